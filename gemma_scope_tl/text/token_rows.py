"""Token rows on disk: the training data of a run, packed once and memory-mapped.

A folder contains ``tokens.safetensors`` (one int32 tensor ``tokens [rows, context]``, readable with any safetensors
reader) and the manifest ``tokens.json``, which records the origin of the rows and the sha256. It is written last.
"""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.files import file_sha256
from gemma_scope_tl.text.tokens import special_mask
from gemma_scope_tl.weights.safetensors_file import safetensors_header

DATA_NAME, MANIFEST_NAME, TENSOR = "tokens.safetensors", "tokens.json", "tokens"
HEADER_BYTES = 512
_CHUNK_ROWS = 4096

Layout = Literal["packed", "rows", "chat"]
TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
Id = TypeVar("Id", bound=np.integer[Any])
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Record(BaseModel):
    """Base of plain data in a JSON file, which is checked when it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    @classmethod
    def parse(cls, text: str | bytes, source: str) -> Self:
        """The record in a file with this content.

        Raises:
            GemmaScopeError: it is not such a record; the message names ``source``, the file, and the first error.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"][:4])  # deeper parts are pydantic's own
            raise GemmaScopeError(
                f"{source} is corrupt, or not written by this version: {where + ': ' if where else ''}{first['msg']}."
            ) from error


class Request(Record):
    """The origin of token rows: equal requests give equal rows.

    Attributes:
        source: a text that identifies the documents; None if nothing does (documents of an iterator).
        tokenizer: fingerprint of the tokenizer.
        context: tokens in a row.
        layout: ``"packed"`` (documents concatenated with EOS between), ``"chat"`` (one wrapped document per row) or
            ``"rows"`` (tokenised rows with BOS, unchanged).
        bos, eos, pad: ids of the special tokens that the tokenizer has.
        prefix, suffix: for chat, the ids between BOS and the document, and after the document.
        limit_tokens: number of tokens at which packing stopped; None for no limit.
    """

    source: str | None
    tokenizer: Sha256
    context: Annotated[int, Field(ge=2)]
    layout: Layout
    bos: TokenId
    eos: TokenId | None
    pad: TokenId | None
    prefix: list[TokenId] = []
    suffix: list[TokenId] = []
    limit_tokens: int | None = None


class TokensManifest(Record):
    """The manifest of finished token rows."""

    format: Literal["gemma_scope_tl tokens"] = "gemma_scope_tl tokens"
    version: Literal[1] = 1
    request: Request
    documents: Annotated[int, Field(ge=1)]
    rows: Annotated[int, Field(ge=1, lt=1 << 40)]
    sha256: Sha256

    @property
    def file_bytes(self) -> int:
        """Exact size of the data file in bytes."""
        return HEADER_BYTES + self.rows * self.request.context * 4


class TokenRows:
    """Rows of token ids ``[rows, context]``, each beginning with BOS.

    Attributes:
        manifest: the manifest of the rows.
        folder: the folder of the rows; None for rows in memory.

    >>> rows = TokenRows.from_ids(torch.tensor([[2, 7, 1], [2, 8, 9]]), special=(2, 1, 0))
    >>> len(rows), rows.kept.tolist()
    (2, [1, 2])
    """

    def __init__(
        self, data: np.ndarray[Any, np.dtype[np.int32]], manifest: TokensManifest, folder: Path | None
    ) -> None:
        """Use :meth:`open` or :meth:`from_ids`."""
        self._data, self.manifest, self.folder = data, manifest, folder
        request = manifest.request
        self._special = sorted({i for i in (request.bos, request.eos, request.pad) if i is not None})

    @classmethod
    def open(cls, folder: str | os.PathLike[str], verify: bool = False) -> TokenRows:
        """Open rows that :func:`~gemma_scope_tl.text.pack.pack_tokens` wrote.

        Args:
            folder: the folder of the rows.
            verify: whether to read the whole file and compare its sha256. Its size and header are always compared.

        Raises:
            GemmaScopeError: when the folder has no finished rows, the manifest is damaged, or the file is missing,
                truncated, or another one.
        """
        place = Path(folder)
        manifest = read_manifest(place)
        if manifest is None:
            raise GemmaScopeError(f"{place} has no finished token rows: there is no {MANIFEST_NAME}. Pack them first.")
        path = place / DATA_NAME
        size = path.stat().st_size if path.is_file() else None
        if size != manifest.file_bytes:
            found = "missing" if size is None else f"{size} bytes long"
            raise GemmaScopeError(
                f"{path} is {found}, but its manifest says {manifest.file_bytes} bytes. Restore it, or pack into "
                "another folder."
            )
        shape = (manifest.rows, manifest.request.context)
        with path.open("rb") as file:
            if file.read(HEADER_BYTES) != header(*shape):
                raise GemmaScopeError(f"{path} is not the file of its manifest: its header differs. Restore it.")
        rows = cls(np.memmap(path, np.int32, "r", HEADER_BYTES, shape), manifest, place)
        if verify:
            rows.verify()
        return rows

    @classmethod
    def from_ids(
        cls, tokens: Int[torch.Tensor, "rows context"], special: tuple[int, int | None, int | None]
    ) -> TokenRows:
        """Make rows in memory, each of which begins with BOS.

        Args:
            tokens: token ids.
            special: ids of BOS, EOS and padding; None for those that do not exist.

        Raises:
            GemmaScopeError: for other shapes, or a row that does not begin with BOS.
        """
        if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2 or tokens.is_floating_point():
            raise GemmaScopeError(
                f"Token rows must be integers [rows, context], not {tokens.dtype} {list(tokens.shape)}."
            )
        bos, eos, pad = special
        if not bool((tokens[:, 0] == bos).all()) or int(tokens.min()) < 0 or int(tokens.max()) >= 1 << 31:
            raise GemmaScopeError(f"Every row must begin with BOS, {bos}, and ids must be from 0 to 2**31 - 1.")
        data = tokens.cpu().to(torch.int32).contiguous().numpy()
        digest = hashlib.sha256(header(*data.shape) + data.tobytes()).hexdigest()
        request = Request(
            source=None, tokenizer="0" * 64, context=data.shape[1], layout="rows", bos=bos, eos=eos, pad=pad
        )
        return cls(data, TokensManifest(request=request, documents=len(data), rows=len(data), sha256=digest), None)

    def __len__(self) -> int:
        return self.manifest.rows

    def __getitem__(self, rows: slice) -> Int[torch.Tensor, "n context"]:
        """A copy of some rows, int64."""
        return torch.from_numpy(self._data[rows].astype(np.int64))

    @property
    def context(self) -> int:
        """Number of tokens in a row."""
        return self.manifest.request.context

    @property
    def sha256(self) -> str:
        """The sha256 of the file, which identifies these rows."""
        return self.manifest.sha256

    @property
    def tokenizer(self) -> str:
        """Fingerprint of the tokenizer."""
        return self.manifest.request.tokenizer

    def keep_mask(self, tokens: Int[torch.Tensor, "batch pos"]) -> Bool[torch.Tensor, "batch pos"]:
        """True at positions for training: all but BOS, EOS, padding, and in chat the user's prefix (section 3.1)."""
        keep = ~special_mask(tokens, self._special)
        if prefix := self.manifest.request.prefix:
            keep[:, : 1 + len(prefix)] = False
        return keep

    @cached_property
    def kept(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Number of positions for training in each row, ``[rows]``. Computed once, from the whole file."""
        first = 1 + len(self.manifest.request.prefix)
        counts = np.empty(len(self), np.int64)
        for at in range(0, len(self), _CHUNK_ROWS):
            chunk = self._data[at : at + _CHUNK_ROWS, first:]
            special = np.zeros(chunk.shape, bool)
            for token in self._special:
                special |= chunk == token
            counts[at : at + len(chunk)] = chunk.shape[1] - special.sum(1)
        return counts

    def kept_by_pass(self, batch_rows: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Number of activations from each forward pass over ``batch_rows`` rows, computed from the tokens."""
        if batch_rows < 1:
            raise GemmaScopeError(f"A forward pass needs at least one token row, not {batch_rows}.")
        return np.add.reduceat(self.kept, np.arange(0, len(self), batch_rows), dtype=np.int64)

    def verify(self) -> None:
        """Read the file and compare its sha256 with the manifest.

        Raises:
            GemmaScopeError: when they differ.
        """
        if self.folder is not None and file_sha256(self.folder / DATA_NAME) != self.sha256:
            raise GemmaScopeError(
                f"{self.folder / DATA_NAME} was changed since it was packed: its sha256 differs from the manifest. "
                "Restore it, or pack into another folder."
            )


def cut_rows(
    stream: np.ndarray[Any, np.dtype[Id]], context: int, bos: int
) -> tuple[np.ndarray[Any, np.dtype[Id]], np.ndarray[Any, np.dtype[Id]]]:
    """Rows of BOS and ``context - 1`` consecutive ids ``[rows, context]``, and the remaining ids."""
    body = context - 1
    count = len(stream) // body
    rows = np.full((count, context), bos, stream.dtype)
    rows[:, 1:] = stream[: count * body].reshape(count, body)
    return rows, stream[count * body :]


def header(rows: int, context: int) -> bytes:
    """The first block of a data file: a safetensors header, padded with spaces."""
    return safetensors_header({TENSOR: (torch.int32, (rows, context))}, size=HEADER_BYTES)


def read_manifest(folder: Path) -> TokensManifest | None:
    """The manifest in ``folder``, or None without one.

    Raises:
        GemmaScopeError: when it cannot be read or is not valid, with the file and the first error.
    """
    path = folder / MANIFEST_NAME
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise GemmaScopeError(f"{path} cannot be read: {error}.") from error
    return TokensManifest.parse(text, str(path))

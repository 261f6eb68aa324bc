"""Packing of documents into token rows on disk, in bounded memory and with resumption after an interruption.

Before packing is finished, the rows are in a hidden file, and ``progress.json`` records how many of them are valid.
When all rows are written and hashed, the file is renamed. The manifest is written last, so a folder without a manifest
has no finished rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from filelock import FileLock
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.files import file_sha256, make_folder, write_atomically, writing
from gemma_scope_tl.text.documents import DocumentBatch, Documents, open_documents
from gemma_scope_tl.text.token_rows import (
    DATA_NAME,
    HEADER_BYTES,
    MANIFEST_NAME,
    Layout,
    Record,
    Request,
    TokenId,
    TokenRows,
    TokensManifest,
    cut_rows,
    header,
    read_manifest,
)
from gemma_scope_tl.text.tokenizing import chat_wrapping, text_ids, without_bos

PARTIAL_NAME, PROGRESS_NAME = ".tokens.partial", "progress.json"
CHECKPOINT_SECONDS = 30.0
_GO_ON = "Make room and pack again: packing resumes if the documents come from files."

Ids = np.ndarray[Any, np.dtype[np.int32]]


class Reached(Record):
    """The progress of packing.

    Attributes:
        request: description of the rows.
        documents: number of documents read.
        rows: number of rows in the file.
        carry: tokens after the last whole row.
    """

    request: Request
    documents: int = 0
    rows: int = 0
    carry: tuple[TokenId, ...] = ()


class Packer:
    """Packing of documents into one folder."""

    def __init__(self, folder: Path, request: Request, tokenizer: Any) -> None:
        self.folder, self.request, self.tokenizer = folder, request, tokenizer
        self.vocabulary = len(tokenizer)
        self.most = None if request.limit_tokens is None else request.limit_tokens // request.context

    def run(self, documents: Documents, progress: bool) -> TokensManifest:
        """Pack, and write the manifest.

        Raises:
            GemmaScopeError: for fewer tokens than a row; ids outside the vocabulary; documents of another kind; or a
                folder with other rows (detected at the end if the documents come from an iterator).
        """
        reached = self._reached() if documents.source is not None else Reached(request=self.request)
        partial = self.folder / PARTIAL_NAME
        size = HEADER_BYTES + reached.rows * self.request.context * 4
        if reached.rows == 0 or not partial.is_file() or partial.stat().st_size < size:
            reached, size = Reached(request=self.request), HEADER_BYTES
            write_atomically(partial, b"")
        self._record(reached)
        with partial.open("r+b", buffering=0) as file:
            file.truncate(size)
            file.seek(size)
            reached = self._write(file, documents, reached, progress)
            if reached.rows == 0:
                raise GemmaScopeError(
                    f"The documents have less than one row of {self.request.context} tokens: give more, or a smaller "
                    "context."
                )
            file.seek(0)
            self._put(file, header(reached.rows, self.request.context))
            self._sync(file)
        return self._finish(partial, reached)

    def _write(self, file: BinaryIO, documents: Documents, reached: Reached, progress: bool) -> Reached:
        """Append rows until the documents or the limit end."""
        carry = np.array(reached.carry, np.int32)
        read, rows, saved = reached.documents, reached.rows, time.monotonic()
        with _bar(progress) as bar:
            task = bar.add_task("packing tokens", total=self._total(documents), completed=self._done(read, rows))
            for batch in documents.read(read):
                block, carry = self._rows(batch, carry, read)
                block = block if self.most is None else block[: self.most - rows]
                self._put(file, block.astype("<i4", copy=False).tobytes())
                read, rows = read + len(batch), rows + len(block)
                reached = Reached(request=self.request, documents=read, rows=rows, carry=tuple(carry.tolist()))
                bar.update(task, completed=self._done(read, rows))
                if self.most is not None and rows >= self.most:
                    break
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    self._sync(file)
                    self._record(reached)
                    saved = time.monotonic()
        return reached

    def _rows(self, batch: DocumentBatch, carry: Ids, read: int) -> tuple[Ids, Ids]:
        """Rows of a batch of documents, and the remaining tokens for the next batch."""
        documents = self._encode(batch, read)
        request = self.request
        if request.layout == "rows":
            return self._as_they_are(documents, read), carry
        bos = request.bos
        if request.layout == "chat":
            assert request.pad is not None
            out = np.full((len(documents), request.context), request.pad, np.int32)
            room = request.context - 1 - len(request.prefix) - len(request.suffix)
            for row, ids in zip(out, documents, strict=True):
                whole = np.concatenate(([bos], request.prefix, ids[:room], request.suffix))
                row[: len(whole)] = whole
            return out, carry
        ends = np.array([request.eos], np.int32)
        stream = np.concatenate([carry, *(part for ids in documents for part in (ids, ends))])
        return cut_rows(stream, request.context, bos)

    def _encode(self, batch: DocumentBatch, read: int) -> list[Ids]:
        """Ids of each document, without a leading BOS unless the documents are tokenised rows."""
        if batch and isinstance(batch[0], str):
            found = text_ids(self.tokenizer, batch, read)
            return [np.array(without_bos(self.tokenizer, ids), np.int32) for ids in found]
        documents: list[Ids] = []
        for number, ids in enumerate(batch, read):
            wide = np.asarray(ids)
            if wide.ndim != 1 or (wide.size and wide.dtype.kind not in "iu"):
                raise GemmaScopeError(f"Document {number} is neither a text nor a list of token ids: {str(ids)[:80]}.")
            if wide.size and not 0 <= int(wide.min()) <= int(wide.max()) < self.vocabulary:
                raise GemmaScopeError(
                    f"Document {number} has token ids from {wide.min()} to {wide.max()}, but the tokenizer has "
                    f"0..{self.vocabulary - 1}."
                )
            starts = self.request.layout != "rows" and wide.size and wide[0] == self.request.bos
            documents.append(wide[1 if starts else 0 :].astype(np.int32))
        return documents

    def _as_they_are(self, documents: list[Ids], read: int) -> Ids:
        for number, ids in enumerate(documents, read):
            if len(ids) != self.request.context or ids[0] != self.request.bos:
                raise GemmaScopeError(
                    f"Row {number} has {len(ids)} tokens and begins with {ids[:1].tolist()}. The first row has "
                    f"{self.request.context} and begins with BOS, {self.request.bos}, so all rows must."
                )
        return np.stack(documents)

    def _finish(self, partial: Path, reached: Reached) -> TokensManifest:
        digest = file_sha256(partial)
        found = read_manifest(self.folder)
        if found is not None and (found.sha256 != digest or found.request != self.request):
            partial.unlink()
            (self.folder / PROGRESS_NAME).unlink()
            raise GemmaScopeError(f"{self.folder} has other token rows: choose another folder.")
        manifest = TokensManifest(request=self.request, documents=reached.documents, rows=reached.rows, sha256=digest)
        with writing(self.folder / DATA_NAME, _GO_ON):
            partial.replace(self.folder / DATA_NAME)
        write_atomically(self.folder / MANIFEST_NAME, manifest.model_dump_json(indent=1) + "\n")
        (self.folder / PROGRESS_NAME).unlink()
        return manifest

    def _reached(self) -> Reached:
        """The progress of an earlier packing of the same request, or no progress."""
        try:
            text = (self.folder / PROGRESS_NAME).read_text(encoding="utf-8")
            found = Reached.model_validate_json(text)
        except (FileNotFoundError, UnicodeDecodeError, ValidationError):
            return Reached(request=self.request)
        return found if found.request == self.request else Reached(request=self.request)

    def _put(self, file: BinaryIO, data: bytes) -> None:
        with writing(self.folder / PARTIAL_NAME, _GO_ON):
            while data:
                data = data[file.write(data) :]

    def _sync(self, file: BinaryIO) -> None:
        with writing(self.folder / PARTIAL_NAME, _GO_ON):
            os.fsync(file.fileno())

    def _record(self, reached: Reached) -> None:
        write_atomically(self.folder / PROGRESS_NAME, reached.model_dump_json() + "\n")

    def _total(self, documents: Documents) -> int | None:
        return documents.total if self.most is None else self.most * self.request.context

    def _done(self, documents: int, rows: int) -> int:
        """The progress in the unit of :meth:`_total`: documents, or tokens if there is a limit."""
        return documents if self.most is None else rows * self.request.context


def _bar(shown: bool) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not shown)


__all__ = ["TokenRows", "pack_tokens", "tokenizer_fingerprint"]


def pack_tokens(
    data: Any,
    tokenizer: Any,
    context: int,
    folder: str | os.PathLike[str],
    *,
    column: str | None = None,
    split: str = "train",
    config: str | None = None,
    revision: str | None = None,
    streaming: bool = True,
    chat: bool = False,
    limit_tokens: int | None = None,
    progress: bool = True,
) -> TokenRows:
    """Pack documents into rows of ``context`` tokens in ``folder``, unless the folder has these rows already.

    Documents are concatenated with EOS between them and cut into rows that begin with BOS. Tokens after the last whole
    row are dropped (as in :func:`gemma_scope_tl.text.rows.pack_texts`). With ``chat``, each document is a row: BOS, the
    user's prefix, the document, the model's prefix, and padding on the right; the document is cut so that the row fits.
    A dataset of token ids is packed in the same way, without the leading BOS of documents. If its first row has
    ``context`` ids and begins with BOS, its rows are used unchanged.

    Packing that was interrupted is resumed. Two processes may request the same folder, and one of them packs. Documents
    from an iterator are packed again, because nothing identifies them.

    Args:
        data: as for :func:`~gemma_scope_tl.text.documents.open_documents`.
        tokenizer: a Hugging Face tokenizer with BOS and EOS (padding, for chat).
        context: tokens in a row, including BOS.
        folder: a folder for these rows only.
        column, split, config, revision, streaming: as for ``open_documents``.
        chat: whether to wrap documents as for an instruction-tuned model.
        limit_tokens: the largest number of tokens, rounded down to whole rows.
        progress: whether to show a progress bar.

    Raises:
        GemmaScopeError: for no documents, or fewer tokens than a row; no tokenizer, or one without the special tokens;
            a folder with other rows or a damaged file.
    """
    documents = open_documents(data, column=column, split=split, config=config, revision=revision, streaming=streaming)
    request = _request(documents, tokenizer, context, chat, limit_tokens)
    place = Path(folder)
    make_folder(place)
    with ExitStack() as held:
        with writing(place / ".lock"):
            held.enter_context(FileLock(place / ".lock"))
        found = read_manifest(place)
        if found is not None:
            _check_same(place, found.request, request)
        elif (place / DATA_NAME).exists() and not (place / PROGRESS_NAME).exists():
            raise GemmaScopeError(f"{place / DATA_NAME} has no manifest: restore the manifest, or remove the file.")
        if found is None or request.source is None:
            Packer(place, request, tokenizer).run(documents, progress)
        return TokenRows.open(place)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A sha256 of all settings that determine the ids of a text, except for the special tokens around it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts: Any = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    else:  # padding and truncation are set by every call
        parts = json.loads(backend.to_str())
        for key in ("padding", "truncation", "post_processor"):
            parts.pop(key, None)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _request(documents: Documents, tokenizer: Any, context: int, chat: bool, limit_tokens: int | None) -> Request:
    if tokenizer is None:
        raise GemmaScopeError("Packing needs the model's tokenizer, which also defines BOS, EOS and padding.")
    bos, eos, pad = (getattr(tokenizer, f"{kind}_token_id", None) for kind in ("bos", "eos", "pad"))
    if bos is None or (pad if chat else eos) is None:
        raise GemmaScopeError(f"Rows need BOS and {'padding' if chat else 'EOS'}, but this tokenizer lacks one.")
    prefix, suffix = chat_wrapping(tokenizer) if chat else ([], [])
    least = len(prefix) + len(suffix) + 2
    if context < least:
        raise GemmaScopeError(
            f"A row has BOS and at least one token, {least} in total, so context cannot be {context}."
        )
    if limit_tokens is not None and limit_tokens < context:
        raise GemmaScopeError(f"limit_tokens={limit_tokens} is less than one row of {context}.")
    layout: Layout = "chat" if chat else "packed"
    if documents.tokenised and not chat:
        first = next(documents.read(0))[0]
        layout = "rows" if len(first) == context and first[0] == bos else layout
    return Request(
        source=documents.source,
        tokenizer=tokenizer_fingerprint(tokenizer),
        context=context,
        layout=layout,
        bos=bos,
        eos=eos,
        pad=pad,
        prefix=prefix,
        suffix=suffix,
        limit_tokens=limit_tokens,
    )


def _check_same(place: Path, found: Request, asked: Request) -> None:
    theirs, ours = found.model_dump(), asked.model_dump()
    other = [f"{key} {theirs[key]}, not {ours[key]}" for key in ours if ours[key] != theirs[key]]
    if other:
        raise GemmaScopeError(f"{place} has other token rows ({'; '.join(other)}): choose another folder.")

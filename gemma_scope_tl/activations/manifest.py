"""The records of a store: which activations it holds, and which rows are in which file with which sha256.

A store is a folder::

    store.json                                   once everything is there
    res/layer_3/00000_00000.safetensors          part and number of the shard; one tensor, "activations" [rows, d]
    res/layer_3/00000_00001.safetensors
    unfinished/contents.json                     while it is written
    unfinished/00000_00000.json                  a set of shards (of all places) that is whole

All places are cut at the same rows, between two forward passes of the model. The header of a shard is a function of
the manifest, so a file of another store, or another place, is recognised by its first block.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import BaseModel, Field, model_validator

from gemma_scope_tl.activations.folder import Folder
from gemma_scope_tl.dtypes import parse_dtype
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sites import Place, parse_place
from gemma_scope_tl.text.token_rows import Record, Sha256
from gemma_scope_tl.weights.safetensors_file import safetensors_header

STORE_NAME = "store.json"
UNFINISHED = "unfinished"
CONTENTS_NAME = f"{UNFINISHED}/contents.json"
TENSOR = "activations"
HEADER_BYTES = 4096

Count = Annotated[int, Field(ge=0, lt=1 << 62)]
Size = Annotated[int, Field(ge=1, lt=1 << 62)]
Text = Annotated[str, Field(max_length=1000)]


_R = TypeVar("_R", bound=Record)


class StoreContents(Record):
    """What the activations of a store depend on: stores with equal contents are equal to the bit.

    Attributes:
        model, backend, weights: name, kind of hooked model, and a fingerprint of the parameters.
        tokens, tokenizer, context: the hash of the token rows, and what they were made with.
        token_rows, batch_rows: how many token rows there are, and how many go through the model at a time.
        rows: activations of every place.
        dtype: of the stored values.
        shard_bytes, parts: how the rows are cut.
        places: width of every place, by its key.
    """

    model: Text
    backend: Text
    weights: Text
    tokens: Text
    tokenizer: Text
    context: Size
    token_rows: Size
    batch_rows: Size
    rows: Size
    dtype: Literal["float32", "bfloat16"]
    shard_bytes: Size
    parts: Size
    places: dict[str, Size]

    @model_validator(mode="after")
    def _check_places(self) -> StoreContents:
        if not self.places:
            raise ValueError("no places")
        for key in self.places:
            try:
                known = parse_place(key).key == key
            except GemmaScopeError:
                known = False
            if not known:
                raise ValueError(f"{key[:80]!r} is not a place")
        return self

    @property
    def digest(self) -> str:
        """A hash of the contents, which the header of each shard repeats."""
        canonical = json.dumps(self.model_dump(), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:32]

    @property
    def widths(self) -> dict[Place, int]:
        """Width of every place."""
        return {parse_place(key): width for key, width in self.places.items()}

    @property
    def torch_dtype(self) -> torch.dtype:
        """Of the stored values."""
        return parse_dtype(self.dtype)

    def row_bytes(self, key: str) -> int:
        """Bytes of one row of a place."""
        return self.places[key] * self.torch_dtype.itemsize


class ShardSet(Record):
    """The same rows of all places, a file for each.

    Attributes:
        part, number: index of the writer, and of the set within its part.
        first_batch, batches: index of the first forward pass over all parts, and how many there are.
        first_row, rows: index of the first activation over all parts, and how many there are.
    """

    part: Count
    number: Count
    first_batch: Count
    batches: Size
    first_row: Count
    rows: Size

    @property
    def stem(self) -> str:
        """Beginning of the names of its files."""
        return f"{self.part:05d}_{self.number:05d}"

    @property
    def file_name(self) -> str:
        """Name of a shard in its place's folder."""
        return f"{self.stem}.safetensors"

    @property
    def record_name(self) -> str:
        """Name of the record that says that the set is whole."""
        return f"{UNFINISHED}/{self.stem}.json"

    def bytes(self, contents: StoreContents, key: str) -> int:
        """Exact size of a place's file."""
        return HEADER_BYTES + self.rows * contents.row_bytes(key)

    def header(self, contents: StoreContents, key: str) -> bytes:
        """The first block of a place's file: a safetensors header, padded with spaces."""
        metadata = {"store": contents.digest, "place": key, "shard": self.stem}
        tensors = {TENSOR: (contents.torch_dtype, (self.rows, contents.places[key]))}
        return safetensors_header(tensors, metadata, HEADER_BYTES)


class StoredSet(ShardSet):
    """A set of shards that was written completely.

    Attributes:
        store: the digest of the store's contents.
        sha256: of the file of each place, by the place's key.
    """

    store: Text
    sha256: dict[str, Sha256]

    def planned(self) -> ShardSet:
        """The set as it was planned, without the hashes."""
        return ShardSet(**self.model_dump(exclude={"store", "sha256"}))


class StoreManifest(Record):
    """All of a store: its contents and its shards, in the order of the rows."""

    format: Literal["gemma_scope_tl activations"] = "gemma_scope_tl activations"
    version: Literal[1] = 1
    contents: StoreContents
    shards: list[StoredSet]

    @model_validator(mode="after")
    def _check_shards(self) -> StoreManifest:
        at, seen = 0, set[str]()
        for shard in self.shards:
            if shard.first_row != at or shard.stem in seen:
                raise ValueError(f"shard {shard.stem} does not begin at row {at}, or is listed twice")
            if shard.store != self.contents.digest or set(shard.sha256) != set(self.contents.places):
                raise ValueError(f"shard {shard.stem} belongs to another store")
            at += shard.rows
            seen.add(shard.stem)
        if at != self.contents.rows:
            raise ValueError(f"the shards hold {at} rows, not {self.contents.rows}")
        return self


def read_record(kind: type[_R], folder: Folder, name: str) -> _R | None:
    """A record from its JSON in a folder, or None if there is no such file.

    Raises:
        GemmaScopeError: the file is not such a record; the message names it and the first error.
    """
    data = folder.read(name)
    return None if data is None else kind.parse(data, folder.url(name))


def to_json(record: BaseModel) -> bytes:
    """The JSON of a record, which :func:`read_record` reads."""
    return record.model_dump_json(indent=1).encode() + b"\n"


def cut(kept: Sequence[int], row_bytes: Mapping[str, int], shard_bytes: int, parts: int) -> list[ShardSet]:
    """Cut a run's forward passes into parts and shards: as many whole passes as fit into ``shard_bytes``, at least one.

    Args:
        kept: activations of every forward pass.
        row_bytes: bytes of a row, by place.
        shard_bytes: largest size of a file, header included, unless one pass has more.
        parts: writers; each has a contiguous share of the passes.

    Returns:
        All sets that hold rows, in the order of the rows.
    """
    limit = (shard_bytes - HEADER_BYTES) // max(row_bytes.values())
    sets: list[ShardSet] = []
    row = 0
    for part in range(parts):
        begin, end = (len(kept) * part // parts, len(kept) * (part + 1) // parts)
        number, first, held = 0, begin, 0
        for batch in range(begin, end + 1):
            rows = kept[batch] if batch < end else 0
            if held and (batch == end or held + rows > limit):
                fields = {"part": part, "number": number, "first_batch": first, "batches": batch - first}
                sets.append(ShardSet(**fields, first_row=row, rows=held))
                row, number, first, held = row + held, number + 1, batch, 0
            held += rows
    return sets


def tensor_bytes(value: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU."""
    return value.view(-1).view(torch.uint8).numpy().data

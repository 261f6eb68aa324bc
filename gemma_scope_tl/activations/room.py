"""How many bytes a store takes, and whether they fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from gemma_scope_tl.activations.direct_file import unfinished
from gemma_scope_tl.activations.folder import Folder
from gemma_scope_tl.activations.manifest import HEADER_BYTES, Contents, ShardSet, cut
from gemma_scope_tl.activations.source import Place
from gemma_scope_tl.activations.token_rows import TokenRows
from gemma_scope_tl.errors import GemmaScopeError

SHARD_BYTES = 4 << 30
"""Size of a shard unless another is asked for."""


def store_bytes(
    token_rows: TokenRows,
    widths: Mapping[Place, int],
    *,
    dtype: torch.dtype = torch.float32,
    shard_bytes: int = SHARD_BYTES,
    batch_rows: int = 8,
    parts: int = 1,
) -> dict[Place, int]:
    """Exact bytes of every place's files in a store of these activations, without running anything.

    The manifest comes on top: about 0.1 kB for every file.

    Args:
        token_rows: the data.
        widths: ``d`` of every place (``site.d_in(dims)``).
        dtype, shard_bytes, batch_rows, parts: as in :func:`~gemma_scope_tl.activations.store.write_store`.
    """
    row_bytes = {place.key: width * dtype.itemsize for place, width in widths.items()}
    sets = cut(token_rows.kept_by_pass(batch_rows).tolist(), row_bytes, shard_bytes, parts)
    rows = sum(one.rows for one in sets)
    return {place: len(sets) * HEADER_BYTES + rows * row_bytes[place.key] for place in widths}


def check_room(folder: Folder, contents: Contents, missing: Sequence[ShardSet]) -> None:
    """Refuse what the disk cannot hold; where nobody knows how much it can (object stores), accept.

    Args:
        folder: of the store.
        contents: its contents.
        missing: the sets that are still to be written, of all writers; what they have written of them counts as free.

    Raises:
        GemmaScopeError: with the bytes that are needed and those that are free.
    """
    free = folder.free()
    if free is None:
        return
    needed = 0
    for key in contents.places:
        begun = folder.sizes(key)
        for one in missing:
            size = one.bytes(contents, key)
            needed += max(0, size - begun.get(unfinished(one.file_name), 0))
    if needed > free:
        raise GemmaScopeError(
            f"The store at {folder.url()} needs {needed} bytes ({needed / 2**30:.1f} GiB) more, and {free} bytes "
            f"({free / 2**30:.1f} GiB) are free there. Choose another disk, fewer places, fewer tokens or bfloat16."
        )

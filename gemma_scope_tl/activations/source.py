"""What a trainer asks of activations, wherever they come from: a model that runs now, or a store on disk.

Both serve the same batches to the bit (in one dtype). The activations of a run form one sequence of rows, in the order
of the tokens, which begins anew after the last. It is cut into buckets of ``bucket_rows`` rows (bucket ``b`` holds rows
``b * bucket_rows`` and on, modulo all rows); each is shuffled by a generator seeded with the run's seed and ``b``, and
served from beginning to end. So batch ``n`` is a function of the seed and of ``n`` alone: a trainer that resumes asks
for batches from where it was, and no state of a shuffle is ever saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.sites import SITES, get_site


class Place(NamedTuple):
    """A tensor of the model: what the SAEs of one site and layer read.

    >>> Place("res", 3).key, Place("embedding", None).key
    ('res/layer_3', 'embedding')
    """

    site: str
    layer: int | None

    @property
    def key(self) -> str:
        """Its name in paths and logs."""
        return self.site if self.layer is None else f"{self.site}/layer_{self.layer}"

    @property
    def target(self) -> Place:
        """The place whose tensor the SAEs here reconstruct: another one only for transcoders, the MLP's output."""
        return Place("mlp", self.layer) if get_site(self.site).is_transcoder else self

    @classmethod
    def parse(cls, key: str) -> Place:
        """The place with this ``key``.

        Raises:
            UnknownNameError: no such site.
            GemmaScopeError: the layer is missing, or not a number.

        >>> Place.parse("att/layer_0")
        Place(site='att', layer=0)
        """
        name, _, rest = key.partition("/layer_")
        if name not in SITES:
            raise unknown_name("site", name, SITES)
        if not SITES[name].per_layer:
            number = None if not rest else "?"
        else:
            number = int(rest) if rest.isascii() and rest.isdigit() and len(rest) < 10 else "?"
        if number == "?":
            raise GemmaScopeError(f"{key!r} is no place: write 'res/layer_3', or 'embedding'.")
        return cls(name, number)


def with_targets(places: Sequence[Place]) -> list[Place]:
    """``places`` and the targets of the transcoders among them, each once."""
    return list(dict.fromkeys([*places, *(place.target for place in places)]))


class Source(Protocol):
    """Activations for training, the same for the same seed.

    Attributes:
        widths: ``d`` of every place on offer.
        rows: how many rows there are before they repeat.
        bucket_rows: rows that are shuffled together.
    """

    @property
    def widths(self) -> Mapping[Place, int]: ...

    @property
    def rows(self) -> int: ...

    @property
    def bucket_rows(self) -> int: ...

    def mean_squares(self, rows: int) -> dict[Place, float]:
        """``E ||x||^2`` of each place over the first ``rows`` rows, in float64. Nothing is held or consumed."""
        ...

    def batches(self, batch_size: int, start: int = 0) -> Iterator[Mapping[Place, torch.Tensor]]:
        """Raw activations ``[batch_size, d]`` of all places, row by row from the same tokens, from batch ``start`` on.

        ``batch_size`` must divide ``bucket_rows``. It never ends: after the last row the data begins anew, in another
        order. The tensors are the caller's to change.
        """
        ...

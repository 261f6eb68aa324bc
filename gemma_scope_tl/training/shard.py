"""Which part of the latents and of the batch a process has, and how parts are added up.

Training is split as in the paper's section 3.3: over latents (each process has some latents of every SAE and sees every
row), over the batch (each has all latents and sees some rows), or both. :data:`WHOLE` is one process with everything.
A distributed shard overrides the two sums; nothing else in a training step talks to other processes.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gemma_scope_tl.errors import GemmaScopeError


@dataclass(frozen=True)
class Shard:
    """One process of ``latent_ranks * data_ranks``; itself only the case of one process.

    Attributes:
        latent_rank, latent_ranks: which of the equal contiguous parts of every SAE's latents.
        data_rank, data_ranks: which of the equal contiguous parts of every batch.
    """

    latent_rank: int = 0
    latent_ranks: int = 1
    data_rank: int = 0
    data_ranks: int = 1

    def __post_init__(self) -> None:
        for name, rank, ranks in (
            ("latent", self.latent_rank, self.latent_ranks),
            ("data", self.data_rank, self.data_ranks),
        ):
            if not 0 <= rank < ranks:
                raise GemmaScopeError(f"{name}_rank must be 0 to {ranks - 1}, not {rank}.")
        if type(self) is Shard and self.latent_ranks * self.data_ranks > 1:
            raise GemmaScopeError("A Shard of more than one process needs a subclass that adds their parts up.")

    def latents(self, d_sae: int) -> slice:
        """This process's latents of an SAE.

        Raises:
            GemmaScopeError: ``d_sae`` cannot be divided equally.
        """
        return _part(d_sae, self.latent_rank, self.latent_ranks, "latents")

    def rows(self, batch_size: int) -> slice:
        """This process's rows of a batch.

        Raises:
            GemmaScopeError: ``batch_size`` cannot be divided equally.
        """
        return _part(batch_size, self.data_rank, self.data_ranks, "rows of a batch")

    @property
    def leads(self) -> bool:
        """Whether this process writes what all of them have in common; one does."""
        return self.latent_rank == 0 and self.data_rank == 0

    @property
    def part(self) -> str:
        """What the name of a file with this process's latents ends with."""
        return "" if self.latent_ranks == 1 else f".{self.latent_rank}_of_{self.latent_ranks}"

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, small ones; every process waits for the others here."""
        return [value]

    def most(self, value: int) -> int:
        """The greatest value of all processes."""
        return value

    def whole(self, local: Tensor, chunk: int | None = None) -> Generator[Tensor, None, None]:
        """A tensor whose first dimension is divided over the latents, whole, ``chunk`` columns at a time.

        Every process must take part. With ``chunk`` no process holds more than ``[latents, chunk]`` of it.
        """
        if local.ndim == 1 or chunk is None:
            yield local
        else:
            yield from local.split(chunk, dim=1)

    def sum_latents(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over the processes that have the same rows and other latents; may be in place."""
        return tensor

    def sum_data(self, tensor: Tensor) -> Tensor:
        """The sum of ``tensor`` over the processes that have the same latents and other rows; may be in place."""
        return tensor


def _part(total: int, rank: int, ranks: int, what: str) -> slice:
    if total % ranks:
        raise GemmaScopeError(f"{total} {what} cannot be divided equally among {ranks} processes.")
    return slice(total // ranks * rank, total // ranks * (rank + 1))


WHOLE = Shard()
"""One process with all latents and all rows."""

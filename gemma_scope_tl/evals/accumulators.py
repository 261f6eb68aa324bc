"""Sums of metrics over a dataset, fed batch by batch. All sums are float64 and on the CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Bool, Float, Int

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.metrics import DENSE_FREQUENCY
from gemma_scope_tl.sae.sparse import SparseActs


class Accumulator:
    """A dataclass whose fields are tensors, numbers or other accumulators, and which can be saved as tensors."""

    def state(self) -> dict[str, torch.Tensor]:
        """All fields as tensors, without loss of precision; fields of inner accumulators are named ``"field/name"``."""
        out: dict[str, torch.Tensor] = {}
        for name, value in self._values().items():
            if isinstance(value, Accumulator):
                out |= {f"{name}/{key}": tensor for key, tensor in value.state().items()}
            elif isinstance(value, torch.Tensor):
                out[name] = value
            else:
                out[name] = torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)
        return out

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore the fields from what :meth:`state` returned.

        Raises:
            GemmaScopeError: when a field is missing.
        """
        for name, value in self._values().items():
            if isinstance(value, Accumulator):
                value.restore(with_prefix(state, f"{name}/"))
                continue
            if name not in state:
                raise GemmaScopeError(f"The state of a {type(self).__name__} lacks {name!r}; it holds {sorted(state)}.")
            setattr(self, name, state[name] if isinstance(value, torch.Tensor) else type(value)(state[name].item()))

    def _values(self) -> dict[str, Accumulator | torch.Tensor | int | float]:
        return {one.name: getattr(self, one.name) for one in fields(self)}  # pyright: ignore[reportArgumentType]


def with_prefix(state: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """The entries whose names begin with ``prefix``, under their names without the prefix."""
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def _no_sums() -> torch.Tensor:
    return torch.zeros(0, dtype=torch.float64)


def _no_counts() -> torch.Tensor:
    return torch.zeros(0, dtype=torch.int64)


@dataclass
class Mean(Accumulator):
    """The mean of all entries of all tensors given."""

    total: float = 0.0
    count: int = 0

    def update(self, values: torch.Tensor) -> None:
        """Add every entry of ``values``."""
        self.total += float(values.double().sum())
        self.count += values.numel()

    @property
    def value(self) -> float:
        """The mean; NaN if no value was added."""
        return self.total / self.count if self.count else math.nan


@dataclass
class VectorMean(Accumulator):
    """The mean of activations ``[n, d]`` over a dataset, which mean ablation and the denominator of FVU use."""

    n: int = 0
    sums: Float[torch.Tensor, " d"] = field(default_factory=_no_sums, repr=False)

    def update(self, x: Float[torch.Tensor, "n d"]) -> None:
        """Add activations."""
        self.n += x.shape[0]
        self.sums = _padded_sum(self.sums, x.double().sum(0).cpu())

    @property
    def value(self) -> Float[torch.Tensor, " d"]:
        """The mean in float64.

        Raises:
            GemmaScopeError: no activation was added.
        """
        if not self.n:
            raise GemmaScopeError("There is no ordinary token in the data: all are BOS, EOS or padding.")
        return self.sums / self.n


@dataclass
class TokenMean(Accumulator):
    """The mean of one number per token, with its sums by sequence and by position.

    Sums by sequence give confidence intervals: sequences are resampled, because tokens of one sequence depend on each
    other. Sums by position give the curves of section 4.2.

    Attributes:
        sums, counts: sum and number of values of each sequence, ``[rows]``.
        position_sums, position_counts: sum and number of values at each position over all sequences, ``[pos]``; a loss
            belongs to the position at which the prediction is made.
    """

    sums: Float[torch.Tensor, " rows"] = field(default_factory=_no_sums)
    counts: Int[torch.Tensor, " rows"] = field(default_factory=_no_counts)
    position_sums: Float[torch.Tensor, " pos"] = field(default_factory=_no_sums)
    position_counts: Int[torch.Tensor, " pos"] = field(default_factory=_no_counts)

    def update(
        self,
        values: Float[torch.Tensor, " n"],
        counted: Bool[torch.Tensor, "batch pos"],
        rows: Int[torch.Tensor, " batch"] | None = None,
    ) -> None:
        """Add sequences.

        Args:
            values: one value per token that counts, in the order of the True entries of ``counted``.
            counted: True at tokens that count.
            rows: the number of each sequence, none of which was added before; None for the next ones.

        Raises:
            GemmaScopeError: when there are not as many values as tokens that count.
        """
        counted = counted.cpu()
        if values.shape != (int(counted.sum()),):
            raise GemmaScopeError(f"{int(counted.sum())} tokens count, but the values have shape {list(values.shape)}.")
        table = torch.zeros(counted.shape, dtype=torch.float64)
        table[counted] = values.detach().double().cpu()
        at = torch.arange(len(counted)) + len(self.sums) if rows is None else rows.cpu()
        missing = max(0, int(at.max()) + 1 - len(self.sums)) if len(at) else 0
        self.sums, self.counts = (torch.nn.functional.pad(one, (0, missing)) for one in (self.sums, self.counts))
        self.sums[at], self.counts[at] = table.sum(1), counted.sum(1)
        self.position_sums = _padded_sum(self.position_sums, table.sum(0))
        self.position_counts = _padded_sum(self.position_counts, counted.sum(0))

    @property
    def total(self) -> float:
        """The sum over all tokens."""
        return float(self.sums.sum())

    @property
    def count(self) -> int:
        """The number of tokens that counted."""
        return int(self.counts.sum())

    @property
    def value(self) -> float:
        """The mean over all tokens; NaN if there are none."""
        return self.total / self.count if self.count else math.nan

    @property
    def by_position(self) -> Float[torch.Tensor, " pos"]:
        """The mean at each position, NaN where no token counted."""
        return self.position_sums / self.position_counts


@dataclass
class LatentCounts(Accumulator):
    """How often each latent fires (section 4.3).

    Attributes:
        fired: number of tokens on which each latent fired, int64 ``[d_sae]``.
        tokens: number of tokens.
    """

    fired: Int[torch.Tensor, " d_sae"]
    tokens: int = 0

    @classmethod
    def empty(cls, d_sae: int) -> LatentCounts:
        """Counts of ``d_sae`` latents, all zero."""
        return cls(torch.zeros(d_sae, dtype=torch.int64))

    def update(self, acts: SparseActs | Float[torch.Tensor, "n d_sae"]) -> None:
        """Add the latents of some tokens."""
        if isinstance(acts, SparseActs):
            self.fired += acts.latents[acts.values != 0].bincount(minlength=self.fired.shape[0]).cpu()
            self.tokens += acts.n_tokens
        else:
            self.fired += (acts != 0).sum(0).cpu()
            self.tokens += acts.shape[0]

    @property
    def frequencies(self) -> Float[torch.Tensor, " d_sae"]:
        """Share of tokens on which each latent fired; NaN if there are no tokens."""
        return self.fired.double() / self.tokens

    @property
    def dead(self) -> float:
        """Share of latents that never fired on these tokens."""
        return float((self.fired == 0).double().mean())

    @property
    def dense(self) -> float:
        """Share of latents that fired on more than a tenth of the tokens."""
        return float((self.frequencies > DENSE_FREQUENCY).double().mean())

    def histogram(self, bins: int = 50) -> tuple[Int[torch.Tensor, " bins"], Float[torch.Tensor, " edges"]]:
        """A histogram of latents by ``log10`` of their frequency, and the edges of its bins.

        The bins extend from one firing in all tokens to a firing on every token. Latents that never fired are in no
        bin. A latent on an edge belongs to the bin above it, and one on the last edge to the last bin.

        Raises:
            GemmaScopeError: no token was counted.
        """
        if not self.tokens:
            raise GemmaScopeError("No token was counted yet.")
        lowest = -math.log10(self.tokens) if self.tokens > 1 else -1.0
        edges = torch.linspace(lowest, 0.0, bins + 1, dtype=torch.float64)
        live = self.frequencies[self.fired > 0].log10().clamp(lowest, 0.0)
        return torch.histogram(live, edges)[0].long(), edges


def _padded_sum(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The sum of two vectors, the shorter one continued by zeros."""
    longer, shorter = (one, other) if one.shape[0] >= other.shape[0] else (other, one)
    out = longer.clone()
    out[: shorter.shape[0]] += shorter
    return out

"""Sums of metrics over a dataset, fed batch by batch.

Each has ``update``; ``merge``, which takes in another one that saw later data; and ``state`` and ``from_state``, which
go through tensors and lose no bit. All sums are float64 and on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.metrics import DENSE_FREQUENCY, fvu
from gemma_scope_tl.sae.sparse import SparseActs

State = Mapping[str, torch.Tensor]


@dataclass
class Mean:
    """A running mean in float64."""

    total: float = 0.0
    count: int = 0

    def update(self, values: torch.Tensor) -> None:
        """Take in every entry of ``values``."""
        self.total += float(values.double().sum())
        self.count += values.numel()

    def merge(self, other: Mean) -> None:
        """Take in what ``other`` saw."""
        self.total += other.total
        self.count += other.count

    def state(self) -> dict[str, torch.Tensor]:
        """Everything, as tensors."""
        return {"total": _scalar(self.total), "count": torch.tensor(self.count)}

    @classmethod
    def from_state(cls, state: State) -> Mean:
        """The mean that gave this state."""
        return cls(float(_part(state, "total")), int(_part(state, "count")))

    @property
    def value(self) -> float:
        """The mean, NaN before any value."""
        return self.total / self.count if self.count else math.nan


@dataclass
class FVU:
    """Fraction of variance unexplained over a dataset, in one pass (section 4.1).

    ``FVU = mean ‖x - x̂‖² / mean ‖x - mean(x)‖²``: 1 for predicting the dataset's mean, 0 for the identity. Sums are
    float64; the denominator is ``Σ‖x - c‖² - n ‖mean(x) - c‖²`` around the first batch's mean c, so that a large mean
    does not cancel the variance away.
    """

    n: int = 0
    error: float = 0.0
    square: float = 0.0
    centre: Float[torch.Tensor, " d"] | None = field(default=None, repr=False)
    sums: Float[torch.Tensor, " d"] | None = field(default=None, repr=False)

    def update(self, x: Float[torch.Tensor, "n d"], x_hat: Float[torch.Tensor, "n d"]) -> None:
        """Take in activations and their reconstructions.

        Raises:
            GemmaScopeError: when their shapes differ.
        """
        if x.shape != x_hat.shape:
            raise GemmaScopeError(f"Activations are {list(x.shape)} and reconstructions {list(x_hat.shape)}.")
        if not x.shape[0]:
            return
        x, x_hat = x.double(), x_hat.double()
        if self.centre is None or self.sums is None:
            self.centre = x.mean(0)
            self.sums = torch.zeros_like(self.centre)
        self.n += x.shape[0]
        self.error += float((x - x_hat).square().sum())
        x = x - self.centre
        self.square += float(x.square().sum())
        self.sums += x.sum(0)

    def merge(self, other: FVU) -> None:
        """Take in what ``other`` saw."""
        if other.centre is None or other.sums is None:
            return
        if self.centre is None or self.sums is None:
            self.centre, self.sums = other.centre, torch.zeros_like(other.sums)
        shift = other.centre - self.centre  # Σ‖y + s‖² = Σ‖y‖² + 2 s·Σy + n ‖s‖²
        self.square += other.square + float(2 * shift @ other.sums + other.n * shift.square().sum())
        self.sums = self.sums + other.sums + other.n * shift
        self.error += other.error
        self.n += other.n

    def state(self) -> dict[str, torch.Tensor]:
        """Everything, as tensors."""
        numbers = {"n": torch.tensor(self.n), "error": _scalar(self.error), "square": _scalar(self.square)}
        if self.centre is None or self.sums is None:
            return numbers
        return {**numbers, "centre": self.centre.cpu(), "sums": self.sums.cpu()}

    @classmethod
    def from_state(cls, state: State) -> FVU:
        """The FVU that gave this state."""
        numbers = float(_part(state, "error")), float(_part(state, "square"))
        return cls(int(_part(state, "n")), *numbers, state.get("centre"), state.get("sums"))

    @property
    def value(self) -> float:
        """The fraction so far, NaN while there is no variance."""
        if self.sums is None:
            return math.nan
        return fvu(self.error, self.square - float(self.sums.square().sum()) / self.n)


@dataclass
class VectorMean:
    """The mean of activations ``[n, d]`` over a dataset: what mean ablation puts in, and the centre of FVU."""

    n: int = 0
    sums: Float[torch.Tensor, " d"] | None = field(default=None, repr=False)

    def update(self, x: Float[torch.Tensor, "n d"]) -> None:
        """Take in activations."""
        total = x.double().sum(0).cpu()
        self.n += x.shape[0]
        self.sums = total if self.sums is None else self.sums + total

    def merge(self, other: VectorMean) -> None:
        """Take in what ``other`` saw."""
        self.n += other.n
        if other.sums is not None:
            self.sums = other.sums if self.sums is None else self.sums + other.sums

    def state(self) -> dict[str, torch.Tensor]:
        """Everything, as tensors."""
        return {"n": torch.tensor(self.n), **({} if self.sums is None else {"sums": self.sums})}

    @classmethod
    def from_state(cls, state: State) -> VectorMean:
        """The mean that gave this state."""
        return cls(int(_part(state, "n")), state.get("sums"))

    @property
    def value(self) -> Float[torch.Tensor, " d"]:
        """The mean in float64.

        Raises:
            GemmaScopeError: before any activation.
        """
        if self.sums is None or not self.n:
            raise GemmaScopeError("There is no ordinary token in the data: all are BOS, EOS or padding.")
        return self.sums / self.n


@dataclass
class TokenMean:
    """The mean of one number per token, with its sums by sequence and by position.

    Sums by sequence make confidence intervals (sequences are resampled, for tokens of one sequence depend on each
    other); sums by position make section 4.2's curves.

    Attributes:
        sums, counts: of each sequence, ``[rows]``.
        position_sums, position_counts: over all sequences, ``[pos]``; the number is that of the token at the position,
            a loss that of the prediction made there.
    """

    sums: Float[torch.Tensor, " rows"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    counts: Int[torch.Tensor, " rows"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    position_sums: Float[torch.Tensor, " pos"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    position_counts: Int[torch.Tensor, " pos"] = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def update(self, values: Float[torch.Tensor, " n"], counted: Bool[torch.Tensor, "batch pos"]) -> None:
        """Take in sequences.

        Args:
            values: of the tokens that count, in the order of ``counted``'s True entries.
            counted: which tokens count.

        Raises:
            GemmaScopeError: when there are not as many values as tokens that count.
        """
        counted = counted.cpu()
        if values.shape != (int(counted.sum()),):
            raise GemmaScopeError(f"{int(counted.sum())} tokens count, the values given are {list(values.shape)}.")
        table = torch.zeros(counted.shape, dtype=torch.float64)
        table[counted] = values.detach().double().cpu()
        self._add(TokenMean(table.sum(1), counted.sum(1), table.sum(0), counted.sum(0)))

    def merge(self, other: TokenMean) -> None:
        """Append the sequences that ``other`` saw."""
        self._add(other)

    def state(self) -> dict[str, torch.Tensor]:
        """Everything, as tensors."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_state(cls, state: State) -> TokenMean:
        """The mean that gave this state."""
        return cls(**{name: _part(state, name) for name in cls.__dataclass_fields__})

    @property
    def total(self) -> float:
        """The sum over all tokens."""
        return float(self.sums.sum())

    @property
    def count(self) -> int:
        """How many tokens counted."""
        return int(self.counts.sum())

    @property
    def value(self) -> float:
        """The mean over all tokens, NaN without any."""
        return self.total / self.count if self.count else math.nan

    @property
    def by_position(self) -> Float[torch.Tensor, " pos"]:
        """The mean at each position, NaN where no token counted."""
        return self.position_sums / self.position_counts

    def _add(self, other: TokenMean) -> None:
        self.sums, self.counts = torch.cat([self.sums, other.sums]), torch.cat([self.counts, other.counts])
        self.position_sums = _padded_sum(self.position_sums, other.position_sums)
        self.position_counts = _padded_sum(self.position_counts, other.position_counts)


@dataclass
class LatentCounts:
    """How often each latent fires (section 4.3).

    Attributes:
        fired: tokens on which each latent fired, int64 ``[d_sae]``.
        tokens: tokens seen.
    """

    fired: Int[torch.Tensor, " d_sae"]
    tokens: int = 0

    @classmethod
    def empty(cls, d_sae: int) -> LatentCounts:
        """Counts of ``d_sae`` latents before any token."""
        return cls(torch.zeros(d_sae, dtype=torch.int64))

    def update(self, acts: SparseActs | Float[torch.Tensor, "n d_sae"]) -> None:
        """Take in the latents of some tokens."""
        if isinstance(acts, SparseActs):
            self.fired += acts.latents[acts.values != 0].bincount(minlength=self.fired.shape[0]).cpu()
            self.tokens += acts.n_tokens
        else:
            self.fired += (acts != 0).sum(0).cpu()
            self.tokens += acts.shape[0]

    def merge(self, other: LatentCounts) -> None:
        """Take in what ``other`` saw."""
        self.fired = self.fired + other.fired
        self.tokens += other.tokens

    def state(self) -> dict[str, torch.Tensor]:
        """Everything, as tensors."""
        return {"fired": self.fired, "tokens": torch.tensor(self.tokens)}

    @classmethod
    def from_state(cls, state: State) -> LatentCounts:
        """The counts that gave this state."""
        return cls(_part(state, "fired"), int(_part(state, "tokens")))

    @property
    def frequencies(self) -> Float[torch.Tensor, " d_sae"]:
        """Share of tokens on which each latent fired, NaN before any token."""
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
        """Latents by ``log10`` of their frequency, and the edges of the bins, from one firing in all to every token.

        Latents that never fired are in no bin. A latent on an edge belongs to the bin above it, the last edge to the
        last bin.

        Raises:
            GemmaScopeError: before any token.
        """
        if not self.tokens:
            raise GemmaScopeError("No token was counted yet.")
        lowest = -math.log10(self.tokens) if self.tokens > 1 else -1.0
        edges = torch.linspace(lowest, 0.0, bins + 1, dtype=torch.float64)
        live = self.frequencies[self.fired > 0].log10().clamp(lowest, 0.0)
        return torch.histogram(live, edges)[0].long(), edges


def _scalar(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _part(state: State, name: str) -> torch.Tensor:
    if name not in state:
        raise GemmaScopeError(f"A state without {name!r}: it holds {sorted(state)}.")
    return state[name]


def _padded_sum(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The sum of two vectors, the shorter taken as followed by zeros."""
    longer, shorter = (one, other) if one.shape[0] >= other.shape[0] else (other, one)
    out = longer.clone()
    out[: shorter.shape[0]] += shorter
    return out


Accumulator = TokenMean | LatentCounts | VectorMean
CLEAN = "clean"


@dataclass
class Unit:
    """Accumulators that belong together.

    Attributes:
        parts: by name.
        facts: what the numbers depend on, besides those of the whole evaluation.
        done: whether all data went in.
    """

    parts: dict[str, Accumulator]
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    done: bool = False

    def state(self, prefix: str = "") -> dict[str, torch.Tensor]:
        """All parts as tensors."""
        return {
            f"{prefix}{name}/{key}": value for name, part in self.parts.items() for key, value in part.state().items()
        }

    def restore(self, state: Mapping[str, torch.Tensor], prefix: str = "") -> None:
        """Take over what :meth:`state` gave.

        Raises:
            GemmaScopeError: when a part is missing.
        """
        for name, part in self.parts.items():
            start = f"{prefix}{name}/"
            mine = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
            self.parts[name] = type(part).from_state(mine)

    def token_mean(self, name: str) -> TokenMean:
        """The part with this name."""
        part = self.parts[name]
        if not isinstance(part, TokenMean):
            raise GemmaScopeError(f"{name} is no mean over tokens.")
        return part

    def vector_mean(self) -> VectorMean:
        """The mean activation, of a unit that holds one."""
        part = self.parts["mean"]
        if not isinstance(part, VectorMean):
            raise GemmaScopeError("This piece of an evaluation holds no mean activation.")
        return part


def token_means(*names: str) -> dict[str, Accumulator]:
    """Empty means over tokens."""
    return {name: TokenMean() for name in names}

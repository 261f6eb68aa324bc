"""Batches from the tokenized corpus: the training mixture and held-out windows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from scripts.bundled.domains import WEIGHTS
from scripts.bundled.tokenizer import BOS


class DomainStream:
    """An endless sequence of contiguous pieces of one domain's token stream.

    A pass cuts the stream at a random phase into pieces of `length` tokens and visits each piece once, shuffled.
    """

    def __init__(self, tokens: np.ndarray, length: int, rng: np.random.Generator) -> None:
        if len(tokens) < 2 * length:
            raise ValueError(f"a stream of {len(tokens)} tokens is too short for pieces of {length}")
        self.tokens, self.length, self.rng = tokens, length, rng
        self.starts: list[int] = []
        self.passes = 0

    def next(self) -> np.ndarray:
        """The next piece, uint16 [length]."""
        if not self.starts:
            phase = int(self.rng.integers(self.length))
            starts = np.arange(phase, len(self.tokens) - self.length + 1, self.length)
            self.starts = self.rng.permutation(starts).tolist()
            self.passes += 1
        start = self.starts.pop()
        return self.tokens[start : start + self.length]


def load_token_batches(
    work: Path, batch: int, context: int, seed: int, *, skip: int = 0, weights: dict[str, float] | None = None
) -> Iterator[torch.Tensor]:
    """Yield int64 [batch, context] from the weighted mixture without end; column 0 is BOS.

    The sequence depends on `seed`, `batch` and `context` only; `skip` omits that many batches (for a resume).
    """
    weights = weights or WEIGHTS
    names = list(weights)
    share = np.array([weights[name] for name in names])
    rng = np.random.default_rng(seed)
    streams = [
        DomainStream(np.load(work / "tokens" / f"{name}.npy"), context - 1, np.random.default_rng([seed, i]))
        for i, name in enumerate(names)
    ]
    while True:
        picks = rng.choice(len(names), size=batch, p=share / share.sum())
        pieces = [streams[pick].next() for pick in picks]
        if skip > 0:
            skip -= 1
            continue
        tokens = np.full((batch, context), BOS, dtype=np.int64)
        tokens[:, 1:] = np.stack(pieces)
        yield torch.from_numpy(tokens)


def heldout_windows(work: Path, domain: str, context: int, limit: int | None = None) -> torch.Tensor:
    """Held-out stream of one domain as int64 [n, context], BOS first; the tail that fills no window is dropped.

    With `limit`, that many windows spread evenly over the stream.
    """
    tokens = np.load(work / "heldout" / f"{domain}.npy").astype(np.int64)
    count = len(tokens) // (context - 1)
    pieces = tokens[: count * (context - 1)].reshape(count, context - 1)
    if limit is not None and limit < count:
        pieces = pieces[np.linspace(0, count - 1, limit).astype(int)]
    windows = np.full((len(pieces), context), BOS, dtype=np.int64)
    windows[:, 1:] = pieces
    return torch.from_numpy(windows)

"""Losses and KL divergences of many residual streams without all their logits: a chunk of tokens at a time.

With a vocabulary of 256,000 tokens, the logits of 8 rows of 1,024 tokens take 8.4 GB in float32. Here the clean logits
of a chunk are computed once and compared with those of every splice; then the next chunk reuses their memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int

CACHED_BYTES = 2 << 20
"""Size of a chunk of logits that stays in a CPU's cache. Small vocabularies gain by it; others need larger chunks."""
MIN_TOKENS = 64
"""Fewest tokens of a chunk that is cut to the cache's size, because the product of fewer is slow."""


@dataclass
class Scores:
    """Cross-entropy of each prediction and, where it was asked for, KL(clean ‖ this), in nats."""

    losses: Float[torch.Tensor, " n"]
    divergences: Float[torch.Tensor, " n"] | None


class LogitHead:
    """A model's final norm, unembedding and soft-cap, in float32 (float64 for a float64 model).

    The logits of a 16-bit model are the float32 products of its 16-bit numbers and are not rounded to 16 bits, because
    bfloat16 has steps of 1/64 nat at a loss of 3, which is as large as some delta losses.

    Args:
        model: from ``load_model``.
        memory: bytes that logits may take at once.
    """

    def __init__(self, model: Any, memory: int) -> None:
        self._norm = model.ln_final
        self.matrix: torch.Tensor = model.unembed.W_U.detach()  # [d_model, vocab], of any strides
        bias = getattr(model.unembed, "b_U", None)
        self.bias = bias.detach() if bias is not None and bool(bias.any()) else None
        cap = getattr(model.cfg, "output_logits_soft_cap", None)
        self.cap = float(cap) if cap and cap > 0 else None
        self.dtype = torch.promote_types(self.matrix.dtype, torch.float32)
        row = self.matrix.shape[1] * self.dtype.itemsize
        most, cached = memory // (3 * row), max(MIN_TOKENS, CACHED_BYTES // row)
        self.chunk = max(1, min(most, cached) if cached > MIN_TOKENS else most)

    def normed(self, final: Float[torch.Tensor, "batch pos d_model"]) -> Float[torch.Tensor, "batch pos d_model"]:
        """The residual stream after the final norm."""
        return self._norm(final)

    def logits(
        self, x: Float[torch.Tensor, "n d_model"], out: Float[torch.Tensor, "n vocab"] | None = None
    ) -> Float[torch.Tensor, "n vocab"]:
        """Logits ``cap · tanh(x W_U / cap)`` of what :meth:`normed` returns; differentiable without ``out``."""
        if self.matrix.dtype == self.dtype:
            made = torch.mm(x, self.matrix, out=out)
        else:
            made = self._widened(x.to(self.dtype), out)
        if self.bias is not None:
            made = made.add_(self.bias.to(self.dtype)) if out is not None else made + self.bias.to(self.dtype)
        if self.cap is None:
            return made
        if out is None:
            return torch.tanh(made / self.cap) * self.cap
        return made.div_(self.cap).tanh_().mul_(self.cap)

    @torch.no_grad()
    def score(
        self,
        clean: Float[torch.Tensor, "n d_model"],
        others: Sequence[tuple[Float[torch.Tensor, "n d_model"], bool]],
        targets: Int[torch.Tensor, " n"],
    ) -> tuple[Float[torch.Tensor, " n"], list[Scores]]:
        """Cross-entropies in nats of a clean pass and of others, and ``KL(clean ‖ other)`` where its bool asks for it.

        ``KL = Σ p (l - l') + log Z' - log Z``, with the clean pass's probabilities p.
        """
        n, vocabulary = clean.shape[0], self.matrix.shape[1]

        def new(size: int) -> torch.Tensor:
            return torch.empty(size, dtype=self.dtype, device=clean.device)

        clean_losses = new(n)
        scores = [Scores(new(n), new(n) if wanted else None) for _, wanted in others]
        space = [new(min(self.chunk, n) * vocabulary).view(-1, vocabulary) for _ in range(3)]
        for start in range(0, n, self.chunk):
            at = slice(start, min(start + self.chunk, n))
            first, p, scratch = (buffer[: at.stop - at.start] for buffer in space)
            chosen = targets[at].unsqueeze(1)
            logits = self.logits(clean[at], first)
            z = self._log_sums(logits, p)
            clean_losses[at] = z - logits.gather(1, chosen).squeeze(1)
            p.div_(p.sum(1, keepdim=True))
            expected = torch.mul(p, logits, out=scratch).sum(1)
            for (other, _), score in zip(others, scores, strict=True):
                logits = self.logits(other[at], first)
                z_other = self._log_sums(logits, scratch)
                score.losses[at] = z_other - logits.gather(1, chosen).squeeze(1)
                if score.divergences is not None:
                    score.divergences[at] = expected - torch.mul(p, logits, out=scratch).sum(1) + z_other - z
        return clean_losses, scores

    def _log_sums(self, logits: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
        """``log Σ exp`` of each row; ``scratch`` becomes the exponentials, up to a factor for each row."""
        top = logits.amax(1, keepdim=True)
        torch.sub(logits, top, out=scratch).exp_()
        return scratch.sum(1).log_().add_(top.squeeze(1))

    def _widened(self, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """``x W_U`` with a few of the matrix's columns at a time in float32."""
        step = max(256, CACHED_BYTES // self.matrix.shape[0])
        parts: list[torch.Tensor] = []
        for start in range(0, self.matrix.shape[1], step):
            columns = self.matrix[:, start : start + step].to(self.dtype)
            if out is None:
                parts.append(x @ columns)
            else:
                out[:, start : start + step] = x @ columns
        return torch.cat(parts, dim=1) if out is None else out

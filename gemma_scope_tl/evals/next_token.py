"""Predictions of the next token: losses and KL divergences of many residual streams, and gradients of logits.

With a vocabulary of 256,000 tokens, the logits of 8 rows of 1,024 tokens take 8.4 GB in float32. :class:`LogitHead`
therefore computes the clean logits of a chunk of tokens once, compares them with those of every splice, and reuses
their memory for the next chunk. The gradients are for the uniformity of active latent importance (appendix C.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from gemma_scope_tl.evals.clean_pass import hook_point, removed_after, run_to_final_norm
from gemma_scope_tl.sites import Place

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

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

    def __init__(self, model: GemmaModel, memory: int) -> None:
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


def sampled_positions(
    scored: Bool[torch.Tensor, "batch pos-1"], first_row: int, count: int, seed: int = 0
) -> Int[torch.Tensor, "batch count"]:
    """``count`` different positions of each row whose predictions count, -1 where a row has fewer.

    The draw depends on the seed and the row's number alone, so it is the same for all batch sizes.
    """
    out = torch.full((scored.shape[0], count), -1, dtype=torch.int64)
    for row, valid in enumerate(scored.cpu()):
        places = valid.nonzero().squeeze(1).numpy()
        draws = np.random.default_rng([seed, first_row + row])
        chosen = draws.permutation(places)[:count]
        out[row, : chosen.shape[0]] = torch.from_numpy(chosen)
    return out


def logit_gradients(
    model: GemmaModel,
    head: LogitHead,
    tokens: Int[torch.Tensor, "batch pos"],
    places: Iterable[Place],
    positions: Int[torch.Tensor, "batch count"],
) -> dict[Place, Float[torch.Tensor, "batch count d"]]:
    """Gradients ``∇_x 𝓛`` at each place, in the clean pass, with respect to the activation x at each position.

    𝓛 is the mean-centred logit of the next token, ``l_target - mean_v l_v`` (soft-capped), at the same position; later
    positions do not count. One forward pass serves all places; each column of ``positions`` takes a backward pass.
    Positions of -1 give zeros.
    """
    probes: dict[Place, torch.Tensor] = {}
    with torch.inference_mode(False), torch.enable_grad(), removed_after() as handles:
        tokens, positions = tokens.clone(), positions.clone()  # autograd refuses inference tensors
        for place in places:
            handles.append(hook_point(model, place).register_forward_hook(_prober(probes, place)))
        final = head.normed(run_to_final_norm(model, tokens))
        gradients = {place: [] for place in probes}
        batch = torch.arange(tokens.shape[0], device=tokens.device)
        for column in positions.to(tokens.device).T:
            at = column.clamp_min(0)
            logits = head.logits(final[batch, at])
            target = logits.gather(1, tokens[batch, at + 1].unsqueeze(1)).squeeze(1)
            centred = (target - logits.mean(1))[column >= 0].sum()
            found = torch.autograd.grad(centred, list(probes.values()), retain_graph=True)
            for place, gradient in zip(probes, found, strict=True):
                flat = gradient.flatten(2)[batch, at]
                gradients[place].append(torch.where((column >= 0).unsqueeze(1), flat, 0.0))
    return {place: torch.stack(columns, dim=1) for place, columns in gradients.items()}


def _prober(probes: dict[Place, torch.Tensor], place: Place) -> Any:
    """A hook that adds a leaf tensor of zeros, whose gradient is the gradient at the place."""

    def probe(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
        probes[place] = torch.zeros_like(out, requires_grad=True)
        return out + probes[place]

    return probe

"""Predictions of the next token: losses and KL divergences of many residual streams, and gradients of logits.

With a vocabulary of 256,000 tokens, the logits of 8 rows of 1,024 tokens take 8.4 GB in float32, and the unembedding
2.4 GB. :class:`LogitHead` therefore never holds the logits of a token: it runs over the vocabulary in blocks that stay
in a processor's cache, and keeps running sums for the clean pass and every splice. So a block of the unembedding is
read, and converted if it has 16 bits, once for hundreds of tokens of all passes.
The gradients are for the uniformity of active latent importance (appendix C.3).
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
"""Bytes of a block of logits that stays in a CPU's cache."""
BLOCK = 1024
"""Columns of the vocabulary in a block on a CPU: 512 tokens fit then, for which the product is fast."""
GPU_BLOCK = 32768
"""Columns in a block on a GPU, where a few large kernels are fastest."""
BOUNDED = 60.0
"""Logits up to this size need no shift: the sum of their exponentials stays finite in float32."""


_BUFFERS = 4  # blocks of logits that are held at once


@dataclass
class Scores:
    """Cross-entropy of each prediction and, where requested, KL(clean ‖ this), in nats."""

    losses: Float[torch.Tensor, " n"]
    divergences: Float[torch.Tensor, " n"] | None


class LogitHead:
    """A model's final norm, unembedding and soft-cap, in float32 (float64 for a float64 model).

    The logits of a 16-bit model are float32 products of 16-bit numbers and are not rounded to 16 bits, because
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
        vocabulary, most = self.matrix.shape[1], memory // (_BUFFERS * self.dtype.itemsize)
        if self.matrix.is_cuda:
            self.block = min(vocabulary, GPU_BLOCK)
            self.chunk = max(1, most // self.block)
        else:
            self.block = min(vocabulary, BLOCK)
            self.chunk = max(1, min(most, CACHED_BYTES // self.dtype.itemsize) // self.block)

    def normed(self, final: Float[torch.Tensor, "batch pos d_model"]) -> Float[torch.Tensor, "batch pos d_model"]:
        """The residual stream after the final norm."""
        return self._norm(final)

    def logits(self, x: Float[torch.Tensor, "n d_model"]) -> Float[torch.Tensor, "n vocab"]:
        """Logits ``cap · tanh(x W_U / cap)`` of what :meth:`normed` returns, differentiable."""
        made = x @ self.matrix if self.matrix.dtype == self.dtype else self._widened(x.to(self.dtype))
        if self.bias is not None:
            made = made + self.bias.to(self.dtype)
        return made if self.cap is None else torch.tanh(made / self.cap) * self.cap

    @torch.no_grad()
    def score(
        self,
        clean: Float[torch.Tensor, "n d_model"],
        others: Sequence[tuple[Float[torch.Tensor, "n d_model"], bool]],
        targets: Int[torch.Tensor, " n"],
    ) -> tuple[Float[torch.Tensor, " n"], list[Scores]]:
        """Cross-entropies in nats of a clean pass and of others, and ``KL(clean ‖ other)`` where the bool is True.

        ``KL = Σ p (l - l') + log Z' - log Z``, with the clean pass's probabilities p.
        """
        n = clean.shape[0]

        def new() -> torch.Tensor:
            return torch.empty(n, dtype=self.dtype, device=clean.device)

        clean_losses, scores = new(), [Scores(new(), new() if wanted else None) for _, wanted in others]
        for start in range(0, n, self.chunk):
            at = slice(start, min(start + self.chunk, n))
            first, *rest = self._sums([clean[at], *(other[at] for other, _ in others)], others, targets[at])
            clean_losses[at] = first.log_total() - first.target
            for sums, score in zip(rest, scores, strict=True):
                score.losses[at] = sums.log_total() - sums.target
                if score.divergences is not None:
                    drift = sums.drift / first.total
                    score.divergences[at] = drift + sums.log_total() - first.log_total()
        return clean_losses, scores

    def _sums(
        self, passes: list[torch.Tensor], others: Sequence[tuple[Any, bool]], targets: torch.Tensor
    ) -> list[_Sums]:
        """The sums over the vocabulary of a chunk of tokens in the clean pass, which is the first, and the others."""
        rows, vocabulary = targets.shape[0], self.matrix.shape[1]
        bounded = self.cap is not None and self.cap <= BOUNDED
        passes = [x.to(self.dtype) for x in passes]
        sums = [_Sums.empty(rows, targets.device, self.dtype, bounded) for _ in passes]
        size = rows * min(self.block, vocabulary)
        space = [torch.empty(size, dtype=self.dtype, device=targets.device) for _ in range(_BUFFERS)]
        for start in range(0, vocabulary, self.block):
            columns = slice(start, min(start + self.block, vocabulary))
            matrix, width = self.matrix[:, columns].to(self.dtype), columns.stop - columns.start
            clean, weights, logits, scratch = (buffer[: rows * width].view(rows, width) for buffer in space)
            self._block(passes[0], matrix, columns, clean)
            scale = sums[0].add(clean, columns, targets, weights)
            for x, one, (_, compared) in zip(passes[1:], sums[1:], others, strict=True):
                self._block(x, matrix, columns, logits)
                one.add(logits, columns, targets, scratch)
                if compared:
                    drift = torch.sub(clean, logits, out=scratch).mul_(weights).sum(1)
                    one.drift = one.drift * scale + drift if scale is not None else one.drift + drift
        return sums

    def _block(self, x: torch.Tensor, matrix: torch.Tensor, columns: slice, out: torch.Tensor) -> None:
        """Write the logits of a block of the vocabulary to ``out``."""
        scale = 1.0 if self.cap is None else 1 / self.cap
        if self.bias is None:
            torch.addmm(out, x, matrix, beta=0, alpha=scale, out=out)  # the old content of out is ignored
        else:
            torch.addmm(self.bias[columns].to(self.dtype), x, matrix, beta=scale, alpha=scale, out=out)
        if self.cap is not None:
            out.tanh_().mul_(self.cap)

    def _widened(self, x: torch.Tensor) -> torch.Tensor:
        """``x W_U`` with a few of the matrix's columns at a time in float32."""
        step = max(256, CACHED_BYTES // self.matrix.shape[0])
        starts = range(0, self.matrix.shape[1], step)
        return torch.cat([x @ self.matrix[:, i : i + step].to(self.dtype) for i in starts], dim=1)


@dataclass
class _Sums:
    """Running sums over the vocabulary for the tokens of a chunk, in float64: ``Σ exp(l - shift)`` and others.

    Attributes:
        shift: the largest logit so far, which is subtracted from the exponents; None for bounded logits.
        total: ``Σ exp(l - shift)``.
        target: the logit of the next token.
        drift: ``Σ exp(c - shift_c) (c - l)``, with the logits c and the shift of the clean pass.
    """

    shift: torch.Tensor | None
    total: torch.Tensor
    target: torch.Tensor
    drift: torch.Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device, dtype: torch.dtype, bounded: bool) -> _Sums:
        """Sums without any column."""
        zeros = torch.zeros(rows, dtype=torch.float64, device=device)
        lowest = None if bounded else torch.full((rows,), -torch.inf, dtype=dtype, device=device)
        return cls(lowest, zeros, zeros.clone(), zeros.clone())

    def add(
        self, logits: torch.Tensor, columns: slice, targets: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor | None:
        """Add a block of columns, and write ``exp(l - shift)`` to ``weights``.

        Returns:
            The factor by which a new shift scales earlier sums, or None for no change.
        """
        inside = (targets >= columns.start) & (targets < columns.stop)
        at = (targets - columns.start).clamp(0, logits.shape[1] - 1).unsqueeze(1)
        self.target = torch.where(inside, logits.gather(1, at).squeeze(1).double(), self.target)
        if self.shift is None:
            self.total += torch.exp(logits, out=weights).sum(1)
            return None
        top = torch.maximum(self.shift, logits.amax(1))
        scale = (self.shift - top).double().exp()
        self.shift = top
        torch.sub(logits, top.unsqueeze(1), out=weights).exp_()
        self.total = self.total * scale + weights.sum(1)
        return scale

    def log_total(self) -> torch.Tensor:
        """``log Σ exp(l)``."""
        return self.total.log() if self.shift is None else self.total.log() + self.shift


def sampled_positions(
    scored: Bool[torch.Tensor, "batch pos-1"], rows: Int[torch.Tensor, " batch"], count: int, seed: int = 0
) -> Int[torch.Tensor, "batch count"]:
    """Draw ``count`` different positions of each row whose predictions count; -1 where a row has fewer.

    The draw depends only on the seed and the row's number, one of ``rows``, so it is the same for all batch sizes. A
    ``count`` above the number of positions is that number.
    """
    count = min(count, max(scored.shape[1], 1))  # a pass of rows of one token scores nothing
    out = torch.full((scored.shape[0], count), -1, dtype=torch.int64)
    for row, (number, valid) in enumerate(zip(rows.tolist(), scored.cpu(), strict=True)):
        places = valid.nonzero().squeeze(1).numpy()
        draws = np.random.default_rng([seed, number])
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
    positions do not count. One forward pass serves all places; each column of ``positions`` takes one backward pass.
    The gradients at positions of -1 are zero.
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
            after = tokens[batch, (at + 1).clamp_max(tokens.shape[1] - 1)]  # rows of one token have no prediction
            target = logits.gather(1, after.unsqueeze(1)).squeeze(1)
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

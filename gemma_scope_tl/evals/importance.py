"""Gradients for the uniformity of active latent importance (appendix C.3)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from gemma_scope_tl.evals.clean_pass import hook_point, removed_after, run_to_final_norm
from gemma_scope_tl.evals.next_token import LogitHead
from gemma_scope_tl.sites import Place


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
    model: Any,
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

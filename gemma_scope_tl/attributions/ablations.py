"""What attributions predict, measured: a latent set to zero at one token, with the error term."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gemma_scope_tl.attributions.passes import one_prompt, places_of, token_row
from gemma_scope_tl.attributions.targets import Metric, Tokens, metric_on
from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.inputs import Text, as_indices
from gemma_scope_tl.tokens import ExcludeTokens


@torch.no_grad()
def ablation_effects(
    model: Any,
    text: Text,
    sae: Any,
    metric: Metric | Tokens,
    pairs: Sequence[tuple[int, int]],
    batch_size: int = 32,
    exclude_special_tokens: ExcludeTokens = True,
    attention_mask: Any = None,
) -> list[float]:
    """Change of ``metric`` when each latent is set to zero at its position, one at a time: ``m(edited) - m(clean)``.

    The SAE is spliced with its error term, so everything else of the tensor stays. The attribution of a latent
    (:func:`~gemma_scope_tl.attribute`) predicts minus this number.

    Args:
        model, metric, exclude_special_tokens, attention_mask: as for :func:`~gemma_scope_tl.attribute`.
        text: one text, or its ids.
        sae: an SAE or transcoder.
        pairs: ``(position, latent)``; positions count from the first token that is not padding.
        batch_size: edits in a forward pass.

    Raises:
        SpliceError: the SAE does not fit; a latent that it has not.
        GemmaScopeError: several texts; a position that the text has not.
    """
    places_of(model, sae, exclude_special_tokens)
    prompt = one_prompt(model, text, exclude_special_tokens, attention_mask, "Ablations are measured on")
    metric = metric_on(model, metric, prompt)
    wanted = [as_indices(pair) for pair in pairs]
    wrong = [latent for _, latent in wanted if not 0 <= latent < sae.cfg.d_sae]
    if wrong:
        raise SpliceError(f"No latent {wrong[0]}: this SAE has latents 0..{sae.cfg.d_sae - 1}.")
    rows = [(token_row(prompt, position), latent) for position, latent in wanted]
    name = model.get_sae_hook_name(sae)
    found: list[float] = []
    for start in range(0, len(rows), batch_size):
        some = torch.tensor(rows[start : start + batch_size], device=prompt.ids.device).T
        batch = some.shape[1] + 1  # the last row is left alone, so that clean and edited round alike

        def edit(acts: torch.Tensor, hook: Any, some: torch.Tensor = some) -> torch.Tensor:
            acts = acts.clone()
            acts[torch.arange(some.shape[1], device=acts.device), some[0], some[1]] = 0
            return acts

        logits = model.run_with_hooks_with_saes(
            prompt.ids.expand(batch, -1),
            attention_mask=prompt.attention_mask.expand(batch, -1),
            saes=[sae],
            use_error_term=True,
            exclude_special_tokens=exclude_special_tokens,
            fwd_hooks=[(name, edit)],
        )
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        *edited, clean = [float(metric(row[None])) for row in wide]
        found += [value - clean for value in edited]
    return found

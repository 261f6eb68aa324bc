"""SAELens's ``run_evals`` on this package's SAEs and models, with given tokens.

Metrics that equal those of :func:`~gemma_scope_tl.evals.suite.evaluate` have the same names, as
``tests/evals/test_bridges.py`` asserts:

- ``l0``, ``fvu`` (1 - SAELens's explained variance), ``loss_clean`` and ``loss_spliced`` are equal up to rounding, on
  tokens without EOS inside. With EOS, ``run_evals`` also counts predictions *of* EOS, which the paper masks.
- The ablation of ``run_evals`` sets the whole site to zero, also at BOS, which a splice leaves unchanged, so its CE
  score compares a splice with an ablation of other positions. Its KL includes the last position, which has no next
  token. Both have different names here.

``run_evals`` writes the tensor that it reads, so transcoders raise an error.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int

from gemma_scope_tl.counts import checked_count
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.saes import subjects_of

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel


class FixedTokens:
    """An activation store for ``run_evals`` that serves the same rows of tokens in batches, repeatedly.

    Args:
        tokens: ``[rows, pos]``.
        batch: number of rows in a batch. It must divide the number of rows, because ``run_evals`` weights batches
            equally.

    Raises:
        GemmaScopeError: ``batch`` does not divide the number of rows.
    """

    def __init__(self, tokens: Int[torch.Tensor, "rows pos"], batch: int) -> None:
        batch = checked_count(batch, "batch_size")
        if tokens.shape[0] % batch:
            raise GemmaScopeError(f"Batches of {batch} do not divide {tokens.shape[0]} rows, so means would be off.")
        self.batches, self.served = list(tokens.split(batch)), 0
        self.store_batch_size_prompts, self.context_size = batch, tokens.shape[1]

    def get_batch_tokens(self, *_: Any) -> Int[torch.Tensor, "batch pos"]:
        """The next batch; the first batch follows the last."""
        self.served += 1
        return self.batches[(self.served - 1) % len(self.batches)]

    def reset_input_dataset(self) -> None:
        """Do nothing, since every evaluation takes all batches."""


def run_sae_lens_evals(
    model: GemmaModel, saes: Any, tokens: Int[torch.Tensor, "rows pos"], batch_size: int = 8
) -> pd.DataFrame:
    """Run SAELens's ``run_evals`` on this package's SAEs and model, one SAE at a time.

    Args:
        model: a model from ``load_model``, or a hooked model of SAELens or TransformerLens that has the SAEs' hooks.
        saes: one SAE, several SAEs, or a suite; SAELens's own SAEs are accepted, too.
        tokens: token ids ``[rows, pos]``, all of which are used.
        batch_size: number of rows in a pass, which must divide the number of rows.

    Returns:
        A row per SAE: ``release, id, site, layer, d_sae, l0, fvu, loss_clean, loss_spliced, delta_loss``, as
        ``evaluate`` names them; ``sae_lens_loss_ablated, sae_lens_ce_score, sae_lens_kl``, which differ from its.

    Raises:
        GemmaScopeError: an SAE is a transcoder, or the batch size does not divide the number of rows.
    """
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for subject in subjects_of(model, saes):
        site = model.family.site(subject.place.site)
        if site.is_transcoder:
            raise GemmaScopeError("SAELens's run_evals writes where it reads; it cannot evaluate a transcoder.")
        sae = subject.get()
        names = {"release": subject.release, "id": subject.id, "site": site.name, "layer": subject.place.layer}
        rows.append({**names, "d_sae": subject.d_sae, **sae_lens_metrics(model, sae, tokens, batch_size)})
    return pd.DataFrame(rows)


def sae_lens_metrics(
    model: GemmaModel, sae: Any, tokens: Int[torch.Tensor, "rows pos"], batch_size: int
) -> dict[str, float]:
    """The metrics of one SAE by ``run_evals``, at the SAE's hook, named as in :func:`run_sae_lens_evals`."""
    from sae_lens.evals import EvalConfig, run_evals
    from sae_lens.training.activation_scaler import ActivationScaler

    store = FixedTokens(tokens, batch_size)
    batches = len(store.batches)
    config = EvalConfig(
        batch_size_prompts=batch_size,
        n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches,
        compute_kl=True,
        compute_ce_loss=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
    )
    given: tuple[Any, Any] = store, model
    found, _ = run_evals(sae, *given, ActivationScaler(), config)
    losses, quality = found["model_performance_preservation"], found["reconstruction_quality"]
    metrics = {
        "l0": found["sparsity"]["l0"],
        "fvu": 1 - quality["explained_variance"],
        "loss_clean": losses["ce_loss_without_sae"],
        "loss_spliced": losses["ce_loss_with_sae"],
        "delta_loss": losses["ce_loss_with_sae"] - losses["ce_loss_without_sae"],
        "sae_lens_loss_ablated": losses["ce_loss_with_ablation"],
        "sae_lens_ce_score": losses["ce_loss_score"],
        "sae_lens_kl": found["model_behavior_preservation"].get("kl_div_with_sae", math.nan),
    }
    return {name: float(value) for name, value in metrics.items()}

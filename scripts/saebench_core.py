"""SAEBench's core evaluation of this package's SAEs and models, in a separate environment.

SAEBench 0.6.0 needs numpy below 2 and datasets below 4, so it does not go with this package's pinned versions.
Its requirements are compatible with this package's declared ones, so one separate environment can hold both (with a CPU
build of torch, take torchvision from the same index or uninstall it, since the core evaluation does not need it):

    python -m venv saebench && saebench/bin/pip install torch sae-bench==0.6.0
    saebench/bin/pip install -e .
    saebench/bin/python scripts/saebench_core.py --site res --layer 2 --width 1k --rows 32 --out core.json

Metrics are computed by ``sae_bench.evals.core.main.run_evals``, on rows of the bundled held-out text (or ``--data``).
SAEBench reads ``hook_name`` and a few other fields from an SAE's ``cfg``, while SAELens 6 has them in ``cfg.metadata``;
:class:`ForSAEBench` makes them available in ``cfg``. The script also prints the metrics of this package's ``evaluate``
on the same rows. L0 is the same, and losses are nearly equal: SAEBench also counts predictions of EOS. SAEBench's
``explained_variance`` is not 1 - FVU: in 0.6.0 the variance is E[x^2] - E[x^2]^2 in place of E[x^2] - E[x]^2.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sae_bench.evals.core.eval_config import CoreEvalConfig  # pyright: ignore[reportMissingImports] (not a dependency)
from sae_bench.evals.core.main import run_evals  # pyright: ignore[reportMissingImports]

import gemma_scope_tl as gs
from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.interop.run_evals import FixedTokens
from gemma_scope_tl.registry.listing import select_rows
from gemma_scope_tl.sae.access import locate
from gemma_scope_tl.sae.loading import load_row
from gemma_scope_tl.text.documents import read_texts
from gemma_scope_tl.text.rows import pack_texts


class ForSAEBench(torch.nn.Module):
    """One of this package's SAEs with the attributes that SAEBench needs."""

    def __init__(self, sae: Any) -> None:
        super().__init__()
        self.sae = sae
        site, layer = locate(sae)
        self.cfg = SimpleNamespace(
            hook_name=site.hook_name(layer, "hooked_transformer"),
            hook_layer=layer or 0,
            hook_head_index=None,
            d_sae=sae.cfg.d_sae,
            d_in=sae.cfg.d_in,
        )
        self.hook_z_reshaping_mode = False

    W_enc = property(lambda self: self.sae.W_enc)
    W_dec = property(lambda self: self.sae.W_dec)
    b_enc = property(lambda self: self.sae.b_enc)
    device = property(lambda self: self.sae.W_enc.device)
    dtype = property(lambda self: self.sae.W_enc.dtype)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Latents."""
        return self.sae.encode(x)

    def decode(self, acts: torch.Tensor) -> torch.Tensor:
        """Reconstruction."""
        return self.sae.decode(acts)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both."""
        return self.decode(self.encode(x))

    def turn_off_forward_pass_hook_z_reshaping(self) -> None:
        """Do nothing, since heads are already flattened."""

    def turn_on_forward_pass_hook_z_reshaping(self) -> None:
        """Do nothing, since heads stay flattened."""


def core(model: Any, sae: Any, tokens: torch.Tensor, batch: int) -> dict[str, Any]:
    """SAEBench's scalar metrics of one SAE."""
    store = FixedTokens(tokens, batch)
    config = CoreEvalConfig(
        model_name="gemma-2",
        batch_size_prompts=batch,
        n_eval_reconstruction_batches=len(store.batches),
        n_eval_sparsity_variance_batches=len(store.batches),
        exclude_special_tokens_from_reconstruction=True,
        context_size=tokens.shape[1],
        compute_kl=True,
        compute_ce_loss=True,
        compute_l2_norms=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        compute_featurewise_density_statistics=False,
        compute_featurewise_weight_based_metrics=False,
        llm_dtype="float32",
    )
    tokenizer = model.tokenizer
    ignored = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
    given: Any = (ForSAEBench(sae), store, model, config)
    metrics, _ = run_evals(*given, ignore_tokens=ignored)
    return metrics


def main() -> None:
    """Read the options, measure, print and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--site", default="res")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--width", default="1k")
    parser.add_argument("--data", default=None)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    model = gs.load_model(options.model, backend="hooked_transformer")
    tokens = pack_texts(model.tokenizer, read_texts(options.data), options.context, options.rows)
    name = options.model.split("/")[-1]
    found: list[dict[str, Any]] = []
    for row in select_rows(name, site=[options.site], layer=[options.layer], width=[options.width]):
        sae = load_row(row, device=model.cfg.device)
        ours = gs.evaluate(model, sae, tokens, batch_size=options.batch_size, progress=False).iloc[0]
        kept = {key: float(ours[key]) for key in ("l0", "fvu", "loss_clean", "loss_spliced", "delta_loss")}
        metrics = core(model, sae, tokens, options.batch_size)
        found.append({"release": row.release, "id": row.id, "saebench": metrics, "evaluate": kept})
        print(json.dumps(found[-1], indent=2, default=float))
    if options.out is not None:
        write_atomically(options.out, json.dumps(found, indent=2, default=float) + "\n")


if __name__ == "__main__":
    main()

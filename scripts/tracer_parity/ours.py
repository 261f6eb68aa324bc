"""Our graph of a case."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedTokenizerFast

import gemma_scope_tl as gs
from gemma_scope_tl.attributions.attribution_graph import AttributionGraph
from gemma_scope_tl.model.loading import load_model
from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from gemma_scope_tl.sae.layered import LayeredCoder
from scripts.tracer_parity.case import Case, arrays, hf_model

SETTINGS: dict[str, Any] = {
    "logits": 10,
    "probability": 0.95,
    "centred": True,
    "soft_cap": "before",
    "max_latent_nodes": None,
}
"""circuit-tracer's defaults: its logits are those before the soft-cap, and it takes all latents."""


def coders_of(case: Case) -> list[Any]:
    """The case's transcoders, or its one cross-layer transcoder, in float64."""
    layers = [{name: torch.from_numpy(array).double() for name, array in one.items()} for one in arrays(case)]
    if case.kind == "clt":
        columns = {name: [one[name] for one in layers] for name in layers[0]}
        columns["W_dec"] = [decoder[:, layer:] for layer, decoder in enumerate(columns["W_dec"])]
        return [LayeredCoder("clt", range(case.layers), **columns)]
    for one in layers:
        if "W_skip" in one:
            one["W_skip"] = one["W_skip"].T.contiguous()  # files hold x @ S, SAELens's classes x @ W_skip.T
    return [
        gs.JumpReLUSAE.from_arrays(
            one, site="transcoder", layer=layer, dtype="float64", family="gemma2"
        ).requires_grad_(False)
        for layer, one in enumerate(layers)
    ]


def our_model(case: Case, backend: str = "bridge") -> Any:
    """The case's model in float64."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(BUNDLED_MODEL)
    return load_model(hf_model=hf_model(case).double(), tokenizer=tokenizer, backend=backend, check=False)


def our_graph(case: Case, backend: str = "bridge") -> AttributionGraph:
    """The graph of the case's prompt, as circuit-tracer makes it."""
    tokens = torch.tensor([case.token_ids])
    return gs.attribution_graph(our_model(case, backend), tokens, coders_of(case), **SETTINGS)

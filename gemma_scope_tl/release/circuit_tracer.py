"""Transcoders in the layout that circuit-tracer reads: a ``config.yaml`` and one safetensors file a layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gemma_scope_tl.contributing.draft import CANONICAL_L0
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.files import replace_files
from gemma_scope_tl.registry.widths import width_label
from gemma_scope_tl.release.release_saes import ReleaseSAE


def transcoder_sets(saes: Sequence[ReleaseSAE]) -> dict[str, list[ReleaseSAE]]:
    """One set for each width, with one transcoder per layer, by the name of the set's folder.

    Of several transcoders in a layer, the one nearest to an L0 of 100 is taken; of two equally near, the sparser one.

    Raises:
        GemmaScopeError: there are no transcoders, or the layers of a width have a gap.
    """
    by_width: defaultdict[int, dict[int, ReleaseSAE]] = defaultdict(dict)
    for sae in sorted(saes, key=lambda sae: (abs(sae.l0 - CANONICAL_L0), sae.l0)):
        if sae.is_transcoder and sae.layer is not None:
            by_width[sae.d_sae].setdefault(sae.layer, sae)
    if not by_width:
        raise GemmaScopeError("circuit-tracer reads transcoders, and there are none among the SAEs.")
    for d_sae, layers in by_width.items():
        missing = sorted(set(range(max(layers))) - set(layers))
        if missing:
            raise GemmaScopeError(
                f"circuit-tracer needs a transcoder in every layer; of {d_sae} latents there is none in {missing}."
            )
    return {f"width_{width_label(d)}": [here[layer] for layer in sorted(here)] for d, here in by_width.items()}


def write_transcoder_set(folder: Path, saes: Sequence[ReleaseSAE], base_model: str) -> None:
    """Write a set of one transcoder per layer, from layer 0 on.

    ``layer_L.safetensors`` holds ``W_enc [d_sae, d_model]`` (transposed), ``W_dec``, ``b_enc``, ``b_dec``,
    ``activation_function.threshold`` and, for transcoders with a skip connection, ``W_skip [d_model, d_model]`` used
    as ``x W_skip^T``. The values are the SAE's own, to the bit.

    Args:
        folder: output folder, which is created if it does not exist.
        saes: one transcoder for each layer, sorted by layer.
        base_model: ``owner/name`` of the model.
    """
    import yaml

    site = saes[0].family.site(saes[0].site)
    block = "blocks.0."  # circuit-tracer puts the block's name before a hook's
    config = {
        "model_name": base_model,
        "model_kind": "transcoder_set",
        "feature_input_hook": site.hook_name(0, "hooked_transformer").removeprefix(block),
        "feature_output_hook": site.hook_name_out(0, "hooked_transformer").removeprefix(block),
    }
    for sae in saes:
        arrays = _arrays(sae.load())
        replace_files(folder, {f"layer_{sae.layer}.safetensors": lambda path, arrays=arrays: save_file(arrays, path)})
    text = yaml.safe_dump(config, sort_keys=False)
    replace_files(folder, {"config.yaml": lambda path: path.write_text(text)})


def _arrays(sae: Any) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {name: value.detach().cpu() for name, value in sae.state_dict().items()}
    state["W_enc"] = state["W_enc"].T
    state["activation_function.threshold"] = state.pop("threshold")
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}

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
from gemma_scope_tl.release.release_saes import Item


def transcoder_sets(items: Sequence[Item]) -> dict[str, list[Item]]:
    """The sets that can be written, by the name of their folder: of every width, one transcoder a layer.

    Of several in one layer, the one nearest to an L0 of 100 is taken, of two as near the sparser one.

    Raises:
        GemmaScopeError: when there are no transcoders, or a width lacks a layer below its last one.
    """
    by_width: defaultdict[int, dict[int, Item]] = defaultdict(dict)
    for item in sorted(items, key=lambda item: (abs(item.l0 - CANONICAL_L0), item.l0)):
        if item.site == "transcoder" and item.layer is not None:
            by_width[item.d_sae].setdefault(item.layer, item)
    if not by_width:
        raise GemmaScopeError("circuit-tracer reads transcoders, and there are none among the SAEs.")
    for d_sae, layers in by_width.items():
        missing = sorted(set(range(max(layers))) - set(layers))
        if missing:
            raise GemmaScopeError(
                f"circuit-tracer needs a transcoder in every layer; of {d_sae} latents there is none in {missing}."
            )
    return {f"width_{width_label(d)}": [here[layer] for layer in sorted(here)] for d, here in by_width.items()}


def write_transcoder_set(folder: Path, items: Sequence[Item], base_model: str) -> None:
    """Write a set of one transcoder a layer, from layer 0 on.

    ``layer_L.safetensors`` holds ``W_enc [d_sae, d_model]`` (transposed), ``W_dec``, ``b_enc``, ``b_dec``,
    ``activation_function.threshold`` and, for transcoders with a skip connection, ``W_skip [d_model, d_model]`` used
    as ``x W_skip^T``. The values are the SAE's own, to the bit.

    Args:
        folder: made if need be.
        items: sorted by layer.
        base_model: ``owner/name`` of the model.
    """
    import yaml

    config = {
        "model_name": base_model,
        "model_kind": "transcoder_set",
        "feature_input_hook": "ln2.hook_normalized",
        "feature_output_hook": "hook_mlp_out",
    }
    for item in items:
        arrays = _arrays(item.load())
        replace_files(folder, {f"layer_{item.layer}.safetensors": lambda path, arrays=arrays: save_file(arrays, path)})
    text = yaml.safe_dump(config, sort_keys=False)
    replace_files(folder, {"config.yaml": lambda path: path.write_text(text)})


def _arrays(sae: Any) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = {name: value.detach().cpu() for name, value in sae.state_dict().items()}
    state["W_enc"] = state["W_enc"].T
    state["activation_function.threshold"] = state.pop("threshold")
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}

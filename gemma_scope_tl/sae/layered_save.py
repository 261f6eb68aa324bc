"""Writing of crosscoders and cross-layer transcoders in Gemma Scope 2's layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.families import Family, family_named, family_of_model, hub_ids, stated_family
from gemma_scope_tl.files import checked_path, is_folder, replace_files
from gemma_scope_tl.registry.schema import LAYER_FILE
from gemma_scope_tl.sae.config import FAMILY
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.weights.checks import CODER_NAME, CONFIG_NAME, check_range, value_range, weights_error
from gemma_scope_tl.weights.coder_config import ARCHITECTURE
from gemma_scope_tl.weights.layer_files import SKIP_NAME, surplus_files
from gemma_scope_tl.weights.layers_config import ALL, tensors_of
from gemma_scope_tl.weights.modes import ordinary_tensors
from gemma_scope_tl.weights.safetensors_file import safetensors_header

_BLOCK = 1 << 22  # values that are written at a time


@ordinary_tensors()
def save_layered(coder: LayeredCoder, path: str | PathLike[str]) -> Path:
    """Write a coder of several layers into a folder: ``params_layer_k.safetensors`` and ``config.json``.

    The planes of ``w_dec`` for earlier layers are written as zeros. Values are written exactly, in the dtype of the
    coder. All files are complete under temporary names before the first is renamed, so a crash in between leaves the
    old files.

    Args:
        coder: the coder. Its L0 is left out if its weights were changed after loading.
        path: the folder, which is created if necessary.

    Returns:
        The path of the folder.

    Raises:
        WeightsError: for values that are not finite, and for thresholds that are not positive.
        GemmaScopeError: when the folder has files of another coder, or no family has such coders.
        WriteError: when a file cannot be written. Existing files are unchanged then.
    """
    folder, count = checked_path(path), len(coder.layers)
    config = json.dumps(layers_config_of(coder), indent=2)
    others = [*surplus_files(folder, count), *([CODER_NAME] if (folder / CODER_NAME).exists() else [])]
    if is_folder(folder) and others:
        raise GemmaScopeError(f"{folder} holds {', '.join(others)} of another coder: choose another folder.")
    writers: dict[str, Callable[[Path], object]] = {LAYER_FILE.format(k): _writer(coder, k) for k in range(count)}
    replace_files(folder, {**writers, CONFIG_NAME: lambda place: place.write_text(config, encoding="utf-8")})
    return folder


def layers_config_of(coder: LayeredCoder) -> dict[str, Any]:
    """The content of ``config.json`` for a coder of several layers, without keys whose values are unknown.

    Raises:
        GemmaScopeError: when the family of the coder's model has no such coders.
    """
    name = coder.model_name
    family = family_of_model(name, coder.site) if coder.family is None else family_named(coder.family)
    hooks = tensors_of(coder.kind, family, _layers(coder, family))
    if hooks is None:
        what = f"No module of {family.title} takes or returns the tensors of a {coder.kind}"
        raise GemmaScopeError(f"{what}. If the model is of another family, give family= when the coder is made.")
    said: dict[str, Any] = {
        "hf_hook_point_in": hooks[0],
        "hf_hook_point_out": hooks[1],
        "width": coder.d_sae,
        "model_name": None if name is None else hub_ids().get(name.rpartition("/")[2], name),
        "architecture": ARCHITECTURE,
        "l0": coder.l0 if coder.as_loaded else None,
        "affine_connection": coder.W_skip is not None,
        "type": coder.kind,
        FAMILY: stated_family(family, name, coder.site),
    }
    return {key: value for key, value in said.items() if value is not None}


def _layers(coder: LayeredCoder, family: Family) -> tuple[int, ...] | str:
    """``"all"`` for a CLT of all layers of a model whose number of layers is known, as in Google's files."""
    dims = None if coder.model_name is None else family.dims_of(coder.model_name)
    every = dims is not None and coder.layers == tuple(range(dims.n_layers))
    return ALL if every and coder.kind == "clt" else coder.layers


def _writer(coder: LayeredCoder, k: int) -> Callable[[Path], None]:
    arrays = {name: getattr(coder, name)[k].detach() for name in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")}
    if coder.W_skip is not None:
        arrays[SKIP_NAME] = coder.W_skip[k].detach()
    shapes = {name.lower(): (array.dtype, list(array.shape)) for name, array in arrays.items()}
    shapes["w_dec"][1][1] = len(coder.layers)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            file.write(safetensors_header(shapes))  # aligned to 64 bytes, so that the arrays can be mapped
            for name, array in arrays.items():
                for block in _blocks(array):
                    _check(f"{coder.name}, layer {coder.layers[k]}", name, block)
                    file.write(_bytes(_with_zeros(block, k) if name == "W_dec" else block))

    return write


def _blocks(array: Tensor) -> Iterator[Tensor]:
    """Parts of an array, on the processor, that are small enough to be copied."""
    rows = max(1, _BLOCK // max(1, array[0].numel()))
    for part in array.split(rows):
        yield part.cpu().contiguous()


def _check(source: str, name: str, block: Tensor) -> None:
    low, high = value_range(block)
    check_range(name, low, high, source)
    if name == "threshold" and low <= 0:
        raise weights_error(source, "has thresholds that are 0; those of such coders are positive", "")


def _with_zeros(block: Tensor, earlier: int) -> Tensor:
    """Rows of a decoder with planes of zeros for the layers before their own."""
    return torch.cat([block.new_zeros(len(block), earlier, block.shape[2]), block], 1)


def _bytes(block: Tensor) -> memoryview:
    return block.contiguous().view(-1).view(torch.uint8).numpy().data

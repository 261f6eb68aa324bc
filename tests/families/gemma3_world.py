"""A small random Gemma 3 in a folder, and a registered release of made-up coders in Gemma Scope 2's layout for it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from tests.coder_files import Coder
from tests.fuzz.seeds import safetensors
from tests.helpers import CONFIGS_3, DEFAULT_3

NAME, RELEASE, LAYERS, WIDTH = "their-model", "their-coders", (3, 5), 256  # sliding and full attention
_NORMS = ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output")
TENSORS = {
    "res": ("resid_post", "output", "output"),
    "att": ("attn_out", "self_attn.o_proj.input", "self_attn.o_proj.input"),
    "mlp": ("mlp_out", _NORMS[1], _NORMS[1]),
    "transcoder": ("transcoder", *_NORMS),
}
KINDS = [(site, affine) for site in TENSORS for affine in ((False, True) if site == "transcoder" else (False,))]


@dataclass(frozen=True)
class World:
    """The folder with ``model/``, ``coders/`` and the registry file, and the arrays of each coder by its id."""

    root: Path
    registry: Path
    arrays: dict[str, dict[str, np.ndarray]]

    def plain(self) -> Any:
        """Hugging Face's model."""
        return Gemma3ForCausalLM.from_pretrained(self.root / "model", attn_implementation="eager").eval()

    def coder(self, site: str, layer: int, affine: bool) -> Coder:
        """The equations of a coder."""
        return Coder(self.arrays[path_of(site, layer, affine)])


def path_of(site: str, layer: int, affine: bool) -> str:
    """The id and path of a coder."""
    return f"{TENSORS[site][0]}/layer_{layer}_width_{WIDTH}_l0_medium{'_affine' if affine else ''}"


def module_of(hf: Any, layer: int, name: str) -> tuple[Any, str]:
    """A module by its name in Gemma Scope 2's configurations, and the side of it."""
    path, _, side = f"model.layers.{layer}.{name}".rpartition(".")
    return hf.get_submodule(path), side


def make(root: Path) -> World:
    """Write everything. Heads (4 of 32) are wider than the stream (64), the window is 8, RoPE is scaled by 8."""
    said = json.loads((BUNDLED_MODEL / "config.json").read_text())
    ids = {key: said[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    sizes: Any = DEFAULT_3 | CONFIGS_3["gemma3"] | ids | {"max_position_embeddings": 512}
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(Gemma3TextConfig(**sizes))
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3 if "norm" in name else 0.15)
    model.save_pretrained(root / "model")
    for file in BUNDLED_MODEL.glob("*token*"):
        shutil.copy(file, root / "model" / file.name)
    rows, arrays = [], {}
    for number, (site, affine) in enumerate(KINDS):
        for layer in LAYERS:
            path = path_of(site, layer, affine)
            arrays[path] = _arrays(np.random.default_rng([number, layer]), 128 if site == "att" else 64, affine)
            _write(root / "coders" / path, site, layer, affine, arrays[path])
            row = {"id": path, "site": site, "layer": layer, "width": str(WIDTH), "d_sae": WIDTH, "path": path}
            row |= {"d_in": 128 if site == "att" else 64, "l0": 60, "label": "medium"}
            rows.append(row | ({"affine": affine} if site == "transcoder" else {}))
    head = {"release": RELEASE, "repo": "./coders", "model": NAME, "family": "gemma3", "license": "MIT"}
    data = {**head, "description": "Made up", "format": "gemma_scope_2", "saes": rows}
    file = root / f"{RELEASE}.yaml"
    file.write_text(json.dumps(data))  # JSON is YAML
    return World(root, file, arrays)


def _arrays(rng: np.random.Generator, d: int, affine: bool) -> dict[str, np.ndarray]:
    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    made = {"w_enc": normal(d, WIDTH, scale=d**-0.5), "w_dec": normal(WIDTH, d, scale=d**-0.5)}
    made |= {"b_enc": normal(WIDTH, scale=0.1), "b_dec": normal(d, scale=0.1), "threshold": abs(normal(WIDTH)) + 0.1}
    return made | ({"affine_skip_connection": normal(d, d, scale=d**-0.5)} if affine else {})


def _write(folder: Path, site: str, layer: int, affine: bool, arrays: dict[str, np.ndarray]) -> None:
    folder.mkdir(parents=True)
    (folder / "params.safetensors").write_bytes(safetensors(arrays))
    reads, writes = (f"model.layers.{layer}.{tensor}" for tensor in TENSORS[site][1:])
    config = {"hf_hook_point_in": reads, "hf_hook_point_out": writes, "width": WIDTH, "model_name": NAME, "l0": 60}
    config |= {"architecture": "jump_relu", "affine_connection": affine, "type": "sae" if reads == writes else site}
    (folder / "config.json").write_text(json.dumps(config))

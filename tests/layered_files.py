"""Folders of crosscoders and cross-layer transcoders, made up with NumPy alone, and the equations of their coders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.seeds import safetensors

Arrays = dict[str, np.ndarray]
D, WIDTH = 24, 16  # latents of each layer


@dataclass(frozen=True)
class Layered:
    """A kind of coder of several layers.

    Attributes:
        type: ``crosscoder`` or ``clt``.
        layers: the model's layers.
        affine: whether it has skip connections.
        all_layers: whether ``config.json`` says ``{all}``.
        d: width of the stream.
        width: latents of each layer.
    """

    type: str
    layers: tuple[int, ...]
    affine: bool = False
    all_layers: bool = False
    d: int = D
    width: int = WIDTH

    @property
    def config(self) -> dict[str, Any]:
        """What Gemma Scope 2's ``config.json`` holds."""
        inside = "all" if self.all_layers else ",".join(map(str, self.layers))
        reads, writes = "output", "output"
        if self.type == "clt":
            reads, writes = "pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"
        return {
            "hf_hook_point_in": f"model.layers.{{{inside}}}.{reads}",
            "hf_hook_point_out": f"model.layers.{{{inside}}}.{writes}",
            "width": self.width * len(self.layers),
            "model_name": "someone/small-gemma" if self.all_layers else "google/gemma-3-1b-pt",
            "architecture": "jump_relu",
            "l0": 12,
            "affine_connection": self.affine,
            "type": self.type,
        }

    def arrays(self, seed: int = 0) -> list[Arrays]:
        """Random arrays of each file, with decoders that write their own and later layers."""
        rng = np.random.default_rng([seed, len(self.layers), self.affine])
        count, d, m = len(self.layers), self.d, self.width

        def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
            return (rng.standard_normal(shape) * scale).astype(np.float32)

        made: list[Arrays] = []
        for k in range(count):
            w_dec = normal(m, count, d, scale=d**-0.5)
            w_dec[:, :k] = 0
            arrays = {
                "w_enc": normal(d, m, scale=d**-0.5),
                "w_dec": w_dec,
                "b_enc": normal(m, scale=0.1),
                "b_dec": normal(d),
                "threshold": (0.5 + 0.5 * rng.random(m)).astype(np.float32),
            }
            if self.affine:
                arrays["affine_skip_connection"] = normal(d, d, scale=d**-0.5)
            made.append(arrays)
        return made

    def write(
        self, folder: Path, arrays: list[Arrays] | None = None, config: dict[str, Any] | None = None, **changed: Any
    ) -> Path:
        """Write the folder, with changed values of the configuration; None drops a key, and an empty one the file."""
        folder.mkdir(parents=True, exist_ok=True)
        for k, one in enumerate(self.arrays() if arrays is None else arrays):
            (folder / f"params_layer_{k}.safetensors").write_bytes(safetensors(one))
        said = {**(self.config if config is None else config), **changed}
        if said:
            text = json.dumps({key: value for key, value in said.items() if value is not None})
            (folder / "config.json").write_text(text)
        return folder


KINDS = {
    "crosscoder": Layered("crosscoder", (2, 5, 7)),
    "clt": Layered("clt", (0, 1, 2, 3), all_layers=True),
    "clt-affine": Layered("clt", (0, 1, 2, 3), affine=True, all_layers=True),
}


def outputs(arrays: list[Arrays], inputs: list[np.ndarray]) -> list[np.ndarray]:
    """``y_k = b_dec_k + sum_{j <= k} f_j w_dec_j[:, k] + x_k S_k`` in float64, with ``f = z H(z - theta)``."""
    wide = [{name: array.astype(np.float64) for name, array in one.items()} for one in arrays]
    acts: list[np.ndarray] = []
    found: list[np.ndarray] = []
    for k, (one, x) in enumerate(zip(wide, inputs, strict=True)):
        z = x.astype(np.float64) @ one["w_enc"] + one["b_enc"]
        acts.append(z * (z > one["threshold"]))
        y = one["b_dec"] + sum(acts[j] @ wide[j]["w_dec"][:, k] for j in range(k + 1))
        found.append(y + x @ one["affine_skip_connection"] if "affine_skip_connection" in one else y)
    return found

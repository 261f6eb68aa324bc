"""Folders of every kind that Gemma Scope 2 has, made up with NumPy alone, and the equations of their coders."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.seeds import safetensors

Arrays = dict[str, np.ndarray]
LAYER, D, HEADS, WIDTH = 13, 24, 40, 512  # the concatenated heads are wider than the stream


@dataclass(frozen=True)
class Kind:
    """A kind of single-layer coder.

    Attributes:
        site: its name here.
        folder: its folder in a release.
        reads, writes: Hugging Face's modules below ``model.layers.L.``, with a side; empty for the layer itself.
        d_in, d_out: widths.
        affine: whether it has a skip connection.
    """

    site: str
    folder: str
    reads: str
    writes: str
    d_in: int = D
    d_out: int = D
    affine: bool = False

    @property
    def config(self) -> dict[str, Any]:
        """What Gemma Scope 2's ``config.json`` holds."""
        return {
            "hf_hook_point_in": f"model.layers.{LAYER}.{self.reads}",
            "hf_hook_point_out": f"model.layers.{LAYER}.{self.writes}",
            "width": WIDTH,
            "model_name": "google/gemma-3-1b-pt",
            "architecture": "jump_relu",
            "l0": 60,
            "affine_connection": self.affine,
            "type": "sae" if self.reads == self.writes else "transcoder",
        }

    @property
    def path(self) -> str:
        """The path of the coder in its repository."""
        return f"{self.folder}/layer_{LAYER}_width_512_l0_medium{'_affine' if self.affine else ''}"

    def arrays(self, seed: int = 0) -> Arrays:
        """Random arrays of which about a tenth of the latents fire on inputs of unit variance."""
        rng = np.random.default_rng([seed, self.d_in, self.affine])

        def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
            return (rng.standard_normal(shape) * scale).astype(np.float32)

        made = {
            "w_enc": normal(self.d_in, WIDTH, scale=self.d_in**-0.5),
            "w_dec": normal(WIDTH, self.d_out, scale=self.d_out**-0.5),
            "b_enc": normal(WIDTH, scale=0.1),
            "b_dec": normal(self.d_out),
            "threshold": (1 + 0.5 * rng.random(WIDTH)).astype(np.float32),
        }
        if self.affine:
            made["affine_skip_connection"] = normal(self.d_in, self.d_out, scale=self.d_in**-0.5)
        return made

    def write(self, root: Path, config: dict[str, Any] | None = None, **changed: Any) -> Path:
        """Write the folder of the coder below ``root``, with changed values of the configuration; None drops a key."""
        folder = root / self.path
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "params.safetensors").write_bytes(safetensors(self.arrays()))
        said = {**(self.config if config is None else config), **changed}
        text = json.dumps({key: value for key, value in said.items() if value is not None})
        (folder / "config.json").write_text(text)
        return folder


KINDS = {
    "res": Kind("res", "resid_post", "output", "output"),
    "res-all": Kind("res", "resid_post_all", "output", "output"),
    "att": Kind("att", "attn_out_all", "self_attn.o_proj.input", "self_attn.o_proj.input", HEADS, HEADS),
    "mlp": Kind("mlp", "mlp_out", "post_feedforward_layernorm.output", "post_feedforward_layernorm.output"),
    "transcoder": Kind(
        "transcoder", "transcoder_all", "pre_feedforward_layernorm.output", "post_feedforward_layernorm.output"
    ),
    "affine": Kind(
        "transcoder",
        "transcoder",
        "pre_feedforward_layernorm.output",
        "post_feedforward_layernorm.output",
        affine=True,
    ),
}


@dataclass
class Coder:
    """The equations of a coder, with row vectors, in float64: ``f = z H(z - theta)``, ``z = x w_enc + b_enc``."""

    arrays: Arrays
    wide: Arrays = field(init=False)

    def __post_init__(self) -> None:
        self.wide = {name: array.astype(np.float64) for name, array in self.arrays.items()}

    def encode(self, x: np.ndarray) -> np.ndarray:
        """Activations of the latents."""
        z = x.astype(np.float64) @ self.wide["w_enc"] + self.wide["b_enc"]
        return z * (z > self.wide["threshold"])

    def decode(self, f: np.ndarray) -> np.ndarray:
        """``f w_dec + b_dec``, without the skip."""
        return f.astype(np.float64) @ self.wide["w_dec"] + self.wide["b_dec"]

    def forward(self, x: np.ndarray) -> np.ndarray:
        """``f w_dec + b_dec + x S``."""
        skip = self.wide.get("affine_skip_connection")
        out = self.decode(self.encode(x))
        return out if skip is None else out + x.astype(np.float64) @ skip

    def gradients(self, x: np.ndarray, grad: np.ndarray) -> Arrays:
        """Gradients of ``sum(grad * forward(x))``: of ``x`` (as ``x``) and of the arrays, but for the thresholds.

        They follow from the equations, with a derivative of 1 where a latent is active and of 0 elsewhere.
        """
        x, grad, f = x.astype(np.float64), grad.astype(np.float64), self.encode(x)
        of_z = (grad @ self.wide["w_dec"].T) * (f != 0)
        found = {
            "w_enc": x.T @ of_z,
            "b_enc": of_z.sum(0),
            "w_dec": f.T @ grad,
            "b_dec": grad.sum(0),
            "x": of_z @ self.wide["w_enc"].T,
        }
        if "affine_skip_connection" in self.wide:
            found["affine_skip_connection"] = x.T @ grad
            found["x"] = found["x"] + grad @ self.wide["affine_skip_connection"].T
        return found


def inputs(kind: Kind, tokens: int, seed: int = 1) -> np.ndarray:
    """Inputs of unit variance, ``[tokens, d_in]``."""
    return np.random.default_rng(seed).standard_normal((tokens, kind.d_in)).astype(np.float32)

"""The release of a trained crosscoder or CLT: measured after training, and written in Gemma Scope 2's layout.

A folder has ``config.json`` and a file ``params_layer_k.safetensors`` for each layer. As in Google's files, ``w_dec [m,
K, d_out]`` has planes for all layers; those of earlier layers are zeros.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gemma_scope_tl.families import Family, hub_ids
from gemma_scope_tl.files import file_sha256, make_folder, replace_files
from gemma_scope_tl.registry.schema import LAYER_FILE
from gemma_scope_tl.registry.widths import width_label
from gemma_scope_tl.sites import Place
from gemma_scope_tl.training.checkpoint import RECIPE
from gemma_scope_tl.training.layered_spec import LayeredSpec
from gemma_scope_tl.training.release import PARTS, SKIP_KEY, UNDIVIDED, columns, gathered
from gemma_scope_tl.training.shard import WHOLE, Shard
from gemma_scope_tl.weights.checks import CONFIG_NAME
from gemma_scope_tl.weights.coder_config import ARCHITECTURE
from gemma_scope_tl.weights.layers_config import ALL, tensors_of
from gemma_scope_tl.weights.safetensors_file import safetensors_header

_ROWS = 1 << 22  # values of a decoder that are written at a time
_ORDER = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold", SKIP_KEY)


@dataclass
class TrainedLayered:
    """One trained coder over several layers, and the sums of its measurement.

    Attributes:
        spec: the description of the coder.
        steps: number of steps of its training.
        layers: the weights of each layer for raw activations, of this process's latents, with ``W_dec [m, K - k,
            d_out]``.
        status: the last row of metrics.
        shard: the part of the latents that this process has. If latents are divided, all processes must measure and
            write together.
        model: name of the model, for ``config.json``.
        rows: number of activations on which the coder was measured.
        active: for each layer, the number of active latents on them.
        error, squares, totals: for each output, the sums of ``||y - y_hat||^2``, ``||y||^2`` and ``y`` over them.
        fired: for each layer, which latents were active at all.
    """

    spec: LayeredSpec
    steps: int
    layers: Sequence[Mapping[str, Tensor]]
    status: Mapping[str, Any]
    shard: Shard = WHOLE
    model: str = ""
    rows: int = 0
    active: list[float] = field(default_factory=list[float])
    error: list[float] = field(default_factory=list[float])
    squares: list[float] = field(default_factory=list[float])
    totals: list[Tensor] = field(default_factory=list[Tensor], repr=False)
    fired: list[Tensor] = field(default_factory=list[Tensor], repr=False)

    @torch.no_grad()
    def observe(self, batch: Mapping[Place, Tensor]) -> None:
        """Measure on raw activations of all places."""
        x = [batch[place].float().cpu() for place in self.spec.reads]
        y = [batch[place].float().cpu() for place in self.spec.writes]
        if not self.totals:
            self.active, self.error, self.squares = ([0.0] * len(x) for _ in range(3))
            self.totals = [torch.zeros(each.shape[1], dtype=torch.float64) for each in y]
            self.fired = [torch.zeros(layer["W_enc"].shape[1], dtype=torch.bool) for layer in self.layers]
        outputs = [torch.zeros_like(each) for each in y]
        for j, layer in enumerate(self.layers):
            z = x[j] @ layer["W_enc"] + layer["b_enc"]
            on = z > layer["threshold"]
            z *= on
            for k, plane in enumerate(layer["W_dec"].unbind(1), j):
                outputs[k] += z @ plane
            self.fired[j] |= on.any(0)
            self.active[j] += float(self.shard.sum_latents(on.sum()))
        self.rows += len(x[0])
        for k, layer in enumerate(self.layers):
            found = self.shard.sum_latents(outputs[k]) + layer["b_dec"]
            if SKIP_KEY in layer:
                found += x[k] @ layer[SKIP_KEY]
            wide = y[k].double()
            self.error[k] += (y[k] - found).double().square().sum().item()
            self.squares[k] += wide.square().sum().item()
            self.totals[k] += wide.sum(0)

    @property
    def metrics(self) -> dict[str, Any]:
        """``l0``, the number of active latents of all layers together, and ``l0_layers`` of each; ``fvu``, the squared
        error over the variance of all outputs together, and ``fvu_layers`` of each; ``silent``, the share of latents
        that never fired."""
        l0s = [active / self.rows for active in self.active]
        variances = [
            squares - total.square().sum().item() / self.rows
            for squares, total in zip(self.squares, self.totals, strict=True)
        ]
        fvus = [_share(error, variance) for error, variance in zip(self.error, variances, strict=True)]
        fired = self.shard.sum_latents(torch.stack([each.sum() for each in self.fired]).sum())
        return {
            "l0": sum(l0s),
            "fvu": _share(sum(self.error), sum(variances)),
            "silent": 1.0 - float(fired) / self.spec.d_sae,
            "l0_layers": l0s,
            "fvu_layers": fvus,
        }

    def write(self, stage: Path, name: str, family: Family, shard: Shard, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write the files into ``stage / name``, and return the row of ``suite.json``."""
        folder, parts = make_folder(stage / name), stage / PARTS
        for k, layer in enumerate(self.layers):
            arrays = self._whole(layer, shard, parts)
            replace_files(folder, {LAYER_FILE.format(k): lambda path, k=k, arrays=arrays: self._save(path, k, arrays)})
            del arrays
            for path in parts.glob("*.npy"):
                path.unlink()
        text = json.dumps(config_of(self.spec, family, self.model), indent=2)
        replace_files(folder, {CONFIG_NAME: lambda path: path.write_text(text, encoding="utf-8")})
        return self._row(folder, name, metrics)

    def take_part(self, family: Family, shard: Shard) -> None:
        """On a process that does not lead: give the leading process this process's latents, as it writes them."""
        for layer in self.layers:
            for local in _divided(layer).values():
                deque(shard.whole(local, columns(self.spec.width)), maxlen=0)

    def _whole(self, layer: Mapping[str, Tensor], shard: Shard, parts: Path) -> dict[str, np.ndarray]:
        """The arrays of a layer, gathered from all processes, a matrix with a row for each latent."""
        own = _divided(layer)
        if shard.latent_ranks == 1:
            found = {name: local.numpy() for name, local in own.items()}
        else:
            make_folder(parts)
            found = {
                name: gathered(local, parts / f"{name}.npy", self.spec.width, shard) for name, local in own.items()
            }
        return found | {name: layer[name].float().numpy() for name in UNDIVIDED if name in layer}

    def _save(self, path: Path, k: int, arrays: Mapping[str, np.ndarray]) -> None:
        count, width = len(self.layers), self.spec.width
        d_in, d_out = arrays["W_enc"].shape[1], len(arrays["b_dec"])
        shapes: dict[str, tuple[int, ...]] = {name: array.shape for name, array in arrays.items()}
        shapes |= {"W_enc": (d_in, width), "W_dec": (width, count, d_out)}
        header = {name.lower(): (torch.float32, shapes[name]) for name in _ORDER if name in arrays}
        with path.open("wb") as file:
            file.write(safetensors_header(header))
            for name in _ORDER:
                if name in arrays:
                    for piece in self._pieces(name, k, arrays[name]):
                        file.write(np.ascontiguousarray(piece, np.float32).data)

    def _pieces(self, name: str, k: int, array: np.ndarray) -> Iterator[np.ndarray]:
        """The values of an array in the order of the file, some at a time."""
        if name == "W_enc":
            step = max(1, _ROWS // len(array))
            yield from (array[:, i : i + step].T for i in range(0, array.shape[1], step))
        elif name == "W_dec":
            count = len(self.layers)
            d_out = array.shape[1] // (count - k)
            step = max(1, _ROWS // (count * d_out))
            for i in range(0, len(array), step):
                part = array[i : i + step].reshape(-1, count - k, d_out)
                whole = np.zeros((len(part), count, d_out), np.float32)
                whole[:, k:] = part
                yield whole
        else:
            yield array

    def _row(self, folder: Path, name: str, metrics: Mapping[str, Any]) -> dict[str, Any]:
        spec = self.spec
        files = [folder / LAYER_FILE.format(k) for k in range(len(spec.layers))]
        return {
            "id": name.removeprefix(f"{spec.folder}/"),
            "site": spec.kind,
            "layer": None,
            "width": width_label(spec.d_sae),
            "d_sae": spec.d_sae,
            "d_in": self.layers[0]["W_enc"].shape[0],
            "path": name,
            "sha256": None,
            "layers": list(spec.layers),
            "sha256s": [file_sha256(file) for file in files],
            **({"affine": True} if spec.skip else {}),
            **metrics,
            "name": spec.name,
            "target_l0": spec.target_l0,
            "lambda": self.status.get("lambda"),
            "steps": self.steps,
            "batch_size": spec.recipe.batch_size,
            "seed": spec.seed,
            RECIPE: spec.to_json()["recipe"],
        }


def _share(error: float, variance: float) -> float:
    return error / variance if variance > 0.0 else float("nan")


def config_of(spec: LayeredSpec, family: Family, model: str) -> dict[str, Any]:
    """The content of ``config.json``, with the target L0 as ``l0``, as in Google's.

    Raises:
        GemmaScopeError: the family has no such coders.
    """
    from gemma_scope_tl.families import stated_family
    from gemma_scope_tl.sae.config import FAMILY

    hooks = tensors_of(spec.kind, family, ALL if spec.said_all else spec.layers)
    said: dict[str, Any] = {
        "hf_hook_point_in": None if hooks is None else hooks[0],
        "hf_hook_point_out": None if hooks is None else hooks[1],
        "width": spec.d_sae,
        "model_name": hub_ids().get(model.rpartition("/")[2], model) or None,
        "architecture": ARCHITECTURE,
        "l0": spec.target_l0,
        "affine_connection": spec.skip,
        "type": spec.kind,
        FAMILY: stated_family(family, model, spec.reads[0].site),
    }
    return {key: value for key, value in said.items() if value is not None}


def _divided(layer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The arrays of a layer that are divided over processes, with a row for each latent, as float32."""
    found = {name: layer[name].float() for name in ("W_enc", "W_dec", "b_enc", "threshold")}
    return found | {"W_enc": found["W_enc"].T, "W_dec": found["W_dec"].flatten(1)}

"""The finished suite: each SAE measured on activations that came after its training, and written as Gemma Scope is."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_scope_tl.activations.source import Place
from gemma_scope_tl.files import replace_files
from gemma_scope_tl.registry.widths import width_label
from gemma_scope_tl.training.spec import SAESpec

_VALUES = 1 << 25  # pre-activations at a time
_DECIMALS = 3
STAGE = ".release"


@dataclass
class Finished:
    """One trained SAE.

    Attributes:
        spec: what was asked for.
        steps: how long it was trained.
        arrays: its weights for raw activations, Gemma Scope's names and layout.
        status: its last row of metrics.
    """

    spec: SAESpec
    steps: int
    arrays: Mapping[str, Tensor]
    status: Mapping[str, Any]
    rows: int = 0
    active: float = 0.0
    error: float = 0.0
    squares: float = 0.0
    total: Tensor | None = None
    fired: Tensor | None = field(default=None, repr=False)

    @torch.no_grad()
    def see(self, x: Tensor, y: Tensor) -> None:
        """Measure on raw activations ``[n, d_in]`` and what they are to become, ``[n, d_out]``."""
        a = self.arrays
        part = max(1, _VALUES // a["W_enc"].shape[1])
        for inputs, targets in zip(x.float().cpu().split(part), y.float().cpu().split(part), strict=True):
            z = inputs @ a["W_enc"] + a["b_enc"]
            on = z > a["threshold"]
            error = targets - ((z * on) @ a["W_dec"] + a["b_dec"])
            wide = targets.double()
            fired = on.any(0)
            self.rows += len(inputs)
            self.active += float(on.sum())
            self.error += error.double().square().sum().item()
            self.squares += wide.square().sum().item()
            self.total = wide.sum(0) if self.total is None else self.total + wide.sum(0)
            self.fired = fired if self.fired is None else self.fired | fired

    @property
    def metrics(self) -> dict[str, float]:
        """``l0``; ``fvu``, the squared error over the variance of the target; ``silent``, the share of latents that
        never fired."""
        assert self.total is not None and self.fired is not None
        variance = self.squares - self.total.square().sum().item() / self.rows
        return {
            "l0": self.active / self.rows,
            "fvu": self.error / variance if variance > 0.0 else float("nan"),
            "silent": 1.0 - self.fired.float().mean().item(),
        }


def measure(saes: Sequence[Finished], batches: Iterable[Mapping[Place, Tensor]], count: int) -> None:
    """Measure all SAEs on the next ``count`` batches."""
    for batch in islice(batches, count):
        for sae in saes:
            sae.see(batch[sae.spec.place], batch[sae.spec.place.target])


def folder_names(saes: Sequence[tuple[SAESpec, float]]) -> list[str]:
    """``res/layer_3/width_1k/average_l0_12`` for SAEs with these measured L0s, each unique.

    Where two would have one name, both get decimals, as many as it takes, up to three; if those are equal too, ``_2``
    and so on follow.

    >>> place = Place("res", 0)
    >>> from gemma_scope_tl.training.recipe import PAPER
    >>> spec = SAESpec("a", place, 512, PAPER, 0)
    >>> [name.split("/")[-1] for name in folder_names([(spec, 12.2), (spec, 12.4), (spec, 30.0)])]
    ['average_l0_12.2', 'average_l0_12.4', 'average_l0_30']
    """
    heads = [f"{spec.place.key}/width_{width_label(spec.d_sae)}/average_l0_" for spec, _ in saes]
    names = [f"{head}{l0:.0f}" for head, (_, l0) in zip(heads, saes, strict=True)]
    for decimals in range(1, _DECIMALS + 1):
        crowded = {name for name, count in Counter(names).items() if count > 1}
        names = [
            f"{head}{l0:.{decimals}f}" if name in crowded else name
            for name, head, (_, l0) in zip(names, heads, saes, strict=True)
        ]
    seen: Counter[str] = Counter()
    for index, name in enumerate(names):
        seen[name] += 1
        names[index] = name if seen[name] == 1 else f"{name}_{seen[name]}"
    return names


def write_release(folder: Path, saes: Sequence[Finished]) -> list[dict[str, Any]]:
    """Write ``<site>/layer_L/width_W/average_l0_N/params.npz`` of every SAE; a registry row and metrics of each.

    What an interrupted call has left is replaced.
    """
    from gemma_scope_tl.sae.loading import scale_embedding
    from gemma_scope_tl.sae.save import write_npz
    from gemma_scope_tl.weights.sniff import PARAMS_NAME

    stage = folder / STAGE
    for old in [stage, *(folder / site for site in {sae.spec.place.site for sae in saes})]:
        shutil.rmtree(old, ignore_errors=True)
    rows: list[dict[str, Any]] = []
    names = folder_names([(sae.spec, sae.metrics["l0"]) for sae in saes])
    for sae, name in zip(saes, names, strict=True):
        arrays = {key: value.detach().cpu().float().contiguous() for key, value in sae.arrays.items()}
        if sae.spec.place.site == "embedding":  # in the units of the table's rows, as released
            arrays = scale_embedding(arrays, inverse=True)
        found = {key: value.numpy() for key, value in arrays.items()}
        replace_files(stage / name, {PARAMS_NAME: lambda path, found=found: write_npz(path, found)})
        rows.append(_row(sae, name, stage / name / PARAMS_NAME))
    for site in sorted(path.name for path in stage.iterdir()):
        os.replace(stage / site, folder / site)
    stage.rmdir()
    return rows


def _row(sae: Finished, name: str, path: Path) -> dict[str, Any]:
    """The registry's columns first."""
    spec = sae.spec
    return {
        "id": name.removeprefix(f"{spec.place.site}/"),
        "site": spec.place.site,
        "layer": spec.place.layer,
        "width": width_label(spec.d_sae),
        "d_sae": spec.d_sae,
        "d_in": sae.arrays["W_enc"].shape[0],
        "path": name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        **sae.metrics,
        "name": spec.name,
        "target_l0": spec.target_l0,
        "lambda": sae.status.get("lambda"),
        "steps": sae.steps,
        "batch_size": spec.recipe.batch_size,
        "seed": spec.seed,
    }

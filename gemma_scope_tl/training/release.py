"""The release of a run: all SAEs are measured after training, and written in Gemma Scope's layout."""

from __future__ import annotations

import os
import shutil
from collections import Counter, deque
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor

from gemma_scope_tl.families import Family
from gemma_scope_tl.files import file_sha256, make_folder, replace_files, writing
from gemma_scope_tl.registry.widths import width_label
from gemma_scope_tl.sites import Place, target_of
from gemma_scope_tl.training.checkpoint import RECIPE
from gemma_scope_tl.training.layered_spec import LayeredSpec
from gemma_scope_tl.training.shard import WHOLE, Shard
from gemma_scope_tl.training.spec import SAESpec
from gemma_scope_tl.weights.checks import PARAMS_NAME

AnySpec = SAESpec | LayeredSpec
STAGE, PARTS = ".release", "parts"
"""Hidden folder in which a release is written before it is moved to its final place, and in it one for parts."""
_VALUES = 1 << 25  # pre-activations that are computed at a time while measuring
_DECIMALS = 3
SKIP_KEY = "affine_skip_connection"
"""The array of a released skip transcoder, ``[d_in, d_out]``, which is used as ``x @ S``."""
UNDIVIDED = ("b_dec", SKIP_KEY)
"""Released arrays that every process has whole, because they do not belong to latents."""


@dataclass
class TrainedSAE:
    """One trained SAE, and the sums of its measurement.

    Attributes:
        spec: the description of the SAE.
        steps: number of steps of its training.
        arrays: the weights for raw activations, in Gemma Scope's names and layout, of this process's latents.
        status: the last row of metrics.
        shard: the part of the latents that this process has. If latents are divided, all processes must measure and
            write together.
        rows, active, error, squares, total, fired: sums over the activations on which the SAE was measured.
    """

    spec: SAESpec
    steps: int
    arrays: Mapping[str, Tensor]
    status: Mapping[str, Any]
    shard: Shard = WHOLE
    rows: int = 0
    active: float = 0.0
    error: float = 0.0
    squares: float = 0.0
    total: Tensor | None = None
    fired: Tensor | None = field(default=None, repr=False)

    def observe(self, batch: Mapping[Place, Tensor]) -> None:
        """Measure on raw activations of all places."""
        self.update(batch[self.spec.place], batch[target_of(self.spec.place)])

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor) -> None:
        """Measure on raw activations ``[n, d_in]`` and their targets ``[n, d_out]``."""
        a = self.arrays
        part = max(1, _VALUES // a["W_enc"].shape[1])
        for inputs, targets in zip(x.float().cpu().split(part), y.float().cpu().split(part), strict=True):
            z = inputs @ a["W_enc"] + a["b_enc"]
            on = z > a["threshold"]
            error = targets - (self.shard.sum_latents((z * on) @ a["W_dec"]) + a["b_dec"])
            if SKIP_KEY in a:
                error -= inputs @ a[SKIP_KEY]
            wide = targets.double()
            fired = on.any(0)
            self.rows += len(inputs)
            self.active += float(self.shard.sum_latents(on.sum()))
            self.error += error.double().square().sum().item()
            self.squares += wide.square().sum().item()
            self.total = wide.sum(0) if self.total is None else self.total + wide.sum(0)
            self.fired = fired if self.fired is None else self.fired | fired

    def write(self, stage: Path, name: str, family: Family, shard: Shard, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """See :class:`Trained`."""
        from gemma_scope_tl.sae.save import write_npz

        found = _whole_arrays(self, family, shard, stage / PARTS)
        replace_files(stage / name, {PARAMS_NAME: lambda path: write_npz(path, found)})
        return _row(self, name, stage / name / PARAMS_NAME, metrics)

    def take_part(self, family: Family, shard: Shard) -> None:
        """See :class:`Trained`."""
        for array in _divided(_release_arrays(self, family)).values():
            deque(shard.whole(array, columns(self.spec.d_sae)), maxlen=0)

    @property
    def metrics(self) -> dict[str, float]:
        """``l0``; ``fvu``, the squared error over the variance of the target; ``silent``, the share of latents that
        never fired."""
        assert self.total is not None and self.fired is not None
        variance = self.squares - self.total.square().sum().item() / self.rows
        return {
            "l0": self.active / self.rows,
            "fvu": self.error / variance if variance > 0.0 else float("nan"),
            "silent": 1.0 - float(self.shard.sum_latents(self.fired.sum())) / self.spec.d_sae,
        }


class Trained(Protocol):
    """A trained SAE, or a coder over several layers.

    Attributes:
        spec: its description.
        metrics: what was measured: ``l0`` and others.
    """

    @property
    def spec(self) -> AnySpec: ...

    @property
    def metrics(self) -> dict[str, Any]: ...

    def observe(self, batch: Mapping[Place, Tensor]) -> None:
        """Measure on raw activations of all places."""
        ...

    def write(self, stage: Path, name: str, family: Family, shard: Shard, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Write the files into ``stage / name``, and return the row of ``suite.json``."""
        ...

    def take_part(self, family: Family, shard: Shard) -> None:
        """On a process that does not lead: give the leading process this process's latents, as it writes them."""
        ...


def measure(saes: Sequence[Trained], batches: Iterable[Mapping[Place, Tensor]], count: int) -> None:
    """Measure all SAEs on the next ``count`` batches."""
    for batch in islice(batches, count):
        for sae in saes:
            sae.observe(batch)


def folder_names(saes: Sequence[tuple[AnySpec, float]]) -> list[str]:
    """``res/layer_3/width_1k/average_l0_12`` for SAEs with these measured L0s, each unique.

    The names of skip transcoders end in ``_affine``, as in Gemma Scope 2's releases.
    SAEs whose names would be equal get as many decimals as are needed, up to three; if the names are still equal,
    ``_2`` and so on is added.

    >>> place = Place("res", 0)
    >>> from gemma_scope_tl.training.recipe import PAPER
    >>> spec = SAESpec("a", place, 512, PAPER, 0)
    >>> [name.split("/")[-1] for name in folder_names([(spec, 12.2), (spec, 12.4), (spec, 30.0)])]
    ['average_l0_12.2', 'average_l0_12.4', 'average_l0_30']
    """
    heads = [spec.release_head for spec, _ in saes]
    tails = ["_affine" if spec.skip else "" for spec, _ in saes]
    names = [f"{head}{l0:.0f}{tail}" for head, (_, l0), tail in zip(heads, saes, tails, strict=True)]
    for decimals in range(1, _DECIMALS + 1):
        crowded = {name for name, count in Counter(names).items() if count > 1}
        names = [
            f"{head}{l0:.{decimals}f}{tail}" if name in crowded else name
            for name, head, (_, l0), tail in zip(names, heads, saes, tails, strict=True)
        ]
    seen: Counter[str] = Counter()
    for index, name in enumerate(names):
        seen[name] += 1
        names[index] = name if seen[name] == 1 else f"{name}_{seen[name]}"
    return names


def write_release(folder: Path, saes: Sequence[Trained], family: Family, shard: Shard = WHOLE) -> list[dict[str, Any]]:
    """Write ``<site>/layer_L/width_W/average_l0_N/params.npz`` of every SAE, and the folders of layered coders.

    Files of an interrupted call are replaced. Where processes divide the latents, all must call this function. The
    leading process writes, a few columns at a time, and never holds a whole matrix in memory.

    Returns:
        A row for each SAE, with the registry's columns and its metrics; no rows on the other processes.

    Raises:
        WriteError: a file cannot be written; the folder has no release then.
    """
    measured = [sae.metrics for sae in saes]
    names = folder_names([(sae.spec, row["l0"]) for sae, row in zip(saes, measured, strict=True)])
    if not shard.leads:
        for sae in saes:
            sae.take_part(family, shard)
        return []
    rows: list[dict[str, Any]] = []
    with staged(folder, [sae.spec for sae in saes]) as stage:
        for sae, name, metrics in zip(saes, names, measured, strict=True):
            rows.append(sae.write(stage, name, family, shard, metrics))
            shutil.rmtree(stage / PARTS, ignore_errors=True)
    return rows


def _release_arrays(sae: TrainedSAE, family: Family) -> dict[str, Tensor]:
    """This process's part of the released arrays, in the file's order and layout."""
    from gemma_scope_tl.sae.units import scale_embedding

    arrays = {key: value.detach().cpu().float().contiguous() for key, value in sae.arrays.items()}
    if family.site(sae.spec.place.site).joins == "embedding":  # released in the units of the embedding's rows
        arrays = scale_embedding(arrays, inverse=True, family=family)
    return arrays


def _divided(arrays: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The released arrays that are divided over processes, with latents as their first dimension."""
    return {key: arrays[key].T if key == "W_enc" else arrays[key] for key in sorted(arrays) if key not in UNDIVIDED}


def _whole_arrays(sae: TrainedSAE, family: Family, shard: Shard, parts: Path) -> dict[str, np.ndarray]:
    """The released arrays, gathered from all processes."""
    own = _release_arrays(sae, family)
    if shard.latent_ranks == 1:
        return {key: value.numpy() for key, value in own.items()}
    make_folder(parts)
    found = {
        key: gathered(local, parts / f"{key}.npy", sae.spec.d_sae, shard, by_latent=key != "W_enc")
        for key, local in _divided(own).items()
    }
    return {key: found[key] if key in found else value.numpy() for key, value in own.items()}


def gathered(local: Tensor, path: Path, latents: int, shard: Shard, *, by_latent: bool = True) -> np.ndarray:
    """A whole array, filled a few columns at a time; a matrix is mapped from a new file.

    Args:
        local: this process's rows of ``latents``.
        path: the file.
        latents: number of rows on all processes together.
        shard: this process's part.
        by_latent: False for the transposed matrix.
    """
    if local.ndim == 1:
        return next(shard.whole(local)).numpy()
    shape = (latents, local.shape[1])
    array = _new_memmap(path, shape if by_latent else shape[::-1])
    rows, at = array if by_latent else array.T, 0
    for piece in shard.whole(local, columns(latents)):
        rows[:, at : at + piece.shape[1]] = piece.numpy()
        at += piece.shape[1]
    return array


def _new_memmap(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A float32 matrix mapped from a new file, whose blocks are allocated at once.

    Without that, a process that writes to the map would be killed by SIGBUS when the disk is full.
    """
    with writing(path):
        array = open_memmap(path, "w+", np.float32, shape)
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def columns(latents: int) -> int:
    """Number of columns of a matrix ``[latents, ...]`` that are gathered at a time, about 64 MiB."""
    return max(1, (1 << 24) // latents)


@contextmanager
def staged(folder: Path, specs: Sequence[AnySpec]) -> Generator[Path]:
    """A hidden folder for the folders of all sites, which replace those in ``folder`` at the end of the context."""
    stage = folder / STAGE
    for old in [stage, *(folder / site for site in {spec.folder for spec in specs})]:
        shutil.rmtree(old, ignore_errors=True)
    try:
        yield stage
    except BaseException:
        shutil.rmtree(stage, ignore_errors=True)  # makes room, as the disk may be full
        raise
    for site in sorted(path.name for path in stage.iterdir()):
        with writing(folder / site):
            os.replace(stage / site, folder / site)
    stage.rmdir()


def _row(sae: TrainedSAE, name: str, path: Path, metrics: Mapping[str, float]) -> dict[str, Any]:
    """The row of an SAE: the registry's columns first, then metrics and how it was trained."""
    spec = sae.spec
    return {
        "id": name.removeprefix(f"{spec.place.site}/"),
        "site": spec.place.site,
        "layer": spec.place.layer,
        "width": width_label(spec.d_sae),
        "d_sae": spec.d_sae,
        "d_in": sae.arrays["W_enc"].shape[0],
        "path": name,
        "sha256": file_sha256(path),
        **({"affine": True} if spec.skip else {}),
        **metrics,
        "name": spec.name,
        "target_l0": spec.target_l0,
        "lambda": sae.status.get("lambda"),
        "steps": sae.steps,
        "batch_size": spec.recipe.batch_size,
        "seed": spec.seed,
        RECIPE: spec.to_json()["recipe"],
    }

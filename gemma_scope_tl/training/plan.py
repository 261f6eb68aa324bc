"""The memory, disk and time that a run will take, without loading a model: ``plan_suite``."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.model.sizes import ModelSizes, family_and_sizes
from gemma_scope_tl.sites import Place, target_of, with_targets
from gemma_scope_tl.training.config import SuiteConfig, TrainingStateError, load_config
from gemma_scope_tl.training.grid import AnyGroup, groups_of, places_of
from gemma_scope_tl.training.layered_spec import LayeredGroup, LayeredSpec

if TYPE_CHECKING:
    import pandas as pd

FLOAT32 = 4
CHECKPOINTS = 3  # two are kept while a third is written
SAE_LENS_BUFFERS = 3.0
"""SAELens's mixing buffer holds the old rows, their concatenation and its permuted copy; measured at 3.0 times."""
SAE_LENS_NORM_BATCHES = 1_000
"""Batches of every hook that SAELens's multi-SAE runner holds to estimate norms."""
GIB = 2.0**30
_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}
STEP_PRODUCTS = 5.0
"""A dense step has five products of the encoder's size: encode, decode, and the gradients of latents and matrices."""
SKIP_PRODUCTS = 2.0
"""The products ``[batch, d_in] x [d_in, d_out]`` of a skip path in a step: output and gradient."""
ENTRIES, ENTRY_VALUES = 4, 16
"""Entries of a coder over several layers for each active latent, and the 32-bit values that are kept for each."""
_LATENTS, _ROWS, _WARM_UP, _RUNS = 1_024, 1_024, 2, 3


def parameters(d_in: int, d_out: int, d_sae: int, *, skip: bool = False) -> int:
    """Number of trained parameters of one SAE, or of a transcoder with or without skip."""
    return d_sae * (d_in + d_out + 2) + d_out + (d_in * d_out if skip else 0)


def state_bytes(d_in: int, d_out: int, widths: Sequence[int], *, momentum: bool = False, skips: int = 0) -> int:
    """Bytes of the weights and Adam's moments of SAEs that are stepped together; about those of a checkpoint.

    ``skips`` of them are skip transcoders. Without momentum there are no first moments. Counters (when a latent last
    moved, whether it fired) take a few bytes a latent and are left out.
    """
    copies = 3 if momentum else 2
    return copies * FLOAT32 * (sum(parameters(d_in, d_out, d_sae) for d_sae in widths) + skips * d_in * d_out)


def step_bytes(d_in: int, d_out: int, widths: Sequence[int], batch: int, *, skips: int = 0) -> int:
    """Further bytes of a step: gradients, a batch and its reconstructions, and the pre-activations of all latents."""
    gradients = sum(parameters(d_in, d_out, d_sae) for d_sae in widths) + skips * d_in * d_out
    return FLOAT32 * (gradients + batch * (2 * d_in + 2 * d_out * len(widths) + sum(widths)))


def layered_sizes(d_in: int, d_out: int, spec: LayeredSpec) -> tuple[int, int]:
    """Number of trained parameters of a coder over several layers, and of values in its released files.

    The files have decoder planes of earlier layers too, which are zeros.
    """
    count = len(spec.layers)
    rest = count * d_out + (count * d_in * d_out if spec.skip else 0)
    planes = spec.width * count * (count + 1) // 2
    per_latent = spec.d_sae * (d_in + 2) + rest
    return per_latent + planes * d_out, per_latent + spec.d_sae * count * d_out


def layered_step_bytes(d_in: int, d_out: int, spec: LayeredSpec, batch: int) -> int:
    """Further bytes of a step: a batch, its reconstructions and errors in all layers (two copies), and active latents.

    Pre-activations are compared with thresholds block by block, and gradients are made for some latents at a time.
    """
    count, prefixes = len(spec.layers), 1 + len(spec.recipe.matryoshka)
    entries = batch * min(spec.d_sae, ENTRIES * (spec.target_l0 or spec.d_sae))
    return int(FLOAT32 * (batch * count * (d_in + (2 * prefixes + 1) * d_out) + ENTRY_VALUES * entries))


def released_bytes(d_in: int, d_out: int, d_sae: int, *, skip: bool = False) -> int:
    """Bytes of one ``params.npz``, without its headers."""
    return FLOAT32 * parameters(d_in, d_out, d_sae, skip=skip)


def bucket_bytes(widths: Iterable[int], rows: int, item_size: int) -> int:
    """Bytes of the buffers of a source, one for each place; there is no second copy."""
    return rows * sum(widths) * item_size


def largest_bucket(widths: Iterable[int], item_size: int, batch: int, budget: float) -> int:
    """The largest number of rows, in whole batches, whose buffers fit into ``budget`` bytes; 0 if one batch does not.

    All 78 sites of Gemma 2 2B in bfloat16 and 16 GiB:

    >>> largest_bucket([2304, 2304, 2048] * 26, 2, 4096, 16 * 2**30)
    49152
    """
    row = sum(widths) * item_size
    return max(0, int(budget // (row * batch))) * batch


def sae_lens_bytes(widths: Iterable[int], rows: int, batch: int, item_size: int) -> int:
    """Peak bytes of SAELens's multi-SAE runner: its mixing buffers, or the batches of its norm estimate.

    The residual stream of Gemma 2 2B in bfloat16, in batches of 4,096, takes 491 GB.

    >>> sae_lens_bytes([2304] * 26, 10**6, 4096, 2) / 1e9
    490.733568
    """
    row = sum(widths) * item_size
    return int(row * max(SAE_LENS_BUFFERS * rows, SAE_LENS_NORM_BATCHES * batch))


def store_bytes(width: int, rows: int, item_size: int) -> int:
    """Bytes of the activations of a place on disk, without the headers of shards."""
    return width * rows * item_size


@dataclass(frozen=True)
class Speed:
    """The speed on which estimates of time are based.

    Attributes:
        flops: floating-point operations per second in the model's products.
        step_flops: those per second of a training step, which is counted as one encoder product (``2 batch d d_sae``).
        basis: a description of how the two numbers were found.
    """

    flops: float
    step_flops: float
    basis: str


def stated(flops: float) -> Speed:
    """The speed of a device of which only the FLOP/s are known."""
    return Speed(flops, flops / STEP_PRODUCTS, f"{flops:.3g} FLOP/s as given; a step is {STEP_PRODUCTS:g} products")


def measured(group: AnyGroup, d_in: int, d_out: int, d_model: int, d_ff: int, batch: int) -> Speed:
    """Time a product of the model's MLP and a step of a small trainer at the widths of a group, with all threads.

    The step has at most 1,024 latents and 1,024 rows; larger ones are assumed to take proportionally longer.
    """
    from gemma_scope_tl.training.layered_trainer import LayeredTrainer
    from gemma_scope_tl.training.place import PlaceTrainer

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, d_model, generator=generator)
    w = torch.randn(d_model, d_ff, generator=generator)
    flops = 2.0 * x.numel() * d_ff / _seconds(lambda: x @ w)
    spec = group.specs[0]
    rows, latents = min(batch, _ROWS), min(spec.d_sae, _LATENTS)
    inputs = torch.randn(rows, d_in, generator=generator) * d_in**-0.5
    targets = torch.randn(rows, d_out, generator=generator) * d_out**-0.5 if spec.is_transcoder else None
    if isinstance(spec, LayeredSpec):
        count = len(spec.layers)
        latents = max(1, latents // count) * count
        layered = LayeredTrainer(d_in, d_out, replace(spec, d_sae=latents, skip=False), total_steps=1_000)
        several = None if targets is None else [targets] * count
        seconds = _seconds(lambda: layered.step([inputs] * count, several))
    else:
        small = replace(spec, d_sae=latents, skip=False)  # a skip path is counted as two products
        trainer = PlaceTrainer(d_in, d_out, [small], total_steps=1_000)
        seconds = _seconds(lambda: trainer.step(inputs.clone(), targets))
    step = 2.0 * rows * d_in * latents / seconds
    threads = torch.get_num_threads()
    basis = (
        f"measured here, {threads} thread{'s' if threads > 1 else ''}: a product of the model's MLP at "
        f"{flops / 1e9:.1f} GFLOP/s, a step of {latents} latents and {rows} rows at {step / 1e9:.1f} GFLOP/s of its "
        "encoder's product; the rest in proportion"
    )
    return Speed(flops, step, basis)


def _seconds(work: Callable[[], object]) -> float:
    """The shortest time of a few runs."""
    for _ in range(_WARM_UP):
        work()
    times: list[float] = []
    for _ in range(_RUNS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


@dataclass(frozen=True)
class Plan:
    """The resources that a run will take. All sizes are in bytes, all times in seconds.

    Attributes:
        jobs: a row for each place and length (SAEs that are stepped together, and could be a job of their own):
            ``place``, ``saes``, ``widths``, ``tokens``, ``steps``, ``parameters``, ``memory`` (weights, Adam, a step,
            and the place's own bucket), ``bucket``, ``store`` (its activations, if they were stored), ``checkpoint``,
            ``released``, ``seconds`` (of its steps; None where nothing was measured).
        totals: the same quantities of one process that does all jobs, and ``model``, ``disk``, ``memory_budget``,
            ``disk_free``, ``largest_bucket`` (rows that fit the budget beside everything else),
            ``largest_bucket_alone`` (rows whose buffers alone fill the budget), ``sae_lens`` (the peak of SAELens's
            buffers), ``forward_seconds``.
        basis: a description of how the times were found.
    """

    jobs: pd.DataFrame
    totals: Mapping[str, Any]
    basis: str

    @property
    def refusals(self) -> list[str]:
        """Reasons why the run does not fit in one process; empty if it fits."""
        t, found = self.totals, list[str]()
        if t["memory"] > t["memory_budget"]:
            most = t["largest_bucket"]
            hint = f"at most {most:,} bucket_rows fit" if most else "no bucket fits beside weights and model"
            found.append(
                f"it needs {t['memory'] / GIB:,.1f} GiB of memory and {t['memory_budget'] / GIB:,.1f} GiB are free: "
                f"{hint}; or train fewer places at a time with only="
            )
        if t["disk"] > t["disk_free"]:
            found.append(
                f"it needs {t['disk'] / GIB:,.1f} GiB of disk and {t['disk_free'] / GIB:,.1f} GiB are free there"
            )
        return found

    def check(self) -> None:
        """Raise if the run does not fit.

        Raises:
            TrainingStateError: with the bytes that are needed and those that are available.
        """
        if self.refusals:
            raise TrainingStateError(f"This run does not fit: {'; '.join(self.refusals)}. force=True runs it anyway.")


def plan_suite(
    config: str | Path | Mapping[str, Any] | SuiteConfig,
    *,
    overrides: Sequence[str] = (),
    memory: float | None = None,
    device_flops: float | None = None,
    measure: bool = True,
) -> Plan:
    """Plan the resources that ``train_suite`` will take for a configuration.

    Args:
        config, overrides: as for ``train_suite``.
        memory: bytes that may be used; by default all memory of the machine.
        device_flops: FLOP/s of the device, for the times; by default measured on this machine's processor.
        measure: False omits the times.

    Raises:
        TrainingStateError: the configuration has problems.
    """
    checked = load_config(config, overrides)
    family, sizes = family_and_sizes(checked.model.name)
    groups = groups_of(checked, sizes.dims, family)
    widths = {place: family.site(place.site).d_in(sizes.dims) for place in with_targets(places_of(groups))}
    speed = None
    if device_flops is not None:
        speed = stated(device_flops)
    elif measure:
        widest = max(groups, key=lambda group: sum(spec.d_sae for spec in group.specs))
        place = widest.places[0]
        d_in, d_out = widths[place], widths[target_of(place)]
        speed = measured(widest, d_in, d_out, sizes.dims.d_model, sizes.d_ff, checked.batch_size)
    rows = [_job(group, checked, widths, speed) for group in groups]
    totals = _totals(
        rows, groups, checked, widths, sizes, budget=_machine_memory() if memory is None else memory, speed=speed
    )
    import pandas as pd

    return Plan(pd.DataFrame(rows), totals, speed.basis if speed else "not estimated")


def _layered_job(
    group: LayeredGroup, config: SuiteConfig, dims: Mapping[Place, int], speed: Speed | None
) -> dict[str, Any]:
    spec, batch, item = group.spec, config.batch_size, _ITEM[config.source.dtype]
    d_in, d_out = dims[spec.reads[0]], dims[spec.writes[0]]
    trained, released = layered_sizes(d_in, d_out, spec)
    state = (3 if spec.recipe.betas[0] > 0.0 else 2) * FLOAT32 * trained
    own = {place: dims[place] for place in with_targets(spec.reads)}
    bucket = bucket_bytes(own.values(), config.source.bucket_rows, item)
    flops = 2.0 * batch * spec.d_sae * d_in * group.steps
    skip_flops = SKIP_PRODUCTS * 2.0 * batch * d_in * d_out * len(spec.layers) * group.steps if spec.skip else 0.0
    return {
        "place": spec.name.rsplit("/width_", 1)[0],
        "saes": 1,
        "widths": str(spec.d_sae),
        "tokens": group.steps * batch,
        "steps": group.steps,
        "parameters": trained,
        "memory": state + layered_step_bytes(d_in, d_out, spec, batch) + bucket,
        "bucket": bucket,
        "store": sum(store_bytes(width, group.steps * batch, item) for width in own.values()),
        "checkpoint": state,
        "released": FLOAT32 * released,
        "seconds": flops / speed.step_flops + skip_flops / speed.flops if speed else None,
    }


def _job(group: AnyGroup, config: SuiteConfig, dims: Mapping[Place, int], speed: Speed | None) -> dict[str, Any]:
    if isinstance(group, LayeredGroup):
        return _layered_job(group, config, dims, speed)
    d_in, d_out = dims[group.place], dims[target_of(group.place)]
    widths, batch, item = [spec.d_sae for spec in group.specs], config.batch_size, _ITEM[config.source.dtype]
    momentum, skips = any(spec.recipe.betas[0] > 0.0 for spec in group.specs), sum(spec.skip for spec in group.specs)
    state = state_bytes(d_in, d_out, widths, momentum=momentum, skips=skips)
    own = {place: dims[place] for place in with_targets([group.place])}
    bucket = bucket_bytes(own.values(), config.source.bucket_rows, item)
    flops = 2.0 * batch * sum(widths) * d_in * group.steps
    skip_flops = SKIP_PRODUCTS * 2.0 * batch * d_in * d_out * skips * group.steps
    return {
        "place": group.place.key,
        "saes": len(widths),
        "widths": ", ".join(str(width) for width in dict.fromkeys(widths)),
        "tokens": group.steps * batch,
        "steps": group.steps,
        "parameters": sum(parameters(d_in, d_out, spec.d_sae, skip=spec.skip) for spec in group.specs),
        "memory": state + step_bytes(d_in, d_out, widths, batch, skips=skips) + bucket,
        "bucket": bucket,
        "store": sum(store_bytes(width, group.steps * batch, item) for width in own.values()),
        "checkpoint": state,
        "released": sum(released_bytes(d_in, d_out, spec.d_sae, skip=spec.skip) for spec in group.specs),
        "seconds": flops / speed.step_flops + skip_flops / speed.flops if speed else None,
    }


def _totals(
    rows: Sequence[Mapping[str, Any]],
    groups: Sequence[AnyGroup],
    config: SuiteConfig,
    widths: Mapping[Place, int],
    sizes: ModelSizes,
    *,
    budget: float,
    speed: Speed | None,
) -> dict[str, Any]:
    batch, item = config.batch_size, _ITEM[config.source.dtype]
    streaming = config.source.kind == "streaming"
    bucket = bucket_bytes(widths.values(), config.source.bucket_rows, item)
    model = sizes.parameters * _ITEM[config.model.dtype] if streaming else 0
    rest = sum(row["memory"] - row["bucket"] for row in rows) + model
    longest: dict[str, int] = {}
    for row in rows:
        longest[row["place"]] = max(longest.get(row["place"], 0), row["store"])
    disk = CHECKPOINTS * sum(row["checkpoint"] for row in rows) + sum(row["released"] for row in rows)
    return {
        **{key: sum(row[key] for row in rows) for key in ("saes", "parameters", "checkpoint", "released")},
        "tokens": max(row["tokens"] for row in rows),
        "steps": max(row["steps"] for row in rows),
        "memory": rest + bucket,
        "model": model,
        "bucket": bucket,
        "store": sum(longest.values()),
        "disk": disk,
        "memory_budget": budget,
        "disk_free": _free(Path(config.output)),
        "largest_bucket": largest_bucket(widths.values(), item, batch, budget - rest),
        "largest_bucket_alone": largest_bucket(widths.values(), item, batch, budget),
        "sae_lens": sae_lens_bytes(widths.values(), config.source.bucket_rows, batch, item),
        "seconds": sum(row["seconds"] for row in rows) if speed else None,
        "forward_seconds": _forward(groups, config, sizes, speed) if speed and streaming else None,
    }


def _forward(groups: Sequence[AnyGroup], config: SuiteConfig, sizes: ModelSizes, speed: Speed) -> float:
    """Seconds of all forward passes, each of which runs as deep as the deepest place that still trains."""
    assert config.data is not None  # a streaming source has text
    seconds, done = 0.0, 0
    for end in sorted({group.steps for group in groups}):
        layers = [place.layer for group in groups if group.steps >= end for place in group.places]
        blocks = max((layer + 1 for layer in layers if layer is not None), default=0)
        tokens = (end - done) * config.batch_size
        seconds += tokens * sizes.flops_per_token(blocks, config.data.context) / speed.flops
        done = end
    return seconds


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free(path: Path) -> int:
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free

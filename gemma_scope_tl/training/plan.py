"""What a run will take, before it runs and without loading a model: ``plan_suite``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.activations.source import Place, with_targets
from gemma_scope_tl.sites import get_site
from gemma_scope_tl.training import costs
from gemma_scope_tl.training.calibration import Speed, measured, stated
from gemma_scope_tl.training.config import SuiteConfig, TrainingStateError, load_config
from gemma_scope_tl.training.grid import Group, groups_of, places_of
from gemma_scope_tl.training.model_sizes import ModelSizes, sizes_of

if TYPE_CHECKING:
    import pandas as pd

GIB = 2.0**30
_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Plan:
    """What a run will take. All sizes are bytes, all times seconds.

    Attributes:
        jobs: a row for each place and length (SAEs that are stepped together, and could be a job of their own):
            ``place``, ``saes``, ``widths``, ``tokens``, ``steps``, ``parameters``, ``memory`` (weights, Adam, a step,
            and the place's own bucket), ``bucket``, ``store`` (its activations, if they were stored), ``checkpoint``,
            ``released``, ``seconds`` (of its steps; None where nothing was measured).
        totals: of one process that does all: the same names, and ``model``, ``disk``, ``memory_budget``, ``disk_free``,
            ``largest_bucket`` (rows that fit the budget beside all else), ``largest_bucket_alone`` (rows whose buffers
            alone fill the budget), ``sae_lens`` (what SAELens's buffers would peak at), ``forward_seconds``.
        basis: what the times rest on.
    """

    jobs: pd.DataFrame
    totals: Mapping[str, Any]
    basis: str

    @property
    def refusals(self) -> list[str]:
        """Why it cannot run as one process; empty if it can."""
        t, found = self.totals, list[str]()
        if t["memory"] > t["memory_budget"]:
            most = t["largest_bucket"]
            hint = f"at most {most:,} bucket_rows fit" if most else "no bucket fits beside weights and model"
            found.append(
                f"it needs {t['memory'] / GIB:,.1f} GiB of memory and {t['memory_budget'] / GIB:,.1f} GiB are there: "
                f"{hint}; or train fewer places at a time with only="
            )
        if t["disk"] > t["disk_free"]:
            found.append(
                f"it needs {t['disk'] / GIB:,.1f} GiB of disk and {t['disk_free'] / GIB:,.1f} GiB are free there"
            )
        return found

    def check(self) -> None:
        """Refuse what cannot run.

        Raises:
            TrainingStateError: with the bytes that are needed and those that are there.
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
    """What ``train_suite`` of the same configuration will take.

    Args:
        config, overrides: as there.
        memory: bytes that may be used; by default all that the machine has.
        device_flops: FLOP/s of the device, for the times; measured on this machine's processor unless given.
        measure: False leaves the times out.

    Raises:
        TrainingStateError: a wrong configuration.
    """
    checked = load_config(config, overrides)
    sizes = sizes_of(checked.model.name)
    groups = groups_of(checked, sizes.dims)
    speed = None
    if device_flops is not None:
        speed = stated(device_flops)
    elif measure:
        widest = max(groups, key=lambda group: sum(spec.d_sae for spec in group.specs))
        d_in, d_out = _widths(widest.place, sizes)
        speed = measured(widest, d_in, d_out, sizes.dims.d_model, sizes.d_ff, checked.batch_size)
    rows = [_job(group, checked, sizes, speed) for group in groups]
    totals = _totals(rows, groups, checked, sizes, _machine_memory() if memory is None else memory, speed)
    import pandas as pd

    return Plan(pd.DataFrame(rows), totals, speed.basis if speed else "not estimated")


def _job(group: Group, config: SuiteConfig, sizes: ModelSizes, speed: Speed | None) -> dict[str, Any]:
    d_in, d_out = _widths(group.place, sizes)
    widths, batch, item = [spec.d_sae for spec in group.specs], config.batch_size, _ITEM[config.source.dtype]
    state = costs.state_bytes(d_in, d_out, widths)
    own = {place: _widths(place, sizes)[0] for place in with_targets([group.place])}
    bucket = costs.bucket_bytes(own.values(), config.source.bucket_rows, item)
    flops = 2.0 * batch * sum(widths) * d_in * group.steps
    return {
        "place": group.place.key,
        "saes": len(widths),
        "widths": ", ".join(str(width) for width in dict.fromkeys(widths)),
        "tokens": group.steps * batch,
        "steps": group.steps,
        "parameters": sum(costs.parameters(d_in, d_out, width) for width in widths),
        "memory": state + costs.step_bytes(d_in, d_out, widths, batch) + bucket,
        "bucket": bucket,
        "store": sum(costs.store_bytes(width, group.steps * batch, item) for width in own.values()),
        "checkpoint": state,
        "released": sum(costs.released_bytes(d_in, d_out, width) for width in widths),
        "seconds": flops / speed.step_flops if speed else None,
    }


def _totals(
    rows: Sequence[Mapping[str, Any]],
    groups: Sequence[Group],
    config: SuiteConfig,
    sizes: ModelSizes,
    budget: float,
    speed: Speed | None,
) -> dict[str, Any]:
    batch, item = config.batch_size, _ITEM[config.source.dtype]
    widths = {place: _widths(place, sizes)[0] for place in with_targets(places_of(groups))}
    streaming = config.source.kind == "streaming"
    bucket = costs.bucket_bytes(widths.values(), config.source.bucket_rows, item)
    model = sizes.parameters * _ITEM[config.model.dtype] if streaming else 0
    rest = sum(row["memory"] - row["bucket"] for row in rows) + model
    longest: dict[str, int] = {}
    for row in rows:
        longest[row["place"]] = max(longest.get(row["place"], 0), row["store"])
    disk = costs.CHECKPOINTS * sum(row["checkpoint"] for row in rows) + sum(row["released"] for row in rows)
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
        "largest_bucket": costs.largest_bucket(widths.values(), item, batch, budget - rest),
        "largest_bucket_alone": costs.largest_bucket(widths.values(), item, batch, budget),
        "sae_lens": costs.sae_lens_bytes(widths.values(), config.source.bucket_rows, batch, item),
        "seconds": sum(row["seconds"] for row in rows) if speed else None,
        "forward_seconds": _forward(groups, config, sizes, speed) if speed and streaming else None,
    }


def _forward(groups: Sequence[Group], config: SuiteConfig, sizes: ModelSizes, speed: Speed) -> float:
    """All forward passes: each runs as deep as the deepest place that still trains."""
    assert config.data is not None  # a streaming source has text
    seconds, done = 0.0, 0
    for end in sorted({group.steps for group in groups}):
        layers = [group.place.layer for group in groups if group.steps >= end]
        blocks = max((layer + 1 for layer in layers if layer is not None), default=0)
        tokens = (end - done) * config.batch_size
        seconds += tokens * sizes.flops_per_token(blocks, config.data.context) / speed.flops
        done = end
    return seconds


def _widths(place: Place, sizes: ModelSizes) -> tuple[int, int]:
    return get_site(place.site).d_in(sizes.dims), get_site(place.target.site).d_in(sizes.dims)


def _machine_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _free(path: Path) -> int:
    there = path.absolute()
    while not there.exists():
        there = there.parent
    return shutil.disk_usage(there).free

"""``gemma-scope train``: train the SAEs of a configuration, or plan the memory, disk and time that this takes."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from gemma_scope_tl.cli import checks, options
from gemma_scope_tl.cli.output import note, print_facts, print_frame, print_rows, say, say_json

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.training.plan import Plan

GIB = 2.0**30
Config = Annotated[
    Path,
    typer.Argument(
        help="A YAML file, or the name of one that comes with the package: demo, bundled, gemma-2-2b-paper, "
        "gemma-2-9b-paper, gemma_scope_2, gemma_scope_2_short, bundled-gemma3, bundled-gemma3-layers.",
        callback=checks.config_file,
    ),
]
Show = Annotated[
    bool, typer.Option("--show", help="Print the file, as a start for one of your own, and do nothing else.")
]
Places = Annotated[
    Literal["place", "width"], typer.Option("--jobs-by", help="On Ray: one job per place, or per place and width.")
]
Harvesters = Annotated[int, typer.Option(min=1, help="On Ray: jobs that write the store if it does not exist.")]
Address = Annotated[
    str | None, typer.Option("--ray-address", help="Train as jobs on this Ray cluster; auto, host:port.")
]

Restart = Annotated[
    bool, typer.Option("--restart", help="Start over: the earlier run is removed after the first step.")
]


def train(
    config: Config,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="key=value, which overrides the file's value.")
    ] = None,
    show: Show = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print the resources that the run takes, without running it.")
    ] = False,
    memory: Annotated[float | None, typer.Option(min=0.01, help="GiB of memory to plan for.")] = None,
    device_flops: Annotated[
        float | None, typer.Option(min=1.0, help="FLOP/s to plan for; by default measured.")
    ] = None,
    restart: Restart = False,
    force: Annotated[bool, typer.Option("--force", help="Run even if the plan says that it does not fit.")] = False,
    ray: Annotated[bool, typer.Option("--ray", help="Train as jobs on a Ray on this machine.")] = False,
    ray_address: Address = None,
    jobs_by: Places = "place",
    harvesters: Harvesters = 1,
    as_json: options.Json = False,
) -> None:
    """Train the SAEs of a configuration. A second call continues an interrupted run.

    Examples:

        gemma-scope train demo

        gemma-scope train demo --show

        gemma-scope train gemma-2-2b-paper --plan --memory 16 --set "only=[res/layer_12/*]"

        gemma-scope train gemma-2-9b-paper --ray-address auto
    """
    if show:
        say(config.read_text(encoding="utf-8").rstrip())
        return
    overrides = _checked(set_ or [])
    if plan:
        from gemma_scope_tl.training.plan import plan_suite

        budget = None if memory is None else memory * GIB
        found = plan_suite(config, overrides=overrides, memory=budget, device_flops=device_flops)
        _print_plan(found, as_json)
        if found.refusals and not force:
            raise typer.Exit(1)
    elif ray or ray_address is not None:
        _print_table(lambda: _on_ray(config, overrides, ray_address, jobs_by, harvesters, not restart), as_json)
    else:
        _check_devices(config, overrides)
        _print_table(lambda: _here(config, overrides, not restart, force), as_json)


def _checked(overrides: list[str]) -> list[str]:
    for override in overrides:
        if not re.fullmatch(r"[^=\s]+=.*", override, flags=re.DOTALL):
            raise typer.BadParameter(f"{override!r} is not key=value.", param_hint="'--set'")
    return overrides


def _print_table(trained: Callable[[], pd.DataFrame], as_json: bool) -> None:
    """Train, and print the table of the SAEs; leave with the status of a signal that stopped it."""
    from gemma_scope_tl.training.running import TrainingStopped

    try:
        table = trained()
    except TrainingStopped as stopped:
        note(str(stopped))
        raise typer.Exit(128 + stopped.signal) from None
    print_frame(table, f"{len(table)} SAEs", as_json, ("path", "l0", "fvu", "silent", "steps"))


def _here(config: Path, overrides: list[str], resume: bool, force: bool) -> pd.DataFrame:
    from gemma_scope_tl.training.suite import train_suite

    return train_suite(config, overrides=overrides, resume=resume, force=force, progress=sys.stderr.isatty())


def _check_devices(config: Path, overrides: list[str]) -> None:
    from gemma_scope_tl.training.config import load_config

    read = load_config(config, overrides)
    for device in (read.device, read.source.device, read.model.device):
        checks.available(device)


def _on_ray(
    config: Path,
    overrides: list[str],
    address: str | None,
    by: Literal["place", "width"],
    harvesters: int,
    resume: bool,
) -> pd.DataFrame:
    from gemma_scope_tl.cli.output import progress
    from gemma_scope_tl.training.ray.job_table import shown_jobs
    from gemma_scope_tl.training.ray.jobs import train_on_ray

    with shown_jobs(progress) as show:
        return train_on_ray(
            config, overrides=overrides, address=address, by=by, harvesters=harvesters, resume=resume, show=show
        )


def _print_plan(plan: Plan, as_json: bool) -> None:
    if as_json:
        facts = {"jobs": plan.jobs.to_dict("records"), "totals": dict(plan.totals), "basis": plan.basis}
        say_json({**facts, "refusals": plan.refusals})
        return
    rows: list[dict[str, Any]] = [
        {
            "place": row["place"],
            "SAEs": row["saes"],
            "widths": row["widths"],
            **{key: f"{row[key]:,}" for key in ("tokens", "steps", "parameters")},
            **{key: _size(row[key]) for key in ("memory", "store", "checkpoint")},
            "time": "" if row["seconds"] is None else _time(row["seconds"]),
        }
        for row in plan.jobs.to_dict("records")
    ]
    print_rows(rows, "", False)
    print_facts(dict(_summary(plan)))
    for refusal in plan.refusals:
        say(f"{typer.style('does not fit:', fg='red')} {refusal}")


def _summary(plan: Plan) -> list[tuple[str, str]]:
    t = plan.totals
    lines = [
        ("SAEs", f"{t['saes']:,} with {t['parameters']:,} parameters, {t['steps']:,} steps"),
        (
            "memory, one process",
            f"{_size(t['memory'])} of {_size(t['memory_budget'])}: bucket {_size(t['bucket'])}, model "
            f"{_size(t['model'])}, weights, Adam and a step {_size(t['memory'] - t['bucket'] - t['model'])}",
        ),
        ("largest bucket_rows", f"{t['largest_bucket']:,} beside all else; {t['largest_bucket_alone']:,} alone"),
        ("SAELens, buffers alone", f"{_size(t['sae_lens'])} for the same places and bucket"),
        (
            "disk",
            f"{_size(t['disk'])} of {_size(t['disk_free'])} free: up to three checkpoints of {_size(t['checkpoint'])}, "
            f"released files {_size(t['released'])}",
        ),
        ("store, if written", f"{_size(t['store'])} for all places"),
    ]
    if t["seconds"] is not None:
        forward = f", forward passes {_time(t['forward_seconds'])}" if t["forward_seconds"] is not None else ""
        lines.append(("time", f"steps {_time(t['seconds'])}{forward}"))
    return [*lines, ("times rest on", plan.basis)]


def _size(count: float) -> str:
    for unit, size in (("PiB", 2**50), ("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20)):
        if count >= size:
            return f"{count / size:,.1f} {unit}"
    return f"{count / 2**10:,.1f} KiB"


def _time(seconds: float) -> str:
    for unit, size in (("years", 31_557_600.0), ("days", 86_400.0), ("h", 3_600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.1f} s"

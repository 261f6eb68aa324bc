"""Make everything that depends on the bundled model and suite, as far as it is left behind.

    python -m scripts.artefacts                      # all steps that are left behind, in order
    python -m scripts.artefacts --list               # what is left behind, and why; runs nothing
    python -m scripts.artefacts --only attribution   # one or several steps, and the pages
    python -m scripts.artefacts --skip suite         # all but these
    python -m scripts.artefacts --only tour --force  # although nothing has changed
    python -m scripts.artefacts --adopt study-probes # record files that the step's command made by hand

What each artefact was made from is recorded in ``docs/artefacts.json`` after each step, so a stopped run goes on where
it was. A failed step stops the run.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from typing import Annotated, Any

import typer

from scripts.artefacts import record as records
from scripts.artefacts.inputs import ROOT, Fingerprints
from scripts.artefacts.steps import PAGES, STEPS, Step, step_named

Names = Annotated[list[str], typer.Option(help="Name of a step; several times.")]

app = typer.Typer(add_completion=False)


@app.command(help=(__doc__ or "").splitlines()[0])
def main(
    only: Names = [],  # noqa: B006  typer reads the default
    skip: Names = [],  # noqa: B006
    adopt: Names = [],  # noqa: B006
    list_: Annotated[bool, typer.Option("--list", help="Only say what is left behind.")] = False,
    force: Annotated[bool, typer.Option(help="Run the chosen steps even if nothing has changed.")] = False,
) -> None:
    """Make what is left behind, list it, or adopt files that were made by hand."""
    for name in (*only, *skip, *adopt):
        try:
            step_named(name)
        except KeyError as error:
            raise typer.BadParameter(str(error.args[0])) from None
    chosen = [step for step in STEPS if (not only or step.name in only) and step.name not in skip]
    if adopt:
        adopted(adopt)
    elif list_:
        show(chosen)
    else:
        raise typer.Exit(run(chosen, force=force))


def show(steps: list[Step]) -> None:
    """Print each step with its state, and how long it took when it was last run."""
    record, fingerprints = records.load(), Fingerprints()
    for step in steps:
        why = records.left_behind(step, record, fingerprints)
        known = record.get(step.name, {})
        seconds = f"{known['seconds'][0]:6.0f} s" if "seconds" in known else f"{known.get('how', '?'):>8}"
        state = "left behind" if why else "up to date"
        typer.echo(f"{step.name:26}{seconds}  {state}{f' ({step.note})' if step.note else ''}")
        for reason in why:
            typer.echo(f"{'':36}{reason}")
        if why and step.lacks():
            typer.echo(f"{'':36}cannot be made here: needs {step.lacks()}")


def adopted(names: list[str]) -> None:
    """Record the files of steps as they are, as made from the present inputs."""
    record, fingerprints = records.load(), Fingerprints()
    for name in names:
        step = step_named(name)
        record[name] = records.made(step, fingerprints.of(step.inputs), "adopted", None)
        typer.echo(f"{name}: {len(record[name]['outputs'])} files adopted")
    records.save(record)


def run(steps: list[Step], *, force: bool) -> int:
    """Run the steps that are left behind, and write the pages; returns an exit status."""
    record, fingerprints = records.load(), Fingerprints()
    began = time.perf_counter()
    left_out = 0
    for number, step in enumerate(steps, 1):
        head = f"[{number}/{len(steps)}] {step.name}"
        why = records.left_behind(step, record, fingerprints)
        if not why and not force:
            typer.echo(f"{head}: up to date")
            continue
        if lacking := step.lacks():
            typer.echo(f"{head}: LEFT BEHIND, needs {lacking}")
            if not step.optional:
                return 1
            left_out += 1
            leave_out(step, record, fingerprints, lacking)
            continue
        last = record.get(step.name, {}).get("seconds")
        typer.echo(f"{head}: {'; '.join(why) or 'forced'}{f' (took {last[0]:.0f} s last time)' if last else ''}")
        inputs = fingerprints.of(step.inputs)
        took = execute(step.commands)
        if took is None:
            typer.echo(f"{head}: failed")
            return 1
        fingerprints.forget()
        record = records.load()  # another process may have adopted files meanwhile
        record[step.name] = records.made(step, inputs, "run", took)
        records.save(record)
        typer.echo(
            f"{head}: {took[0]:.0f} s ({took[1]:.0f} s of processors), {time.perf_counter() - began:.0f} s in all"
        )
    if execute((PAGES,)) is None:
        return 1
    typer.echo(f"done{f'; {left_out} left behind: see above' if left_out else ''}")
    return 0


def leave_out(step: Step, record: dict[str, Any], fingerprints: Fingerprints, lacking: str) -> None:
    """Record that the artefacts of a step are not of the present inputs."""
    known = record.setdefault(step.name, {})
    known["left_out"] = {"inputs": fingerprints.of(step.inputs), "needs": lacking}
    records.save(record)


def execute(commands: tuple[str, ...]) -> tuple[float, float] | None:
    """Run commands of Python in the root of the repository.

    Returns:
        Seconds that passed, and seconds of processors where the system counts them; None if a command failed.
    """
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": paths}
    began, worked = time.perf_counter(), _worked()
    for command in commands:
        typer.echo(f"    python {command}")
        if subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, env=env, check=False).returncode:
            return None
    return time.perf_counter() - began, _worked() - worked


def _worked() -> float:
    """Seconds of processors that finished child processes have used."""
    spent = os.times()
    return spent.children_user + spent.children_system


if __name__ == "__main__":
    app()

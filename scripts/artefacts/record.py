"""The committed record of what artefacts were made from, and what is left behind according to it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gemma_scope_tl.files import write_atomically
from scripts.artefacts.inputs import ROOT, Fingerprints, sha256
from scripts.artefacts.steps import STEPS, Step, outputs_of

RECORD = ROOT / "docs" / "artefacts.json"


def load(path: Path = RECORD) -> dict[str, Any]:
    """Step name to its record: ``inputs`` and ``outputs`` with their fingerprints, ``how`` and ``seconds``
    (that passed, and of processors).

    ``how`` is ``run``, or ``adopted`` where somebody vouched that the files were made from these inputs. A record may
    have ``left_out``: the inputs from which the step was not made, because something was lacking, and what that was.
    """
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(record: dict[str, Any], path: Path = RECORD) -> None:
    """Write the record, steps in their order."""
    ordered = {step.name: record[step.name] for step in STEPS if step.name in record}
    write_atomically(path, json.dumps(ordered, indent=1) + "\n")


def made(step: Step, inputs: dict[str, str], how: str, seconds: tuple[float, float] | None) -> dict[str, Any]:
    """The record of a step whose outputs are as they are now, made from ``inputs``.

    Raises:
        FileNotFoundError: a pattern of the step's outputs matches no file.
    """
    for pattern in step.outputs:
        if not any(ROOT.glob(pattern)):
            raise FileNotFoundError(f"The step {step.name!r} left no {pattern}.")
    outputs = {path.relative_to(ROOT).as_posix(): sha256(path) for path in outputs_of(step)}
    found: dict[str, Any] = {"how": how, "inputs": inputs, "outputs": outputs}
    return found if seconds is None else {**found, "seconds": [round(one, 1) for one in seconds]}


def left_behind(step: Step, record: dict[str, Any], fingerprints: Fingerprints) -> list[str]:
    """Why a step has to be run, a line for each reason; empty if its artefacts are up to date."""
    known = record.get(step.name)
    if known is None or "inputs" not in known:
        return ["nothing says what it was made from"]
    now = fingerprints.of(step.inputs)
    changed = [name for name, value in now.items() if known["inputs"].get(name) != value]
    why = [f"made from another {name}" for name in changed]
    there = {path.relative_to(ROOT).as_posix(): path for path in outputs_of(step)}
    why += [f"{path} is missing" for path in known["outputs"] if path not in there]
    why += [f"{path} is new" for path in there if path not in known["outputs"]]
    for name, path in there.items():
        if name in known["outputs"] and sha256(path) != known["outputs"][name]:
            why.append(f"{name} is not the file that the step wrote")
    return why


def is_known(step: Step, record: dict[str, Any], fingerprints: Fingerprints) -> bool:
    """Whether a run has said of the present inputs that it had to leave an optional step out."""
    left_out = record.get(step.name, {}).get("left_out")
    return step.optional and left_out is not None and left_out["inputs"] == fingerprints.of(step.inputs)


def report(record: dict[str, Any], fingerprints: Fingerprints, steps: Iterable[Step] = STEPS) -> dict[str, list[str]]:
    """Step name to reasons, for the steps that are left behind."""
    found = {step.name: left_behind(step, record, fingerprints) for step in steps}
    return {name: why for name, why in found.items() if why}

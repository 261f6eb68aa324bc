"""The suites that the jobs of a run have written, merged into one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_scope_tl.families import Family
from gemma_scope_tl.files import make_folder, write_atomically, writing
from gemma_scope_tl.training.checkpoint import METRICS_NAME, SUITE_NAME, read_record, write_suite
from gemma_scope_tl.training.config import SuiteConfig, TrainingStateError
from gemma_scope_tl.training.grid import AnyGroup, scaled_places_of
from gemma_scope_tl.training.release import folder_names, staged


def merge_jobs(
    folder: Path, config: SuiteConfig, groups: Sequence[AnyGroup], parts: Sequence[Path], family: Family
) -> None:
    """Write the suite of a run from the suites of its jobs, equal to the bit to the suite that one process writes.

    The files ``params.npz`` are hard links to those of the jobs, where the file system supports them. The file
    ``metrics.jsonl`` is equal only if all lengths are multiples of ``log_every``, since a process that trains several
    lengths logs at the end of each.

    Args:
        folder: folder of the run.
        config: configuration of the run.
        groups: the SAEs of the run, in the order of the grid.
        parts: folders of the jobs.
        family: family of the model.

    Raises:
        TrainingStateError: a job's suite is missing.
    """
    found, scales = _suites(parts)
    specs = [spec for group in groups for spec in group.specs]
    names = folder_names([(spec, found[spec.name][1]["l0"]) for spec in specs])
    rows: list[dict[str, Any]] = []
    with staged(folder, specs) as stage:
        for spec, name in zip(specs, names, strict=True):
            part, row = found[spec.name]
            make_folder(stage / name)
            for file in sorted(path.name for path in (part / row["path"]).iterdir()):
                _link(part / row["path"] / file, stage / name / file)
            rows.append({**row, "id": name.removeprefix(f"{spec.folder}/"), "path": name})
    write_atomically(folder / METRICS_NAME, _metrics({spec.name: i for i, spec in enumerate(specs)}, parts))
    write_suite(folder, config, family, {place: scales[place.key] for place in scaled_places_of(groups)}, rows)


def _suites(parts: Sequence[Path]) -> tuple[dict[str, tuple[Path, dict[str, Any]]], dict[str, float]]:
    """The folder and the row of every SAE, by the SAE's name, and the scales of all places."""
    found: dict[str, tuple[Path, dict[str, Any]]] = {}
    scales: dict[str, float] = {}
    for part in parts:
        if not (part / SUITE_NAME).exists():
            raise TrainingStateError(
                f"A job is done, but {part / SUITE_NAME} is missing: output must be a folder that all nodes share "
                "under one path."
            )
        facts = read_record(part / SUITE_NAME)
        scales |= facts["scales"]
        found |= {row["name"]: (part, row) for row in facts["saes"]}
    return found, scales


def _metrics(order: Mapping[str, int], parts: Sequence[Path]) -> bytes:
    """The metrics of all jobs, sorted by step and then in the order of the grid."""
    lines: list[tuple[int, int, bytes]] = []
    for part in parts:
        for line in (part / METRICS_NAME).read_bytes().splitlines(keepends=True):
            row = json.loads(line)
            lines.append((row["step"], order[row["name"]], line))
    return b"".join(line for _, _, line in sorted(lines))


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # the file system has no hard links
        with writing(target):
            shutil.copyfile(source, target)

"""The model of a run: recorded in ``run.json``, and compared when the run continues or its table is asked for."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.model.identity import model_facts
from gemma_scope_tl.training.checkpoint import CHECKPOINTS, RUN_NAME, SUITE_NAME, read_record, steps_of
from gemma_scope_tl.training.config import TrainingStateError

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel


def check_same_model(folder: Path, model: GemmaModel) -> None:
    """Compare the model with the one that is recorded in a run's folder, or record it if the run is at its beginning.

    A run of an earlier version has no such record. It continues with a warning, and the model is recorded then. A
    value that only one of the two configurations has, as after an update of transformers, is no difference.

    Raises:
        TrainingStateError: the run was made on another model; the message names what differs.
    """
    path, now = folder / RUN_NAME, model_facts(model)
    is_finished = (folder / SUITE_NAME).exists()
    record = read_record(path) if path.exists() or not is_finished else {}
    known = record.get("model")
    if known is not None:
        _compare(known, now, folder)
        return
    if is_finished or steps_of(folder / CHECKPOINTS):
        warnings.warn(
            f"{folder} holds a run of an earlier version, which did not record its model: that it was this one is not "
            "checked.",
            stacklevel=3,
        )
    if not is_finished:
        write_atomically(path, json.dumps({**record, "model": now}, indent=1) + "\n")


def _compare(known: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    old, new = known["config"], now["config"]
    differing = [
        f"{name} is {old[name]!r}, not {new[name]!r}" for name in old if name in new and old[name] != new[name]
    ]
    if known["weights"] != now["weights"]:
        differing.insert(0, "its weights are others")
    if known["backend"] != now["backend"]:
        differing.insert(0, f"its backend is {known['backend']}, not {now['backend']}")
    if differing:
        raise TrainingStateError(
            f"{folder} holds a run on another model: {'; '.join(differing[:5])}. Use that model to go on, or choose "
            "another output."
        )

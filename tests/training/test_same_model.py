"""A run continues, and gives its table, only with the model on which it began."""

from __future__ import annotations

import json
import signal
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.training.checkpoint import RUN_NAME
from gemma_scope_tl.training.config import TrainingStateError
from gemma_scope_tl.training.place import PlaceTrainer
from gemma_scope_tl.training.running import TrainingStopped
from gemma_scope_tl.training.suite import train_suite
from tests.helpers import shared_model
from tests.training.planted import PlantedSource, tiny_config


def _config(folder: Path) -> dict[str, Any]:
    return {
        "output": str(folder),
        "model": {"name": "bundled", "device": "cpu"},
        "data": {"dataset": "bundled", "column": "text", "context": 64, "limit_tokens": 8000},
        "source": {"bucket_rows": 1024, "scale_rows": 1024, "batch_rows": 8},
        "steps": 6,
        "recipe": {"preset": "fast", "batch_size": 128},
        "grid": [{"sites": ["res"], "layers": [0], "widths": [32], "target_l0s": [4]}],
        "eval_batches": 1,
        "checkpoint_every": 2,
        "threads": 1,
    }


def _train(folder: Path, model: Any = None) -> Any:
    return train_suite(_config(folder), model=model, progress=False)


def _stopped(folder: Path, model: Any = None) -> None:
    """Begin a run and stop it after some steps."""
    step, done = PlaceTrainer.step, list[int]()

    def stopping(self: Any, *args: Any) -> Any:
        done.append(1)
        if len(done) == 3:
            signal.raise_signal(signal.SIGTERM)
        return step(self, *args)

    with patch.object(PlaceTrainer, "step", stopping), pytest.raises(TrainingStopped):
        _train(folder, model)


def _other() -> Any:
    """The bundled model with one entry changed."""
    model = gs.load_model("bundled", check=False)
    with torch.no_grad():
        next(model.parameters())[5, 7] += 1.0
    return model


def _without_record(folder: Path) -> None:
    """Make the record that of an earlier version."""
    path = folder / RUN_NAME
    record = json.loads(path.read_text())
    del record["model"]
    path.write_text(json.dumps(record))


def test_another_model_is_refused_and_the_same_goes_on(tmp_path: Path) -> None:
    folder, model = tmp_path / "run", shared_model("bundled", "bridge")
    _stopped(folder, model)
    with pytest.raises(TrainingStateError, match="run on another model: its weights are others"):
        _train(folder, _other())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        table = _train(folder)  # by its name, which loads the same weights
        assert _train(folder, model).equals(table) and _train(folder).equals(table)
    with pytest.raises(TrainingStateError, match="run on another model: its weights are others"):
        _train(folder, _other())
    config = model.original_model.config
    said = pytest.raises(TrainingStateError, match=r"another model: sliding_window is \d+, not 3\.")
    with patch.object(config, "sliding_window", 3), said:
        _train(folder, model)
    with patch.object(config, "value_of_a_later_version", 3, create=True):
        assert _train(folder, model).equals(table)


def test_a_run_of_an_earlier_version_goes_on_with_a_warning(tmp_path: Path) -> None:
    folder, model = tmp_path / "run", shared_model("bundled", "bridge")
    _stopped(folder, model)
    _without_record(folder)
    with pytest.warns(UserWarning, match="did not record its model"):
        _train(folder, model)
    with pytest.raises(TrainingStateError, match="another model"):  # it is recorded now
        _train(folder, _other())
    _without_record(folder)
    with pytest.warns(UserWarning, match="did not record its model"):
        _train(folder, model)
    assert "model" not in json.loads((folder / RUN_NAME).read_text())  # a finished run is not written to


def test_other_sources_record_no_model(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    train_suite(tiny_config(folder), source=PlantedSource, progress=False)
    assert "model" not in json.loads((folder / RUN_NAME).read_text())

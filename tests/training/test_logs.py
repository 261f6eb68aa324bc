"""Loggers: the same weights with and without them, and what they wrote is what metrics.jsonl has."""

from __future__ import annotations

import builtins
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.training.config import TrainingStateError
from gemma_scope_tl.training.logs import MetricsFile
from gemma_scope_tl.training.suite import train_suite
from tests.training.kill import hashes
from tests.training.planted import PlantedSource, tiny_config


def _run(folder: Path, **changes: Any) -> dict[str, str]:
    train_suite(tiny_config(folder, **changes), source=PlantedSource, progress=False)
    return {
        name: digest for name, digest in hashes(folder).items() if name.split("/")[0] not in ("tensorboard", "wandb")
    }


def _rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_metrics_file_is_cut_at_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsFile(path, 0)
    log.log(1, [{"name": "a", "l0": 2.0}])
    kept = log.sync()
    log.log(2, [{"name": "a", "l0": 3.0}])
    log.close()
    log = MetricsFile(path, kept)
    log.log(2, [{"name": "a", "l0": 4.0}])
    log.close()
    assert [json.loads(line)["l0"] for line in path.read_text().splitlines()] == [2.0, 4.0]
    with pytest.raises(TrainingStateError, match="at the checkpoint: it was cut"):
        MetricsFile(path, 10_000)


def test_tensorboard_changes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="pip install 'gemma-scope-tl[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    plain = _run(tmp_path / "plain")
    assert _run(tmp_path / "logged", loggers=[{"kind": "tensorboard"}]) == plain
    events = EventAccumulator(str(tmp_path / "logged" / "tensorboard"))
    events.Reload()
    for row in _rows(tmp_path / "plain"):
        scalars = {event.step: event.value for event in events.Scalars(f"{row['name']}/error")}
        assert scalars[row["step"]] == pytest.approx(row["error"], rel=1e-6)  # they are float32 there


def test_wandb_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a module in W&B's place that takes note of the calls."""
    seen: list[dict[str, Any]] = []

    class Fake:
        def init(self, **given: Any) -> Fake:
            seen.append(given)
            return self

        def define_metric(self, *_: Any, **__: Any) -> None: ...

        def log(self, values: dict[str, Any]) -> None:
            seen.append(values)

        def finish(self) -> None:
            seen.append({"finished": True})

    monkeypatch.setitem(sys.modules, "wandb", Fake())  # pyright: ignore[reportArgumentType]
    plain = _run(tmp_path / "plain")
    assert _run(tmp_path / "logged", loggers=[{"kind": "wandb", "mode": "offline"}]) == plain
    assert (seen[0]["mode"], seen[0]["resume"], seen[-1]) == ("offline", "allow", {"finished": True})
    for row in _rows(tmp_path / "plain"):
        assert any(v.get("step") == row["step"] and v.get(f"{row['name']}/l0") == row["l0"] for v in seen)


@pytest.mark.parametrize("kind", ["tensorboard", "wandb"])
def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "wandb" or name.startswith("torch.utils.tensorboard"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(GemmaScopeError, match=rf"pip install 'gemma-scope-tl\[{kind}\]'"):
        _run(tmp_path, loggers=[{"kind": kind}])

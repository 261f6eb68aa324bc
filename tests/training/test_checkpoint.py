"""Checkpoints: whole, verified, the last two kept; what is damaged or another's is refused by name."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest
import torch

from gemma_scope_tl.training.checkpoint import (
    MANIFEST_NAME,
    UNFINISHED,
    CheckpointManifest,
    check_same_run,
    load_manifest,
    load_state,
    save_checkpoint,
    steps_of,
)
from gemma_scope_tl.training.config import TrainingStateError

STATE = {"a": {"w": torch.arange(4096.0), "n": torch.tensor(3)}, "b": {"w": torch.zeros(2, 3)}}


def _manifest(step: int) -> CheckpointManifest:
    return CheckpointManifest(
        step=step, config={"seed": 1}, scales={"res/layer_0": 0.1}, metrics_bytes=7, threads=1, files={}
    )


def test_round_trip_and_the_last_two(tmp_path: Path) -> None:
    for step in (5, 10, 100):
        save_checkpoint(tmp_path, _manifest(step), STATE)
    assert steps_of(tmp_path) == [10, 100]
    folder = tmp_path / "step_100"
    manifest = load_manifest(folder)
    assert (manifest.step, manifest.scales["res/layer_0"], manifest.metrics_bytes) == (100, 0.1, 7)
    for name, state in STATE.items():
        found = load_state(folder, manifest, name)
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_every_damage_is_named(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, _manifest(5), STATE)
    manifest, path = load_manifest(folder), folder / "a.safetensors"
    whole = path.read_bytes()
    for broken in (whole[:-1], whole[:100], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        path.write_bytes(broken)
        with pytest.raises(TrainingStateError, match=r"a\.safetensors is not the file that was written"):
            load_state(folder, manifest, "a")
    path.unlink()
    with pytest.raises(TrainingStateError, match=r"a\.safetensors is missing"):
        load_state(folder, manifest, "a")
    with pytest.raises(TrainingStateError, match="belongs to another run"):
        load_state(folder, manifest, "c")
    text = (folder / MANIFEST_NAME).read_text()
    for wrong in ("", text[:50], text.replace('"version": 1', '"version": 2'), text.replace("checkpoint", "x")):
        (folder / MANIFEST_NAME).write_text(wrong)
        with pytest.raises(TrainingStateError, match="not the manifest of a checkpoint"):
            load_manifest(folder)
    (folder / MANIFEST_NAME).write_text(text)
    folder.rename(tmp_path / "step_9")
    with pytest.raises(TrainingStateError, match="is of step 5, in folder step_9"):
        load_manifest(tmp_path / "step_9")


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path) -> None:
    """The system refuses to let a file grow: what a full disk does, without filling one."""
    save_checkpoint(tmp_path, _manifest(5), STATE)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        with pytest.raises(TrainingStateError, match="step 10 could not be written.*step 5 is kept"):
            save_checkpoint(tmp_path, _manifest(10), STATE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert steps_of(tmp_path) == [5]
    assert not (tmp_path / UNFINISHED).exists()
    assert torch.equal(load_state(tmp_path / "step_5", load_manifest(tmp_path / "step_5"), "a")["w"], STATE["a"]["w"])


def test_what_is_left_of_a_killed_write_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / UNFINISHED).mkdir()
    (tmp_path / UNFINISHED / "a.safetensors").write_bytes(b"half")
    assert steps_of(tmp_path) == []
    save_checkpoint(tmp_path, _manifest(5), STATE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_5"]


def test_other_configurations_are_refused_naming_the_key(tmp_path: Path) -> None:
    here = {"grid": [{"widths": [64]}], "seed": 1}
    check_same_run(here, {"grid": [{"widths": [64]}], "seed": 1}, tmp_path)
    with pytest.raises(TrainingStateError, match=r"grid\.0\.widths\.0 is 64, not 65; seed is 1, not 2"):
        check_same_run(here, {"grid": [{"widths": [65]}], "seed": 2}, tmp_path)

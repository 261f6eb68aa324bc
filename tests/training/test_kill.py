"""A run that is killed at any moment ends with the files of one that was not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma_scope_tl.training.suite import train_suite
from tests.training.kill import ROOT, hashes, killed_run
from tests.training.planted import PlantedSource, tiny_config

pytestmark = pytest.mark.kill


def test_killed_runs_end_equal(tmp_path: Path) -> None:
    killed_run(tmp_path / "whole", 0, 0, steps=180)
    hits = killed_run(tmp_path / "broken", 3, 1, steps=180)
    assert len(hits) == 3
    assert "write" in hits  # a checkpoint was being written
    whole = hashes(tmp_path / "whole")
    assert len(whole) == 8  # five SAEs, run.json, suite.json, metrics.jsonl: nothing was left behind
    assert hashes(tmp_path / "broken") == whole


def test_sigterm_saves_and_says_so(tmp_path: Path) -> None:
    """The process ends with its error after a checkpoint of the step that it was in; the next call goes on."""
    command = [sys.executable, "-m", "tests.training.kill", "--child", str(tmp_path / "run"), "--steps", "800"]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    while not list((tmp_path / "run").glob("checkpoints/step_*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    error = process.communicate()[1].decode()
    assert process.returncode == 1
    assert "TrainingStopped: Stopped by SIGTERM after step" in error
    step = int(error.split("after step ")[1].split()[0])
    assert (tmp_path / "run" / "checkpoints" / f"step_{step}").is_dir()
    config = tiny_config(tmp_path / "run", steps=800, only=[])
    table = train_suite(config, overrides=["checkpoint_every=500"], source=PlantedSource, progress=False)
    assert len(table) == 5
    assert f'"from_step": {step}' in (tmp_path / "run" / "runs.jsonl").read_text()

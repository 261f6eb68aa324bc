"""``gemma-scope train``: the plan, a run, being stopped, and errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gemma_scope_tl.cli import app
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.registry.locate import configurations
from gemma_scope_tl.training.config import load_config

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = (
    "steps=6",
    "recipe.batch_size=256",
    "source.bucket_rows=1024",
    "source.scale_rows=1024",
    "data.limit_tokens=8192",
    "eval_batches=1",
    "grid.0.sites=[res]",
    "grid.0.widths=[64]",
)


def _run(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["train", *args], catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == code, result.output
    return result.stdout


def _sets(folder: Path, *more: str) -> list[str]:
    return [part for value in (f"output={folder}", *SMALL, *more) for part in ("--set", value)]


def test_configurations_go_by_name_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    help_text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "400"}).output
    for name, file in configurations().items():
        assert re.search(rf"[ ,]{re.escape(name)}[ ,.]", help_text), f"{name} is not in the help"
        assert _run(name, "--show") == file.read_text(encoding="utf-8").rstrip() + "\n"
        assert load_config(name) == load_config(file)
    assert list(tmp_path.iterdir()) == []


def test_a_file_goes_before_a_name_and_a_folder_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo").mkdir()
    assert load_config("demo").output == "build/demo-suite"
    (tmp_path / "demo").rmdir()
    (tmp_path / "demo").write_text(_run("demo", "--show").replace("build/demo-suite", "mine"))
    assert load_config("demo").output == "mine"
    (tmp_path / "folder").mkdir()
    with pytest.raises(GemmaScopeError, match="folder is a folder: name a file"):
        load_config("folder")


def test_plan(tmp_path: Path) -> None:
    demo = str(CONFIGS / "demo.yaml")
    text = _run(demo, "--plan", "--device-flops", "1e12", "--set", f"output={tmp_path / 'x'}")
    for part in ("res/layer_2", "largest bucket_rows", "SAELens", "as given"):
        assert part in text
    assert not (tmp_path / "x").exists()
    facts = json.loads(_run(demo, "--plan", "--device-flops", "1e12", "--json"))
    assert [job["place"] for job in facts["jobs"]] == [f"{s}/layer_2" for s in ("res", "mlp", "att", "transcoder")]
    paper = str(CONFIGS / "gemma-2-2b-paper.yaml")
    assert "does not fit" in _run(paper, "--plan", "--memory", "16", "--device-flops", "1e15", code=1)


@pytest.mark.slow
def test_train_and_again(tmp_path: Path) -> None:
    demo = str(CONFIGS / "demo.yaml")
    rows = json.loads(_run(demo, *_sets(tmp_path), "--json"))
    assert [row["name"] for row in rows] == ["res/layer_2/width_64/target_l0_26"]
    assert (tmp_path / rows[0]["path"] / "params.npz").exists()
    assert json.loads(_run(demo, *_sets(tmp_path), "--json")) == rows


@pytest.mark.kill
def test_ctrl_c_is_status_130_and_errors_are_one_line(tmp_path: Path) -> None:
    code = "from gemma_scope_tl.cli import main; main()"
    command = [sys.executable, "-c", code, "train", str(CONFIGS / "demo.yaml")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    sets = _sets(tmp_path, "steps=100000", "checkpoint_every=2", "grid.0.widths=[64]")
    process = subprocess.Popen([*command, *sets], env=env, stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.glob("checkpoints/step_*")) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    error = process.communicate()[1]
    assert process.returncode == 130, error
    assert "Stopped by SIGINT after step" in error and "the same call continues" in error
    bad = subprocess.run([*command, "--set", "sead=1"], env=env, capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    assert "Unknown key 'sead'. Nearest: seed" in bad.stderr
    assert "Traceback" not in bad.stderr

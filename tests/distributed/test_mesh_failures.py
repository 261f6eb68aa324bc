"""Processes of one job of which some fail: the others end in bounded time, and say what to do."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma_scope_tl.training.checkpoint import write_run
from gemma_scope_tl.training.config import load_config
from tests.distributed.mesh_suite_worker import mesh_config

ROOT = Path(__file__).resolve().parents[2]


def start(module: str, *arguments: object, world: int = 2) -> list[subprocess.Popen[str]]:
    """Processes as a launcher starts them that does not watch over them, as ``srun`` does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found: list[subprocess.Popen[str]] = []
    for rank in range(world):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        meeting = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
        }
        command = [sys.executable, "-m", f"tests.distributed.{module}", *map(str, arguments)]
        env = {**os.environ, **place, **meeting, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        found.append(subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True))
    return found


@pytest.mark.kill
@pytest.mark.parametrize("number", ["SIGKILL", "SIGSTOP"])
def test_a_process_that_dies_or_hangs_ends_the_others(number: str) -> None:
    """Killed, its sockets close; halted, as where its machine is lost, they stay open and say nothing."""
    first, second = start("failing_worker", number, 5)
    try:
        began = time.monotonic()
        error = first.communicate(timeout=120)[1]
        assert first.returncode == 1
        assert "start the same command again" in error.splitlines()[-1], error[-2000:]
        assert time.monotonic() - began < 90  # most of it imports
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


@pytest.mark.slow
def test_all_processes_say_why_the_leading_one_refuses(tmp_path: Path) -> None:
    """Resumed with another mesh: no process waits for one that has left, or blames the network."""
    (tmp_path / "run").mkdir()
    write_run(tmp_path / "run", load_config(mesh_config(tmp_path / "run", mesh={"latents": 1, "data": 2})))
    before = {path.name for path in (tmp_path / "run").iterdir()}
    for process in start("mesh_suite_worker", tmp_path / "run", 2, 1):
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 1
        assert "mesh.latents is 1, not 2; mesh.data is 2, not 1" in error.splitlines()[-1], error[-2000:]
    assert {path.name for path in (tmp_path / "run").iterdir()} <= before | {".lock"}

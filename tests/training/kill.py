"""Kill a training run at random moments until it is finished, and compare what it wrote with an undisturbed run.

``python -m tests.training.kill --kills 50`` kills that many times; half of the kills wait for a checkpoint being
written.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.training.planted import PlantedSource, tiny_config

ROOT = Path(__file__).resolve().parents[2]
PAUSE = "KILL_TEST_PAUSE"
"""Seconds that the child below waits at each point of a write, so that a kill can hit any of them."""


def slow_writes() -> None:
    """Wait ``PAUSE`` seconds before files are flushed and renamed."""
    pause = float(os.environ.get(PAUSE, "0"))
    if pause:
        flush, rename = os.fsync, Path.rename
        os.fsync = lambda handle: (time.sleep(pause), flush(handle))[1]
        Path.rename = lambda self, target: (time.sleep(pause), rename(self, target))[1]  # type: ignore[method-assign]


def child(output: Path, steps: int) -> None:
    """Train; where ``PAUSE`` is set, slowly while files are flushed and renamed."""
    slow_writes()
    from gemma_scope_tl.training.suite import train_suite

    train_suite(tiny_config(output, steps=steps), source=PlantedSource, progress=False)


def killed_run(output: Path, kills: int, seed: int, steps: int = 24) -> list[str]:
    """Start the child over and over, kill it ``kills`` times, then let it finish; what each kill hit.

    Raises:
        AssertionError: the child ended by itself with an error.
    """
    rng, hits = random.Random(seed), list[str]()
    while True:
        targeted = len(hits) % 2 == 1
        env = {**os.environ, "OMP_NUM_THREADS": "1", **({PAUSE: "0.05"} if targeted else {})}
        command = [sys.executable, "-m", "tests.training.kill", "--child", str(output), "--steps", str(steps)]
        process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.PIPE)
        if len(hits) < kills:
            hit = _kill(process, output, targeted, rng)
            if hit:
                hits.append(hit)
        error = process.communicate()[1].decode()
        if process.returncode == 0:
            return hits
        assert process.returncode == -signal.SIGKILL, error


def _kill(process: subprocess.Popen[bytes], output: Path, targeted: bool, rng: random.Random) -> str | None:
    """Kill at a random moment: after the run began to train, or while a checkpoint is written."""
    watched, delay = output / "checkpoints" / ".unfinished", rng.random() * (0.3 if targeted else 0.6)
    before = (output / "metrics.jsonl").stat().st_mtime_ns if (output / "metrics.jsonl").exists() else 0
    while process.poll() is None:
        busy = watched.exists() if targeted else (output / "metrics.jsonl").exists()
        if busy and (targeted or (output / "metrics.jsonl").stat().st_mtime_ns != before):
            break
        time.sleep(0.002)
    time.sleep(delay)
    if process.poll() is not None:
        return None
    during = "write" if watched.exists() else "elsewhere"
    process.kill()
    process.wait()
    return during


def hashes(output: Path) -> dict[str, str]:
    """Every file of a finished run but those that say when it ran, by its path."""
    skip = {".lock", "runs.jsonl"}
    files = [path for path in output.rglob("*") if path.is_file() and path.name not in skip]
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--child", type=Path)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.steps)
        return
    with tempfile.TemporaryDirectory() as folder:
        whole, broken = Path(folder) / "whole", Path(folder) / "broken"
        steps = max(options.steps, 60 * options.kills)
        killed_run(whole, 0, 0, steps)
        began = time.monotonic()
        hits = killed_run(broken, options.kills, options.seed, steps)
        same = hashes(whole) == hashes(broken)
        sys.stdout.write(
            f"{len(hits)} kills ({hits.count('write')} while a checkpoint was written) over {steps} steps, "
            f"{time.monotonic() - began:.0f} s: {len(hashes(whole))} files {'equal' if same else 'DIFFER'}\n"
        )
    sys.exit(0 if same and len(hits) == options.kills else 1)


if __name__ == "__main__":
    main()

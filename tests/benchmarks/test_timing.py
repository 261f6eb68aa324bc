"""Medians, ranges and ratios of paired measurements, how well buffers mix, and runs that continue."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import __main__ as command
from benchmarks.first_feature import timed
from benchmarks.mixing import mixing
from benchmarks.timing import compared, paired, spread


def test_a_spread_is_the_median_and_the_range() -> None:
    assert spread("x", [3.0, 1.0, 2.0]) == {"x": 2.0, "x_min": 1.0, "x_max": 3.0}


def test_ratios_are_of_pairs_and_above_one_where_ours_is_better() -> None:
    """The machine becomes three times as slow between the pairs: each pair's ratio is unchanged."""
    slower = compared([1.0, 3.0], [2.0, 6.0], "s")
    assert (slower["ratio"], slower["ratio_min"], slower["ratio_max"], slower["runs"]) == (2.0, 2.0, 2.0, 2)
    speeds = compared([4.0, 8.0], [2.0, 2.0], "rows/s", more_is_better=True)
    assert (speeds["ours_value"], speeds["peer_value"], speeds["ratio"]) == (6.0, 2.0, 3.0)
    with pytest.raises(ValueError, match="shorter"):
        compared([1.0, 2.0], [1.0], "s")


def test_both_sides_run_in_turn() -> None:
    calls: list[str] = []
    found = paired(lambda: calls.append("ours"), lambda: calls.append("peer"), runs=2, warmup=1)
    assert calls == ["ours", "peer"] * 3
    assert found["ours_s_min"] <= found["ours_s"] <= found["ours_s_max"] and found["runs"] == 2


def test_a_process_is_timed_by_the_clock_and_by_its_processor() -> None:
    code = "import sys, time; time.sleep(0.3); print('[1.0]')"
    found = timed(code)
    assert found.found == [1.0]
    assert found.wall_s >= 0.3 and found.cpu_s > 0.0  # a sleeping process uses the clock only
    with pytest.raises(subprocess.CalledProcessError) as raised:
        timed("raise SystemExit('it failed')")
    assert "it failed" in raised.value.stderr


def test_mixing_is_what_a_loop_over_pairs_finds() -> None:
    """Against the definition, on a shuffled stream of 8 sequences of 12 rows, of which the middle four count."""
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(8), 12))
    distances: list[float] = []
    together: list[int] = []
    for sequence in (2, 3, 4, 5):
        at = np.flatnonzero(order == sequence)
        distances += [abs(a - b) for a in at for b in at if a != b]
        together += [int(((at // 16) == (a // 16)).sum()) - 1 for a in at]
    found = mixing(order, batch=16, context=12)
    assert found["distance"] == pytest.approx(np.mean(distances), rel=1e-12)
    assert found["together"] == pytest.approx(np.mean(together), rel=1e-12)


def test_an_unshuffled_stream_is_not_mixed() -> None:
    found = mixing(np.repeat(np.arange(8), 16), batch=16, context=16)
    assert found == {"distance": pytest.approx(17 / 3), "together": 15.0}  # (n + 1) / 3 for neighbouring rows


def test_a_run_that_was_stopped_continues_with_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def run(argv: list[str], check: bool) -> Any:
        name = argv[2].removeprefix("benchmarks.")
        assert check and argv[:2] == [sys.executable, "-m"]
        started.append(name)
        if name == "sparse" and started.count("sparse") == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(command.subprocess, "run", run)
    monkeypatch.setattr(command, "update_pages", lambda: None)
    notes = tmp_path / "build" / "bench.json"
    names = ("loading", "sparse", "store")
    with pytest.raises(KeyboardInterrupt):
        command.run_all(names, notes)
    assert json.loads(notes.read_text(encoding="utf-8")) == ["loading"]
    command.run_all(names, notes)
    assert started == ["loading", "sparse", "sparse", "store"]
    assert not notes.exists()  # the next run begins anew
    command.run_all(names[:1], None)
    assert started[-1] == "loading"


def test_an_unknown_benchmark_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["sparsse"])
    assert "there is no benchmark 'sparsse'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", [*command.NAMES, "gpu"])
def test_every_benchmark_runs_at_tiny_sizes(name: str) -> None:
    """A benchmark that calls something that was renamed is found here; at these sizes its numbers mean nothing."""
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", "--quick"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    if name != "gpu":
        assert "| --- | --- | --- | --- |" in done.stdout

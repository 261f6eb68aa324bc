"""Every reader on its seeds, on whatever was once found to break it, and on a few thousand new inputs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.fuzz import mutators
from tests.fuzz.guard import Guard, Violation
from tests.fuzz.harness import fuzz, outcome, shrink
from tests.fuzz.targets import NAMES, Target, make_target

FINDINGS = sorted(path for path in (Path(__file__).parent / "findings").glob("*/*") if path.suffix != ".md")
ACCEPTED = {"npz": 11, "safetensors": 8, "yaml": 2, "cfg": 4, "config": 4, "partial": 19, "stamp": 4}
EXECUTIONS = {"npz": 150, "safetensors": 200, "yaml": 40, "config": 150, "partial": 150, "stamp": 30}


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Target, Guard]:
    monkeypatch.setenv("GEMMA_SCOPE_TL_CACHE", str(tmp_path / "cache"))
    return make_target(request.param, tmp_path), Guard(tmp_path)


@pytest.mark.parametrize("made", NAMES, indirect=True)
def test_seeds_are_read(made: tuple[Target, Guard]) -> None:
    """Those that are no SAE on purpose are refused; a search from seeds that all fail would find nothing."""
    target, guard = made
    outcomes = [outcome(target, data, guard) for data in target.seeds()]
    assert outcomes.count("ok") == ACCEPTED[target.name], outcomes
    assert set(outcomes) <= {"ok", "WeightsError", "RegistryError"}


UNFIXED = pytest.mark.xfail(
    strict=True, raises=Violation, reason="not fixed yet; when it is, drop .unfixed from its name"
)


@pytest.mark.parametrize(
    ("made", "path"),
    [
        pytest.param(
            path.parent.name,
            path,
            id=f"{path.parent.name}-{path.name}",
            marks=[UNFIXED] if path.suffix == ".unfixed" else [],
        )
        for path in FINDINGS
    ],
    indirect=["made"],
)
def test_findings(made: tuple[Target, Guard], path: Path) -> None:
    """The ending of a finding's name is what reading it must come to; one that is not fixed yet must still fail."""
    assert outcome(made[0], path.read_bytes(), made[1]) == path.suffix[1:]


@pytest.mark.fuzz
@pytest.mark.parametrize("made", EXECUTIONS, indirect=True)
def test_a_short_search_finds_nothing(made: tuple[Target, Guard]) -> None:
    target, guard = made
    totals = fuzz(target, guard, 60, seed=0, extra=[], executions=EXECUTIONS[target.name])
    assert not totals.findings
    assert totals.executions == EXECUTIONS[target.name]
    assert len(totals.corpus) > 1


@pytest.mark.fuzz
@pytest.mark.parametrize(
    ("defect", "key"),
    [
        (lambda data, folder: [][1], "IndexError"),
        (lambda data, folder: (folder / "fuzz.yaml").with_name("x").write_text("x"), "audit open"),
        (lambda data, folder: __import__("subprocess").run(["true"]), "audit subprocess.Popen"),
        (lambda data, folder: exec("1"), "audit exec"),
        (lambda data, folder: __import__("pickle").loads(b"cposix\nsystem\n."), "audit pickle.find_class"),
    ],
)
def test_the_search_sees_defects(defect: Any, key: str, tmp_path: Path) -> None:
    """A reader with one defect behind one byte that no seed has: it is found, and shrunk to that byte."""
    whole, guard = make_target("yaml", tmp_path), Guard(tmp_path)

    def run(data: bytes) -> None:
        if b"\xff" in data:
            defect(data, tmp_path)

    target = Target("yaml", lambda: [b"a: b\nc: d"], mutators.mutate_bytes, whole.place, run, whole.files)
    totals = fuzz(target, guard, 60, seed=0, extra=[], executions=400)
    (found,) = [name for name in totals.findings if name.startswith(key)]
    data, text = totals.findings[found]
    assert text
    assert shrink(target, guard, data, found) == b"\xff"


def test_mutators_take_anything(tmp_path: Path) -> None:
    rng = random.Random(0)
    for name in [name for name in NAMES if name != "cfg"]:
        folder = tmp_path / name
        folder.mkdir()
        target = make_target(name, folder)
        for data in [b"", b"PK", rng.randbytes(99), *target.seeds()]:
            for _ in range(20):
                assert len(target.mutate(data, rng, b"PK\x03\x04")) <= 3 << 16

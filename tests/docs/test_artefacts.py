"""What is made from the bundled model and suite is up to date, and what is left behind is named."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from scripts import study_page
from scripts.artefacts import __main__ as command
from scripts.artefacts import inputs, record, steps
from scripts.artefacts.inputs import INPUTS, ROOT, Fingerprints
from scripts.artefacts.steps import APART, STEPS, Step, commands_of, outputs_of, step_named


def test_nothing_is_left_behind() -> None:
    """The message names each artefact's step, why it is left behind, and the command that makes it."""
    known, fingerprints = record.load(), Fingerprints()
    left = record.report(known, fingerprints)
    for name in [name for name in left if record.is_known(step_named(name), known, fingerprints)]:
        warnings.warn(f"{name} is left behind, as the record says: {left.pop(name)}", stacklevel=1)
    lines = [f"{name}: {reason}" for name, why in left.items() for reason in why]
    assert not lines, "\n".join([*lines, f"run: {commands_of(map(step_named, left))}"])


def test_every_generated_file_belongs_to_one_step_or_says_why_to_none() -> None:
    patterns = ("docs/**/*.png", "docs/**/*.csv", "docs/**/*.json", "tutorials/*.ipynb", "benchmarks/results/**/*.json")
    generated = inputs.files(
        *patterns,
        "pretrained_yaml/bundled-*",
        "gemma_scope_tl/bundled/**/results/*",
        "gemma_scope_tl/bundled/**/saes/**/*",
    )
    owners: dict[Path, list[str]] = {path: [] for path in generated}
    for step in STEPS:
        for path in outputs_of(step):
            owners[path].append(step.name)
    apart = {path for pattern in APART for path in ROOT.glob(pattern)}
    for path, names in owners.items():
        assert len(names) == 1 or (not names and path in apart), f"{path.relative_to(ROOT)}: {names}"


def test_every_figure_of_the_pages_is_an_artefact() -> None:
    made = {path for step in STEPS for path in outputs_of(step)} | {ROOT / path for path in APART}
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).resolve() in made, f"{page.name}: {target}"


def test_steps_are_in_order_and_name_what_there_is() -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)
    assert set(steps.STUDIES) == set(study_page.STUDIES)
    order = [step.name for step in STEPS]
    assert order.index("suite") < order.index("results") < order.index("results-figures")
    for step in STEPS:
        assert set(step.inputs) <= set(INPUTS)
        for one in step.commands:
            target = one.split()[1] if one.startswith("-m ") else one.split()[0]
            path = ROOT / target if target.endswith(".py") else ROOT / target.replace(".", "/")
            assert path.exists() or path.with_suffix(".py").exists(), one
    with pytest.raises(KeyError, match="study-probes"):
        step_named("probes")


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of two inputs and two steps, the second of which reads what the first writes."""
    (tmp_path / "model.txt").write_text("model")
    (tmp_path / "scripts").mkdir()
    (tmp_path / "one.py").write_text(
        "import pathlib as p\np.Path('one.txt').write_text(p.Path('model.txt').read_text())"
    )
    (tmp_path / "two.py").write_text("import pathlib as p\np.Path('two.txt').write_text(p.Path('one.txt').read_text())")
    (tmp_path / "pages.py").write_text("")
    made = (
        Step("one", ("one.py",), ("model",), ("one.txt",)),
        Step("two", ("two.py",), ("first",), ("two.txt",)),
        Step("three", ("nowhere.py",), ("model",), ("three.txt",), lambda: "a browser", optional=True),
    )
    for module in (inputs, record, steps, command):
        monkeypatch.setattr(module, "ROOT", tmp_path, raising=False)
        monkeypatch.setattr(module, "STEPS", made, raising=False)
    given = {"model": lambda: inputs.of_files("model.txt"), "first": lambda: inputs.of_files("one.txt")}
    monkeypatch.setattr(inputs, "INPUTS", given)
    monkeypatch.setattr(command, "PAGES", "pages.py")
    path = tmp_path / "record.json"
    monkeypatch.setattr(record.load, "__defaults__", (path,))
    monkeypatch.setattr(record.save, "__defaults__", (None, path)[1:])
    monkeypatch.setattr(record.report, "__defaults__", (made,))
    return tmp_path


def state() -> dict[str, list[str]]:
    return record.report(record.load(), Fingerprints())


def runs(*arguments: str) -> Any:
    return CliRunner().invoke(command.app, arguments)


def test_only_what_is_left_behind_is_run_in_order(project: Path) -> None:
    assert set(state()) == {"one", "two", "three"}
    result = runs()
    assert result.exit_code == 0, result.output
    assert (project / "two.txt").read_text() == "model"
    assert (
        re.search(r"\[1/3\] one: \d+ s", result.output) and "[3/3] three: LEFT BEHIND, needs a browser" in result.output
    )
    assert set(state()) == {"three"}
    again = runs()
    assert "[1/3] one: up to date" in again.output and "[2/3] two: up to date" in again.output
    (project / "model.txt").write_text("another")
    assert state()["one"] == ["made from another model"]
    assert "up to date" not in runs("--only", "one").output
    assert state()["two"] == ["made from another first"]
    runs("--skip", "three")
    assert (project / "two.txt").read_text() == "another" and set(state()) == {"three"}


def test_a_changed_missing_or_new_file_is_named(project: Path) -> None:
    runs()
    (project / "one.txt").write_text("by hand")
    assert state()["one"] == ["one.txt is not the file that the step wrote"]
    (project / "one.txt").unlink()
    assert "one.txt is missing" in state()["one"]
    listed = runs("--list").output
    assert "left behind" in listed and "one.txt is missing" in listed and not (project / "one.txt").exists()
    assert commands_of([STEPS[0]]) == f"python -m scripts.artefacts --only {STEPS[0].name}"


def test_a_failed_step_stops_the_run_and_keeps_what_is_done(project: Path) -> None:
    (project / "two.py").write_text("raise SystemExit(3)")
    result = runs()
    assert result.exit_code == 1 and "[2/3] two: failed" in result.output
    assert "one" not in state() and "two" in state()
    (project / "two.py").write_text("")
    with pytest.raises(FileNotFoundError, match=r"two\.txt"):  # a step that succeeds without its output is no success
        CliRunner().invoke(command.app, [], catch_exceptions=False)


def test_what_is_left_out_is_known_for_these_inputs_only(project: Path) -> None:
    three = command.STEPS[2]
    runs()
    assert record.is_known(three, record.load(), Fingerprints()) and "three" in state()
    (project / "model.txt").write_text("another")
    assert not record.is_known(three, record.load(), Fingerprints())
    assert not record.is_known(three._replace(optional=False), record.load(), Fingerprints())


def test_files_made_by_hand_are_adopted_and_unknown_steps_refused(project: Path) -> None:
    shutil.copy(project / "model.txt", project / "one.txt")
    assert runs("--adopt", "one").exit_code == 0 and "one" not in state()
    assert json.loads((project / "record.json").read_text())["one"]["how"] == "adopted"
    refused = runs("--only", "tow")
    assert refused.exit_code == 2 and "two" in refused.output


def test_fingerprints_are_of_names_and_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "ROOT", tmp_path)
    (tmp_path / "a").write_text("1")
    first = inputs.of_files("*")
    shutil.move(tmp_path / "a", tmp_path / "b")
    renamed = inputs.of_files("*")
    (tmp_path / "b").write_text("2")
    assert len({first, renamed, inputs.of_files("*")}) == 3
    found = subprocess.run(["sha256sum", str(tmp_path / "b")], capture_output=True, text=True, check=True).stdout
    assert inputs.sha256(tmp_path / "b") == found.split()[0]

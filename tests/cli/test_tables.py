"""Every verb's table at every width: distinct headers, whole cells, nothing wider than the terminal."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner

from gemma_scope_tl.cli import app, interp, publish
from gemma_scope_tl.cli import output as tables
from gemma_scope_tl.model import loading
from gemma_scope_tl.release.upload import Upload, UploadFile
from tests.cli.test_help import _once

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = ("--rows", "1", "--context", "24")
PLAN = ("train", str(CONFIGS / "gemma-2-2b-paper.yaml"), "--plan", "--device-flops", "1e15", "--memory", "16")
VERBS: list[tuple[str, ...]] = [
    ("list", "*layer_20/width_16k*", "--site", "res", "--model", "gemma-2-2b"),
    ("list", "--model", "gemma-2-2b", "--site", "transcoder"),
    ("list", "--summary"),
    ("features", "In the beginning God created\nthe heaven and the earth, 日本語"),
    ("top-tokens", "--latent", "12"),
    ("attribute", "In the beginning God created the heaven and the", "--target", " earth"),
    ("graph", "God said unto\nthem, 日本語", "--layer", "2"),
    ("eval", "--site", "res", "--layer", "2", *SMALL),
    ("eval", "--model", "bundled-gemma3", "--site", "clt", *SMALL),
    ("eval", "--layer", "2", "--canonical", "--by-position", "--rows", "1", "--context", "8"),
    ("study", "fidelity", "--canonical", *SMALL),
    ("study", "position", "--layer", "2", "--canonical", *SMALL),
    ("study", "frequency", "--layer", "2", "--canonical", "--bins", "3", *SMALL),
    ("study", "domains", "--layer", "2", "--site", "res", "--canonical", "--subset", "maths", *SMALL),
    ("study", "precision", "--layer", "2", "--canonical", *SMALL),
    ("study", "transfer", "--tuned", "bundled", "--layer", "2", "--canonical", *SMALL),
    ("study", "uniformity", "--layer", "2", "--canonical", "--sampled", "1", *SMALL),
    (
        "study",
        "probes",
        "--site",
        "res",
        "--layer",
        "2",
        "--canonical",
        "--concept",
        "domain: code",
        "--k",
        "1",
        *SMALL,
    ),
    ("neuronpedia", "--site", "res", "--layer", "2", "--canonical", "--latent", "3", *SMALL),
    ("registry", "check", str(CONFIGS.parent / "pretrained_yaml" / "bundled-res.yaml")),
    PLAN,
]
Cells = tuple[list[str], list[list[str]]]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[Cells]]]:
    """The tables of all verbs: names and cells."""
    found: dict[str, list[Cells]] = {}
    folder = tmp_path_factory.mktemp("tables")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(loading, "load_model", _once)
        for verb in [*VERBS, ("upload",), ("explain",)]:
            with _recorded(patch) as kept:
                _call(verb)
            found[" ".join(verb[:2])] = [*found.get(" ".join(verb[:2]), []), *kept]
    yield found


class _recorded:
    """Whatever is laid out, while a terminal is 80 columns wide."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.patch, self.kept = patch, list[Cells]()

    def __enter__(self) -> list[Cells]:
        real = tables._laid_out

        def keep(names: list[str], cells: list[list[str]], title: str, width: int) -> list[Any]:
            self.kept.append((names, cells))
            return real(names, cells, title, width)

        self.patch.setattr(tables, "_laid_out", keep)
        self.patch.setattr(tables, "terminal", lambda: Console(file=io.StringIO(), force_terminal=True, width=80))
        self.real = real
        return self.kept

    def __exit__(self, *_: object) -> None:
        self.patch.setattr(tables, "_laid_out", self.real)


def _call(verb: tuple[str, ...]) -> None:
    """Run a verb; two that need a Hub or a language model print what they would."""
    if verb == ("upload",):
        files = tuple(
            UploadFile(f"layer_{n}/width_16k/average_l0_{n}/params.npz", 10**9, "0" * 64, "new") for n in range(3)
        )
        publish._print_upload(Upload("me/my-saes", "main", True, False, files, ()), "my-saes")
    elif verb == ("explain",):
        row = {"site": "res", "layer": 2, "id": "layer_2/width_1k/average_l0_16", "latent": 3}
        words = {"explanation": "fires on the names of rivers and of the towns that lie at them", "detection": 0.81}
        scores = {"detection_low": 0.7, "detection_high": 0.9, "simulation": 0.4}
        frame = pd.DataFrame([{**row, **words, **scores}, {**row, **words, **scores, "latent": 4}])
        tables.print_frame(frame, "2 latents", False, interp.SHOWN)
    else:
        result = CliRunner().invoke(app, list(verb), catch_exceptions=False)
        assert result.exit_code == (1 if verb[0] == "train" else 0), (verb, result.output)


def rendered(names: list[str], cells: list[list[str]], width: int) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, color_system=None, width=width)
    for part in tables._laid_out(names, cells, "title", width):
        console.print(part, soft_wrap=isinstance(part, str), markup=False, highlight=False)
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def read(text: str, names: list[str]) -> list[dict[str, str]]:
    """The rows of a rendered table, folded cells joined."""
    if "┃" not in text:
        if not any(re.match(rf"{re.escape(names[-1])}\b", line) for line in text.splitlines()):
            return []  # a long table: whole lines
        blocks = text.partition("\nin every row")[0].partition("\ntitle")[0].split("\n\n")
        pattern = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
        pairs = [re.findall(rf"^({pattern})(?: {{2,}}|[ ]*$)(.*)$", block, flags=re.MULTILINE) for block in blocks]
        return [{_squeezed(name): _squeezed(value) for name, value in block} for block in pairs if block]
    rows = [[[]]]
    lines = [line for line in text.splitlines() if line[:1] in "┃│┡├"]
    folded = any(line.startswith("├") for line in lines)
    groups: list[list[list[str]]] = [[]]
    for line in lines:
        if line[0] in "┡├":
            groups.append([])
        else:
            parts = re.split("[┃│]", line)[1:-1]
            if groups[-1] and line[0] == "│" and not folded:
                groups.append([])
            groups[-1].append(parts)
    rows = [[_squeezed("".join(column)) for column in zip(*group, strict=True)] for group in groups]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


def _squeezed(text: str) -> str:
    return re.sub(r"\s", "", text)


@pytest.mark.slow
@pytest.mark.parametrize("width", [60, 80, 120])
def test_no_table_loses_anything(seen: dict[str, list[Cells]], width: int) -> None:
    assert len([verb for verb, kept in seen.items() if kept]) >= 17
    for verb, kept in seen.items():
        for names, cells in kept:
            assert len(set(names)) == len(names) and all(names), (verb, names)
            text = rendered(names, cells, width)
            if "┃" in text:
                assert max(cell_len(line) for line in text.splitlines() if line[:1] in "┏┃┡│├└") <= width, verb
            assert "…" not in text, verb
            rows = read(text, names)
            if not rows:  # a long one: every line is whole
                for line in cells:
                    assert all(one in text for one in line), verb
                continue
            assert len(rows) == len(cells), (verb, text)
            for row, line in zip(rows, cells, strict=True):
                for name, one in zip(names, line, strict=True):
                    found = row.get(_squeezed(name))
                    shared = f"{name} {one or '-'}" in _shared(text)
                    assert shared if found is None else found == _squeezed(one), (verb, name, text)


def _shared(text: str) -> str:
    found = re.search(r"^in every row: (.*)$", text, flags=re.MULTILINE)
    return found[1] if found else ""


def test_ids_are_told_apart_at_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The case that was reported: five SAEs whose ids differ in their last letters."""
    with _recorded(monkeypatch) as kept:
        _call(VERBS[0])
    text = rendered(*kept[0], 80)
    for l0 in (22, 38, 71, 139, 294):
        assert f"layer_20/width_16k/average_l0_{l0} " in text
    assert "in every row: release gemma-scope-2b-pt-res, model gemma-2-2b, site res, layer 20, width 16k" in text


@pytest.mark.parametrize(
    ("value", "low", "high", "shown"),
    [
        (0.4271, 0.4024, 0.4512, "0.427 ± 0.025"),
        (0.4271, 0.4271, 0.4271, "0.4271"),
        (1234.5, 1200.0, 1290.7, "1234 ± 56"),
        (-0.5, -0.62, -0.4, "-0.50 ± 0.12"),
        (1.5e-9, 1e-9, 2e-9, "1.5e-09 ± 5e-10"),
        (float("nan"), 0.0, 1.0, ""),
        (0.3, float("nan"), float("nan"), "0.3"),
        (0.3, None, None, "0.3"),
    ],
)
def test_numbers_with_intervals(value: float, low: float, high: float, shown: str) -> None:
    assert tables.cell(tables.with_intervals({"x": value, "x_low": low, "x_high": high})["x"]) == shown


def test_what_is_in_no_pair_stays() -> None:
    row = {"low": 1, "x_low": 2, "y": 3, "y_low": 2.5}
    assert tables.with_intervals(row) == row


def test_a_terminal_is_shown_no_control_letters() -> None:
    assert tables.cell("a\x1b[31mb\n") == "a\\x1b[31mb\\n"


def _facts(monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], width: int | None) -> list[str]:
    stream, said = io.StringIO(), list[str]()
    console = Console(file=stream, force_terminal=width is not None, width=width, color_system=None)
    monkeypatch.setattr(tables, "terminal", lambda: console)
    monkeypatch.setattr(tables, "say", said.append)
    tables.print_facts(facts)
    return re.sub(r"\x1b\[\d*m", "", "\n".join(said)).split("\n")


@pytest.mark.parametrize("width", [24, 40, 60, 80])
def test_facts_stay_in_their_column(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    """Long values and those of several lines are folded beside their names, and nothing of them is lost."""
    facts = {
        "plain": "The king said unto him\n  all the words of the land of Israel, and went forth",
        "latent 12, scale 0.5": "日本語の王は言った and a\x1b[31m letter",
        "sha256": "0123456789abcdef" * 4,
        "none": None,
    }
    lines = _facts(monkeypatch, facts, width)
    assert max(map(cell_len, lines)) <= width
    wanted = "".join(name + (value or "-").replace("\x1b", "\\x1b") for name, value in facts.items())
    assert _squeezed("".join(lines)) == _squeezed(wanted)
    starts = [line for line in lines if not line.startswith(" ")]
    assert len(starts) == len(facts), lines
    piped = _facts(monkeypatch, facts, None)
    assert len(piped) == len(facts) + 1 and piped[1].startswith(" " * 22 + "  all the words"), piped


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0390625, "0.03906"), (0.413086, "0.4131"), (71.0, "71"), (1234567.0, "1.23457e+06"), (1234.56, "1234.56")],
)
def test_a_number_alone_has_four_digits(value: float, shown: str) -> None:
    assert tables.cell(value) == shown

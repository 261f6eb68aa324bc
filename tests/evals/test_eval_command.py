"""``gemma-scope eval`` and the texts that it reads."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

import gemma_scope_tl as gs
from gemma_scope_tl.cli.command import add
from gemma_scope_tl.cli.evals import Evaluate
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.text.documents import read_texts


def _run(*args: str) -> str:
    app = typer.Typer(rich_markup_mode="markdown")
    add(app, Evaluate, "eval")
    result = CliRunner().invoke(app, list(args), catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
def test_eval_writes_every_format_and_resumes(tmp_path: Path) -> None:
    base = ["layer_1/*", "--site", "res", "--rows", "2", "--context", "32", "--resume", str(tmp_path / "cache")]
    rows = json.loads(_run(*base, "--json"))
    measured = len(gs.list_saes(model="bundled", site="res", layer=1))
    assert [row["layer"] for row in rows] == [1] * measured
    assert all(row["tokens"] > 0 and row["fvu"] < 0.5 for row in rows)
    for name, read in (("t.csv", pd.read_csv), ("t.parquet", pd.read_parquet), ("t.json", pd.read_json)):
        _run(*base, "--out", str(tmp_path / name))
        assert read(tmp_path / name)["l0"].tolist() == pytest.approx([row["l0"] for row in rows])
    positions = json.loads(_run(*base, "--by-position", "--json"))
    assert len(positions) == measured * 32
    assert "gemma-scope eval" in _run("--help")


def test_eval_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(GemmaScopeError, match=r"Unknown table format '\.xlsx'"):
        _run("--out", str(tmp_path / "t.xlsx"))
    with pytest.raises(GemmaScopeError, match="No SAE fits"):
        _run("nothing/*")


def test_texts_of_files(tmp_path: Path) -> None:
    lines = tmp_path / "t.jsonl"
    lines.write_text('{"text": "a", "n": 1}\n\n{"text": "b", "n": 2}\n', encoding="utf-8")
    assert list(read_texts(lines)) == ["a", "b"]
    (tmp_path / "t.txt").write_text("a\nb", encoding="utf-8")
    assert list(read_texts(tmp_path / "t.txt")) == ["a\nb"]
    assert len(next(read_texts())) > 100
    with pytest.raises(GemmaScopeError, match="Unknown column of texts 'body'. Nearest: text"):
        list(read_texts(lines, column="body"))
    with pytest.raises(GemmaScopeError, match="contains int, not text"):
        list(read_texts(lines, column="n"))
    lines.write_text('{"text": "a"}\n{', encoding="utf-8")
    with pytest.raises(GemmaScopeError, match="line 2, is not JSON"):
        list(read_texts(lines))
    with pytest.raises(GemmaScopeError, match="Cannot read"):
        list(read_texts(tmp_path / "absent.txt"))
    with pytest.raises(GemmaScopeError, match="Cannot read the data set"):
        list(read_texts(str(tmp_path / "absent")))

"""``registry check --results``: the rows' L0 against a table of measurements."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from gemma_scope_tl.cli.registry import registry_app
from gemma_scope_tl.contributing.measure import results_l0, tolerated
from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError
from gemma_scope_tl.registry.listing import select_rows
from gemma_scope_tl.registry.locate import builtin_folder

ROWS = select_rows("bundled", release="bundled-res")


def _table(changed: float = 0.0) -> pd.DataFrame:
    frame = pd.DataFrame({"release": [r.release for r in ROWS], "id": [r.id for r in ROWS], "l0": [r.l0 for r in ROWS]})
    frame["l0"] = frame["l0"].astype(float)
    frame.loc[0, "l0"] += changed
    return frame


@pytest.mark.parametrize("ending", [".csv", ".json", ".parquet"])
def test_a_row_that_is_off_is_found(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"r{ending}"
    write = {".csv": "to_csv", ".json": "to_json", ".parquet": "to_parquet"}[ending]
    options = {"orient": "records"} if ending == ".json" else {"index": False}
    getattr(_table(), write)(path, **options)
    assert {finding.ok for finding in results_l0(ROWS, path)} == {True}
    getattr(_table(tolerated(float(ROWS[0].l0 or 0)) + 0.5), write)(path, **options)
    wrong = [finding for finding in results_l0(ROWS, path) if finding.ok is False]
    assert [finding.row for finding in wrong] == [ROWS[0].id]
    assert "the row says" in wrong[0].text


def test_missing_and_doubled_rows(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    table = _table()
    pd.concat([table.iloc[1:], table.iloc[1:2].assign(l0=1000.0)]).to_csv(path, index=False)
    found = {finding.row: finding for finding in results_l0(ROWS, path)}
    assert (found[ROWS[0].id].ok, found[ROWS[0].id].text) == (None, "not in the results")
    assert found[ROWS[1].id].ok is False
    assert "2 different L0s" in found[ROWS[1].id].text


def test_a_table_of_other_saes_is_a_problem(tmp_path: Path) -> None:
    """Otherwise a check that compared nothing would end with `no problems`."""
    path = tmp_path / "r.csv"
    file = builtin_folder() / f"{ROWS[0].release}.yaml"
    for release, l0s in (("another", slice(None)), (ROWS[0].release, slice(0))):
        _table().assign(release=release).iloc[l0s].to_csv(path, index=False)
        (finding,) = results_l0(ROWS, path)
        assert (finding.ok, finding.row) == (False, "") and f"none of the {len(ROWS)} SAEs" in finding.text
        assert f"{ROWS[0].release}/{ROWS[0].id}" in finding.text and ("another/" in finding.text) == (
            release != ROWS[0].release
        )
        result = CliRunner().invoke(registry_app, ["check", str(file), "--results", str(path)], catch_exceptions=False)
        assert result.exit_code == 1 and "no problems" not in result.stdout


def test_what_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    path.write_text("release,id\na,b\n")
    with pytest.raises(GemmaScopeError, match="Cannot read results"):
        results_l0(ROWS, path)
    with pytest.raises(GemmaScopeError, match="Cannot read results"):
        results_l0(ROWS, tmp_path / "none.csv")
    with pytest.raises(UnknownNameError, match="format of results"):
        results_l0(ROWS, tmp_path / "r.txt")


def test_the_option(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    _table().to_csv(path, index=False)
    file = builtin_folder() / f"{ROWS[0].release}.yaml"
    args = ["check", str(file), "--results", str(path), "--json"]
    result = CliRunner().invoke(registry_app, args, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    checked = [one for one in json.loads(result.stdout)["findings"] if one["check"] == "l0"]
    assert {one["row"] for one in checked} == {row.id for row in ROWS}
    _table(500.0).to_csv(path, index=False)
    assert CliRunner().invoke(registry_app, args, catch_exceptions=False).exit_code == 1

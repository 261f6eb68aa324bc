"""The benchmark tables of README.md and docs/benchmarks.md are those of the results, and few in the README."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import pages
from benchmarks.machine import cpu_name, sentence
from benchmarks.table import identity, ranged, table
from gemma_scope_tl.errors import GemmaScopeError

ROW = {"id": "a", "what": "w", "peer": "p", "ratio": 2.0, "ratio_min": 1.5, "ratio_max": 2.5, "runs": 3}
TIMES = {"ours_s": 3.0, "ours_s_min": 2.951, "ours_s_max": 3.1, "peer_s": 0.006}


def test_both_pages_are_those_of_the_results() -> None:
    for path, text in pages.pages().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is old: run 'python -m benchmarks --pages'"


def test_the_readme_has_ten_rows_at_most_and_names_the_machine() -> None:
    assert len(pages.README_ROWS) <= 10
    made = pages.readme_table(pages.Results())
    lines = [line for line in made.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(pages.README_ROWS) - len(_missing())
    assert "Measured by" in made and "torch" in made


def test_only_rows_without_results_are_pending() -> None:
    assert set(_missing()) == set(pages.PENDING), "take rows that have results out of PENDING"


def _missing() -> list[str]:
    results = pages.Results()
    present = {f"{file}/{identity(row)}" for file, rows in results.rows.items() for row in rows}
    return [name for name in pages.README_ROWS if name not in present]


def test_every_row_with_repeats_shows_how_far_they_differ() -> None:
    """A row with a ratio's range in the results shows it, unless the numbers shown are equal."""
    results = pages.Results()
    for rows in results.rows.values():
        for row in rows:
            if row.get("runs", 1) > 1:
                assert row["ratio_min"] <= row["ratio"] <= row["ratio_max"], row["what"]


def test_numbers_are_shown_with_their_range_and_in_one_unit() -> None:
    assert ranged(3.0, 2.951, 3.1, "s") == "3.00 s (2.95–3.10)"
    assert ranged(0.6786, 0.655, 0.7, "s") == "679 ms (655–700)"
    assert ranged(0.0047, 0.00468, 0.00471, "s") == "4.7 ms"  # all the same as it is shown
    assert ranged(7.59e6, 7.1e6, 7.7e6, "rows/s") == "7.59 M rows/s (7.10–7.70)"
    assert ranged(1.2e9, None, None, "bytes/s") == "1.20 GB/s"
    assert ranged(0.15634, 0.15612, 0.1571, "") == "0.1563 (0.1561–0.1571)"
    made = table([{**ROW, **TIMES, "ours_products": 1.61}, {**ROW, "ours": "5 requests", "theirs": "19 GB"}])
    assert "| w | 3.00 s (2.95–3.10) = 1.6 products | 6.0 ms (p) | **2.0** (1.5–2.5) |" in made
    assert "**1.05** (0.98–1.10) |" in table([{**ROW, **TIMES, "ratio": 1.05, "ratio_min": 0.98, "ratio_max": 1.1}])
    assert "**0.0041** |" in table([{**ROW, **TIMES, "ratio": 0.0041, "ratio_min": 0.0041, "ratio_max": 0.0041}])
    seeds = {"ratio_low": 1.01, "ratio_high": float("nan"), "ours": "0.1", "theirs": "0.2"}
    assert "**2.0** |" in table([{"what": "w", "peer": "p", "ratio": 2.0, **seeds}])  # one seed has no interval
    assert "| w | 5 requests | 19 GB (p) | **2.0** (1.5–2.5) |" in made


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two rows in one file of results."""
    rows = [{**ROW, **TIMES}, {**ROW, **TIMES, "id": "b"}]
    (tmp_path / "store.json").write_text(json.dumps({"machine": {"torch": "2"}, "rows": rows}), encoding="utf-8")
    return tmp_path


def test_a_name_without_a_result_is_an_error_that_names_the_nearest(folder: Path) -> None:
    results = pages.Results(folder)
    assert [row["id"] for _, row in results.chosen(["store/b", "store/a"])] == ["b", "a"]
    with pytest.raises(GemmaScopeError, match="0 results are named 'store/c'; near it: store/"):
        results.chosen(["store/c"])


def test_results_that_no_table_shows_are_an_error(folder: Path) -> None:
    assert "| w |" in pages.page_tables(pages.Results(folder))["bench_store"]
    (folder / "store.json").rename(folder / "other.json")
    with pytest.raises(GemmaScopeError, match=r"No group .* \['other'\]"):
        pages.page_tables(pages.Results(folder))


def test_two_rows_of_one_name_are_an_error(folder: Path) -> None:
    found = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    found["rows"][1]["id"] = "A"
    (folder / "store.json").write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(GemmaScopeError, match=r"several rows named \['a'\]"):
        pages.page_tables(pages.Results(folder))


def test_the_machine_in_words(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor: 0\nmodel name\t: Some CPU @ 2 GHz\n", encoding="utf-8")
    assert cpu_name(tmp_path / "cpuinfo") == "Some CPU @ 2 GHz"
    known = {"cpu": "Some CPU", "cores": 2, "vectors": "AVX512", "memory_gib": 24, "threads": 2, "python": "3.11.7"}
    words = sentence({**known, "torch": "2.13.0", "date": "2026-01-02"})
    assert words == "Some CPU, 2 cores, AVX512, 24 GiB with 2 threads; Python 3.11.7, torch 2.13.0; 2026-01-02"
    assert sentence({"torch": "2.13.0"}).startswith("processor not recorded; torch 2.13.0; date not recorded")

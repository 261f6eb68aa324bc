"""``list_saes(with_metrics=True)``, and the results that come with the package."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from gemma_scope_tl.errors import RegistryError
from gemma_scope_tl.registry import list_saes, listing
from gemma_scope_tl.registry.listing import COLUMNS, METRICS, RESULTS

BUNDLED = list_saes(model="bundled")
RELEASES = list(BUNDLED["release"].unique())


def test_columns_and_rows_are_those_of_the_plain_table() -> None:
    for conditions in ({"model": "bundled"}, {"release": "gemma-scope-27b-pt-res"}, {"pattern": "nothing"}):
        plain, joined = list_saes(**conditions), list_saes(**conditions, with_metrics=True)
        pd.testing.assert_frame_equal(joined[list(plain.columns)], plain)
        assert joined.dtypes.astype(str).to_dict() == {**COLUMNS, **METRICS}
    assert list_saes(release="gemma-scope-27b-pt-res", with_metrics=True)["fvu"].isna().all()


def test_only_results_of_these_weights_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "RESULTS", tmp_path)
    release = RELEASES[0]
    rows = BUNDLED[BUNDLED["release"] == release]
    frame = rows[["release", "id", "sha256"]].iloc[:2].copy()
    for number, name in enumerate(METRICS):
        frame["l0" if name == "l0_measured" else name] = float(number)
    frame["tokens"], frame["more"] = 77, "ignored"
    frame.iloc[1, 2] = "0" * 64  # weights of another time
    frame.to_csv(tmp_path / f"{release}.csv", index=False)
    table = list_saes(model="bundled", with_metrics=True)
    measured = table["fvu"].notna()
    assert table.loc[measured, "id"].tolist() == [frame["id"].iloc[0]]
    assert table.loc[measured, "release"].tolist() == [release]
    assert table.loc[measured, "l0_measured"].tolist() == [0.0]
    assert table.loc[measured, "tokens"].tolist() == [77]
    assert table["l0"].tolist() == BUNDLED["l0"].tolist()
    for text in ("release,id,sha256\na,b,c\n", "", 'release,id\n"'):
        (tmp_path / f"{release}.csv").write_text(text)
        with pytest.raises(RegistryError, match=f"{release}.csv does not hold results"):
            list_saes(model="bundled", with_metrics=True)


def test_torch_is_not_imported() -> None:
    code = """
import sys, gemma_scope_tl as gs
assert len(gs.list_saes(model="bundled", with_metrics=True))
print([m for m in ("torch", "sae_lens", "transformer_lens") if m in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_bundled_sae_has_results_of_its_weights() -> None:
    table = list_saes(model="bundled", with_metrics=True)
    missing = table.loc[table["fvu"].isna(), ["release", "id"]]
    assert not len(missing), f"run scripts/bundled_results.py: {missing.to_dict('records')}"
    assert (table["fvu"] < 1).all()
    assert (table["fvu_low"] <= table["fvu"]).all()
    assert (table["fvu"] <= table["fvu_high"]).all()


@pytest.mark.parametrize("release", RELEASES)
def test_every_column_is_documented(release: str) -> None:
    facts = json.loads((RESULTS / f"{release}.json").read_text(encoding="utf-8"))
    columns = pd.read_csv(RESULTS / f"{release}.csv", nrows=0).columns
    bounds = {f"{name}_{end}" for name in facts["columns"] for end in ("low", "high")}
    assert set(facts["columns"]) <= set(columns) <= set(facts["columns"]) | bounds
    assert {"torch", "transformers", "transformer-lens", "sae-lens", "gemma-scope-tl"} <= set(facts["software"])


@pytest.mark.slow
def test_a_row_is_what_the_configuration_gives() -> None:
    """One SAE, measured again from the committed configuration."""
    import gemma_scope_tl as gs
    from gemma_scope_tl.evals.suite import evaluate
    from gemma_scope_tl.text.documents import read_texts
    from gemma_scope_tl.text.rows import pack_texts

    row = list_saes(model="bundled", site="res", with_metrics=True).sort_values("layer").iloc[-1]
    config = json.loads((RESULTS / f"{row['release']}.json").read_text(encoding="utf-8"))["configuration"]
    model = gs.load_model("bundled", dtype=config["dtype"])
    tokens = pack_texts(model.tokenizer, read_texts(), config["context"])
    rows = config["rows"]
    tokens = tokens[[at * tokens.shape[0] // rows for at in range(rows)]]
    assert hashlib.sha256(tokens.numpy().tobytes()).hexdigest() == config["tokens_sha256"]
    sae = gs.JumpReLUSAE.from_pretrained(row["release"], row["id"])
    found = evaluate(model, sae, tokens, progress=False, ablations=("zero",), seed=config["seed"]).iloc[0]
    for name in ("l0", "fvu", "delta_loss", "loss_recovered", "kl", "fvu_low", "delta_loss_high"):
        wanted = row["l0_measured" if name == "l0" else name]
        assert found[name] == pytest.approx(wanted, rel=2e-3), name  # a latent at its threshold on another machine
    assert found["tokens"] == row["tokens"]


def test_the_script_sees_what_is_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = Path(__file__).resolve().parents[2] / "scripts" / "bundled_results.py"
    spec = importlib.util.spec_from_file_location("bundled_results", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    arguments = ["bundled_results.py", "--check", "--release", RELEASES[0], "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    path = tmp_path / f"{RELEASES[0]}.csv"
    assert module.main() == 1  # no file
    shutil.copy(RESULTS / path.name, path)
    assert module.main() == 0
    first = str(BUNDLED.loc[BUNDLED["release"] == RELEASES[0], "sha256"].iloc[0])
    path.write_text(path.read_text().replace(first, "0" * 64))
    capsys.readouterr()
    assert module.main() == 1
    assert capsys.readouterr().out.count("no result") == 1

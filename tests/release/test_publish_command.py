"""``gemma-scope export`` and ``gemma-scope upload`` as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

from gemma_scope_tl.cli import app
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.registry import read_release
from tests.hub.server import LocalHub

ID = "owner/tiny-scope"


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_card_from_options(folder: Path, tmp_path: Path) -> None:
    (folder / "README.md").unlink()
    (folder / "tiny-scope.yaml").rename(tmp_path / "old.yaml")
    for stray in folder.rglob("sae_lens"):
        stray.rename(tmp_path / "mirrors")
    (tmp_path / "recipe.json").write_text(json.dumps({"lr": 7e-5, "bandwidth": 0.01}))
    table = pd.DataFrame([{"site": "att", "layer": 41, "d_sae": 1024, "l0": 30.2, "fvu": 0.125}])
    table.to_csv(tmp_path / "m.csv", index=False)
    out = tmp_path / "again"
    shown = run(
        "export", folder, out, "--license", "mit", "--base-model", "me/model", "--model", "bundled", "--data", "Texts.",
        "--note", "One.", "--note", "Two.", "--recipe", tmp_path / "recipe.json", "--searched", "bandwidth",
        "--metrics", tmp_path / "m.csv", "--name", "second",
    )  # fmt: skip
    card = (out / "README.md").read_text()
    for words in ("Texts.", "- One.\n- Two.", "| bandwidth | 0.01 | 0.001 | search |", "| 30.2 | 0.125 |"):
        assert words in card
    assert len(read_release(out / "second.yaml").rows) == 6
    assert shown.startswith(f"{out}: 8 files") and f"gemma-scope upload {out} OWNER/again" in shown
    (tmp_path / "list.yaml").write_text("- lr\n")
    with pytest.raises(GemmaScopeError, match="holds no hyper-parameters by name"):
        run("export", folder, out, "--license", "mit", "--model", "bundled", "--recipe", tmp_path / "list.yaml")


def test_look_then_upload(hub: LocalHub, token: str, folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) - 4
    shown = run("upload", folder, ID)
    count = len([file for file in folder.rglob("*") if file.is_file()]) - 1
    assert f"{count} files, {size:,} bytes; {count} files, {size:,} bytes to send" in shown
    assert "not part of the release, stay here: notes.txt" in shown and "(private, new), branch main" in shown
    assert f"gemma-scope upload {folder} {ID} --yes" in shown and not hub.repos
    done: dict[str, Any] = json.loads(run("upload", folder, ID, "--yes", "--public", "--json"))
    assert not hub.repos["models", ID].private and done["revision"] == hub.repos["models", ID].branches["main"]
    pinned = yaml.safe_load(Path(done["registry_file"]).read_text())
    assert pinned["repo"] == ID and {row["revision"] for row in pinned["saes"]} == {done["revision"]}
    assert "--public --branch try/it --yes" in run("upload", folder, ID, "--public", "--branch", "try/it")
    again = run("upload", folder, ID, "--public")
    assert again.count("already there") == count and "0 files, 0 bytes to send" in again
    assert "(public, exists)" in again and "--public --yes" in again

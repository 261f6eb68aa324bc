"""The registry and the bundled data are found from a wheel, an sdist and the source tree."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CHECK = """
import gemma_scope_tl as gs
from gemma_scope_tl.families import bundled_names
from gemma_scope_tl.registry.locate import BUNDLED_MODEL, MODEL_FOLDER, bundle_folder
from gemma_scope_tl.weights.fetch import fetch, fetch_layers
from gemma_scope_tl.training.config import load_config
from gemma_scope_tl.viz.graph_page import page_html
assert gs.__file__.startswith({root!r}), gs.__file__
row = gs.registry.resolve("gemma-scope-2b-pt-res", "layer_20/width_16k/canonical")
table = gs.list_saes()
bundled = table[table["model"].str.startswith("bundled")]
assert row.l0 == 71 and len(table) == 12173 + len(bundled) and len(bundled) > 0
assert set(bundled["model"]) == set(bundled_names())
folders = [BUNDLED_MODEL, *(bundle_folder(name) / MODEL_FOLDER for name in bundled_names())]
assert all((folder / "model.safetensors").is_file() for folder in folders)
assert gs.list_saes(model="bundled-gemma3", with_metrics=True)["fvu"].notna().all()
rows = [gs.registry.resolve(r.release, r.id) for r in bundled.itertuples()]
files = [path for row in rows for path in (fetch_layers(row) if row.layers else [fetch(row)])]
assert all(path.is_file() for path in files) and len(files) == len(rows) - 2 + 6 + 4
assert load_config("demo").steps > 0
assert page_html("a", {{}}).endswith("</html>\\n")  # its parts are data files
print("found")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def _found_from(root: Path) -> None:
    # -S -P would hide the dependencies too; a path entry in front of the editable install is enough
    env = {**os.environ, "PYTHONPATH": str(root)}
    code = CHECK.format(root=str(root))
    done = subprocess.run([sys.executable, "-c", code], cwd=root.parent, env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "found", done.stderr


@pytest.mark.slow
def test_from_a_wheel(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.stat().st_size < 40e6  # the limit of the bundled data, which are compressed in it
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "wheel")
    assert "gemma_scope_tl/pretrained_yaml/gemma-scope-2b-pt-res.yaml" in names
    configs = {f"gemma_scope_tl/configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml")}
    assert configs and configs <= set(names)
    assert not any(name.startswith(("tests/", "scripts/", "benchmarks/")) for name in names)
    _found_from(tmp_path / "wheel")


@pytest.mark.slow
def test_from_an_sdist(built: Path, tmp_path: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = tmp_path.iterdir()
    assert (root / "pretrained_yaml" / "schema.json").is_file()
    _found_from(root)


def test_from_the_source_tree() -> None:
    _found_from(ROOT)


def test_python_and_ranges() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    for wanted in ('"transformer-lens>=3.9,<4"', '"sae-lens>=6.54,<7"', 'requires-python = ">=3.11,<3.14"'):
        assert wanted in text

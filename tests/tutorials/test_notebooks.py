"""Every tutorial runs from top to bottom, and shows what its text speaks of."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from scripts import tutorials

SHOWN: dict[str, list[str]] = {
    "1_load_and_look": [
        r"layers, d_model",
        r"W_enc +\[",
        r"explained variance 0\.[5-9]",
        r"by default: 0",
        r"image/png",
        r"text/html",
    ],
    "2_splice_ablate_steer": [
        r"loss [\d.]+, spliced [\d.]+",
        r"the same bits: True",
        r"hook_sae_acts_post",
        r"logits: \d\.\de-0[4-9]",
        r"promotes \[",
    ],
    "3_attribution_graph": [
        r"transcoders of \d+",
        r"[\d,]+ nodes, [\d,]+ edges",
        r"image/png",
        r"' Israel'",
        r"edge E_\d+_\d+ -> ",
        r"frozen measured : -",
        r"model  measured : .*difference -",
        r"graph\.json",
    ],
    "4_train": [r"l0_warm_up_steps", r"average_l0_\d+", r"image/png", r"decoder rows: 1\.0", r"suite\.json"],
    "5_evaluate": [r"held-out tokens", r"loss_recovered", r"image/png"],
    "6_publish": [r"params\.npz", r"release: tutorial-saes", r"no problems", r"sae_lens\S* True"],
}
FIGURES = {"1_load_and_look": 1, "3_attribution_graph": 2, "4_train": 1, "5_evaluate": 4}


# Tutorials 5 and 6 go on with the run of 4, so these three share a folder.
CHAINS = [
    ["1_load_and_look"],
    ["2_splice_ablate_steer"],
    ["3_attribution_graph"],
    ["4_train", "5_evaluate", "6_publish"],
]


@pytest.mark.tutorials
@pytest.mark.parametrize("stems", CHAINS, ids="-".join)
def test_tutorials_run(stems: list[str], tmp_path: Path) -> None:
    sources = {path.stem: path for path in tutorials.sources()}
    for stem in stems:
        notebook = tutorials.make(sources[stem])
        tutorials.execute(notebook, tmp_path)
        text = nbformat.writes(notebook)
        shown = "\n".join(_outputs(notebook))
        for pattern in SHOWN[stem]:
            assert re.search(pattern, shown), f"{stem} does not show {pattern}"
        assert shown.splitlines().count("image/png") == FIGURES.get(stem, 0), stem
        assert len(text) < tutorials.LARGEST, stem
        for private in (str(tmp_path), str(Path.home()), str(tutorials.ROOT)):
            assert private == "/" or private not in text, stem


@pytest.mark.parametrize("source", tutorials.sources(), ids=lambda path: path.stem)
def test_the_committed_notebook_is_made_from_its_source(source: Path) -> None:
    path = tutorials.notebook_of(source)
    assert tutorials.is_made_from(path, source), "run: python -m scripts.tutorials"
    notebook = nbformat.read(path, as_version=4)
    assert all(cell["execution_count"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert path.stat().st_size < tutorials.LARGEST
    shown = "\n".join(_outputs(notebook))
    assert shown.splitlines().count("image/png") == FIGURES.get(source.stem, 0)


def test_all_are_listed() -> None:
    assert [path.stem for path in tutorials.sources()] == list(SHOWN)
    assert [stem for stems in CHAINS for stem in stems] == list(SHOWN)
    page = (tutorials.ROOT / "docs" / "tutorials.md").read_text(encoding="utf-8")
    assert re.findall(r"tutorials/(\w+)\.ipynb", page) == list(SHOWN)


def test_stripping_leaves_no_paths_and_no_stderr(tmp_path: Path) -> None:
    cell = nbformat.v4.new_code_cell("1")
    cell["metadata"] = {"execution": {"iopub.status.busy": "now"}}
    cell["outputs"] = [
        nbformat.v4.new_output("stream", name="stderr", text="a warning"),
        nbformat.v4.new_output("stream", name="stdout", text=f"in {tmp_path}"),
        nbformat.v4.new_output("stream", name="stdout", text="/x"),
    ]
    notebook = nbformat.v4.new_notebook(cells=[cell])
    tutorials.strip(notebook, tmp_path)
    assert [output["text"] for output in cell["outputs"]] == ["in ./x"]
    assert cell["metadata"] == {}


def _outputs(notebook: Any) -> list[str]:
    """What a notebook shows, a kind of picture as its own line."""
    found: list[str] = []
    for cell in notebook["cells"]:
        for output in cell.get("outputs", []):
            found.append(output.get("text", ""))
            for kind, value in output.get("data", {}).items():
                found.append(kind if kind.startswith("image/") else f"{kind}\n{value}")
    return found

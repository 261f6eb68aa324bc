"""Releases with coders of several layers: drafted from a folder, checked, registered, and loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import gemma_scope_tl as gs
from gemma_scope_tl.contributing.check import CHECKS, check_release
from gemma_scope_tl.contributing.draft import Options, draft_release, write_draft
from gemma_scope_tl.contributing.measure import measure_l0
from gemma_scope_tl.errors import RegistryError
from gemma_scope_tl.registry import register_release, unregister_release
from gemma_scope_tl.sae.layered import LayeredCoder
from tests.fuzz.seeds import safetensors
from tests.layered_files import KINDS

OPTIONS = Options(release="mine", license="MIT")
CLT, CROSS = "clt/width_64_l0_medium_affine", "crosscoder/layer_2_5_7_width_48_l0_12"


def write(root: Path) -> Path:
    """A folder with a CLT and a crosscoder of one model, named as Google names them."""
    KINDS["clt-affine"].write(root / CLT)
    KINDS["crosscoder"].write(root / CROSS, model_name="someone/small-gemma")
    return root


def problems(path: Path) -> str:
    return "\n".join(f"{finding.check}: {finding.text}" for finding in check_release(path).problems)


def test_a_release_is_drafted_checked_and_loaded(tmp_path: Path) -> None:
    folder = write(tmp_path / "suite")
    draft = draft_release(str(folder), tmp_path, OPTIONS)
    path = write_draft(draft, tmp_path)
    clt, crosscoder = draft.release.saes
    assert (clt.id, clt.site, clt.layers, clt.affine, clt.label) == (CLT, "clt", (0, 1, 2, 3), True, "medium")
    assert (crosscoder.site, crosscoder.layers, crosscoder.affine) == ("crosscoder", (2, 5, 7), None)
    assert (clt.l0, crosscoder.l0, draft.release.model, draft.release.family) == (12, 12, "small-gemma", "gemma3")
    assert len(clt.sha256s or ()) == 4 and len(crosscoder.sha256s or ()) == 3
    report = check_release(path)
    assert not report.problems
    assert {finding.check for finding in report.findings if finding.ok} == {*CHECKS} - {"l0"}
    assert "is not run" in measure_l0(report.rows, 1)[0].text
    register_release(path)
    try:
        for row in (clt, crosscoder):
            coder = gs.load_sae("small-gemma", row.site, width=row.width, l0=12)
            assert isinstance(coder, LayeredCoder) and coder.name == f"mine/{row.id}"
        latents = gs.load_latents("mine", CROSS, {5: [1, 3]})
        assert latents.W_dec[5].shape == (2, 2, 24)
    finally:
        unregister_release("mine")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / CLT / "params_layer_3.safetensors").unlink(), "files: .* has no .*params_layer_3"),
        (lambda folder: (folder / CLT / "params_layer_1.safetensors").write_bytes(b""), "shapes: .* is empty"),
        (
            lambda folder: (folder / CLT / "params_layer_4.safetensors").write_bytes(
                (folder / CLT / "params_layer_3.safetensors").read_bytes()
            ),
            "shapes: .*has .*params_layer_4.safetensors too",
        ),
        (lambda folder: KINDS["clt-affine"].write(folder / CLT, l0=20), "shapes: .* l0 20, should be 12"),
        (
            lambda folder: KINDS["clt-affine"].write(folder / CLT, KINDS["clt-affine"].arrays(7)),
            "sha256: params_layer_0.safetensors has .* but the row says",
        ),
        (lambda folder: KINDS["crosscoder"].write(folder / CROSS, model_name="gemma-3-4b"), "model gemma-3-4b, should"),
    ],
)  # fmt: skip
def test_files_that_contradict_their_rows(change: Any, message: str, tmp_path: Path) -> None:
    import re

    folder = write(tmp_path / "suite")
    path = write_draft(draft_release(str(folder), tmp_path, OPTIONS), tmp_path)
    change(folder)
    assert re.search(message, problems(path)), problems(path)


def test_rows_that_contradict_the_files(tmp_path: Path) -> None:
    folder = write(tmp_path / "suite")
    path = write_draft(draft_release(str(folder), tmp_path, OPTIONS), tmp_path)
    data = yaml.safe_load(path.read_text())
    for changed, message in (
        ({"layers": [0, 1, 2, 4]}, "has the layers all, should be"),
        ({"d_sae": 60, "width": "60"}, "has d_sae 64, should be 60"),
        ({"affine": False}, "has skip True, should be False"),
        ({"site": "crosscoder", "affine": None}, "type clt, should be crosscoder"),
    ):
        row = {**data["saes"][0], **changed}
        path.write_text(json.dumps({**data, "saes": [row]}))
        assert message in problems(path)


def test_what_a_draft_needs(tmp_path: Path) -> None:
    """Without a configuration the name of the folder says what it can, and the user the rest."""
    KINDS["crosscoder"].write(tmp_path / "suite" / CROSS, config={})
    KINDS["clt"].write(tmp_path / "suite/other", config={})
    with pytest.raises(RegistryError) as caught:
        draft_release(str(tmp_path / "suite"), tmp_path, OPTIONS)
    text = str(caught.value)
    assert "The model is not known" in text and "The site of 1 folders is not known (other)" in text
    assert "other: Its layers are not known" in text
    arrays = KINDS["clt"].arrays()[0] | {"w_dec": np.ones((16, 3, 24), np.float32)}
    (tmp_path / "suite/other/params_layer_0.safetensors").write_bytes(safetensors(arrays))
    with pytest.raises(RegistryError, match=r"other.*W_dec is \[16, 3, 24\], should be \[16, 4, 24\]"):
        draft_release(str(tmp_path / "suite"), tmp_path, OPTIONS)

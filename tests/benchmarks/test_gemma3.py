"""The benchmarks of Gemma 3: what both sides are given is the same, and what is said of the peer holds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from benchmarks import gemma3
from benchmarks.coder_files import COMMIT, Coder, hub_cache, random_arrays
from benchmarks.gemma3_1b import CODERS, Meter
from benchmarks.saelens_loader import load_released_with_sae_lens
from gemma_scope_tl.registry import resolve
from gemma_scope_tl.weights.checks import CODER_NAME
from tests.coder_files import Coder as Equations

KINDS = [Coder("res"), Coder("transcoder"), Coder("transcoder", affine=True)]


@pytest.mark.parametrize("coder", KINDS, ids=lambda coder: coder.title)
def test_both_sides_load_the_arrays_of_a_made_up_file(coder: Coder, tmp_path: Path) -> None:
    arrays = random_arrays(24, 64, affine=coder.affine)
    root = hub_cache(tmp_path)
    file = coder.write(root, arrays)
    assert file.name == CODER_NAME and COMMIT in file.parts
    stock = load_released_with_sae_lens(root, coder.release, coder.id)
    ours = gs.JumpReLUSAE.from_folder(file.parent)
    assert (ours.site, ours.layer) == (coder.site, coder.layer)
    stored = {name.lower(): value for name, value in ours.state_dict().items()}
    if coder.affine:
        stored["affine_skip_connection"] = stored.pop("w_skip").T
    assert set(stored) == set(arrays) and all(torch.equal(stored[name], array) for name, array in arrays.items())
    assert all(torch.equal(value, ours.state_dict()[name]) for name, value in stock.state_dict().items())
    if coder.site == "transcoder":  # if SAELens names another hook one day, the benchmark's texts are old
        assert stock.cfg.metadata.hook_name == "blocks.7.hook_mlp_in"


@pytest.mark.parametrize("coder", [*KINDS, *CODERS], ids=lambda coder: coder.path)
def test_the_names_are_released_ones(coder: Coder) -> None:
    row = resolve(coder.release, coder.id)
    affine = coder.affine if coder.site == "transcoder" else None
    assert (row.path, row.site, row.layer, row.affine) == (coder.path, coder.site, coder.layer, affine)


def test_the_formula_is_the_equations() -> None:
    """Both are float64, so they differ by the order of some hundred additions."""
    arrays = random_arrays(24, 64, affine=True, threshold=1.0)
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(2))
    equations = Equations({name: array.numpy() for name, array in arrays.items()})
    for skip, wanted in ((True, equations.forward(x.numpy())), (False, equations.decode(equations.encode(x.numpy())))):
        found = gemma3.formula(arrays, x, skip)
        torch.testing.assert_close(found, torch.from_numpy(wanted), rtol=0, atol=1e-12)


def test_the_rows_say_which_side_is_right_and_why() -> None:
    """With the hook corrected, only the skip connection is missing; the benchmark itself asserts the causes."""
    rows: dict[str, dict[str, Any]] = {row["id"]: row for row in gemma3.run(quick=True)}
    for row in rows.values():
        assert max(error["largest"] for error in row["ours_error"].values()) < 1e-4 < 0.1 < row["moves"]["largest"]
        assert row["peer_error"]["mean"] <= row["peer_error"]["largest"]
    wrong = {name: row["peer_error"]["largest"] > 0.1 for name, row in rows.items()}
    assert wrong == {
        "transcoder-released": True,
        "transcoder-corrected": False,
        "skip-transcoder-released": True,
        "skip-transcoder-corrected": True,
    }


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process's memory is read from /proc")
def test_a_step_is_measured_with_the_memory_that_it_adds() -> None:
    """Of two steps the second adds nothing, although the peak of the process is that of the first.

    The kernel adds up resident pages of each processor in batches, so the count is off by some hundred kibibytes.
    """
    meter = Meter()
    assert meter("large", lambda: torch.ones(64, 1 << 20, dtype=torch.uint8).numel()) == 64 << 20
    meter("small", lambda: torch.ones(1))
    (large,), (small,) = meter.found["large"], meter.found["small"]
    assert 60 < large["mib"] < 96 and small["mib"] < 8
    assert large["s"] > 0 and small["s"] > 0

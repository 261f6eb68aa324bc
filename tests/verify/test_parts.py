"""The parts that need no model: the sample, the bands, the orderings, and token texts of dashboards."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.registry.listing import select_rows
from gemma_scope_tl.verification.bands import judge
from gemma_scope_tl.verification.downloads import NeededFile, Plan
from gemma_scope_tl.verification.neuronpedia import token_ids
from gemma_scope_tl.verification.ordering import orderings
from gemma_scope_tl.verification.run import summary
from gemma_scope_tl.verification.sample import candidates, draw, float32_bytes

# --- the sample


def test_the_sample_is_seeded_and_spread() -> None:
    rows, left_out = candidates("gemma-2-2b")
    assert left_out == 30 and max(map(float32_bytes, rows)) <= 4 << 30  # 262k to 1m: 6 + 6 + 18
    first, again, other = draw(rows, 12, 0), draw(rows, 12, 0), draw(rows, 12, 1)
    assert first == again and first != other and len({one.row.path + one.row.site for one in first}) == 12
    sites = [one.row.site for one in first]
    assert set(sites) == {"att", "mlp", "res", "embedding", "transcoder"}
    assert {one.row.width for one in draw(rows, 30, 0)} >= {"16k", "65k", "4k"}
    layers = sorted(one.row.layer for one in draw(rows, 60, 0) if one.row.layer is not None)
    assert layers[0] <= 2 and layers[-1] >= 23
    assert [one.bfloat16 for one in first] == [False, True, False, False] * 3


def test_the_sample_has_pairs_that_differ_in_l0_only() -> None:
    rows, _ = candidates("gemma-2-2b", sites=["mlp"])
    chosen = [one.row for one in draw(rows, 6, 3)]
    assert (chosen[0].layer, chosen[0].width) == (chosen[1].layer, chosen[1].width) and chosen[0].l0 != chosen[1].l0
    assert (chosen[3].layer, chosen[3].width) == (chosen[4].layer, chosen[4].width)


def test_the_sample_is_at_most_everything() -> None:
    rows, _ = candidates("gemma-2-9b-it", layers=[20])
    assert len(draw(rows, 500)) == len(rows) == 10
    with pytest.raises(GemmaScopeError, match="sample must be 1 or more"):
        draw(rows, 0)
    with pytest.raises(GemmaScopeError, match="6 do, but all are larger than 4 GiB"):
        candidates("gemma-2-2b", layers=[12], widths=["524k"])


def test_sizes_are_those_of_the_released_files() -> None:
    """The file of a 16k SAE of 2B has 302 MB, that of 1m 19.3 GB (docs of the release)."""
    sizes = {row.width: float32_bytes(row) for row in select_rows("gemma-2-2b", "res", 12)}
    assert sizes["16k"] == pytest.approx(302e6, rel=2e-3) and sizes["1m"] == pytest.approx(19.3e9, rel=5e-3)


def test_the_amount_of_a_download_says_what_it_leaves_out() -> None:
    """The model's weights are unknown where the Hub cannot be asked, and are most of what will be downloaded."""
    sae, other = (NeededFile("me/saes", name, size, False, "SAE", True) for name, size in (("a", 302e6), ("b", 1.2e9)))
    weights = NeededFile("me/model", "the model's weights", None, False, "model", True)
    here = replace(weights, here=True)
    assert Plan((sae, other, here)).amount == "2 files, 1.50 GB" and Plan((sae,)).amount == "1 file, 0.30 GB"
    text = "2 files or more: at least 0.30 GB, and the model's weights, whose size is unknown"
    assert Plan((sae, weights)).amount == text
    assert summary(Plan((sae, weights))).startswith(f"Not on this machine: {text}: me/saes/a, me/model/the model's")
    assert Plan((sae, weights)).unknown == [weights]


# --- the bands

ROW = next(row for row in select_rows("gemma-2-2b", "res", 20, "16k") if row.l0 == 71)
OTHERS = select_rows("gemma-2-2b", "res", 20, "16k")


def numbers(**given: float) -> dict[str, float]:
    """Measurements like those of SAEBench for this row: L0 75.6, FVE 0.792, delta loss 0.232 of 2.44 nats."""
    found = {"l0": 75.6, "fvu": 0.208, "delta_loss": 0.232, "loss_clean": 2.44, "loss_zero_ablated": 12.45}
    found |= {"loss_recovered": 0.977, **given}
    for name in ("l0", "fvu", "delta_loss", "loss_recovered"):
        found |= {f"{name}_low": found[name] - 0.01, f"{name}_high": found[name] + 0.01}
    return found


@pytest.mark.parametrize(
    ("given", "kinds"),
    [
        ({}, []),
        ({"l0": 36}, []),
        ({"l0": 35, "fvu": 0.3}, ["label"]),  # the L0 of average_l0_38
        ({"l0": 205}, ["l0"]),
        ({"l0": 143}, ["label"]),
        ({"l0": 0.0}, ["l0"]),
        ({"fvu": 0.89}, []),
        ({"fvu": 0.91}, ["fvu"]),
        ({"fvu": float("nan")}, ["fvu"]),
        ({"delta_loss": 11.0, "loss_recovered": -0.1}, ["loss"]),
        ({"delta_loss": float("nan")}, ["loss"]),
        ({"delta_loss": 10.0, "loss_recovered": -0.1}, []),  # 10.01 is needed, which is within the interval
    ],
)
def test_the_bands(given: dict[str, float], kinds: list[str]) -> None:
    assert [fault.kind for fault in judge(ROW, numbers(**given), None, OTHERS).faults] == kinds


def test_what_cannot_be_decided_is_a_note() -> None:
    assert "does not raise the loss" in judge(ROW, numbers(loss_zero_ablated=2.4), None).notes[0]
    (note,) = judge(ROW, numbers(loss_recovered=-0.005), None).notes
    assert "within the interval" in note


def test_bfloat16() -> None:
    assert judge(ROW, numbers(), numbers(fvu=0.209, l0=75.0)).faults == ()
    assert judge(ROW, numbers(fvu=0.2), numbers(fvu=0.2 + 0.0199)).faults == ()
    for changed in ({"fvu": 0.24}, {"l0": 60.0}, {"fvu": float("nan")}):
        (fault,) = judge(ROW, numbers(), numbers(**changed)).faults
        assert fault.kind == "precision" and "in float32 0.208" in fault.text


# --- the orderings


def measured(name: str, site: str, layer: int, row_l0: float, delta: float, fvu: float = 0.2, **more: Any) -> Any:
    found = {"name": name, "site": site, "layer": layer, "width": "16k", "d_sae": 16384, "row_l0": row_l0, "l0": row_l0}
    found |= {"delta_loss": delta, "delta_loss_low": delta - 0.01, "delta_loss_high": delta + 0.01}
    found |= {"loss_clean": 2.44, "loss_zero_ablated": 12.45}
    return found | {"fvu": fvu, "fvu_low": fvu - 0.01, "fvu_high": fvu + 0.01, **more}


def faults(*saes: Any) -> list[str]:
    return [fault.text for one in orderings(saes) if (fault := one.fault) is not None]


def test_more_latents_are_not_worse() -> None:
    """SAEBench's delta losses of layer 11: 0.337 at L0 22, 0.169 at 80, 0.114 at 168."""
    right = [measured(f"l0_{l0}", "res", 11, l0, delta) for l0, delta in ((22, 0.337), (80, 0.169), (168, 0.114))]
    assert faults(*right) == [] and orderings(right)[0].agree == 3
    swapped = [*right[:2], measured("l0_168", "res", 11, 168, 0.5)]
    (text,) = faults(*swapped)
    assert "larger delta loss is contradicted by 2 of 3 pairs" in text and "l0_22 and l0_168" in text
    assert faults(right[0], measured("same", "res", 11, 30, 0.34)) == []  # within the intervals


def test_wider_is_not_worse() -> None:
    narrow = measured("narrow", "res", 20, 71, 0.2, 0.25)
    assert faults(narrow, measured("wide", "res", 20, 72, 0.2, 0.2, width="65k", d_sae=65536)) == []
    (text,) = faults(narrow, measured("wide", "res", 20, 72, 0.2, 0.3, width="65k", d_sae=65536))
    assert "a wider SAE" in text


def test_sites_are_ordered_as_in_the_figures() -> None:
    res = [measured(f"res{layer}", "res", layer, 80, 0.2) for layer in (5, 12)]
    below = [measured(f"att{layer}", "att", layer, 80, 0.02) for layer in (5, 12)]
    above = [measured(f"att{layer}", "att", layer, 80, 0.5) for layer in (5, 12)]
    assert faults(*res, *below) == [] and faults(*res, above[0], below[1]) == []
    (text,) = faults(*res, *above)
    assert "res has a larger delta loss than att" in text
    assert faults(*res, *(one | {"l0": 300.0} for one in above)) == []  # not at an equal L0
    mlp_att = [measured("mlp", "mlp", 5, 80, 0.01), *above]
    assert faults(*mlp_att) == []  # the paper does not order these two


@pytest.mark.parametrize("ablated", [2.4, 2.44, float("nan")])
def test_a_tensor_that_the_model_does_not_need_has_no_ordered_delta_loss(ablated: float) -> None:
    """The same SAEs make a fault where zero in the tensor's place raises the loss. FVU is compared in any case."""
    res = [measured(f"res{layer}", "res", layer, 80, 0.2) for layer in (5, 12)]
    above = [measured(f"att{layer}", "att", layer, 80, 0.5) for layer in (5, 12)]
    assert len(faults(*res, *above)) == 1
    assert len(faults(*res, *(one | {"loss_zero_ablated": 2.45} for one in above))) == 1
    for saes in ([*res, *(one | {"loss_zero_ablated": ablated} for one in above)],
                 [*(one | {"loss_zero_ablated": ablated} for one in res), *above]):  # fmt: skip
        assert faults(*saes) == []
        (compared,) = [one for one in orderings(saes) if one.left_out]
        assert (compared.left_out, compared.pairs) == (4, 0) and "res has a larger delta loss than att" in compared.name
    sparse, dense = (measured(name, "res", 5, l0, delta, fvu, loss_zero_ablated=ablated)
                     for name, l0, delta, fvu in (("sparse", 22, 0.1, 0.2), ("dense", 80, 0.3, 0.3)))  # fmt: skip
    (text,) = faults(sparse, dense)
    assert "no larger FVU" in text


# --- Neuronpedia's tokens


class Vocabulary:
    def get_vocab(self) -> dict[str, int]:
        return {"<bos>": 2, "▁the": 5, "the": 6, "\n": 7, "▁": 8, "king": 9}


@pytest.mark.parametrize(
    ("tokens", "ids"),
    [
        (["<bos>", "▁the", "king"], [2, 5, 9]),
        (["<bos>", " the", "king"], [2, 5, 9]),
        (["the", "↵", " "], [6, 7, 8]),
        (["the", "queen"], None),
    ],
)
def test_token_ids(tokens: list[str], ids: list[int] | None) -> None:
    assert token_ids(Vocabulary(), tokens) == ids

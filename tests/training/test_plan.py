"""Plans: the numbers against arithmetic written out here, and against what training allocates."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gemma_scope_tl.model.sizes import sizes_of
from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from gemma_scope_tl.sites import Place
from gemma_scope_tl.training import plan as costs
from gemma_scope_tl.training.config import TrainingStateError
from gemma_scope_tl.training.place import PlaceTrainer
from gemma_scope_tl.training.plan import plan_suite
from gemma_scope_tl.training.recipe import FAST
from gemma_scope_tl.training.spec import SAESpec

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def test_sizes_of_known_models_without_loading() -> None:
    from safetensors import safe_open

    with safe_open(BUNDLED_MODEL / "model.safetensors", "np") as file:
        count = sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
    assert sizes_of("bundled").parameters == count
    assert round(sizes_of("gemma-2-2b").parameters / 1e6) == 2614  # as on the model's card: 2.61B
    assert round(sizes_of("google/gemma-2-9b-it").parameters / 1e6) == 9242
    assert round(sizes_of("gemma-2-27b").parameters / 1e6) == 27227


def test_all_sites_of_2b_fit_sixteen_gibibytes() -> None:
    """78 buffers in bfloat16: 49,152 rows; SAELens would need three buckets, or 1,000 batches at once."""
    plan = plan_suite(
        CONFIGS / "gemma-2-2b-paper.yaml",
        overrides=["source.bucket_rows=49152", "only=[res/*width_16k*, mlp/*width_16k*, att/*width_16k*]"],
        memory=16 * 2**30,
        measure=False,
    )
    row = 26 * (2304 + 2304 + 2048) * 2
    assert plan.totals["bucket"] == 49_152 * row <= 16 * 2**30
    assert plan.totals["largest_bucket_alone"] == 49_152
    assert plan.totals["sae_lens"] == 1000 * 4096 * row  # the norm estimate is the larger of both here
    big = plan_suite(CONFIGS / "gemma-2-2b-paper.yaml", overrides=["source.bucket_rows=8388608"], measure=False)
    assert big.totals["sae_lens"] == 3 * 8_388_608 * (
        row + 27 * 2304 * 2
    )  # and the embedding, and 26 inputs of transcoders


def test_a_plan_that_cannot_fit_is_refused_with_the_number() -> None:
    plan = plan_suite(CONFIGS / "gemma-2-9b-paper.yaml", memory=2**34, device_flops=1e15)
    assert "needs 11,9" in plan.refusals[0] and "16.0 GiB are free" in plan.refusals[0]
    with pytest.raises(TrainingStateError, match="does not fit"):
        plan.check()
    assert plan.totals["seconds"] == pytest.approx(
        5 * sum(2 * 4096 * steps * latents * d for steps, latents, d in _work(plan)) / 1e15, rel=1e-12
    )
    row = plan.jobs.set_index("place").loc["embedding"]
    assert row["parameters"] == 4 * (4096 * (2 * 3584 + 2) + 3584)
    assert row["store"] == row["tokens"] * 3584 * 2


def _work(plan: object) -> list[tuple[int, int, int]]:
    rows = plan.jobs.to_dict("records")  # type: ignore[attr-defined]
    found: list[tuple[int, int, int]] = []
    for row in rows:
        d = 4096 if row["place"].startswith("att") else 3584
        saes = row["saes"] // len(row["widths"].split(", "))
        found.append((row["steps"], saes * sum(int(w) for w in row["widths"].split(", ")), d))
    return found


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_formulas_are_what_training_allocates(beta1: float) -> None:
    place, recipe = Place("transcoder", 0), replace(FAST, betas=(beta1, 0.95))
    specs = [SAESpec(f"s{i}", place, width, recipe, i, target_l0=5.0) for i, width in enumerate((256, 512))]
    trainer = PlaceTrainer(128, 96, specs, total_steps=1_000)
    state = sum(tensor.nbytes for tensor in trainer.state().values())
    formula = costs.state_bytes(128, 96, [256, 512], momentum=beta1 > 0.0)
    assert formula <= state <= formula + 64 * 768 + 4096  # counters: some bytes a latent
    arrays = trainer.released(0, 1.0)
    assert sum(a.numel() * 4 for a in arrays.values()) == costs.released_bytes(128, 96, 256)


def test_time_rests_on_a_measurement() -> None:
    plan = plan_suite(CONFIGS / "demo.yaml")
    assert "measured here" in plan.basis
    assert plan.totals["seconds"] > 0 and plan.totals["forward_seconds"] > 0
    assert plan.totals["seconds"] == pytest.approx(plan.jobs["seconds"].sum())
    twice = plan_suite(CONFIGS / "demo.yaml", overrides=["steps=400"], device_flops=1e12)
    once = plan_suite(CONFIGS / "demo.yaml", device_flops=1e12)
    assert twice.totals["forward_seconds"] == pytest.approx(2 * once.totals["forward_seconds"])

"""Attributions against autograd through the splice, against x . g, and against the metric itself."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.attributions.gradients import attribute
from gemma_scope_tl.attributions.targets import logit, logit_difference, single_token, token_loss
from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError
from gemma_scope_tl.sites import BACKENDS, Place
from tests.helpers import hooked, random_gemma, random_sae, random_tokens, shared_model

PLACES = [("res", 1), ("mlp", 2), ("att", 1), ("embedding", None), ("transcoder", 2)]
METRIC = logit_difference(40, 50)
EXACT = 1e-10  # the same passes in float64: rounding only
NORMS = 1e-5  # passes that differ by rounding: Gemma 2's norms and softmax are float32 whatever the dtype


# Gauss-Legendre converges geometrically, as fast as the path stays away from where the norms bend.
QUADRATURE = {"latents": 5e-3, "bias": 1e-3, "zero": 1e-3}


def double_model(backend: str) -> Any:
    return hooked(random_gemma(dtype=torch.float64), backend)


def double_sae(model: Any, site: str, layer: int | None, **kwargs: Any) -> Any:
    return random_sae(model.dims, site, layer, **kwargs).double()


def by_hooks(model: Any, tokens: torch.Tensor, name: str, metric: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """A site's tensor and the metric's gradient there, heads flattened, with plain hooks and autograd."""
    kept: list[torch.Tensor] = []

    def leaf(value: torch.Tensor, hook: Any) -> torch.Tensor:
        kept.append(value.detach().requires_grad_(True))
        return kept[0]

    metric(model.run_with_hooks(tokens, fwd_hooks=[(name, leaf)])).backward()
    assert kept[0].grad is not None
    model.zero_grad()
    shape = (*tokens.shape, -1)
    return kept[0].detach().reshape(shape), kept[0].grad.reshape(shape)


def write_name(sae: Any) -> str:
    if sae.site == "embedding":
        return "hook_embed"
    return f"blocks.{sae.layer}." + {"att": "attn.hook_z", "res": "hook_resid_post"}.get(sae.site, "hook_mlp_out")


def rows_of(table: pd.DataFrame, sae: Any) -> pd.DataFrame:
    layer = table["layer"].isna() if sae.layer is None else table["layer"] == sae.layer
    return table[(table["site"] == sae.site) & layer]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_parts_add_up_to_x_dot_g_at_every_token(backend: str) -> None:
    model = double_model(backend)
    tokens = random_tokens(model, batch=2, length=12)
    tokens[1, 6] = 1  # a special token inside
    saes = [double_sae(model, site, layer, seed=i) for i, (site, layer) in enumerate(PLACES)]
    saes.append(double_sae(model, "transcoder", 0, seed=9, skip=True))
    table = attribute(model, tokens, saes, METRIC)
    for sae in saes:
        rows = rows_of(table, sae)
        x, g = by_hooks(model, tokens, write_name(sae), METRIC)
        wanted = (x * g).sum(-1)
        sums = rows.groupby(["sequence", "position"])["attribution"].sum()
        for (sequence, position), total in sums.items():
            assert total == pytest.approx(wanted[sequence, position].item(), rel=1e-8, abs=EXACT)
        assert len(sums) == tokens.numel()  # every token has rows
        special = rows[rows["kind"] == "unspliced"]
        assert set(zip(special["sequence"], special["position"], strict=True)) == {(0, 0), (1, 0), (1, 6)}
        assert set(rows["kind"]) - {"skip"} == {"latent", "error", "bias", "unspliced"}
        assert ("skip" in set(rows["kind"])) == (sae.layer == 0)
    assert table.columns.tolist() == [
        "sequence", "position", "token", "site", "layer", "kind", "latent", "activation", "attribution",
    ]  # fmt: skip
    with torch.no_grad():
        assert table.attrs["metric"] == pytest.approx(METRIC(model(tokens)).item(), rel=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("site", "layer"), PLACES)
def test_a_latent_gets_its_activation_times_autograds_gradient_through_the_splice(
    site: str, layer: int | None, backend: str
) -> None:
    model = double_model(backend)
    tokens = random_tokens(model, batch=1, length=10)
    sae = double_sae(model, site, layer)
    kept: list[torch.Tensor] = []

    def leaf(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        kept.append(acts.detach().requires_grad_(True))
        return kept[0]

    logits = model.run_with_hooks_with_saes(
        tokens, saes=[sae], use_error_term=True, fwd_hooks=[(model.get_sae_hook_name(sae), leaf)]
    )
    (gradient,) = torch.autograd.grad(METRIC(logits), kept)
    wanted = (kept[0] * gradient).detach()[0]
    table = attribute(model, tokens, sae, METRIC)
    latents = table[table["kind"] == "latent"]
    got = torch.zeros_like(wanted)
    at = torch.tensor(latents[["position", "latent"]].to_numpy(dtype=int)).T
    got[tuple(at)] = torch.tensor(latents["attribution"].to_numpy())
    torch.testing.assert_close(got, wanted, rtol=NORMS, atol=NORMS)
    activations = kept[0].detach()[0][tuple(at)].numpy()
    np.testing.assert_allclose(latents["activation"], activations, rtol=NORMS)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("baseline", ["latents", "bias", "zero"])
def test_integrated_gradients_are_complete(baseline: str, backend: str) -> None:
    model = double_model(backend)
    tokens = random_tokens(model, batch=2, length=8)
    # random biases are no mean activation: on other sites a path down to them meets the bend of the next RMSNorm
    places = PLACES if baseline == "latents" else [("mlp", 1), ("transcoder", 2)]
    saes = [double_sae(model, site, layer, seed=i) for i, (site, layer) in enumerate(places)]
    saes.append(double_sae(model, "transcoder", 0, seed=9, skip=True))
    table = attribute(model, tokens, saes, METRIC, method="integrated", baseline=baseline, steps=32)
    kinds = {"latents": {"latent"}, "bias": {"latent", "error", "skip"}}.get(baseline, set(table["kind"]))
    assert (table.loc[~table["kind"].isin(kinds), "attribution"] == 0).all()
    assert (table.loc[table["kind"].isin(kinds), "attribution"] != 0).all()
    for sae, start, gap in zip(saes, table.attrs["baseline_metric"], table.attrs["gap"], strict=True):
        change, total = table.attrs["metric"] - start, rows_of(table, sae)["attribution"].sum()
        assert abs(change) > 1e-2
        assert total == pytest.approx(change, rel=QUADRATURE[baseline])
        assert gap == pytest.approx(total - change, abs=1e-12)


def test_the_baseline_of_integrated_gradients_is_a_spliced_ablation_of_all_latents() -> None:
    model = double_model("bridge")
    tokens = random_tokens(model, batch=1, length=8)
    saes = [double_sae(model, site, layer) for site, layer in PLACES]
    table = attribute(model, tokens, saes, METRIC, method="integrated", steps=1)
    for sae, start in zip(saes, table.attrs["baseline_metric"], strict=True):
        hook = (model.get_sae_hook_name(sae), lambda acts, hook: torch.zeros_like(acts))
        with torch.no_grad():
            ablated = METRIC(model.run_with_hooks_with_saes(tokens, saes=[sae], use_error_term=True, fwd_hooks=[hook]))
        assert start == pytest.approx(ablated.item(), rel=NORMS)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_counterfactual_is_the_other_prompts_activations(backend: str) -> None:
    model = double_model(backend)
    tokens, other = random_tokens(model, batch=1, length=8, seed=1), random_tokens(model, batch=1, length=8, seed=2)
    sae = double_sae(model, "res", 1)
    table = attribute(model, tokens, sae, METRIC, method="integrated", counterfactual=other, steps=32)
    with torch.no_grad():  # everything after layer 1 follows from its residual stream
        start = METRIC(model(other)).item()
    assert table.attrs["baseline_metric"] == [pytest.approx(start, rel=NORMS)]
    change = table.attrs["metric"] - start
    assert table["attribution"].sum() == pytest.approx(change, rel=2e-2)
    assert (table.loc[table["kind"] == "bias", "attribution"] == 0).all()
    patched = attribute(model, tokens, sae, METRIC, counterfactual=other)  # attribution patching, to first order
    x, g = by_hooks(model, tokens, write_name(sae), METRIC)
    y, _ = by_hooks(model, other, write_name(sae), METRIC)
    assert patched["attribution"].sum() == pytest.approx(((x - y) * g).sum().item(), rel=1e-8)


@pytest.mark.slow
def test_the_model_is_left_as_it_was() -> None:
    for backend in BACKENDS:
        model = hooked(random_gemma(), backend)
        tokens = random_tokens(model, length=8)
        saes = [random_sae(model.dims, site, layer) for site, layer in PLACES]
        fired: list[int] = []
        model.add_hook("blocks.1.hook_resid_post", lambda value, hook, fired=fired: fired.append(1))
        hooks = {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()}
        wants = [p.requires_grad for p in model.parameters()]
        assert any(wants)
        with torch.no_grad():
            before = model(tokens)

        def broken(logits: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError

        for metric in (METRIC, broken):
            for method in ("gradient", "integrated"):
                try:
                    attribute(model, tokens, saes, metric, method=method, steps=2)
                except ZeroDivisionError:
                    assert metric is broken
        assert [p.requires_grad for p in model.parameters()] == wants
        assert all(p.grad is None for p in model.parameters())
        assert all(p.grad is None and not p.requires_grad for sae in saes for p in sae.parameters())
        assert {name: len(point.fwd_hooks) for name, point in model.hook_dict.items()} == hooks
        assert not model.acts_to_saes
        fired.clear()
        with torch.no_grad():
            assert torch.equal(model(tokens), before)
        assert fired == [1]


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_outer_no_grad_changes_nothing(outer: Any, backend: str) -> None:
    model = shared_model("grouped", backend)
    sae = random_sae(model.dims, "att", 1)
    wanted = attribute(model, "hello", sae, METRIC)
    with outer():
        got = attribute(model, "hello", sae, METRIC)
        assert not torch.is_grad_enabled()
    pd.testing.assert_frame_equal(got, wanted)


def test_several_saes_are_each_attributed_as_if_alone() -> None:
    model = shared_model("grouped", "bridge")
    one, other = random_sae(model.dims, "res", 1), random_sae(model.dims, "res", 2, seed=1)
    together = attribute(model, "hello", [one, other], METRIC)
    alone = attribute(model, "hello", one, METRIC)
    mine = together[together["layer"] == 1].reset_index(drop=True)
    pd.testing.assert_frame_equal(mine, alone)


def test_padding_does_not_shift_positions_and_sequences_do_not_mix() -> None:
    model = shared_model("grouped", "bridge")
    sae = random_sae(model.dims, "res", 1)
    key = ["position", "kind", "latent"]
    together = attribute(model, ["hi", "hello"], sae, METRIC)
    alone = attribute(model, "hi", sae, METRIC).sort_values(key, ignore_index=True)
    first = together[together["sequence"] == 0].sort_values(key, ignore_index=True)
    pd.testing.assert_frame_equal(first, alone, rtol=1e-3, atol=1e-4)  # float32, and masked attention sums differ
    assert first["position"].min() == 0
    assert set(first.loc[first["position"] == 0, "kind"]) == {"unspliced"}
    assert set(first.loc[first["position"] == 2, "token"]) == {"i"}


def test_top_keeps_the_strongest_latents_of_each_sequence() -> None:
    model = shared_model("grouped", "bridge")
    saes = [random_sae(model.dims, "res", 1), random_sae(model.dims, "mlp", 2)]
    everything = attribute(model, ["hi", "hello"], saes, METRIC)
    top = attribute(model, ["hi", "hello"], saes, METRIC, top=3)
    for sequence in (0, 1):
        full, kept = (t[(t["sequence"] == sequence) & (t["kind"] == "latent")] for t in (everything, top))
        assert len(kept) == 3
        assert kept["attribution"].tolist() == full["attribution"].head(3).tolist()
        assert full["attribution"].abs().is_monotonic_decreasing
    assert (top["kind"] != "latent").sum() == (everything["kind"] != "latent").sum()
    assert (everything.loc[everything["kind"] == "latent", "activation"] > 0).all()  # only what fires is listed


def test_special_tokens_can_be_attributed_too() -> None:
    model = shared_model("grouped", "bridge")
    sae = random_sae(model.dims, "res", 1)
    table = attribute(model, "hello", sae, METRIC, exclude_special_tokens=False)
    assert "unspliced" not in set(table["kind"])
    assert table.loc[table["kind"] == "latent", "position"].min() == 0


def test_a_stock_saelens_sae_with_heads_apart() -> None:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    for backend in BACKENDS:
        model = shared_model("grouped", backend)
        ours = random_sae(model.dims, "att", 2)
        metadata = SAEMetadata(hook_name="blocks.2.attn.hook_z")
        cfg = JumpReLUSAEConfig(
            d_in=128, d_sae=256, apply_b_dec_to_input=False, reshape_activations="hook_z", metadata=metadata
        )
        stock = JumpReLUSAE(cfg)
        stock.load_state_dict(ours.state_dict())
        wanted, got = attribute(model, "hello", ours, METRIC), attribute(model, "hello", stock, METRIC)
        pd.testing.assert_frame_equal(got, wanted, rtol=1e-4, atol=1e-5)  # float32, sums in another order
        assert stock.hook_z_reshaping_mode  # as it was


def test_a_float32_sae_on_a_bfloat16_model() -> None:
    model = hooked(random_gemma(dtype=torch.bfloat16), "bridge")
    sae = random_sae(model.dims, "res", 1)
    tokens = random_tokens(model, batch=1, length=8)
    table = attribute(model, tokens, sae, METRIC)
    x, g = by_hooks(model, tokens, write_name(sae), lambda logits: METRIC(logits.float()))
    assert table["attribution"].sum() == pytest.approx((x.float() * g.float()).sum().item(), rel=1e-4)


def test_ready_made_metrics() -> None:
    logits = torch.randn(2, 3, 7, requires_grad=True)
    probabilities = logits.detach().double().numpy()
    probabilities = np.exp(probabilities) / np.exp(probabilities).sum(-1, keepdims=True)
    assert logit(4)(logits).item() == pytest.approx(logits[:, -1, 4].sum().item())
    assert logit([4, 5], position=1)(logits).item() == pytest.approx((logits[0, 1, 4] + logits[1, 1, 5]).item())
    difference = (logits[:, 0, 1] - logits[:, 0, 2]).sum().item()
    assert logit_difference(1, 2, 0)(logits).item() == pytest.approx(difference, abs=1e-6)
    assert token_loss(3)(logits).item() == pytest.approx(-np.log(probabilities[:, -1, 3]).sum(), rel=1e-5)


def test_what_cannot_be_attributed_raises() -> None:
    model = shared_model("grouped", "bridge")
    sae = random_sae(model.dims, "res", 1)
    with pytest.raises(UnknownNameError, match="method"):
        attribute(model, "hello", sae, METRIC, method="gradients")
    with pytest.raises(UnknownNameError, match="baseline"):
        attribute(model, "hello", sae, METRIC, baseline="mean")
    with pytest.raises(GemmaScopeError, match="not both"):
        attribute(model, "hello", sae, METRIC, baseline="zero", counterfactual="world")
    with pytest.raises(GemmaScopeError, match=r"\[1, 7\].*\[1, 6\]"):
        attribute(model, "hello", sae, METRIC, counterfactual="worlds")
    with pytest.raises(GemmaScopeError, match="special tokens"):
        tokens = random_tokens(model, batch=1, length=6)
        attribute(model, tokens, sae, METRIC, counterfactual=tokens.masked_fill(tokens == tokens[0, 3], 1))
    with pytest.raises(GemmaScopeError, match=r"shape \[1, 6\]"):
        attribute(model, "hello", sae, lambda logits: logits[..., 0])
    with pytest.raises(GemmaScopeError, match="float"):
        attribute(model, "hello", sae, lambda logits: logits.sum().item())  # type: ignore[arg-type, return-value]
    with pytest.raises(GemmaScopeError, match="no gradient"):
        attribute(model, "hello", sae, lambda logits: logits.detach().sum())
    with pytest.raises(GemmaScopeError, match="is nan"):
        attribute(model, "hello", sae, lambda logits: logits.sum() * float("nan"))
    with pytest.raises(GemmaScopeError, match="No position 6"):
        attribute(model, "hello", sae, logit(5, position=6))
    with pytest.raises(GemmaScopeError, match="vocabulary"):
        attribute(model, "hello", sae, logit(96))
    with pytest.raises(GemmaScopeError, match="2 tokens were given for 1"):
        attribute(model, "hello", sae, logit([3, 4]))
    with pytest.raises(GemmaScopeError, match="steps must be 1 or more, not 0"):
        attribute(model, "hello", sae, METRIC, method="integrated", steps=0)
    with pytest.raises(GemmaScopeError, match="top must be 1 or more, .* not 0"):
        attribute(model, "hello", sae, METRIC, top=0)
    with pytest.raises(SpliceError, match="No SAE"):
        attribute(model, "hello", [], METRIC)
    with pytest.raises(SpliceError, match="layers are"):
        attribute(model, "hello", random_sae(model.dims, "res", 9), METRIC)
    with model.saes([random_sae(model.dims, "res", 1, seed=1)]), pytest.raises(SpliceError, match="taken"):
        attribute(model, "hello", sae, METRIC)
    assert single_token(model, "a") == model.tokenizer.encode("a")[-1]
    with pytest.raises(GemmaScopeError, match="2 tokens"):
        single_token(model, "ab")
    assert gs.attribute is attribute


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_wide_gap_is_warned_of_and_closed_by_more_steps(backend: str) -> None:
    model = double_model(backend)
    tokens = random_tokens(model, batch=2, length=8)
    saes = [double_sae(model, site, layer, seed=i) for i, (site, layer) in enumerate(PLACES)]
    options: dict[str, Any] = {"method": "integrated", "baseline": "zero"}
    with pytest.warns(UserWarning, match=r"add up to .* give more steps= \(now 1\)") as caught:
        table = attribute(model, tokens, saes, METRIC, steps=1, **options)
    pairs = zip(saes, table.attrs["baseline_metric"], table.attrs["gap"], strict=True)
    wide = [sae for sae, start, gap in pairs if abs(gap) > 0.1 * abs(table.attrs["metric"] - start)]
    assert len(caught) == len(wide) > 0
    for sae, warning in zip(wide, caught, strict=True):
        assert f"at {Place(sae.site, sae.layer).key} add" in str(warning.message)
        assert warning.filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribute(model, tokens, saes, METRIC, method="integrated", steps=32)  # from the latents' baseline
        attribute(model, tokens, saes, METRIC)
        nothing = double_sae(model, "mlp", 1)
        nothing.threshold.data += 1e6  # no latent is active, so the metrics differ by rounding at most
        attribute(model, tokens, nothing, METRIC, method="integrated", steps=1)

"""evaluate() against the same numbers computed by hand on the plain model."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.evals.suite import evaluate, measure_suite
from gemma_scope_tl.model.plain import run_reference
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sites import BACKENDS
from gemma_scope_tl.text.rows import pack_texts
from tests.helpers import CharTokenizerFactory, random_gemma, random_sae, random_tokens, shared_model
from tests.parity.test_splice import by_hand, spliced_by_hand

PLACES = [("res", 1), ("mlp", 2), ("att", 0), ("embedding", None), ("transcoder", 3)]


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> float:
    logp = logits.double().log_softmax(-1)
    terms = [
        -logp[b, t, tokens[b, t + 1]].item()
        for b in range(tokens.shape[0])
        for t in range(tokens.shape[1] - 1)
        if tokens[b, t] > 2 and tokens[b, t + 1] > 2
    ]
    return float(np.mean(terms))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_number_by_hand(backend: str) -> None:
    hf = random_gemma()
    tokens = random_tokens(hf, batch=5)
    tokens[3, 11] = 1
    model = shared_model("grouped", backend)
    saes = [random_sae(model.dims, site, layer, seed=i) for i, (site, layer) in enumerate(PLACES)]
    table = evaluate(model, saes, tokens, batch_size=2, progress=False)
    reference = run_reference(hf, tokens)
    keep = tokens > 2
    for sae, row in zip(saes, table.itertuples(), strict=True):
        x = reference.sites[sae.site, sae.layer][keep].double()
        y = reference.sites["mlp", sae.layer][keep].double() if sae.site == "transcoder" else x
        acts = sae.double().encode(x)
        fvu = (y - by_hand(sae, x)).square().sum() / (y - y.mean(0)).square().sum()
        sae.float()
        assert row.l0 == pytest.approx((acts > 0).sum(-1).double().mean().item(), rel=1e-3)  # a latent at its threshold
        assert row.fvu == pytest.approx(fvu.item(), rel=1e-4)
        assert row.loss_clean == pytest.approx(_loss(reference.logits, tokens), rel=1e-5)
        assert row.loss_spliced == pytest.approx(_loss(spliced_by_hand(hf, tokens, [sae]), tokens), rel=1e-4)
        assert row.delta_loss == pytest.approx(row.loss_spliced - row.loss_clean)
        assert row.tokens == int(keep.sum())
    assert not model.acts_to_saes


def test_an_exact_sae_costs_nothing_and_an_empty_one_costs_what_zeros_cost() -> None:
    model = shared_model("bundled", "bridge")
    d = model.dims.d_model
    identity = {  # x = relu(x) - relu(-x)
        "W_enc": torch.cat([torch.eye(d), -torch.eye(d)], dim=1),
        "W_dec": torch.cat([torch.eye(d), -torch.eye(d)]),
        "b_enc": torch.zeros(2 * d),
        "b_dec": torch.zeros(d),
        "threshold": torch.zeros(2 * d),
    }
    exact = JumpReLUSAE.from_arrays(identity, site="res", layer=1)
    empty = JumpReLUSAE.from_arrays({**identity, "threshold": torch.full((2 * d,), 1e9)}, site="res", layer=1)
    table = evaluate(model, [exact, empty], ["And God said, Let there be light. " * 40], context=64, progress=False)
    assert table["fvu"][0] == 0
    assert abs(table["delta_loss"][0]) < 1e-6  # float32 rounding of the loss
    assert table["loss_recovered"][0] == pytest.approx(1, abs=1e-6)
    assert table["l0"][0] == pytest.approx(d, abs=0.1)
    assert table["l0"][1] == 0
    assert table["loss_spliced"][1] == pytest.approx(table["loss_zero_ablated"][1], abs=1e-6)
    assert table["loss_recovered"][1] == pytest.approx(0, abs=1e-6)


def test_packing() -> None:
    tokenizer = CharTokenizerFactory.get()
    rows = pack_texts(tokenizer, ["abc", "defg"], context=4)
    a, b, c, d, e, f, g = tokenizer.encode("abcdefg", add_special_tokens=False)
    assert rows.tolist() == [[2, a, b, c], [2, 1, d, e], [2, f, g, 1]]
    with pytest.raises(GemmaScopeError, match="less than one row of 99"):
        pack_texts(tokenizer, ["abc"], context=100)
    without = copy.deepcopy(tokenizer)
    without.bos_token = None
    with pytest.raises(GemmaScopeError, match="between BOS and EOS, but this tokenizer lacks one"):
        pack_texts(without, ["abc"], context=4)


def test_an_sae_that_does_not_fit_raises() -> None:
    model = shared_model("grouped", "bridge")
    sae: Any = random_sae(model.dims, "res", 1)
    sae.layer = 9
    with pytest.raises((SpliceError, GemmaScopeError), match="9"):
        evaluate(model, sae, random_tokens(model), progress=False)


def test_table_by_position_and_intervals_agree_with_the_whole() -> None:
    model = shared_model("grouped", "bridge")
    saes = [random_sae(model.dims, site, layer, seed=i) for i, (site, layer) in enumerate(PLACES)]
    found = measure_suite(model, saes, random_tokens(model, batch=6), batch_size=4, progress=False)
    table, positions = found.table(), found.by_position()
    for number, row in table.iterrows():
        here = positions.iloc[number * 24 : (number + 1) * 24]
        assert np.average(here["l0"][1:], weights=here["tokens"][1:]) == pytest.approx(row["l0"], rel=1e-12)
        assert np.nanmean(here["loss_spliced"]) == pytest.approx(row["loss_spliced"], rel=1e-12)  # all positions alike
        assert here["tokens"].iloc[0] == 0  # BOS
        assert np.isnan(here["kl"].iloc[-1])  # nothing comes next
        for name in ("l0", "fvu", "delta_loss", "kl"):
            assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"], name
        assert row["kl"] > 0


def test_mean_ablation_by_hand() -> None:
    hf, model = random_gemma(), shared_model("grouped", "bridge")
    tokens = random_tokens(hf, batch=3)
    sae = random_sae(model.dims, "res", 1)
    row = evaluate(model, sae, tokens, batch_size=2, progress=False).iloc[0]
    keep = tokens > 2
    mean = run_reference(hf, tokens).sites["res", 1][keep].double().mean(0).float()

    def ablate(_module: Any, _args: Any, out: Any) -> Any:
        x = out[0] if isinstance(out, tuple) else out
        changed = torch.where(keep.unsqueeze(-1), mean, x)
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    handle = hf.model.layers[1].register_forward_hook(ablate)
    with torch.no_grad():
        wanted = _loss(hf(tokens).logits, tokens)
    handle.remove()
    assert row["loss_mean_ablated"] == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_uniformity_against_autograd_on_the_plain_model(backend: str) -> None:
    hf, model = random_gemma(), shared_model("grouped", backend)
    tokens = random_tokens(hf, batch=2, length=8)
    sae = random_sae(model.dims, "mlp", 1)
    row = evaluate(model, sae, tokens, uniformity=7, progress=False, ablations=()).iloc[0]  # every position
    reference, taken = run_reference(hf, tokens), {}

    def leaf(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor:
        taken["x"] = out.detach().requires_grad_()
        return taken["x"]

    handle = hf.model.layers[1].post_feedforward_layernorm.register_forward_hook(leaf)
    logits = hf(tokens).logits
    handle.remove()
    values = []
    for b in range(2):
        for t in range(1, 7):
            centred = logits[b, t, tokens[b, t + 1]] - logits[b, t].mean()
            (gradient,) = torch.autograd.grad(centred, taken["x"], retain_graph=True)
            acts = sae.encode(reference.sites["mlp", 1][b, t]).double()
            y = (acts * (sae.W_dec.double() @ gradient[b, t].double())).abs().detach().numpy()
            p = y[y > 0] / y.sum()
            values.append(np.exp(-(p * np.log(p)).sum()) / len(p))
    assert row["uniformity"] == pytest.approx(np.mean(values), rel=1e-3)  # a latent at its threshold


def test_suites_are_loaded_one_by_one_and_memory_budgets_change_nothing() -> None:
    import gemma_scope_tl as gs

    model = shared_model("bundled", "bridge")
    suite = gs.load_suite("bundled", sites="res", layers=[0, 3], width="1k", memory=1)
    texts = ["And God said, Let there be light. " * 40]
    table = evaluate(model, suite, texts, context=64, progress=False)
    small = evaluate(model, list(suite.values()), texts, context=64, progress=False, memory_budget=1)
    assert len(suite.loaded) == 1
    assert table["layer"].tolist() == [0, 3]
    for name in ("l0", "fvu", "loss_spliced", "loss_zero_ablated", "kl"):
        np.testing.assert_allclose(table[name], small[name], rtol=1e-4)  # other batches: a latent at its threshold


def test_arguments_that_make_no_sense() -> None:
    model = shared_model("grouped", "bridge")
    sae, tokens = random_sae(model.dims, "res", 1), random_tokens(model)
    for options, match in (
        ({"ablations": ("zeros",)}, "Unknown ablation"),
        ({"batch_size": 0}, "batch_size"),
        ({"memory_budget": 0}, "memory_budget"),
        ({"uniformity": -1}, "uniformity"),
    ):
        with pytest.raises(GemmaScopeError, match=match):
            evaluate(model, sae, tokens, progress=False, **options)
    for wrong in (tokens.float(), tokens[None], tokens + 96):
        with pytest.raises(GemmaScopeError, match="Token ids"):
            evaluate(model, sae, wrong, progress=False)
    with pytest.raises(GemmaScopeError, match="No SAE"):
        evaluate(model, [], tokens, progress=False)

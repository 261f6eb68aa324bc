"""evaluate() against the same numbers computed by hand on the plain model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gemma_scope_tl.adapters.loading import load_model
from gemma_scope_tl.adapters.reference import run_reference
from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.evals.packing import pack_texts
from gemma_scope_tl.evals.suite import evaluate
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import CharTokenizerFactory, hooked, random_gemma, random_sae, random_tokens
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
    model = hooked(random_gemma(), backend)
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
    model = load_model("bundled")
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


def test_an_sae_that_does_not_fit_raises() -> None:
    model = hooked(random_gemma(), "bridge")
    sae: Any = random_sae(model.dims, "res", 1)
    sae.layer = 9
    with pytest.raises((SpliceError, GemmaScopeError), match="9"):
        evaluate(model, sae, random_tokens(model), progress=False)

"""Metrics along the sequence, against the plain model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.model.plain import run_reference
from gemma_scope_tl.studies import binned_by_position, position_edges
from tests.helpers import random_gemma, random_sae, random_tokens, shared_model


def _losses(logits: Any, tokens: Any) -> Any:
    logs = logits.double().log_softmax(-1)[:, :-1]
    return -logs.gather(2, tokens[:, 1:, None]).squeeze(2).numpy()


def test_bins_by_hand() -> None:
    hf = random_gemma()
    tokens = random_tokens(hf, batch=3)
    tokens[1, 9] = 1  # an EOS: one ordinary token and two predictions fewer
    model = shared_model("grouped", "bridge")
    sae = random_sae(model.dims, "res", 1)
    edges = [0, 1, 2, 8, 12, 24]
    table = binned_by_position(model, sae, tokens, edges, batch_size=2, progress=False)
    reference = run_reference(hf, tokens)
    x = reference.sites["res", 1].double()
    keep = (tokens > 2).numpy()
    acts = sae.encode(x.float())
    x_hat = (acts @ sae.W_dec + sae.b_dec).double()
    error = (x - x_hat).square().sum(-1).numpy()
    around = (x - x[torch.from_numpy(keep)].mean(0)).square().sum(-1).numpy()
    losses, scored = _losses(reference.logits, tokens), keep[:, :-1] & keep[:, 1:]

    def splice(_module: Any, _args: Any, out: Any) -> Any:
        plain = out[0] if isinstance(out, tuple) else out
        changed = torch.where(torch.from_numpy(keep)[..., None], x_hat.float(), plain)
        return (changed, *out[1:]) if isinstance(out, tuple) else changed

    handle = hf.model.layers[1].register_forward_hook(splice)
    with torch.no_grad():
        spliced = _losses(hf(tokens).logits, tokens)
    handle.remove()
    assert table["start"].tolist() == [1, 2, 8, 12]  # BOS alone has no row
    for row in table.itertuples():
        cut = slice(row.start, row.stop)
        inside, counted = keep[:, cut], scored[:, cut]
        assert row.tokens == inside.sum()
        assert row.predictions == counted.sum()
        assert row.l0 == pytest.approx((acts > 0).sum(-1).numpy()[:, cut][inside].mean(), rel=1e-3)  # at a threshold
        assert row.squared_error == pytest.approx(error[:, cut][inside].mean(), rel=1e-4)
        assert row.fvu == pytest.approx(error[:, cut][inside].sum() / around[:, cut][inside].sum(), rel=1e-4)
        assert row.loss_clean == pytest.approx(losses[:, cut][counted].mean(), rel=1e-5)
        assert row.loss_spliced == pytest.approx(spliced[:, cut][counted].mean(), rel=1e-4)


@pytest.mark.parametrize("length", [2, 16, 17, 128, 1024])
def test_default_edges_cover_the_sequence(length: int) -> None:
    edges = position_edges(length)
    assert edges[0] == 0
    assert edges[-1] == length
    assert (np.diff(edges) > 0).all()
    assert len(edges) < 16 + 30


def test_edges_that_make_no_sense() -> None:
    model = shared_model("grouped", "bridge")
    sae, tokens = random_sae(model.dims, "res", 1), random_tokens(model)
    for edges in ([3, 3], [0], [0, 25], [-1, 4], [5, 2]):
        with pytest.raises(GemmaScopeError, match="Edges of bins must increase and be between 0 and 24"):
            binned_by_position(model, sae, tokens, edges, progress=False)

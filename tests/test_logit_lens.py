"""Promoted and suppressed tokens against plain Hugging Face weights, and against the model's own logits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.interventions import steer
from gemma_scope_tl.latents import logit_lens
from gemma_scope_tl.latents.logit_lens import top_tokens
from gemma_scope_tl.sae.latents import Latents
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import random_gemma, random_sae, random_tokens, shared_model


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return shared_model("grouped", request.param)


def _by_hand(site: str, row: np.ndarray) -> np.ndarray:
    plain = random_gemma()
    w = {name: value.double().numpy() for name, value in plain.state_dict().items()}
    if site == "att":
        row = w["model.layers.2.self_attn.o_proj.weight"] @ row
        row = row * (1 + w["model.layers.2.post_attention_layernorm.weight"])
    return w["lm_head.weight"] @ (row * (1 + w["model.norm.weight"]))


@pytest.mark.parametrize("site", ["res", "mlp", "att", "embedding", "transcoder"])
def test_by_hand_from_hugging_face_weights(model: Any, site: str) -> None:
    sae = random_sae(model.dims, site, None if site == "embedding" else 2)
    table = top_tokens(model, sae, [5, 80], k=7)
    assert table.columns.tolist() == ["latent", "kind", "rank", "token_id", "token", "logit"]
    assert len(table) == 2 * 2 * 7
    for latent in (5, 80):
        logits = _by_hand(site, sae.W_dec[latent].double().numpy())
        ascending = np.argsort(logits)
        for kind, ids in (("promoted", ascending[::-1][:7]), ("suppressed", ascending[:7])):
            rows = table[(table["latent"] == latent) & (table["kind"] == kind)]
            assert rows["rank"].tolist() == list(range(7))
            assert rows["token_id"].tolist() == ids.tolist()
            np.testing.assert_allclose(rows["logit"], logits[ids], atol=1e-5, rtol=1e-5)  # computed in float32
            assert rows["token"].tolist() == [model.tokenizer.decode([i]) for i in ids]


@pytest.mark.parametrize("site", ["res", "mlp"])
def test_steering_very_hard_makes_the_logits_those(model: Any, site: str) -> None:
    """At the last layer nothing follows but the final norm: under a huge vector it leaves only the vector's direction,
    so the model's own logits, undone of the soft-cap, are the table's times sqrt(d) over the norm of the row."""
    sae = random_sae(model.dims, site, 3)
    table = top_tokens(model, sae, 11, k=96)
    wanted = torch.zeros(96, dtype=torch.float64)
    promoted = table[table["kind"] == "promoted"]
    wanted[torch.tensor(promoted["token_id"].tolist())] = torch.tensor(promoted["logit"].tolist(), dtype=torch.float64)
    with torch.no_grad():
        logits = model.run_with_hooks(random_tokens(model), fwd_hooks=[steer(sae, 11, 1e7)])[:, 1:].double()
    got = 30 * torch.atanh(logits / 30)
    # float32 logits up to about 20 of 30, through the inverse of tanh; the old residual is 1e-6 of the new
    torch.testing.assert_close(got, (wanted * 8).expand_as(got), atol=5e-4, rtol=1e-4)


def test_decoder_rows_suffice(model: Any) -> None:
    sae = random_sae(model.dims, "att", 2)
    rows = Latents((9, 4), sae.W_dec[[9, 4]], sae.b_enc[[9, 4]], sae.threshold[[9, 4]], site="att", layer=2)
    assert top_tokens(model, rows, 4).equals(top_tokens(model, sae, 4))


def test_many_latents_in_slices_give_the_tables_of_each_alone(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is larger than the budget, and no id is decoded twice."""
    sae, decode = random_sae(model.dims, "res", 2), model.tokenizer.decode
    whole = top_tokens(model, sae, range(256), k=5)
    shapes, decoded, product = list[torch.Size](), list[int](), logit_lens._logits

    def watched(model: Any, u: torch.Tensor) -> torch.Tensor:
        logits = product(model, u)
        shapes.append(logits.shape)
        return logits

    monkeypatch.setattr(logit_lens, "_logits", watched)
    monkeypatch.setattr(logit_lens, "_HELD", 96 * 100 + 5)
    monkeypatch.setattr(type(model.tokenizer), "decode", lambda _, ids: decoded.extend(ids) or decode(ids))
    found = top_tokens(model, sae, range(256), k=5)
    assert shapes == [(100, 96), (100, 96), (56, 96)]
    assert sorted(decoded) == sorted(set(found["token_id"]))
    pd.testing.assert_frame_equal(found, whole, rtol=0, atol=1e-5)  # products of another shape, of float32 logits
    monkeypatch.undo()
    for latent in (0, 99, 100, 255):
        alone = top_tokens(model, sae, latent, k=5)
        mine = whole[whole["latent"] == latent].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, alone, rtol=0, atol=1e-5)


def test_the_table_is_that_of_a_loop_over_latents_to_the_bit(model: Any) -> None:
    sae, chosen = random_sae(model.dims, "att", 2), [7, 3, 200]
    rows: list[dict[str, Any]] = []
    for latent, logits in zip(chosen, logit_lens.latent_logits(model, sae, chosen), strict=True):
        for kind, largest in (("promoted", True), ("suppressed", False)):
            values, ids = logits.topk(6, largest=largest)
            for rank, (value, i) in enumerate(zip(values.tolist(), ids.tolist(), strict=True)):
                token = model.tokenizer.decode([i])
                row = {"latent": latent, "kind": kind, "rank": rank, "token_id": i, "token": token, "logit": value}
                rows.append(row)
    pd.testing.assert_frame_equal(top_tokens(model, sae, chosen, k=6), pd.DataFrame(rows), check_exact=True)


def test_errors(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1)
    for k in (0, 97):
        with pytest.raises(GemmaScopeError, match="k must be between 1 and 96"):
            top_tokens(model, sae, 0, k=k)
    with pytest.raises(SpliceError, match="No latent 256"):
        top_tokens(model, sae, 256)
    with pytest.raises(SpliceError, match=r"layers are 0\.\.3"):
        top_tokens(model, random_sae(model.dims, "res", 4), 0)
    other = Latents((0,), torch.ones(1, 2304), torch.zeros(1), torch.zeros(1), site="res", layer=1)
    with pytest.raises(SpliceError, match="another model"):
        top_tokens(model, other, 0)

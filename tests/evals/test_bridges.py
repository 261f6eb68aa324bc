"""SAELens's ``run_evals`` on our SAEs and models against our own evaluation of the same tokens."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.interop.run_evals import FixedTokens, run_sae_lens_evals
from gemma_scope_tl.registry.locate import HELD_OUT_TEXT
from gemma_scope_tl.text.rows import pack_texts
from tests.helpers import random_sae, shared_model

SAME = ("l0", "fvu", "loss_clean", "loss_spliced", "delta_loss")


def _without_eos(model: Any) -> torch.Tensor:
    texts = [json.loads(line)["text"] for line in HELD_OUT_TEXT.read_text(encoding="utf-8").splitlines()]
    return pack_texts(model.tokenizer, ["\n".join(texts)], 64)[:8]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["hooked_transformer", "bridge"])
def test_both_evaluations_agree(backend: str) -> None:
    model = shared_model("bundled", backend)
    saes = [gs.load_sae("bundled", site, 1, width="1k") for site in ("res", "mlp", "att")]
    tokens = _without_eos(model)
    theirs = run_sae_lens_evals(model, saes, tokens, batch_size=4)
    ours = gs.evaluate(model, saes, tokens, progress=False)
    assert theirs["id"].tolist() == ours["id"].tolist()
    for name in SAME:
        np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-4, atol=1e-4, err_msg=name)
    spliced, ablated = (theirs["sae_lens_loss_ablated"] - theirs[name] for name in ("loss_spliced", "loss_clean"))
    # Quotients of float32 losses of 3 to 8 nats; above 1 where a splice lowers the loss of so few tokens.
    np.testing.assert_allclose(theirs["sae_lens_ce_score"], spliced / ablated, rtol=1e-4)


def test_what_differs_is_what_the_docstring_says() -> None:
    """With EOS in the rows the clean losses part; the zero ablation is another one."""
    model = shared_model("bundled", "hooked_transformer")
    sae = gs.load_sae("bundled", "res", 1, width="1k")
    texts = [json.loads(line)["text"][:100] for line in HELD_OUT_TEXT.read_text(encoding="utf-8").splitlines()]
    tokens = pack_texts(model.tokenizer, texts, 64)[:8]
    assert (tokens == model.tokenizer.eos_token_id).any()
    (theirs,) = run_sae_lens_evals(model, sae, tokens).to_dict("records")
    (ours,) = gs.evaluate(model, sae, tokens, progress=False).to_dict("records")
    assert theirs["l0"] == pytest.approx(ours["l0"], rel=1e-4)
    assert abs(theirs["loss_clean"] - ours["loss_clean"]) > 0.01


def test_what_cannot_be_is_refused() -> None:
    model = shared_model("bundled", "hooked_transformer")
    tokens = _without_eos(model)
    with pytest.raises(GemmaScopeError, match="cannot evaluate a transcoder"):
        run_sae_lens_evals(model, random_sae(model.dims, "transcoder", 1), tokens)
    with pytest.raises(GemmaScopeError, match="Batches of 3 do not divide 8 rows"):
        FixedTokens(tokens, 3)

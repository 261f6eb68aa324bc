"""An SAE that says which family it belongs to raises in a model of another one, whatever the names of the hooks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.families import named_family
from gemma_scope_tl.latents.logit_lens import latent_logits
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import random_tokens, shared_model


def _coder(site: str, model: str | None, d: int = 64) -> Any:
    rng = np.random.default_rng(0)
    arrays = {name: rng.normal(size=shape) for name, shape in (("W_enc", (d, 96)), ("W_dec", (96, d)))}
    arrays |= {"b_enc": rng.normal(size=96), "b_dec": rng.normal(size=d), "threshold": rng.uniform(0.1, 1.0, 96)}
    return gs.JumpReLUSAE.from_arrays(arrays, model=model, site=site, layer=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("site", ["res", "transcoder"])
def test_a_model_of_another_family(backend: str, site: str) -> None:
    """The models have no names, so only the family differs."""
    for config, wrong, right in (("gemma3", "gemma-2-2b", "gemma-3-1b"), ("grouped", "gemma-3-1b", "gemma-2-2b")):
        model = shared_model(config, backend)
        tokens, coder = random_tokens(model, length=6), _coder(site, wrong)
        titles = [named_family(name).title for name in (wrong, right)]  # pyright: ignore[reportOptionalMemberAccess]
        says = f"trained on a {titles[0]}.*{wrong}.*this model is a {titles[1]}"
        for call in (
            lambda model=model, coder=coder, tokens=tokens: model.run_with_saes(tokens, saes=[coder]),
            lambda model=model, coder=coder: model.add_sae(coder),
            lambda model=model, coder=coder, tokens=tokens: gs.features(model, tokens, coder),
            lambda model=model, coder=coder, tokens=tokens: gs.evaluate(model, coder, tokens, progress=False),
            lambda model=model, coder=coder: latent_logits(model, coder, [1]),
        ):
            with pytest.raises(SpliceError, match=says):
                call()
        assert not model.acts_to_saes
        for name in (right, None, "my-model"):  # the last two say nothing
            with torch.no_grad():
                assert model.run_with_saes(tokens, saes=[_coder(site, name)]).isfinite().all()


def test_a_stated_family() -> None:
    """The metadata of an SAE of the user's own model, as a run on that model writes them."""
    coder = _coder("res", "my-model")
    coder.cfg.metadata.family = "gemma3"
    with pytest.raises(SpliceError, match=r"trained on a Gemma 3 \(my-model\), and this model is a Gemma 2"):
        shared_model("grouped", "bridge").run_with_saes(random_tokens(shared_model("grouped", "bridge")), saes=[coder])


def test_known_families() -> None:
    assert named_family("someone/gemma-2-2b-it") is named_family("bundled") is not None
    assert named_family("my-model") is None and named_family(None) is None

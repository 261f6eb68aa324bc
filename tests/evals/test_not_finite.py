"""Models and SAEs with NaN: an error that says where, in place of a table without the values."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.model.finite import all_finite
from gemma_scope_tl.sites import BACKENDS
from gemma_scope_tl.studies.firing import count_firing
from tests.helpers import hooked, random_gemma, random_sae, random_tokens

PLANTED = 3  # this layer's MLP gives NaN on the second token and later ones that attend to it


def _broken(config: str, backend: str) -> Any:
    """A model whose weights are damaged after it was loaded and checked."""
    model = hooked(random_gemma(config), backend, check=False)
    block = model.blocks[PLANTED]
    with torch.no_grad():
        matrix = block.mlp.out.original_component.weight if backend == "bridge" else block.mlp.W_out
        matrix.view(-1)[0] = float("nan")
    return model


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", ["grouped", "gemma3"])
def test_a_broken_model_is_named_with_the_place(config: str, backend: str) -> None:
    model = _broken(config, backend)
    sae, tokens = random_sae(model.dims, "res", PLANTED), random_tokens(model, batch=3)
    first = re.escape(f"activations are not finite in float32, first at mlp/layer_{PLANTED}, in row 0 at token 1")
    for measure in (
        lambda: gs.features(model, tokens, sae),
        lambda: gs.evaluate(model, sae, tokens, progress=False),
        lambda: gs.evaluate(model, random_sae(model.dims, "res", 0), tokens, progress=False),  # the losses are NaN
        lambda: gs.mean_norms(model, tokens),
        lambda: count_firing(model, sae, tokens, progress=False),
    ):
        with pytest.raises(GemmaScopeError, match=first):
            measure()
    before = random_sae(model.dims, "res", PLANTED - 1)  # what ends before the fault is right
    assert len(gs.features(model, tokens, before)) and len(count_firing(model, before, tokens, progress=False))


def test_the_row_counts_from_the_first_of_all_batches() -> None:
    model = hooked(random_gemma(), "bridge", check=False)
    tokens = random_tokens(model, batch=5)
    tokens[:, 1:][tokens[:, 1:] == 7] = 8
    tokens[3, 4] = 7
    with torch.no_grad():
        model.original_model.get_input_embeddings().weight[7] = float("inf")
    with pytest.raises(GemmaScopeError, match=r"first at embedding, in row 3 at token 4\."):
        gs.evaluate(model, random_sae(model.dims, "res", 1), tokens, batch_size=2, progress=False, ablations=())
    tokens[3, 4] = 8  # a row that is not measured does not matter
    gs.evaluate(model, random_sae(model.dims, "res", 1), tokens, batch_size=2, progress=False, ablations=())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["W_enc", "b_enc", "threshold"])
def test_a_broken_sae_is_named_with_the_latent(name: str, backend: str) -> None:
    model = hooked(random_gemma(), backend, check=False)
    sae, tokens = random_sae(model.dims, "res", 1), random_tokens(model, batch=3)
    with torch.no_grad():
        getattr(sae, name)[..., 9] = float("nan")
    with pytest.raises(GemmaScopeError, match=r"Latent 9 of the SAE of res/layer_1 is not finite"):
        gs.features(model, tokens, sae)


def test_infinities_and_overflowing_sums_are_told_apart() -> None:
    counted = torch.ones(2, 3, dtype=torch.bool)
    values = torch.ones(2, 3, 4)
    assert all_finite(values * 3e38, counted)  # the sum of four overflows in float32
    assert all_finite((values * 6e4).half(), counted)
    for wrong in (float("inf"), float("-inf"), float("nan")):
        values[1, 2, 3] = wrong
        assert not all_finite(values, counted) and not all_finite(values.view(2, 3, 2, 2), counted)
    values[1, 2, :2] = torch.tensor([float("inf"), float("-inf")])
    assert not all_finite(values, counted)
    counted[1, 2] = False  # a token that does not count
    assert all_finite(values, counted)

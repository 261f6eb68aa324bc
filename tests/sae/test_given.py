"""What is given to SAEs and interventions and is no tensor, no number, or not of a dtype to answer in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE as StockSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig

import gemma_scope_tl as gs
from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.sae.choices import as_saes
from gemma_scope_tl.sae.latents import Latents
from gemma_scope_tl.sites import ModelDims
from tests.helpers import random_sae

DIMS = ModelDims(2, 16, 2, 8)
WHOLE = torch.arange(-32, 32).reshape(4, 16)


@pytest.fixture(params=["res", "att", "transcoder", "skip"])
def sae(request: Any) -> Any:
    site, skip = ("transcoder", True) if request.param == "skip" else (request.param, False)
    return random_sae(DIMS, site, 1, d_sae=64, skip=skip)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool])
def test_whole_numbers_are_answered_in_the_dtype_of_the_sae(sae: Any, dtype: torch.dtype) -> None:
    x = WHOLE.to(dtype)
    out = sae(x)
    assert out.dtype == torch.float32 and torch.equal(out, sae(x.float())) and bool((out != out.round()).any())
    if sae.is_transcoder:
        assert torch.equal(sae.forward_with_activations(x)[0], out)
        return
    if sae.site == "res":
        stock = StockSAE(JumpReLUSAEConfig(16, 64, apply_b_dec_to_input=False))
        stock.load_state_dict(sae.state_dict())
        torch.testing.assert_close(out, stock(x), rtol=1e-6, atol=1e-6)
    sae.use_error_term = True
    torch.testing.assert_close(sae(x), x.float(), rtol=1e-6, atol=1e-5)
    assert sae(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("given", [[[1.0] * 16], np.ones((1, 16)), "hi", None, 3, torch.ones(1, 16) * 1j])
def test_what_is_no_real_tensor(sae: Any, given: Any) -> None:
    part = Latents((3, 4), sae.W_dec[3:5], sae.b_enc[3:5], sae.threshold[3:5], sae.W_enc[:, 3:5])
    methods = [sae, sae.encode, lambda x: sae.encode(x, latents=3), sae.decode, sae.process_sae_in, part.encode]
    methods += [sae.forward_with_activations] if sae.is_transcoder else []
    methods += [sae.skip] if hasattr(sae, "W_skip") else []
    for method in methods:
        with pytest.raises(SpliceError, match="takes a tensor|takes real numbers"):
            method(given)
    with pytest.raises(SpliceError, match=r"read \[..., 16\]"):
        part.encode(torch.ones(2, 17))


def test_numbers_positions_and_latents() -> None:
    sae = random_sae(DIMS, "res", 1, d_sae=64)
    for wrong in ("5", None, [None], ["1"], {}, 1j, True):
        for edit in (gs.steer, gs.clamp, gs.scale):
            with pytest.raises(SpliceError, match="takes numbers|takes real numbers"):
                edit(sae, 3, wrong)  # type: ignore[operator]
    with pytest.raises(SpliceError, match="the table of mean_norms"):
        gs.steer(sae, 3, 1.0, unit="mean_norm", mean_norm="5")  # type: ignore[arg-type]
    for wrong in ("2", 1.5, ["1"], [0.5], {1: 2}):
        with pytest.raises(SpliceError, match="Positions must be"):
            gs.ablate(sae, 3, positions=wrong)  # type: ignore[arg-type]
    for wrong, said in (([], "name at least one"), ([3, 3], "Latent 3 is given twice")):
        for use in (lambda given: sae.encode(torch.ones(16), latents=given), lambda given: gs.steer(sae, given, 1.0)):
            with pytest.raises(SpliceError, match=said):
                use(wrong)


@pytest.mark.filterwarnings("ignore:.*SAE objects is deprecated")
def test_arrays_of_saes() -> None:
    saes = [random_sae(DIMS, "res", layer, d_sae=64) for layer in range(2)]
    unpacked, plain = np.array(saes, dtype=object), np.empty(2, dtype=object)
    plain[:] = saes
    for given in (unpacked, plain):
        assert [id(one) for one in as_saes(given)] == [id(one) for one in saes]
    with pytest.raises(SpliceError, match="array of shape"):
        as_saes(plain.reshape(1, 2))

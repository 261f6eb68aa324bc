"""Random SAEs have the shape, the L0 and, if asked, the frequencies of their SAE, also on other tokens."""

from __future__ import annotations

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError
from gemma_scope_tl.evals.saes import latents_of
from gemma_scope_tl.studies import random_twin
from gemma_scope_tl.studies.random_saes import checked_l0
from tests.helpers import random_sae, shared_model


def _inputs(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + 1.0


@pytest.mark.parametrize("frequency", ["equal", "matched"])
@pytest.mark.parametrize("site", ["res", "att", "transcoder"])
def test_a_twin_has_the_same_l0(site: str, frequency: str) -> None:
    model = shared_model("grouped", "bridge")
    sae = random_sae(model.dims, site, 1)
    x = _inputs(2000, sae.W_enc.shape[0])
    twin = random_twin(sae, x, frequency=frequency)
    assert twin.W_enc.shape == sae.W_enc.shape and twin.W_dec.shape == sae.W_dec.shape
    # The number of firings of each latent on the 2,000 tokens is rounded by at most a half.
    assert latents_of(twin, x).l0 == pytest.approx(latents_of(sae, x).l0, abs=sae.W_enc.shape[1] * 0.5 / 2000)
    assert not torch.equal(twin.W_enc, random_twin(sae, x, seed=1).W_enc)
    with pytest.raises(GemmaScopeError, match="needs activations"):
        random_twin(sae, x[:0])
    with pytest.raises(UnknownNameError, match="Nearest: matched"):
        random_twin(sae, x, frequency="match")


def test_matched_frequencies_are_those_of_each_latent() -> None:
    """Dead, rare, frequent and always active latents; the counts are exact, because pre-activations do not tie."""
    d = 16
    thresholds = torch.tensor([100.0, 2.5, 1.0, 1e-6, 1e-6])
    encoder = torch.nn.functional.normalize(torch.randn(d, 5, generator=torch.Generator().manual_seed(1)), dim=0)
    arrays = {"W_enc": encoder, "W_dec": encoder.T.contiguous(), "b_dec": torch.zeros(d), "threshold": thresholds}
    sae = gs.JumpReLUSAE.from_arrays({**arrays, "b_enc": torch.tensor([0.0, 0, 0, 0, 100])}, site="res", layer=1)
    x = _inputs(4000, d)
    twin = random_twin(sae, x, frequency="matched")
    wanted, found = ((one.encode(x) != 0).sum(0) for one in (sae, twin))
    assert wanted[0] == 0 and wanted[4] == 4000 and 0 < wanted[1] < wanted[2] < wanted[3] < 4000
    assert found.tolist() == wanted.tolist()
    assert (twin.threshold > 0).all()


@pytest.mark.parametrize("frequency", ["equal", "matched"])
def test_few_tokens_do_not_raise_the_l0_of_other_tokens(frequency: str) -> None:
    """1,000 latents from 300 tokens: thresholds at the lower end of their gaps would add 1000 / 301 to an L0 of 8."""
    d = 32
    encoder = torch.nn.functional.normalize(torch.randn(d, 1000, generator=torch.Generator().manual_seed(1)), dim=0)
    arrays = {"W_enc": encoder, "W_dec": encoder.T.contiguous(), "b_enc": torch.zeros(1000), "b_dec": torch.zeros(d)}
    sae = gs.JumpReLUSAE.from_arrays({**arrays, "threshold": torch.full((1000,), 2.6)}, site="res", layer=1)
    x = _inputs(20_000, d) - 1.0
    differences = []
    for start in range(0, 3000, 300):
        mine, its = checked_l0(sae, random_twin(sae, x[start : start + 300], frequency=frequency), x[4000:], band=1.0)
        differences.append(its - mine)
    assert 3 < mine < 8
    # The mean over ten samples; rounding a share of 300 tokens to whole ones moves the L0 by at most half of 1000 / 300
    # for equal frequencies, and by nothing on average for matched ones.
    assert abs(sum(differences) / 10) < (1.0 if frequency == "matched" else 1.7)


def test_the_l0_is_checked_on_other_tokens() -> None:
    """Thresholds from a random part of the text give the SAE's L0 on the rest; from one kind of text they give another
    L0 on another kind, which is an error."""
    d = 16
    encoder = torch.nn.functional.normalize(torch.randn(d, 64, generator=torch.Generator().manual_seed(1)), dim=0)
    arrays = {"W_enc": encoder, "W_dec": encoder.T.contiguous(), "b_enc": torch.zeros(64), "b_dec": torch.zeros(d)}
    sae = gs.JumpReLUSAE.from_arrays({**arrays, "threshold": torch.full((64,), 4.0)}, site="res", layer=1)
    one, other = _inputs(4000, d, 1), 2.0 * _inputs(4000, d, 2) + 2.0
    both = torch.cat([one, other])[torch.randperm(8000, generator=torch.Generator().manual_seed(3))]
    fair = checked_l0(sae, random_twin(sae, both[:4000]), both[4000:])
    assert fair[0] == pytest.approx(latents_of(sae, both[4000:]).l0)
    assert fair[1] == pytest.approx(fair[0], rel=0.05)  # 4,000 tokens determine the quantiles to a few per cent
    unfair = random_twin(sae, other)
    with pytest.raises(GemmaScopeError, match="The random SAE beside the SAE has L0"):
        checked_l0(sae, unfair, one)
    assert checked_l0(sae, unfair, one, band=1000.0)[0] == pytest.approx(latents_of(sae, one).l0)
    with pytest.raises(GemmaScopeError, match="on other tokens"):
        checked_l0(sae, unfair, one[:0])

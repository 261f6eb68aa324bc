"""Our SAEs against SAELens' own loaders, on the same ``params.npz`` of every site's true input width.

SAELens derives sizes from repository and folder names; its config overrides let the number of latents be small here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sae_lens
import torch
from sae_lens.loading import pretrained_sae_loaders as loaders

from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sae.units import embedding_scale

D_SAE = 512
FOLDER = "layer_7/width_16k/average_l0_50"
SITES = {
    "res": ("google/gemma-scope-2b-pt-res", FOLDER, 2304),
    "mlp": ("google/gemma-scope-2b-pt-mlp", FOLDER, 2304),
    "att": ("google/gemma-scope-2b-pt-att", FOLDER, 2048),
    "embedding": ("google/gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", 2304),
    "transcoder": ("google/gemma-scope-2b-pt-transcoders", FOLDER, 2304),
    "embedding-9b": ("google/gemma-scope-9b-pt-res", "embedding/width_4k/average_l0_7", 3584),
}
Pair = tuple[Any, Any, torch.Tensor]


def write_params(path: Path, d_in: int, lower: bool = False) -> None:
    """Gemma-Scope-like numbers: unit decoder rows, about one latent in seven on for unit-variance inputs."""
    rng = np.random.default_rng(d_in)
    w_dec = rng.normal(size=(D_SAE, d_in))
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    parts: dict[str, Any] = {
        "W_enc": w_dec.T + 0.01 * rng.normal(size=(d_in, D_SAE)),
        "W_dec": w_dec,
        "b_enc": 0.1 * rng.normal(size=D_SAE),
        "b_dec": 0.5 * rng.normal(size=d_in),
        "threshold": 1 + 0.2 * rng.random(D_SAE),
    }
    named: Any = {name.lower() if lower else name: array.astype(np.float32) for name, array in parts.items()}
    np.savez(path, **named)


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Pair]:
    """SAELens' object, ours and an input, all for one site."""

    def load(case: str, dtype: str = "float32", lower: bool = False) -> Pair:
        site, (repo, folder, d_in) = case.split("-")[0], SITES[case]
        write_params(tmp_path / "params.npz", d_in, lower)
        monkeypatch.setattr(loaders, "hf_hub_download", lambda **_: str(tmp_path / "params.npz"))
        name = "gemma_2_transcoder" if site == "transcoder" else "gemma_2_sae"
        loader: Any = partial(with_fewer_latents, getattr(loaders, f"{name}_huggingface_loader"))
        with pytest.warns(UserWarning, match="registered in the official"):
            theirs = sae_lens.SAE.from_pretrained(repo, folder, dtype=dtype, converter=loader)
        ours = JumpReLUSAE.from_folder(tmp_path, site=site, layer=7, dtype=dtype)
        x = torch.randn(4, 6, d_in, generator=torch.Generator().manual_seed(0))
        return theirs, ours, x.unflatten(-1, (8, 256)) if site == "att" else x

    return load


def with_fewer_latents(loader: Callable[..., Any], cfg_overrides: dict[str, Any], **kwargs: Any) -> Any:
    return loader(cfg_overrides={**cfg_overrides, "d_sae": D_SAE}, **kwargs)


@pytest.mark.parametrize("lower", [False, True], ids=["W_enc", "w_enc"])
@pytest.mark.parametrize("case", ["res", "mlp", "att", "transcoder"])
def test_equal_to_the_bit(pair: Callable[..., Pair], case: str, lower: bool, record_property: Any) -> None:
    theirs, ours, x = pair(case, lower=lower)
    with torch.no_grad():
        acts, recons = theirs.encode(x), theirs(x)
    record_property("features", float((ours.encode(x) - acts).abs().max()))
    record_property("reconstruction", float((ours(x) - recons).abs().max()))
    assert 0.02 < float((acts > 0).float().mean()) < 0.5
    assert torch.equal(ours.encode(x), acts)
    assert torch.equal(ours.decode(acts), recons)
    assert torch.equal(ours(x), recons)
    assert ours.cfg.metadata.hook_name == theirs.cfg.metadata.hook_name
    assert ours.cfg.metadata.hook_name_out == theirs.cfg.metadata.hook_name_out
    assert ours.cfg.reshape_activations == theirs.cfg.reshape_activations


@pytest.mark.parametrize("case", ["embedding", "embedding-9b"])
def test_embedding_differs_by_the_decoder_bias_alone(pair: Callable[..., Pair], case: str) -> None:
    """SAELens leaves b_dec in the units of the table, so its reconstruction is off by (sqrt(d) - 1) b_dec."""
    theirs, ours, x = pair(case)
    x = x * embedding_scale(x.shape[-1])
    with torch.no_grad():
        acts, recons = theirs.encode(x), theirs(x)
    for name in ("W_enc", "W_dec", "b_enc", "threshold"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert torch.equal(ours.encode(x), acts)
    lost = (embedding_scale(x.shape[-1]) - 1) * theirs.b_dec.detach()
    assert float(lost.abs().max()) > 10
    torch.testing.assert_close(ours(x) - recons, lost.expand_as(x), atol=1e-4, rtol=0)
    torch.testing.assert_close(ours(x), recons + lost, atol=1e-4, rtol=0)


def test_embedding_reconstructs_where_sae_lens_does_not(pair: Callable[..., Pair]) -> None:
    """Rows near b_dec are reconstructed as s * b_dec by ours and as b_dec by SAELens."""
    theirs, ours, _ = pair("embedding")
    scaled = ours.b_dec[None]
    quiet = torch.zeros(1, D_SAE)
    assert torch.equal(ours.decode(quiet), scaled)
    torch.testing.assert_close(theirs.decode(quiet).detach() * 48, scaled)


def test_att_where_sae_lens_breaks(pair: Callable[..., Pair]) -> None:
    """SAELens takes heads apart only, and keeps the first head width for good."""
    theirs, ours, x = pair("att")
    with torch.no_grad():
        expected = theirs(x)
        assert theirs(x.unflatten(-1, (2, 128)).flatten(2, 3)).shape[-1] == 256  # should be 128
        with pytest.raises(Exception, match=r"shape|rearrange|size"):
            theirs.encode(x.flatten(-2))
    assert torch.equal(ours(x.flatten(-2)), expected.flatten(-2))
    assert ours(x.flatten(-2).unflatten(-1, (16, 128))).shape[-2:] == (16, 128)


def test_bfloat16_differs_only_at_rounded_thresholds(pair: Callable[..., Pair]) -> None:
    """SAELens rounds theta to bfloat16 with the rest; latents between both thetas are all that may differ."""
    theirs, ours, x = pair("res", dtype="bfloat16")
    with torch.no_grad():
        acts = theirs.encode(x)
    differs = ours.encode(x) != acts
    fine, coarse = ours.threshold, theirs.threshold.float()
    either = torch.maximum(ours.encode(x), acts).float()
    low, high = torch.minimum(fine, coarse), torch.maximum(fine, coarse)
    assert bool(((low <= either) & (either <= high))[differs].all())
    assert float(differs.float().mean()) < 0.01


def test_sae_lens_functions_take_ours(pair: Callable[..., Pair]) -> None:
    theirs, ours, x = pair("res")
    with torch.no_grad():
        theirs.fold_W_dec_norm()
    ours.fold_W_dec_norm()
    for name, parameter in theirs.named_parameters():
        assert torch.equal(getattr(ours, name), parameter), name
    assert torch.equal(ours(x), theirs(x).detach())
    assert ours.get_name() == "sae_None_blocks.7.hook_resid_post_512"

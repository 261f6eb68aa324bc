"""What each intervention does to a tensor, against its equation in NumPy and against hooks on plain Hugging Face."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gemma_scope_tl.errors import SpliceError, UnknownNameError
from gemma_scope_tl.interventions import ablate, clamp, scale, steer
from gemma_scope_tl.sae.latents import Latents
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import hooked, random_gemma, random_sae, random_tokens, shared_model

LATENTS = [9, 2, 40]


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return shared_model("grouped", request.param)


def at_hook(model: Any, tokens: torch.Tensor, name: str, hooks: list[Any]) -> torch.Tensor:
    """The tensor at a hook, heads flattened, after ``hooks``."""
    with torch.no_grad(), model.hooks(hooks):
        return model.run_with_cache(tokens, names_filter=name)[1][name].flatten(2)


def some_latents(sae: Any, latents: list[int], encoder: bool = True) -> Latents:
    return Latents(
        latents=tuple(latents),
        W_dec=sae.W_dec[latents],
        b_enc=sae.b_enc[latents],
        threshold=sae.threshold[latents],
        W_enc=sae.W_enc[:, latents] if encoder else None,
        site=sae.site,
        layer=sae.layer,
    )


def numpy_acts(sae: Any, x: np.ndarray) -> np.ndarray:
    z = x @ sae.W_enc.numpy().astype(np.float64) + sae.b_enc.numpy()
    return z * (z > sae.threshold.numpy())


def layer_of(site: str) -> int | None:
    return None if site == "embedding" else 1


NEW = {  # the activations that each edit gives to the latents, from those they have
    "ablate": (lambda sae, **kw: ablate(sae, LATENTS, **kw), lambda f: 0 * f),
    "clamp": (lambda sae, **kw: clamp(sae, LATENTS, 4.5, **kw), lambda f: 0 * f + 4.5),
    "clamp-each": (lambda sae, **kw: clamp(sae, LATENTS, [1.0, -2.0, 6.0], **kw), lambda f: 0 * f + [1, -2, 6]),
    "scale": (lambda sae, **kw: scale(sae, LATENTS, 3.0, **kw), lambda f: 3 * f),
    "scale-each": (lambda sae, **kw: scale(sae, LATENTS, [0.5, 2.0, -1.0], **kw), lambda f: f * [0.5, 2, -1]),
    "steer-each": (lambda sae, **kw: steer(sae, LATENTS, [5.0, -3.0, 0.5], **kw), lambda f: f + np.array([5, -3, 0.5])),
}


@pytest.mark.slow
@pytest.mark.parametrize("site", ["res", "mlp", "att", "embedding"])
def test_each_edit_follows_its_equation(model: Any, site: str, subtests: pytest.Subtests) -> None:
    sae, tokens = random_sae(model.dims, site, layer_of(site)), random_tokens(model)
    tokens[1, 9] = 1
    name = ablate(sae, LATENTS)[0]
    clean = at_hook(model, tokens, name, []).double().numpy()
    acts = numpy_acts(sae, clean)[..., LATENTS]
    assert (acts > 0).any() and (acts == 0).any()
    for edit, (make, new) in NEW.items():
        with subtests.test(edit=edit):
            pair, loaded = make(sae), make(some_latents(sae, [40, 7, 2, 9]))  # in another order
            assert pair[0] == loaded[0] == name
            change = (new(acts) - acts) * (tokens > 2).numpy()[..., None]
            wanted = clean + change @ sae.W_dec.numpy().astype(np.float64)[LATENTS]
            for hook in (pair, loaded):  # float32 of values up to about 30, after a product over 64 or 128
                np.testing.assert_allclose(at_hook(model, tokens, name, [hook]).numpy(), wanted, atol=3e-5, rtol=1e-5)


@pytest.mark.parametrize("site", ["res", "mlp", "att", "embedding", "transcoder"])
def test_steering_adds_the_decoder_row(model: Any, site: str) -> None:
    sae, tokens = random_sae(model.dims, site, layer_of(site)), random_tokens(model)
    tokens[1, 9] = 1
    pair = steer(sae, latent=3, scale=12.5)
    change = at_hook(model, tokens, pair[0], [pair]) - at_hook(model, tokens, pair[0], [])
    ordinary = tokens > 2
    wanted = (sae.W_dec[3] * 12.5).expand_as(change[ordinary])
    torch.testing.assert_close(change[ordinary], wanted, atol=1e-5, rtol=0)  # one float32 rounding of values up to 30
    assert not change[~ordinary].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("edit", ["steer", "clamp"])
def test_logits_equal_those_of_a_hook_on_hugging_face(backend: str, edit: str) -> None:
    plain, ours = random_gemma(), shared_model("grouped", backend)
    sae, tokens = random_sae(ours.dims, "res", 1), random_tokens(ours)

    def on_layer(module: Any, args: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        f = torch.relu(x @ sae.W_enc[:, 7] + sae.b_enc[7])
        f = f * (f > sae.threshold[7])
        amount = torch.full_like(f, 30.0) if edit == "steer" else 30.0 - f
        y = x + (amount * (tokens > 2))[..., None] * sae.W_dec[7]
        return (y, *output[1:]) if isinstance(output, tuple) else y

    handle = plain.model.layers[1].register_forward_hook(on_layer)
    with torch.no_grad():
        wanted = plain(tokens).logits
        handle.remove()
        moved = (wanted - plain(tokens).logits).abs().max()
        pair = steer(sae, 7, 30.0) if edit == "steer" else clamp(sae, 7, 30.0)
        got = ours.run_with_hooks(tokens, fwd_hooks=[pair])
    assert moved > 1
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)  # HookedTransformer's float32 through four layers


@pytest.mark.slow
@pytest.mark.parametrize("site", ["res", "att", "transcoder"])
def test_editing_the_spliced_features(model: Any, site: str, subtests: pytest.Subtests) -> None:
    sae, tokens = random_sae(model.dims, site, 1), random_tokens(model)
    reads, writes = sae_hooks(sae)
    x, y = (at_hook(model, tokens, name, []).double().numpy() for name in (reads, writes))
    acts = numpy_acts(sae, x)
    w_dec, ordinary = sae.W_dec.numpy().astype(np.float64), (tokens > 2).numpy()[..., None]
    for edit, (make, new) in NEW.items():
        with subtests.test(edit=edit):
            pair = make(sae, on="features")
            assert pair[0] == model.get_sae_hook_name(sae)
            edited = acts.copy()
            edited[..., LATENTS] = new(acts[..., LATENTS])
            for error_term, base in ((False, acts @ w_dec + sae.b_dec.numpy()), (True, y)):
                wanted = np.where(ordinary, base + (edited - acts) @ w_dec, y)
                with model.saes([sae], use_error_term=error_term):
                    got = at_hook(model, tokens, writes, [pair]).numpy()
                np.testing.assert_allclose(got, wanted, atol=5e-5, rtol=1e-5)  # float32, sums over 256 latents
            if site != "transcoder":  # with the error term, the same as without splicing
                plain = at_hook(model, tokens, writes, [make(sae)]).numpy()
                np.testing.assert_allclose(plain, got, atol=5e-5, rtol=1e-5)


def sae_hooks(sae: Any) -> tuple[str, str]:
    from gemma_scope_tl.sites import get_site

    site = get_site(sae.site)
    return site.hook_name(sae.layer, "hooked_transformer"), site.hook_name_out(sae.layer, "hooked_transformer")


def test_ablate_is_scale_by_zero_is_clamp_to_zero(model: Any) -> None:
    sae, tokens = random_sae(model.dims, "mlp", 2), random_tokens(model)
    first, *others = (
        at_hook(model, tokens, "blocks.2.hook_mlp_out", [pair])
        for pair in (ablate(sae, LATENTS), scale(sae, LATENTS, 0), clamp(sae, LATENTS, 0))
    )
    assert all(torch.equal(first, other) for other in others)
    unchanged = at_hook(model, tokens, "blocks.2.hook_mlp_out", [scale(sae, LATENTS, 1)])
    assert torch.equal(unchanged, at_hook(model, tokens, "blocks.2.hook_mlp_out", []))


def test_a_plain_edit_passes_no_hook_point_of_a_spliced_sae(model: Any) -> None:
    """Nor do its own looks at the latents end up in caches."""
    sae, tokens, calls = random_sae(model.dims, "res", 1), random_tokens(model), []
    with model.saes([sae], use_error_term=True), torch.no_grad():
        name = model.get_sae_hook_name(sae)
        counting = (name, lambda acts, hook: calls.append(acts.shape))
        clean = model.run_with_hooks(tokens, fwd_hooks=[counting])
        edited = model.run_with_hooks(tokens, fwd_hooks=[counting, ablate(sae, 9)])
    assert not torch.equal(clean, edited)
    assert calls == [(2, 24, 256)] * 2


@pytest.mark.parametrize("site", ["res", "att"])
def test_stock_saelens_saes(model: Any, site: str) -> None:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    ours, tokens = random_sae(model.dims, site, 1), random_tokens(model)
    hook = sae_hooks(ours)[0]
    config = JumpReLUSAEConfig(
        d_in=ours.cfg.d_in,
        d_sae=256,
        apply_b_dec_to_input=False,
        reshape_activations="hook_z" if site == "att" else "none",
        metadata=SAEMetadata(hook_name=hook),
    )
    stock = JumpReLUSAE(config)
    stock.load_state_dict(ours.state_dict())
    for make in (lambda s: clamp(s, LATENTS, 3.0), lambda s: steer(s, LATENTS, 3.0), lambda s: scale(s, 2, 4.0)):
        got, wanted = (at_hook(model, tokens, hook, [make(sae)]) for sae in (stock, ours))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)  # all columns at once, or three
    assert stock.hook_z_reshaping_mode == (site == "att")  # as it was


def test_a_bfloat16_model_stays_bfloat16() -> None:
    model = hooked(random_gemma(dtype=torch.bfloat16), "bridge")
    sae, tokens = random_sae(model.dims, "att", 1), random_tokens(model)
    for pair in (steer(sae, 1, 2.0), steer(sae, 1, 2.0, unit="norm"), ablate(sae, 1), clamp(sae, 1, 2.0)):
        assert model.run_with_hooks(tokens, fwd_hooks=[pair]).dtype == torch.bfloat16
        clean, edited = (at_hook(model, tokens, pair[0], hooks) for hooks in ([], [pair]))
        assert edited.dtype == torch.bfloat16 and not torch.equal(clean, edited)


def test_errors(model: Any) -> None:
    sae, transcoder = random_sae(model.dims, "res", 1), random_sae(model.dims, "transcoder", 1)
    rows = some_latents(sae, [3, 5], encoder=False)
    with pytest.raises(SpliceError, match=r"No latent 256: this SAE has latents 0\.\.255"):
        steer(sae, 256, 1.0)
    with pytest.raises(SpliceError, match="No latent -1"):
        ablate(sae, [0, -1])
    with pytest.raises(SpliceError, match="given twice"):
        scale(sae, [4, 4], 2.0)
    with pytest.raises(SpliceError, match="at least one"):
        ablate(sae, [])
    with pytest.raises(SpliceError, match="each of the 3 latents"):
        clamp(sae, LATENTS, [1.0, 2.0])
    for edit in (ablate, lambda s, i: clamp(s, i, 1.0), lambda s, i: scale(s, i, 1.0)):
        with pytest.raises(SpliceError, match='on="features"'):
            edit(transcoder, 0)
        with pytest.raises(SpliceError, match="have no encoder columns"):
            edit(rows, 3)
    assert steer(rows, [3, 5], 1.0)[0] == "blocks.1.hook_resid_post"
    with pytest.raises(UnknownNameError, match="load_latents"):
        steer(rows, 4, 1.0)
    with pytest.raises(SpliceError, match="site of these latents is unknown"):
        steer(Latents((0,), sae.W_dec[:1], sae.b_enc[:1], sae.threshold[:1]), 0, 1.0)
    with pytest.raises(UnknownNameError, match="activations, features"):
        ablate(sae, 0, on="acts")  # pyright: ignore

"""Attaching and detaching: loud where something is wrong, exact where it is not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gemma_scope_tl.errors import SpliceError, UnknownNameError
from gemma_scope_tl.model.splicing import splice
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import hooked, random_gemma, random_sae, random_tokens, shared_model


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Any:
    return shared_model("grouped", request.param)


def _fingerprint(model: Any) -> dict[str, tuple[int, str, int]]:
    return {name: (id(point), point.name, len(point.fwd_hooks)) for name, point in model.hook_dict.items()}


def test_detaching_restores_every_hook_point_and_the_users_hooks(model: Any) -> None:
    fired: list[str] = []
    name = "blocks.1.hook_resid_post"
    model.add_hook(name, lambda value, hook: fired.append("permanent"), is_permanent=True)
    model.add_hook(name, lambda value, hook: fired.append("temporary"))
    before = _fingerprint(model)
    sae = random_sae(model.dims, "res", 1)
    names = {short: point.name for short, point in sae.hook_dict.items()}
    tokens = random_tokens(model)
    with torch.no_grad():
        logits = model(tokens)
        for _ in range(3):
            fired.clear()
            model.run_with_saes(tokens, saes=[sae])
            assert fired == ["permanent", "temporary"]  # they keep firing while an SAE is attached
        assert torch.equal(model(tokens), logits)
    assert _fingerprint(model) == before
    assert {short: point.name for short, point in sae.hook_dict.items()} == names
    model.reset_hooks(including_permanent=True)


def test_a_hook_on_the_site_sees_what_flows_on(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1)
    tokens = random_tokens(model)
    _, cache = model.run_with_cache_with_saes(tokens, saes=[sae])
    output = cache["blocks.1.hook_resid_post.hook_sae_output"]
    seen: list[torch.Tensor] = []
    with model.saes([sae]), model.hooks([("blocks.1.hook_resid_post", lambda value, hook: seen.append(value))]):
        model(tokens)
    assert torch.equal(seen[0], output)


def test_reset_hooks_leaves_saes_attached_and_clears_hooks_on_them(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1)
    tokens = random_tokens(model)
    with torch.no_grad():
        wanted = model.run_with_saes(tokens, saes=[sae])
        with model.saes([sae]):
            model.add_hook(model.get_sae_hook_name(sae), lambda acts, hook: acts * 0)
            assert not torch.equal(model(tokens), wanted)
            model.reset_hooks()
            assert torch.equal(model(tokens), wanted)


def test_nesting_exceptions_and_all_or_nothing(model: Any) -> None:
    res, mlp, taken = (random_sae(model.dims, site, 1, seed=i) for i, site in enumerate(["res", "mlp", "res"]))
    with splice(model, res):
        with splice(model, [mlp]):
            assert set(model.acts_to_saes) == {"blocks.1.hook_resid_post", "blocks.1.hook_mlp_out"}
        assert list(model.acts_to_saes.values()) == [res]
        with pytest.raises(SpliceError, match="taken"), splice(model, [mlp, taken]):
            pass
        assert list(model.acts_to_saes.values()) == [res]  # mlp went in before the error and is out again
    with pytest.raises(ZeroDivisionError), splice(model, [res, mlp]):
        _ = 1 / 0
    assert not model.acts_to_saes
    with pytest.raises(SpliceError, match="attached already"):
        model.run_with_saes(random_tokens(model), saes=[res, res])
    assert not model.acts_to_saes


def test_a_transcoder_and_an_mlp_sae_write_to_the_same_place(model: Any) -> None:
    transcoder, mlp = random_sae(model.dims, "transcoder", 1), random_sae(model.dims, "mlp", 1)
    for pair in ([transcoder, mlp], [mlp, transcoder]):
        with pytest.raises(SpliceError, match=r"blocks\.1\.hook_mlp_out is taken"):
            model.run_with_saes(random_tokens(model), saes=pair)


def test_what_does_not_fit_raises_before_the_forward_pass(model: Any) -> None:
    att_width = random_sae(model.dims, "att", 1)
    att_width.site = "res"
    with pytest.raises(SpliceError, match="reads 128 dimensions, but site 'res' of this model has 64"):
        model.add_sae(att_width)
    deep = random_sae(model.dims, "res", 1)
    deep.layer = 4
    with pytest.raises(SpliceError, match=r"no layer 4: this model's layers are 0\.\.3"):
        model.add_sae(deep)
    nowhere = random_sae(model.dims, "res", 1)
    nowhere.site = nowhere.layer = None
    nowhere.cfg.metadata.hook_name = None
    with pytest.raises(SpliceError, match="site= and layer="):
        model.add_sae(nowhere)
    other = random_sae(model.dims, "res", 1)
    other.cfg.metadata.model_name = "gemma-2-9b"
    model.model_id = "gemma-2-2b"
    with pytest.raises(SpliceError, match="trained on 'gemma-2-9b'; this model is 'gemma-2-2b'"):
        model.add_sae(other)
    model.model_id = "gemma-2-9b-it"  # the paper splices base SAEs into the IT model
    model.add_sae(other)
    model.reset_saes()
    with pytest.raises(UnknownNameError, match="attached SAE"):
        model.reset_saes("blocks.1.hook_resid_post")


def test_both_backends_names_reset_one_sae(model: Any) -> None:
    for name in ("blocks.1.hook_resid_post", "blocks.1.hook_out"):
        model.add_sae(random_sae(model.dims, "res", 1))
        model.add_sae(random_sae(model.dims, "res", 2))
        model.reset_saes(name)
        assert list(model.acts_to_saes) == ["blocks.2.hook_resid_post"]
        model.reset_saes()


def test_special_tokens_are_left_alone_unless_asked(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1)
    tokens = random_tokens(model)
    tokens[0, 5] = 1
    site = "blocks.1.hook_resid_post"

    def at_site(**kwargs: Any) -> torch.Tensor:
        with model.saes([sae], **kwargs):
            return model.run_with_cache(tokens, names_filter=site)[1][site]

    with torch.no_grad():
        clean = model.run_with_cache(tokens, names_filter=site)[1][site]
        default, everywhere, chosen = (
            at_site(),
            at_site(exclude_special_tokens=False),
            at_site(exclude_special_tokens=[7]),
        )
    same = (default == clean).all(-1)
    assert torch.equal(same, tokens <= 2)
    assert not (everywhere == clean).all(-1).any()
    assert torch.equal((chosen == clean).all(-1), tokens == 7)


def test_embeddings_as_input_have_no_special_tokens(model: Any) -> None:
    sae = random_sae(model.dims, "res", 1)
    tokens = random_tokens(model)
    embeds = torch.randn(2, 6, model.dims.d_model)
    kwargs = {"start_at_layer": 0} if model.backend == "hooked_transformer" else {}
    model(tokens)  # ids of an earlier pass must not be used
    with pytest.raises(SpliceError, match="exclude_special_tokens=False"):
        model.run_with_saes(embeds, saes=[sae], **kwargs)
    model.run_with_saes(embeds, saes=[sae], exclude_special_tokens=False, **kwargs)


def test_without_a_tokenizer_special_tokens_must_be_named() -> None:
    from gemma_scope_tl.model.loading import load_model

    model = load_model(hf_model=random_gemma())
    sae = random_sae(model.dims, "res", 1)
    with pytest.raises(SpliceError, match="no tokenizer"):
        model.add_sae(sae)
    model.run_with_saes(random_tokens(model), saes=[sae], exclude_special_tokens=[0, 1, 2])


def test_stock_saelens_saes_splice_too(model: Any) -> None:
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    ours = random_sae(model.dims, "att", 2)
    cfg = JumpReLUSAEConfig(
        d_in=128,
        d_sae=256,
        apply_b_dec_to_input=False,
        reshape_activations="hook_z",
        metadata=SAEMetadata(hook_name="blocks.2.attn.hook_z"),
    )
    stock = JumpReLUSAE(cfg)
    stock.load_state_dict(ours.state_dict())
    tokens = random_tokens(model)
    with torch.no_grad():
        assert torch.equal(model.run_with_saes(tokens, saes=[stock]), model.run_with_saes(tokens, saes=[ours]))
    assert stock.hook_z_reshaping_mode  # as it was


def test_splice_wants_a_model_of_ours() -> None:
    with pytest.raises(SpliceError, match="load_model"):
        splice(random_gemma(), [])  # pyright: ignore[reportArgumentType]


def test_logits_carry_no_graph_from_the_saes() -> None:
    model = hooked(random_gemma(), "bridge").requires_grad_(False)
    assert not model.run_with_saes(random_tokens(model), saes=[random_sae(model.dims, "res", 1)]).requires_grad


def test_a_model_without_numbers_takes_none_away() -> None:
    """On the meta device an SAE would lose its weights."""
    model = hooked(random_gemma("narrow-heads"), "bridge")
    sae = random_sae(model.dims, "res", 1, d_sae=64)
    model.to("meta")  # as where the weights of layers are kept elsewhere between passes
    with pytest.raises(SpliceError, match="would lose"), model.saes(sae, exclude_special_tokens=False):
        model.blocks[1].hook_out(torch.zeros(1, 2, 64, device="meta"))
    assert {parameter.device.type for parameter in sae.parameters()} == {"cpu"}
    assert bool(sae.W_dec.any())

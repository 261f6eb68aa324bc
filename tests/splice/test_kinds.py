"""Every kind of SAE at every site, several at once, chains, and what must be refused."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata

from gemma_scope_tl.errors import SpliceError, UnknownNameError
from gemma_scope_tl.model.plain import relative_difference
from gemma_scope_tl.sites import BACKENDS, flatten_heads, get_site
from tests.helpers import hooked, random_gemma, random_sae, random_tokens, shared_model
from tests.parity.test_splice import by_hand

ROUNDING = 1e-5  # float32 through four layers
BRIDGE_WORDS = {
    "blocks.1.hook_out.hook_sae_acts_post": "blocks.1.hook_resid_post.hook_sae_acts_post",
    "blocks.1.hook_out.1.hook_sae_recons": "blocks.1.hook_resid_post.1.hook_sae_recons",
    "blocks.0.attn.o.hook_in.hook_sae_input": "blocks.0.attn.hook_z.hook_sae_input",
    "blocks.2.ln2_post.hook_out.hook_sae_error": "blocks.2.hook_mlp_out.hook_sae_error",
    "embed.hook_out.hook_sae_output": "hook_embed.hook_sae_output",
}
SAE_HOOKS = ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"]
KINDS: list[tuple[str, int | None, bool]] = [  # site, layer, skip path
    ("res", 1, False),
    ("mlp", 2, False),
    ("att", 0, False),
    ("embedding", None, False),
    ("transcoder", 3, False),
    ("transcoder", 1, True),
]


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return shared_model("grouped", request.param)


def _names(model: Any, sae: Any) -> tuple[str, str]:
    site = get_site(sae.site)
    return site.hook_name(sae.layer, model.backend), site.hook_name_out(sae.layer, model.backend)


@pytest.mark.parametrize(("site", "layer", "skip"), KINDS)
def test_what_each_kind_reads_reconstructs_and_leaves(model: Any, site: str, layer: int | None, skip: bool) -> None:
    """The error is what the SAE misses of the tensor it writes: for a transcoder the MLP's true output."""
    sae, tokens = random_sae(model.dims, site, layer, skip=skip), random_tokens(model)
    read, write = _names(model, sae)
    short = model.get_sae_hook_name(sae).removesuffix(".hook_sae_acts_post")
    with torch.no_grad():
        clean = model.run_with_cache(tokens)[1]
        x, y = flatten_heads(clean[read]), flatten_heads(clean[write])
        _, cache = model.run_with_cache_with_saes(tokens, saes=sae, use_error_term=True)
    recons, special = by_hand(sae, x), (tokens <= 2)[..., None]
    assert torch.equal(cache[f"{short}.hook_sae_input"], x)
    assert (
        relative_difference(flatten_heads(cache[f"{short}.hook_sae_error"]), (y - recons).masked_fill(special, 0))
        < ROUNDING
    )
    assert relative_difference(flatten_heads(cache[f"{short}.hook_sae_output"]), y) < ROUNDING
    assert cache[write].shape == clean[write].shape  # heads stay apart where the backend has them apart
    assert site != "transcoder" or relative_difference(y, x) > 0.1  # the two tensors of a transcoder are not alike


def test_at_the_att_site_heads_may_be_apart_or_flat() -> None:
    shapes = {}
    for backend in BACKENDS:
        model = shared_model("grouped", backend)
        sae, tokens = random_sae(model.dims, "att", 1), random_tokens(model)
        with torch.no_grad():
            shapes[backend] = model.run_with_cache_with_saes(tokens, saes=sae)[1][_names(model, sae)[1]].ndim
            if backend == "bridge":
                continue
            with model.saes([sae]) as there:
                attached = next(iter(there._attached.values()))
                z = torch.randn(2, 5, 4, 32)
                apart = attached.replace(z, z, None)
                flat = attached.replace(z.flatten(-2), z.flatten(-2), None)
        assert apart.shape == z.shape
        assert torch.equal(apart.flatten(-2), flat)
    assert 4 in shapes.values()


def test_several_in_one_layer_and_a_transcoder_elsewhere(model: Any) -> None:
    """The reconstruction of each is of what the ones before it left."""
    places = [("att", 1), ("mlp", 1), ("res", 1), ("transcoder", 2), ("res", 3), ("embedding", None)]
    saes = [random_sae(model.dims, site, layer, seed=i) for i, (site, layer) in enumerate(places)]
    tokens = random_tokens(model)
    with torch.no_grad():
        clean = model(tokens)
        _, cache = model.run_with_cache_with_saes(tokens, saes=saes)
        for sae in saes:
            name = model.get_sae_hook_name(sae, "hook_sae_input")
            x = cache[name]
            recons = cache[name.replace("hook_sae_input", "hook_sae_recons")]
            assert relative_difference(recons, by_hand(sae, x)) < ROUNDING
            written = flatten_heads(cache[_names(model, sae)[1]])
            ordinary = tokens > 2
            assert relative_difference(written[ordinary], recons[ordinary]) < ROUNDING
        exact = model.run_with_saes(tokens, saes=saes, use_error_term=True)
    assert relative_difference(exact, clean) < 5e-5  # six roundings in a row
    assert not model.acts_to_saes


@pytest.mark.parametrize("sites", [("res", "res"), ("mlp", "mlp"), ("mlp", "transcoder"), ("transcoder", "mlp")])
def test_two_at_one_site_and_one_twice_are_refused(model: Any, sites: tuple[str, str]) -> None:
    passes: list[int] = []
    first, second = (random_sae(model.dims, site, 1, seed=i) for i, site in enumerate(sites))
    with model.hooks([("hook_embed", lambda value, hook: passes.append(1))]):
        with pytest.raises(SpliceError, match="is taken"):
            model.run_with_saes(random_tokens(model), saes=[first, second])
        for chain in (False, True):
            with pytest.raises(SpliceError, match="attached already"):
                model.run_with_saes(random_tokens(model), saes=[first, first], chain=chain)
    assert not passes and not model.acts_to_saes


def test_what_belongs_to_another_model_is_refused_before_the_pass(model: Any) -> None:
    passes: list[int] = []
    wide, deep, other = random_sae(model.dims, "att", 0), random_sae(model.dims, "res", 7), None
    wide.site = "res"
    other = random_sae(model.dims, "res", 1)
    other.cfg.metadata.model_name = "gemma-2-9b"
    model.model_id = "gemma-2-2b"
    good = random_sae(model.dims, "mlp", 1)
    with model.hooks([("hook_embed", lambda value, hook: passes.append(1))]):
        for bad, match in ((wide, "reads 128 dimensions"), (deep, "no layer 7"), (other, "trained on 'gemma-2-9b'")):
            for run in (model.run_with_saes, model.run_with_cache_with_saes, model.run_with_hooks_with_saes):
                with pytest.raises(SpliceError, match=match):
                    run(random_tokens(model), saes=[good, bad])
    model.model_id = None
    assert not passes and not model.acts_to_saes and not model.sae_hook_points()


# -- chains ------------------------------------------------------------------------------------------------------------


def test_a_chain_is_one_after_the_other(model: Any) -> None:
    saes = [random_sae(model.dims, "res", 1, seed=i) for i in range(3)]
    tokens, write = random_tokens(model), "blocks.1.hook_resid_post"
    names = [f"{write}{stage}.hook_sae_acts_post" for stage in ("", ".1", ".2")]
    with torch.no_grad():
        y = model.run_with_cache(tokens, names_filter=write)[1][write]
        with model.saes(saes, chain=True):
            assert [model.get_sae_hook_name(sae) for sae in saes] == names
            assert list(model.acts_to_saes) == [write, f"{write}.1", f"{write}.2"]
            assert list(model.acts_to_saes.values()) == saes
            _, cache = model.run_with_cache(tokens)
    special, flowing = (tokens <= 2)[..., None], y.double()
    for sae, name in zip(saes, names, strict=True):
        w = {key: value.detach().double() for key, value in sae.named_parameters()}
        pre = flowing @ w["W_enc"] + w["b_enc"]
        acts = pre * (pre > w["threshold"])
        assert relative_difference(cache[name], acts) < ROUNDING
        flowing = torch.where(special, y.double(), acts @ w["W_dec"] + w["b_dec"])
    assert relative_difference(cache[write], flowing) < ROUNDING


def test_chains_with_the_error_term(model: Any) -> None:
    """Unedited, a chain changes nothing; an edit of the first is seen by the second."""
    first, second = (random_sae(model.dims, "res", 1, seed=i) for i in range(2))
    tokens, write = random_tokens(model), "blocks.1.hook_resid_post"
    with torch.no_grad():
        plain, clean = model.run_with_cache(tokens, names_filter=write)
        with model.saes([first, second], use_error_term=True, chain=True):
            assert relative_difference(model(tokens), plain) < ROUNDING
            edit = (model.get_sae_hook_name(first), lambda acts, hook: acts * 0)
            with model.hooks([edit]):
                got = model.run_with_cache(tokens)[1]
    special, y = (tokens <= 2)[..., None], clean[write].double()
    moved = torch.where(special, y, first.b_dec.double() + y - by_hand(first, y))
    assert relative_difference(got[f"{write}.1.hook_sae_input"], moved) < ROUNDING
    assert relative_difference(got[f"{write}.1.hook_sae_recons"], by_hand(second, moved)) < ROUNDING
    assert relative_difference(got[write], moved) < ROUNDING


@pytest.mark.parametrize("name", ["blocks.1.hook_resid_post", "blocks.1.hook_out"])
def test_one_name_resets_a_whole_chain(model: Any, name: str) -> None:
    chain, other = [random_sae(model.dims, "res", 1, seed=i) for i in range(2)], random_sae(model.dims, "res", 2)
    tokens = random_tokens(model)
    with torch.no_grad():
        wanted = model.run_with_saes(tokens, saes=other)
        for sae in [*chain, other]:
            model.add_sae(sae, chain=True)
        model.reset_saes(name)
        assert list(model.acts_to_saes.values()) == [other]
        assert torch.equal(model(tokens), wanted)
    model.reset_saes()
    with pytest.raises(UnknownNameError):
        model.reset_saes(name)


def test_a_transcoder_begins_chains_and_never_follows(model: Any) -> None:
    transcoder, mlp = random_sae(model.dims, "transcoder", 1), random_sae(model.dims, "mlp", 1)
    tokens = random_tokens(model)
    with pytest.raises(SpliceError, match="transcoder reads another tensor"):
        model.run_with_saes(tokens, saes=[mlp, transcoder], chain=True)
    assert not model.acts_to_saes
    with torch.no_grad():
        _, cache = model.run_with_cache_with_saes(tokens, saes=[transcoder, mlp], chain=True)
    predicted = cache["blocks.1.hook_mlp_out.hook_sae_recons"]
    ordinary = tokens > 2
    assert torch.equal(cache["blocks.1.hook_mlp_out.1.hook_sae_input"][ordinary], predicted[ordinary])
    written = flatten_heads(cache[_names(model, mlp)[1]])
    assert relative_difference(written[ordinary], by_hand(mlp, predicted)[ordinary]) < ROUNDING


# -- names -------------------------------------------------------------------------------------------------------------


def test_cached_keys_are_the_same_list_on_both_backends() -> None:
    keys = {}
    for backend in BACKENDS:
        model = shared_model("grouped", backend)
        saes = [random_sae(model.dims, site, layer, skip=skip) for site, layer, skip in KINDS]
        saes.append(random_sae(model.dims, "res", 1, seed=9))
        for sae in saes:
            model.add_sae(sae, use_error_term=True, chain=True)
        cache = model.run_with_cache(random_tokens(model))[1]
        points = model.sae_hook_points()
        keys[backend] = [key for key in cache if key in points]
        assert set(keys[backend]) == set(points)
        others = {key for key in cache if ".hook_sae_" in key} - set(points)  # in the bridge's words
        assert len(others) == len(points)
        for theirs, mine in BRIDGE_WORDS.items():
            assert cache[theirs].data_ptr() == cache[mine].data_ptr()
        assert keys[backend].count("blocks.1.hook_resid_post.1.hook_sae_acts_post") == 1
        chosen = [model.get_sae_hook_name(sae) for sae in saes]
        assert set(model.run_with_cache(random_tokens(model), names_filter=chosen)[1]) == set(chosen)
        model.reset_saes()
    ours, theirs = (keys[backend] for backend in BACKENDS)
    assert len(ours) == len(set(ours)) == 7 * 6
    assert ours == theirs  # in the order of the forward pass
    for before, after in pairwise(SAE_HOOKS):
        for key in ours:
            if key.endswith(before):
                assert ours.index(key) < ours.index(key.replace(before, after))


def test_one_sae_on_two_models_keeps_its_names_whoever_lets_go_first() -> None:
    models = [hooked(random_gemma(), "hooked_transformer") for _ in range(2)]
    sae, tokens = random_sae(models[0].dims, "res", 1), random_tokens(models[0])
    for first, second in ((0, 1), (1, 0)):
        models[0].add_sae(sae)
        models[1].add_sae(sae)
        models[first].reset_saes()
        assert models[second].get_sae_hook_name(sae) in models[second].run_with_cache(tokens)[1]
        models[second].reset_saes()
        assert [point.name for point in sae.hook_dict.values()] == list(sae.hook_dict)


# -- the user's hooks --------------------------------------------------------------------------------------------------


def test_resetting_permanent_hooks_leaves_saes_attached(model: Any) -> None:
    chain, transcoder = (
        [random_sae(model.dims, "res", 1, seed=i) for i in range(2)],
        random_sae(model.dims, "transcoder", 2),
    )
    tokens, fired = random_tokens(model), []
    with torch.no_grad(), model.saes([*chain, transcoder], chain=True):
        wanted = model(tokens)
        model.add_hook("blocks.1.hook_resid_post", lambda value, hook: fired.append(1), is_permanent=True)
        model.reset_hooks(including_permanent=True)
        assert torch.equal(model(tokens), wanted)
        model.reset_hooks(including_permanent=True)
        assert torch.equal(model(tokens), wanted)
    assert not fired
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_a_block_of_hooks_ends_on_an_sae_that_leaves_before_it(model: Any) -> None:
    sae, tokens = random_sae(model.dims, "res", 1), random_tokens(model)
    sae.hook_sae_acts_post.add_hook(lambda acts, hook: None)  # the user's own, on the SAE
    model.add_sae(sae)
    with torch.no_grad():
        wanted = model(tokens)
        with model.hooks([(model.get_sae_hook_name(sae), lambda acts, hook: acts * 0)]):
            assert not torch.equal(model(tokens), wanted)
            model.reset_saes()
        with model.saes([sae]):
            assert torch.equal(model(tokens), wanted)
    assert len(sae.hook_sae_acts_post.fwd_hooks) == 1


# -- SAELens's own -----------------------------------------------------------------------------------------------------


def _stock(kind: str, site: str, dims: Any) -> Any:
    torch.manual_seed(5)
    hook, width = {"res": ("blocks.1.hook_resid_post", 64), "att": ("blocks.1.attn.hook_z", 128)}[site]
    shape: Any = {"reshape_activations": "hook_z" if site == "att" else "none"}
    shape |= {"d_in": width, "d_sae": 256, "metadata": SAEMetadata(hook_name=hook)}
    if kind == "topk":
        sae: Any = TopKSAE(TopKSAEConfig(k=9, **shape))
    elif kind == "jumprelu":
        sae = JumpReLUSAE(JumpReLUSAEConfig(**shape))
        torch.nn.init.constant_(sae.threshold, 0.7)
    else:
        sae = StandardSAE(StandardSAEConfig(**shape))
    for parameter in (sae.b_enc, sae.b_dec):
        torch.nn.init.normal_(parameter, std=0.2)
    return sae


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "topk"])
@pytest.mark.parametrize("site", ["res", "att"])
def test_stock_saes(model: Any, kind: str, site: str) -> None:
    """Against SAELens's own forward pass, its error term, and edits of every sort."""
    sae, tokens = _stock(kind, site, model.dims), random_tokens(model)
    write = sae.cfg.metadata.hook_name
    alone = copy.deepcopy(sae)
    if site == "att":
        alone.turn_off_forward_pass_hook_z_reshaping()
    asked = get_site(site).hook_name(1, model.backend)
    ordinary = tokens > 2
    with torch.no_grad():
        clean, cache = model.run_with_cache(tokens)
        y = flatten_heads(cache[asked])
        spliced = flatten_heads(model.run_with_cache_with_saes(tokens, saes=sae)[1][asked])
        assert torch.equal(spliced[~ordinary], y[~ordinary])
        assert relative_difference(spliced[ordinary], alone(y)[ordinary]) < ROUNDING
        exact = model.run_with_saes(tokens, saes=sae, use_error_term=True)
        assert relative_difference(exact, clean) < ROUNDING
        for point in ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"):
            alone.hook_dict[point].add_hook(_halve)
            edited = alone(y)
            alone.reset_hooks()
            wanted = torch.where(ordinary[..., None], edited + (y - alone(y)), y)
            for edit in (_halve, _halve_in_place):
                with model.saes([sae], use_error_term=True), model.hooks([(f"{write}.{point}", edit)]):
                    got = flatten_heads(model.run_with_cache(tokens)[1][asked])
                assert relative_difference(got, wanted) < ROUNDING
    assert sae.hook_z_reshaping_mode == (site == "att")


def _halve(value: torch.Tensor, hook: Any) -> torch.Tensor:
    return value * 0.5


def _halve_in_place(value: torch.Tensor, hook: Any) -> None:
    value.mul_(0.5)

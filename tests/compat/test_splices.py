"""SAEs in models: what SAELens's methods give, on its classes and on ours. BOS is spliced too, as in SAELens.

Left out, because SAELens is wrong there: the skip path of skip transcoders, which it drops; and on its bridge the
embedding, whose hook it does not find, ``reset_hooks`` beside an SAE, which fails, and backward hooks afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError
from gemma_scope_tl.sites import BACKENDS, get_site
from tests.compat.pairs import Side, make_pair
from tests.compat.test_models import Seen, check, equal, halve, resid

PLACES = ["res", "att", "mlp", "transcoder"]
POINTS = ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_output"]


@pytest.fixture(scope="module", params=BACKENDS)
def sides(request: Any) -> tuple[Side, Side]:
    return make_pair(request.param)


@pytest.fixture(autouse=True)
def clean(sides: tuple[Side, Side]) -> Any:
    yield
    for side in sides:
        side.model.reset_saes()
        side.model.reset_hooks()


def run(s: Side, *names: str, **options: Any) -> Any:
    return s.model.run_with_saes(s.tokens, saes=[s.saes[name] for name in names], **s.plain, **options)


def cached(s: Side, *names: str, **options: Any) -> Any:
    """Output, and of the cache what belongs to SAEs, by the names that users write for this backend."""
    saes = [s.saes[name] for name in names]
    out, cache = s.model.run_with_cache_with_saes(s.tokens, saes=saes, **s.plain, **options)
    return [out, {name: value for name, value in cache.items() if ".hook_sae_" in name}]


@pytest.mark.slow
@pytest.mark.parametrize("error_term", [None, False, True])
@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_passes_and_caches(sides: tuple[Side, Side], place: str, error_term: bool | None) -> None:
    """Every hook point of the SAE, under SAELens's own name on the backend, with its shape."""
    check(lambda s: run(s, place, use_error_term=error_term), sides)
    check(lambda s: cached(s, place, use_error_term=error_term), sides)
    check(lambda s: s.model(s.tokens), sides)


@torch.no_grad()
def test_several_at_once(sides: tuple[Side, Side]) -> None:
    names = ("early", "att", "mlp")
    check(lambda s: run(s, *names), sides)
    check(lambda s: cached(s, *names, use_error_term=True), sides)
    check(lambda s: run(s, *names, return_type="loss"), sides)
    check(lambda s: s.model.run_with_saes(s.tokens, saes=s.saes["res"], **s.plain), sides)  # one, not in a list


@torch.no_grad()
def test_methods_for_saes_without_any(sides: tuple[Side, Side]) -> None:
    check(lambda s: s.model.run_with_saes(s.tokens), sides)
    check(lambda s: s.model.run_with_cache_with_saes(s.tokens, names_filter=resid(s, 1))[0], sides)
    check(lambda s: s.model.run_with_hooks_with_saes(s.tokens, fwd_hooks=[(resid(s, 1), halve)]), sides)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_filters_and_forms_of_caches(sides: tuple[Side, Side], place: str) -> None:
    for wanted in (
        lambda name: name.endswith("hook_sae_acts_post"),
        lambda name: "hook_sae" in name,
    ):
        check(lambda s, wanted=wanted: cached(s, place, names_filter=wanted), sides)

    def by_name(s: Side) -> Any:
        site, layer = get_site("transcoder" if place == "transcoder" else place), s.saes[place].cfg.metadata.hook_layer
        backend = "bridge" if hasattr(s.model, "original_model") else "hooked_transformer"
        name = f"{site.hook_name_out(layer, backend)}.hook_sae_acts_post"
        found = [cached(s, place, names_filter=name)[1][name], cached(s, place, names_filter=[name])[1][name]]
        s.model.add_sae(s.saes[place], **s.plain)
        found += [s.model.run_with_cache(s.tokens, names_filter=name)[1][name]]
        s.model.reset_saes()
        return found

    check(by_name, sides)

    def one_text(s: Side) -> Any:
        _, cache = s.model.run_with_cache_with_saes(
            s.tokens[:1], saes=[s.saes[place]], remove_batch_dim=True, **s.plain
        )
        whole = s.model.run_with_cache_with_saes(s.tokens, saes=[s.saes[place]], return_cache_object=False, **s.plain)[
            1
        ]
        return [{n: v for n, v in cache.items() if ".hook_sae_" in n}, type(whole) is dict]

    check(one_text, sides)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("place", PLACES)
@torch.no_grad()
def test_hooks_on_saes(sides: tuple[Side, Side], place: str, point: str) -> None:
    """Edits of every hook point, with and without the error term, and what later points then see."""

    def edited(s: Side) -> Any:
        seen = Seen()
        hooks = [
            (lambda name: name.endswith(f".{point}"), halve),
            (lambda name: name.endswith((".hook_sae_output", ".hook_sae_error")), seen),
        ]
        out = s.model.run_with_hooks_with_saes(s.tokens, saes=[s.saes[place]], fwd_hooks=hooks, **s.plain)
        s.model.add_sae(s.saes[place], use_error_term=True, **s.plain)
        with_error = s.model.run_with_hooks(s.tokens, fwd_hooks=hooks)
        s.model.reset_saes()
        # a filter is asked about both names of a hook point, so ours may be noted under either
        return [out, with_error, [value for _, value in seen.notes]]

    check(edited, sides)


@torch.no_grad()
def test_a_hook_on_one_head(sides: tuple[Side, Side]) -> None:
    """On HookedTransformer the att site's output and error have heads apart: head 0 is one index."""

    def zeroed(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value = value.clone()
        value[..., 0, :] = 0
        return value

    check(
        lambda s: s.model.run_with_hooks_with_saes(
            s.tokens,
            saes=[s.saes["att"]],
            fwd_hooks=[(lambda name: name.endswith("hook_sae_output"), zeroed)],
            **s.plain,
        ),
        sides,
    )


@torch.no_grad()
def test_lifetimes(sides: tuple[Side, Side]) -> None:
    def steps(s: Side) -> Any:
        model, found = s.model, []

        def note() -> None:
            found.append([model(s.tokens), sorted(model.acts_to_saes)])

        model.add_sae(s.saes["early"], **s.plain)
        note()
        with model.saes(saes=[s.saes["mlp"]], **s.plain):
            note()
        note()
        with model.saes(saes=[s.saes["mlp"]], reset_saes_end=False, **s.plain) as given:
            assert given is model
        note()
        name = s.saes["early"].cfg.metadata.hook_name
        model.reset_saes(name)
        note()
        model.add_sae(s.saes["att"], use_error_term=True, **s.plain)
        model.reset_saes([s.saes["mlp"].cfg.metadata.hook_name])
        note()
        model.run_with_saes(s.tokens, saes=[s.saes["res"]], reset_saes_end=False, **s.plain)
        note()
        if not hasattr(model, "original_model"):
            model.reset_hooks()  # SAEs are no hooks of the user's
        note()
        model.reset_saes()
        note()
        with pytest.raises(ZeroDivisionError), model.saes(saes=[s.saes["res"]], **s.plain):
            raise ZeroDivisionError
        note()
        return found

    check(steps, sides)


@torch.no_grad()
def test_an_sae_keeps_its_own_setting_of_the_error_term(sides: tuple[Side, Side]) -> None:
    def steps(s: Side) -> Any:
        sae = s.saes["res"]
        with pytest.warns(DeprecationWarning):
            sae.use_error_term = True
        try:
            return [run(s, "res"), run(s, "res", use_error_term=False), sae.use_error_term]
        finally:
            sae.use_error_term = False

    check(steps, sides)


@torch.no_grad()
def test_generation_with_saes(sides: tuple[Side, Side]) -> None:
    """Without a cache: SAELens's masks and the bridge's cache do not survive a cached step."""

    def steps(s: Side) -> Any:
        with s.model.saes(saes=[s.saes["res"], s.saes["att"]], **s.plain):
            return s.model.generate(
                s.tokens, max_new_tokens=4, do_sample=False, use_past_kv_cache=False, stop_at_eos=False, verbose=False
            )

    check(steps, sides)


def test_gradients_of_a_loss_through_saes(sides: tuple[Side, Side]) -> None:
    def steps(s: Side) -> Any:
        sae = s.saes["res"]
        sae.requires_grad_(True)
        try:
            with s.model.saes(saes=[sae], **s.plain):
                s.model(s.tokens, return_type="loss").backward()
            found = {n: p.grad for n, p in sae.named_parameters() if p.grad is not None}
            sae.zero_grad()
            return [found, s.model.W_E.grad if s.model.W_E.is_leaf else None]
        finally:
            sae.requires_grad_(False)

    check(steps, sides)


# -- HookedTransformer alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sides", ["hooked_transformer"], indirect=True)
@torch.no_grad()
def test_special_tokens_and_the_embedding(sides: tuple[Side, Side]) -> None:
    """SAELens's bridge has neither."""

    def excluded(ids: Any) -> Callable[[Side], Any]:
        return lambda s: s.model.run_with_saes(s.tokens, saes=[s.saes["res"]], exclude_special_tokens=ids)

    for ids in (False, [2], [2, int(sides[0].tokens[0, 3])]):
        check(excluded(ids), sides)
    check(lambda s: run(s, "embedding", use_error_term=True), sides)
    check(lambda s: cached(s, "embedding"), sides)
    saes = {s.model: [s.saes["res"]] for s in sides}
    theirs = sides[0].model.run_with_saes(sides[0].tokens, saes=saes[sides[0].model], exclude_special_tokens=[0, 1, 2])
    equal(theirs, sides[1].model.run_with_saes(sides[1].tokens, saes=saes[sides[1].model]))  # ours by default


# -- the differences on purpose, as docs/coming-from.md has them -------------------------------------------------------


@torch.no_grad()
def test_a_taken_site(sides: tuple[Side, Side]) -> None:
    """SAELens overwrites, and restores at the end of a block; ours refuses."""
    for s, raises in zip(sides, (False, True), strict=True):
        s.model.add_sae(s.saes["res"], **s.plain)
        other = type(s.saes["res"])(s.saes["res"].cfg)
        if raises:
            with pytest.raises(SpliceError, match=r"taken.*chain=True"):
                s.model.add_sae(other, **s.plain)
        else:
            s.model.add_sae(other)
        assert list(s.model.acts_to_saes.values()) == [s.saes["res"] if raises else other]


@torch.no_grad()
def test_what_is_skipped_with_a_warning_there_raises_here(sides: tuple[Side, Side]) -> None:
    theirs, ours = sides
    theirs.model.reset_saes("blocks.0.hook_resid_post")
    with pytest.raises(UnknownNameError):
        ours.model.reset_saes("blocks.0.hook_resid_post")
    for s, raises in zip(sides, (False, True), strict=True):
        lost = type(s.saes["res"])(s.saes["res"].cfg)
        lost.site, lost.cfg.metadata.hook_name = None, "blocks.77.hook_resid_post"
        try:
            if raises:
                with pytest.raises(GemmaScopeError, match="77"):
                    s.model.add_sae(lost, **s.plain)
            else:
                s.model.add_sae(lost)
            assert not s.model.acts_to_saes
        finally:
            lost.cfg.metadata.hook_name = "blocks.1.hook_resid_post"


@torch.no_grad()
def test_hooks_of_the_user_stay_here(sides: tuple[Side, Side]) -> None:
    counts = []
    for s in sides:
        seen = Seen()
        s.model.add_hook(resid(s, 1), seen)
        run(s, "res")
        s.model(s.tokens)
        counts.append(len(seen.notes))
    assert counts[1] == 2 > counts[0]


def test_units_after_folding_a_scale() -> None:
    """SAELens leaves the units of latents, the training class those of matrices; the reconstruction is one."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE as Stock
    from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig

    from gemma_scope_tl.interop.training_sae import GemmaScopeTrainingSAE, GemmaScopeTrainingSAEConfig

    torch.manual_seed(0)
    trained = GemmaScopeTrainingSAE(GemmaScopeTrainingSAEConfig(d_in=8, d_sae=32, apply_b_dec_to_input=False))
    stock = Stock(JumpReLUSAEConfig(d_in=8, d_sae=32, apply_b_dec_to_input=False))
    stock.load_state_dict(
        {
            **{n: getattr(trained, n).detach().clone() for n in ("W_enc", "W_dec", "b_enc", "b_dec")},
            "threshold": trained.threshold.detach(),
        }
    )
    x, factor = torch.randn(5, 8), 0.25
    before = stock.encode(x)
    for one in (trained, stock):
        one.fold_activation_norm_scaling_factor(factor)
    raw = x / factor
    torch.testing.assert_close(stock.encode(raw), before)
    torch.testing.assert_close(trained.encode(raw), before / factor)
    torch.testing.assert_close(trained(raw), stock(raw))

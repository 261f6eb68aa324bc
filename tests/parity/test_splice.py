"""Spliced SAEs on both backends, against the same SAE written out by hand and hooked into the plain model."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.model.plain import relative_difference
from gemma_scope_tl.sites import BACKENDS, get_site
from tests.helpers import decoder_of, hooked, random_gemma, random_sae, random_tokens, shared_model, text_of

PLACES = [("res", 1), ("mlp", 2), ("att", 0), ("embedding", None), ("transcoder", 3)]
# Layer 5 has full attention, the others sliding attention.
PLACES_3 = [("res", 1), ("mlp", 2), ("att", 5), ("transcoder", 3), ("transcoder", 5)]
PLACES_OF = {"grouped": PLACES, "gemma3": PLACES_3, "gemma3-in-a-wrapper": PLACES_3}
CASES = [(config, *place) for config, places in PLACES_OF.items() for place in places]
of_cases = pytest.mark.parametrize(("config", "site", "layer"), CASES)
of_families = pytest.mark.parametrize("config", ["grouped", "gemma3"])
ROUNDING = 1e-5  # float32 on values of 1 to 30, through up to four layers


def by_hand(sae: Any, x: torch.Tensor) -> torch.Tensor:
    """The JumpReLU SAE of the paper (section 2.2, equation 3 of arXiv 2407.14435), in float64."""
    w = {name: p.detach().double() for name, p in sae.named_parameters()}
    pre = x.double() @ w["W_enc"] + w["b_enc"]
    acts = pre * (pre > w["threshold"])
    out = acts @ w["W_dec"] + w["b_dec"]
    return out + x.double() @ w["W_skip"].T if "W_skip" in w else out


def spliced_by_hand(
    hf: Any, tokens: torch.Tensor, saes: list[Any], untouched: torch.Tensor | None = None, **kwargs: Any
) -> torch.Tensor:
    """Logits of the plain model with every SAE replacing its site outside ``untouched`` (BOS, EOS, padding)."""
    special = (tokens <= 2 if untouched is None else untouched).unsqueeze(-1)
    taken: dict[int, torch.Tensor] = {}

    def replaced(x: torch.Tensor, y: torch.Tensor, sae: Any) -> torch.Tensor:
        return torch.where(special, y, by_hand(sae, x).to(y.dtype))

    with ExitStack() as stack:
        for sae in saes:
            decoder = decoder_of(hf)
            block = decoder.layers[sae.layer or 0]
            post = {"res": block, "mlp": block.post_feedforward_layernorm, "embedding": decoder.embed_tokens}
            if sae.site == "att":
                handle = block.self_attn.o_proj.register_forward_pre_hook(
                    lambda _m, args, sae=sae: (replaced(args[0], args[0], sae),)
                )
            elif sae.site == "transcoder":
                norm, config = block.pre_feedforward_layernorm, text_of(hf)

                def read(_m: Any, args: Any, out: Any, config: Any = config) -> None:
                    x = args[0].float()
                    before = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps)
                    taken[0] = before if config.model_type == "gemma2" else out  # Gemma Scope 2 reads behind the gain

                stack.callback(norm.register_forward_hook(read).remove)
                handle = block.post_feedforward_layernorm.register_forward_hook(
                    lambda _m, _a, out, sae=sae: replaced(taken[0], out, sae)
                )
            else:
                handle = post[sae.site].register_forward_hook(
                    lambda _m, _a, out, sae=sae: (
                        (replaced(out[0], out[0], sae), *out[1:]) if isinstance(out, tuple) else replaced(out, out, sae)
                    )
                )
            stack.callback(handle.remove)
        with torch.no_grad():
            return hf(tokens, use_cache=False, **kwargs).logits


@pytest.mark.parametrize("backend", BACKENDS)
@of_cases
def test_one_sae(config: str, site: str, layer: int | None, backend: str) -> None:
    hf = random_gemma(config)
    tokens = random_tokens(hf)
    tokens[1, 7] = 1  # an EOS in the middle
    model = shared_model(config, backend)
    sae = random_sae(model.dims, site, layer)
    wanted = spliced_by_hand(hf, tokens, [sae])
    with torch.no_grad():
        clean = hf(tokens).logits
        got = model.run_with_saes(tokens, saes=[sae])
        after = model(tokens)
    assert relative_difference(wanted, clean) > 1e-2  # splicing a random SAE does something
    assert relative_difference(got, wanted) < ROUNDING
    assert relative_difference(after, clean) < ROUNDING  # and leaves nothing behind


@pytest.mark.parametrize("config", ["one-kv-head", "gemma3-narrow-heads"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_saes_at_every_kind_of_site_together(backend: str, config: str) -> None:
    hf = random_gemma(config)
    tokens = random_tokens(hf)
    model = shared_model(config, backend)
    places: list[tuple[str, int | None]] = [("embedding", None)] if "embedding" in model.family.sites else []
    places += [("att", 0), ("mlp", 0), ("res", 0), ("transcoder", 1), ("res", 2), ("att", 2)]
    saes = [random_sae(model.dims, site, layer, seed=i) for i, (site, layer) in enumerate(places)]
    with torch.no_grad():
        got = model.run_with_saes(tokens, saes=saes)
    assert relative_difference(got, spliced_by_hand(hf, tokens, saes)) < 5e-5  # seven replacements in a row
    assert not model.acts_to_saes


@of_families
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_skip_transcoder_keeps_its_linear_path(backend: str, config: str) -> None:
    hf = random_gemma(config)
    tokens = random_tokens(hf)
    model = shared_model(config, backend)
    sae = random_sae(model.dims, "transcoder", 1, skip=True)
    with torch.no_grad():
        got = model.run_with_saes(tokens, saes=sae)
    assert relative_difference(got, spliced_by_hand(hf, tokens, [sae])) < ROUNDING


@pytest.mark.parametrize("backend", BACKENDS)
@of_cases
def test_the_error_term_changes_nothing_until_a_feature_is_edited(
    config: str, site: str, layer: int | None, backend: str
) -> None:
    model = shared_model(config, backend)
    tokens = random_tokens(model)
    sae = random_sae(model.dims, site, layer)
    name = model.get_sae_hook_name(sae)
    with torch.no_grad():
        clean = model(tokens)
        spliced, cache = model.run_with_cache_with_saes(tokens, saes=[sae], use_error_term=True)
        acts = cache[name]
        latent = int(acts[0, 5].argmax())
        edited = model.run_with_hooks_with_saes(
            tokens, saes=[sae], use_error_term=True, fwd_hooks=[(name, _zero(latent))]
        )
    assert relative_difference(spliced, clean) < ROUNDING
    removed = acts[..., latent : latent + 1].masked_fill((tokens <= 2).unsqueeze(-1), 0) * sae.W_dec[latent]
    out_hook = name.removesuffix(".hook_sae_acts_post")
    with torch.no_grad():  # with the error term, an edit is the edit of the plain activation
        wanted = model.run_with_hooks(
            tokens, fwd_hooks=[(out_hook, lambda value, hook: value - removed.reshape(value.shape))]
        )
    assert relative_difference(edited, wanted) < ROUNDING
    assert relative_difference(edited, clean) > 1e-4


def _zero(latent: int) -> Any:
    def hook_fn(acts: torch.Tensor, hook: Any) -> torch.Tensor:
        acts = acts.clone()
        acts[..., latent] = 0
        return acts

    return hook_fn


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@of_cases
def test_float32_sae_in_a_bfloat16_model(config: str, site: str, layer: int | None, backend: str) -> None:
    hf = random_gemma(config, dtype=torch.bfloat16)
    tokens = random_tokens(hf)
    model = hooked(random_gemma(config, dtype=torch.bfloat16), backend)
    sae = random_sae(model.dims, site, layer)
    with torch.no_grad():
        got = model.run_with_saes(tokens, saes=[sae])
        clean = model(tokens)
        with_error = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    assert got.dtype == torch.bfloat16
    # one rounding to bfloat16 at the splice on the bridge; HookedTransformer rounds differently everywhere
    assert relative_difference(got, spliced_by_hand(hf, tokens, [sae])) < (5e-3 if backend == "bridge" else 6e-2)
    assert relative_difference(with_error, clean) < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@of_cases
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_generation(config: str, site: str, layer: int | None, use_cache: bool, backend: str) -> None:
    hf = random_gemma(config)
    model = shared_model(config, backend)
    sae = random_sae(model.dims, site, layer)
    prompt = random_tokens(hf, batch=2, length=6)
    wanted = prompt
    for _ in range(12):  # beyond the sliding window
        wanted = torch.cat([wanted, spliced_by_hand(hf, wanted, [sae])[:, -1:].argmax(-1)], dim=1)
    with model.saes([sae]):
        got = model.generate(prompt, max_new_tokens=12, do_sample=False, use_past_kv_cache=use_cache, stop_at_eos=False)
    assert got.tolist() == wanted.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_bundled_suite_on_the_bundled_model(backend: str) -> None:
    hf = random_gemma("bundled")
    model = shared_model("bundled", backend)
    text = "And God said, Let there be light: and there was light. " * 6
    tokens = model.to_tokens(text)
    assert tokens.shape[1] > 64  # longer than the sliding window
    rows = gs.list_saes(model="bundled", site=["res", "mlp", "att"])
    rows = rows[rows["canonical"]]  # one of each width
    assert rows.groupby(["site", "layer"]).size().eq(2).all()
    saes = [gs.JumpReLUSAE.from_pretrained(*names) for names in rows[["release", "id"]].to_numpy()]
    with torch.no_grad():
        for sae in saes:
            assert (
                relative_difference(model.run_with_saes(tokens, saes=sae), spliced_by_hand(hf, tokens, [sae]))
                < ROUNDING
            )
        clean = model(tokens)
        exact = model.run_with_saes(tokens, saes=saes[::2], use_error_term=True)
    assert relative_difference(exact, clean) < ROUNDING
    together = saes[::2]
    wanted = tokens[:, :60]
    for _ in range(12):  # across the edge of the window
        wanted = torch.cat([wanted, spliced_by_hand(hf, wanted, together)[:, -1:].argmax(-1)], dim=1)
    with model.saes(together):
        got = model.generate(tokens[:, :60], max_new_tokens=12, do_sample=False, stop_at_eos=False)
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize("config", ["grouped", "gemma3", "gemma3-in-a-wrapper"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_plain_cached_generation_equals_hugging_face(backend: str, config: str) -> None:
    hf = random_gemma(config)
    prompt = random_tokens(hf, batch=2, length=6)
    wanted = hf.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=0)
    got = shared_model(config, backend).generate(prompt, max_new_tokens=20, do_sample=False, stop_at_eos=False)
    assert got.tolist() == wanted.tolist()


@of_families
@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_from_a_left_padded_batch(backend: str, config: str) -> None:
    hf = random_gemma(config)
    rows = [random_tokens(hf, batch=1, length=n, seed=n) for n in (9, 6)]
    padded = torch.cat([torch.nn.functional.pad(row, (9 - row.shape[1], 0), value=0) for row in rows])
    model = shared_model(config, backend)
    sae = random_sae(model.dims, "res" if config == "grouped" else "transcoder", 1)
    with model.saes([sae]):
        together = model.generate(padded, max_new_tokens=10, do_sample=False, stop_at_eos=False)
        apart = [model.generate(row, max_new_tokens=10, do_sample=False, stop_at_eos=False) for row in rows]
    assert [row[-10:].tolist() for row in together] == [row[0, -10:].tolist() for row in apart]
    wanted = rows[1]
    for _ in range(10):
        wanted = torch.cat([wanted, spliced_by_hand(hf, wanted, [sae])[:, -1:].argmax(-1)], dim=1)
    assert apart[1].tolist() == wanted.tolist()


def test_both_backends_have_the_same_cache_keys_as_saelens() -> None:
    from sae_lens import HookedSAETransformer

    keys = {}
    for backend in BACKENDS:
        model = shared_model("grouped", backend)
        saes = [random_sae(model.dims, site, layer) for site, layer in PLACES]
        _, cache = model.run_with_cache_with_saes(random_tokens(model), saes=saes, use_error_term=True)
        keys[backend] = {key for key in cache if ".hook_sae_" in key}
        assert {model.get_sae_hook_name(sae) for sae in saes} <= keys[backend]
    assert keys["bridge"] == keys["hooked_transformer"]

    ours = shared_model("grouped", "hooked_transformer")
    stock = HookedSAETransformer(ours.cfg)
    stock.load_state_dict(ours.state_dict(), strict=False)
    saes = [random_sae(ours.dims, site, layer) for site, layer in PLACES]
    _, cache = stock.run_with_cache_with_saes(random_tokens(ours), saes=saes, use_error_term=True)
    wanted = {key for key in cache if ".hook_sae_" in key}
    named = set().union(*(other_names_of(sae) for sae in saes))
    assert keys["bridge"] == wanted | named and not wanted & named


def other_names_of(sae: Any) -> set[str]:
    """The names of SAELens's bridge for the hook points of an SAE."""
    write = get_site(sae.site).hook_name_out(sae.layer, "bridge")
    return {f"{write}.{name}" for name in sae.hook_dict}

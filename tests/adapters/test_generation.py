"""Generation: where it stops, what stands where while it streams, and what a pass in between may not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import random_gemma, random_sae, random_tokens, shared_model

GREEDY: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return shared_model("narrow-heads", request.param)


def _streamed(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    return torch.cat(list(model.generate_stream(ids, max_tokens_per_yield=1, **GREEDY, **options)), dim=1)


def _by_hugging_face(model: Any, ids: torch.Tensor, use_past_kv_cache: bool = True) -> torch.Tensor:
    """As pipelines and evaluation harnesses run a bridge's model."""
    return model.original_model.generate(ids, use_cache=use_past_kv_cache, **GREEDY)


WAYS: dict[str, Callable[..., torch.Tensor]] = {
    "generate": lambda model, ids, **options: model.generate(ids, **GREEDY, **options),
    "generate_stream": _streamed,
    "hf_generate": lambda model, ids, **options: model.hf_generate(ids, **GREEDY, **options),
    "original_model.generate": _by_hugging_face,
}


def _edited(model: Any, run: Callable[..., torch.Tensor], ids: torch.Tensor, positions: Any, cache: bool) -> list[Any]:
    """Which columns of the text a hook with these positions edits at each pass, and the ids that come out."""
    seen: list[list[list[int]]] = []
    sae = random_sae(model.dims, "res", 0)
    name, steer = gs.steer(sae, 3, 50.0, positions=positions, exclude_special_tokens=False)

    def watched(value: torch.Tensor, hook: Any) -> torch.Tensor:
        out = bound(value, hook)
        seen.append([row.nonzero().flatten().tolist() for row in (out != value).any(-1)])
        return out

    bound = steer.bound_to(model)
    with model.hooks([(name, watched)]):
        out = run(model, ids, use_past_kv_cache=cache)
    return [seen, out.tolist()]


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("positions", [[3], [-1], slice(4, None), slice(-2, None)], ids=str)
@pytest.mark.parametrize("way", [way for way in WAYS if way != "generate"])
def test_positions_are_those_of_generate(model: Any, way: str, positions: Any, cache: bool) -> None:
    """The same columns in every pass: a position is the same token from the first to the last."""
    if model.backend == "hooked_transformer" and way in ("hf_generate", "original_model.generate"):
        assert not hasattr(model, way.split(".")[0])
        return
    ids = random_tokens(model, batch=2, length=7)
    ids[1, :2], ids[1, 2] = 0, 2  # padding, then BOS
    wanted = _edited(model, WAYS["generate"], ids, positions, cache)
    assert _edited(model, WAYS[way], ids, positions, cache) == wanted
    prompt = {"[3]": [[3], [5]], "[-1]": [[6], [6]], "slice(4, None, None)": [[4, 5, 6], [6]]}.get(str(positions))
    assert wanted[0][0] == (prompt or [[5, 6], [5, 6]])
    later = wanted[0][1]  # the second pass: one new column, or all of them
    grows = isinstance(positions, slice)
    assert later == ([[0], [0]] if grows else [[], []]) if cache else len(later[0]) == len(wanted[0][0][0]) + grows


def test_a_stream_is_not_disturbed_by_other_passes(model: Any) -> None:
    """Between its pieces the model reads other texts, streams another one, and is spliced."""
    one, other = random_tokens(model, 1, 7), random_tokens(model, 1, 5, seed=1)
    sae = random_sae(model.dims, "res", 0)
    with gs.splice(model, sae, positions=[2, -1]):
        wanted = [model.generate(ids, **GREEDY)[0].tolist() for ids in (one, other)]
        streams = [model.generate_stream(ids, max_tokens_per_yield=1, **GREEDY) for ids in (one, other)]
        got: list[list[int]] = [[], []]
        for _ in range(5):
            for pieces, ids in zip(streams, got, strict=True):
                ids += next(pieces)[0].tolist()
                model(random_tokens(model, 3, 4, seed=2))
        assert got == wanted


def test_a_cached_loop_by_hand_counts_in_the_text(model: Any) -> None:
    """A key-value cache knows which text it holds, also when two texts go on in turn."""
    texts = [random_tokens(model, 1, 8, seed=seed) for seed in (3, 4)]
    sae = random_sae(model.dims, "res", 0)
    with torch.no_grad(), gs.splice(model, sae, positions=slice(-1, 7)):
        caches = [_begin(model, ids[:, :6]) for ids in texts]
        for column in (6, 7):
            for ids, cache in zip(texts, caches, strict=True):
                logits = _go_on(model, ids[:, column : column + 1], cache)
    with torch.no_grad(), gs.splice(model, sae, positions=[5, 6]):  # from the prompt's last token on, 5
        torch.testing.assert_close(logits[:, -1], model(texts[1])[:, -1], rtol=0, atol=6e-4)


def test_padding_stays_masked_in_a_cached_loop_by_hand(model: Any) -> None:
    """Nobody has to carry the mask along."""
    ids = random_tokens(model, 1, 8, seed=5)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    with torch.no_grad():
        cache = _begin(model, padded[:, :-1])
        got = _go_on(model, padded[:, -1:], cache)[:, -1]
        torch.testing.assert_close(got, model(ids)[:, -1], rtol=0, atol=6e-4)


def _begin(model: Any, ids: torch.Tensor) -> Any:
    if model.backend == "bridge":
        return model(ids, return_type="logits_and_cache", use_cache=True)[1]
    from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

    cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, ids.shape[0])
    model(ids, past_kv_cache=cache)
    return cache


def _go_on(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    if model.backend == "bridge":
        return model(ids, past_key_values=cache, use_cache=True)
    return model(ids, past_kv_cache=cache)


@pytest.mark.parametrize("method", ["generate", "generate_stream", "hf_generate"])
def test_generation_stops_where_the_model_says(method: str, model: Any) -> None:
    """Hugging Face stops at any id of ``generation_config.eos_token_id``; so does every way here."""
    if not hasattr(model, method):
        assert model.backend == "hooked_transformer"
        return
    ids = random_tokens(model, 1, 6, seed=6)
    plain = random_gemma("narrow-heads")
    long = plain.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=1)[0, 6:].tolist()
    stop = long[4]
    wanted = long[: long.index(stop) + 1]
    kept, model.stop_token_ids = model.stop_token_ids, (1, stop)
    try:
        options = {"max_new_tokens": 12, "do_sample": False}
        for given in ({}, {"eos_token_id": [1, stop]}):
            out = getattr(model, method)(ids, **options, **given)
            out = out if isinstance(out, torch.Tensor) else torch.cat(list(out), dim=1)
            assert out[0, 6:].tolist() == wanted
        for given in ({"stop_at_eos": False}, {"eos_token_id": 95 if 95 not in long else 94}):
            out = getattr(model, method)(ids, **options, **given)
            out = out if isinstance(out, torch.Tensor) else torch.cat(list(out), dim=1)
            assert out.shape[1] == 18, given
    finally:
        model.stop_token_ids = kept


def test_embeddings_do_not_take_the_ids_of_the_pass_before(model: Any) -> None:
    """Where special tokens stand is unknown then; spliced everywhere it is right."""
    ids = random_tokens(model, 1, 7)
    sae = random_sae(model.dims, "res", 0)
    with torch.no_grad():
        embeddings = model.run_with_cache(ids, names_filter="hook_embed")[1]["hook_embed"]
        with gs.splice(model, sae):
            model(ids)
            for given in ((None, {"inputs_embeds": embeddings}), (embeddings, {})):
                with pytest.raises(SpliceError, match="embeddings"):
                    model(given[0], **given[1])
        with gs.splice(model, sae, exclude_special_tokens=False):
            torch.testing.assert_close(model(None, inputs_embeds=embeddings), model(ids), rtol=0, atol=6e-4)
        on_embedding = random_sae(model.dims, "embedding", None)
        with gs.splice(model, on_embedding, exclude_special_tokens=False), pytest.raises(SpliceError, match="skips"):
            model(embeddings)


def test_nothing_to_stop_at_raises() -> None:
    model = gs.load_model(hf_model=random_gemma("narrow-heads"))
    model.stop_token_ids = ()
    ids = random_tokens(model, 1, 5)
    with pytest.raises(GemmaScopeError, match="stop_at_eos=False"):
        model.generate(ids, **GREEDY)
    assert model.generate(ids, stop_at_eos=False, **GREEDY).shape == (1, 10)


OTHERS = ["hello you", "hi there, a longer one"]


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
def test_other_passes_from_inside_a_generation_are_their_own_texts(model: Any, cache: bool) -> None:
    """From a hook: a padded batch, another generation, the beginning of the same text; neither disturbs the other."""
    sae = random_sae(model.dims, "res", 1)
    options = {**GREEDY, "stop_at_eos": False, "use_past_kv_cache": cache, "return_type": "tokens"}
    with torch.no_grad(), gs.splice(model, sae, positions=slice(1, None)):
        wanted = model.generate(OTHERS, **options)
        texts = [OTHERS[::-1], random_tokens(model, 1, 4), model.to_tokens(OTHERS)[:, :3]]
        alone = [(model(text), model.generate(text, **options)) for text in texts]
        seen: list[Any] = []

        def judge(value: torch.Tensor, hook: Any) -> None:
            if not seen:  # once, and not for the passes made here
                seen.append(None)
                seen.extend((model(text), model.generate(text, **options)) for text in texts)

        with model.hooks([("blocks.0.hook_resid_post", judge)]):
            assert torch.equal(model.generate(OTHERS, **options), wanted)
    for (logits, ids), (got_logits, got_ids) in zip(alone, seen[1:], strict=True):
        torch.testing.assert_close(got_logits, logits, rtol=0, atol=1e-4)
        assert torch.equal(got_ids, ids)


def test_guidance_reads_two_texts_in_one_generation() -> None:
    """Hugging Face's classifier-free guidance runs the last token alone beside the prompt: each row as by itself."""
    model = shared_model("narrow-heads", "bridge")
    sae = random_sae(model.dims, "res", 0)
    rows = [random_tokens(model, 1, 8, seed=seed) for seed in (1, 2)]
    rows[1] = rows[1][:, :5]
    padded = torch.cat([rows[0], torch.nn.functional.pad(rows[1], (3, 0), value=0)])
    options = {"max_new_tokens": 6, "do_sample": False, "guidance_scale": 1.5, "eos_token_id": 95, "pad_token_id": 0}
    with gs.splice(model, sae):
        together = model.original_model.generate(padded, **options)
        for row, got in zip(rows, together, strict=True):
            assert model.original_model.generate(row, **options)[0, -6:].tolist() == got[-6:].tolist()


def _in_pieces(model: Any, ids: torch.Tensor, cut: int, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a text whose first columns are read into a cache before."""
    if model.backend == "bridge":
        from transformers import DynamicCache

        cache = DynamicCache(config=model.original_model.config)
        first, rest = {"past_key_values": cache, "use_cache": True}, {"past_key_values": cache, "use_cache": True}
    else:
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        cache = TransformerLensKeyValueCache.init_cache(model.cfg, model.cfg.device, ids.shape[0])
        first, rest = {"past_kv_cache": cache}, {"past_kv_cache": cache}
    if mask is not None:
        first["attention_mask"] = mask[:, :cut]
        rest["attention_mask"] = mask if model.backend == "bridge" else mask[:, cut:]
    model(ids[:, :cut], **first)
    return model(ids[:, cut:], **rest)


@pytest.mark.parametrize("masked", [False, True])
def test_padding_may_end_in_the_second_piece(model: Any, masked: bool) -> None:
    """A row whose first piece is padding alone begins in the second; positions count from there."""
    ids = random_tokens(model, 2, 9)
    ids[1, :5], ids[1, 5] = 0, 2
    mask = (ids != 0).long() if masked else None
    sae = random_sae(model.dims, "res", 0)
    with torch.no_grad(), gs.splice(model, sae, positions=slice(1, 3)):
        wanted = model(ids)[:, -1]
        for cut in (3, 5, 7):
            torch.testing.assert_close(_in_pieces(model, ids, cut, mask)[:, -1], wanted, rtol=0, atol=6e-4)


def test_caches_that_others_changed_or_made() -> None:
    """Reordered rows are not taken for the old ones; Hugging Face's own positions are gone on with."""
    from transformers import DynamicCache

    model = shared_model("narrow-heads", "bridge")
    ids = random_tokens(model, 2, 9)
    ids[1, :4], ids[1, 4] = 0, 2
    mask, new = (ids != 0).long(), random_tokens(model, 2, 2, seed=4)[:, 1:]
    with torch.no_grad():
        for order in ([1, 0], [1]):
            cache = DynamicCache(config=model.original_model.config)
            model(ids, past_key_values=cache, use_cache=True)
            cache.batch_select_indices(torch.tensor(order))
            with pytest.raises(SpliceError, match="attention_mask"):
                model(new[: len(order)], past_key_values=cache, use_cache=True)
            text = torch.cat([ids[order], new[: len(order)]], dim=1)
            got = model(new[: len(order)], past_key_values=cache, use_cache=True, attention_mask=(text != 0).long())
            torch.testing.assert_close(got[:, -1], model(text)[:, -1], rtol=0, atol=6e-4)
        cache = DynamicCache(config=model.original_model.config)
        model.original_model(ids, attention_mask=mask, use_cache=True, **{_cache_name(model): cache})
        got = model(new, past_key_values=cache, use_cache=True)
        torch.testing.assert_close(got[:, -1], model(torch.cat([ids, new], 1))[:, -1], rtol=0, atol=6e-4)


def _cache_name(model: Any) -> str:
    import inspect

    return "cache" if "cache" in inspect.signature(type(model.original_model).forward).parameters else "past_key_values"


def test_padding_follows_the_end_of_a_text_as_in_hugging_face(model: Any) -> None:
    """Rows that are done before others, equal to Hugging Face's batch column by column."""
    plain, ids = random_gemma("narrow-heads"), random_tokens(model, 3, 6)
    long = plain.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=95, pad_token_id=0)
    stop = int(long[0, 8])
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": [95, stop]}
    wanted = plain.generate(ids, pad_token_id=0, **options).tolist()
    assert 0 in wanted[0]
    got = model.generate(ids, **options)
    assert got.tolist() == wanted
    pieces = list(model.generate_stream(ids, max_tokens_per_yield=2, **options))
    assert torch.cat(pieces, dim=1).tolist() == wanted
    if model.backend == "bridge":
        from transformers import GenerationConfig

        assert model.hf_generate(ids, **options).tolist() == wanted
        config = GenerationConfig(pad_token_id=0, **options)
        assert model.hf_generate(ids, generation_config=config).tolist() == wanted


def test_layers_and_ids_that_do_not_exist_raise(model: Any) -> None:
    ids = random_tokens(model)
    if model.backend == "hooked_transformer":  # its rotary table ends with the context of 128
        for method in ("generate", "generate_stream"):
            with pytest.raises(GemmaScopeError, match="positions for 128"):
                getattr(model, method)(ids, max_new_tokens=106)
        assert model.generate(ids, max_new_tokens=105, stop_at_eos=False).shape == (2, 129)
    for options in ({"stop_at_layer": 99}, {"stop_at_layer": -9}):
        with pytest.raises(SpliceError, match="layers are"):
            model(ids, **options)
    with pytest.raises(SpliceError, match="residual stream"):
        model(ids, start_at_layer=1)
    for call in (model, model.run_with_cache, model.generate):
        with pytest.raises(GemmaScopeError, match="integers"):
            call(torch.tensor([[2.0, 5.0]]))


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_pass_inside_a_pass_is_never_the_generation_s_own(model: Any, when: int, cache: bool) -> None:
    """Not even over the same text: with a mask of its own, more rows, another column, or by Hugging Face's model."""
    sae = random_sae(model.dims, "res", 1)
    ids = random_tokens(model, 2, 9)
    ids[1, :3], ids[1, 3] = 0, 2
    mask = torch.ones_like(ids[:1])
    mask[0, :3] = 0
    texts: list[tuple[torch.Tensor, dict[str, Any]]] = [
        (ids[:1], {"attention_mask": mask}),
        (ids, {"attention_mask": torch.ones_like(ids)}),
        (ids[:, :5], {}),
        (ids.repeat(2, 1), {}),
        (torch.cat([ids, ids[:, -1:]], dim=1), {}),
    ]
    runs = [lambda text, options: model(text, **options)]
    if model.backend == "bridge":
        runs.append(lambda text, options: model.original_model(text, **options).logits)
    options = {**GREEDY, "stop_at_eos": False, "use_past_kv_cache": cache}
    with torch.no_grad(), gs.splice(model, sae, positions=[1, -1], exclude_special_tokens=False):
        wanted = model.generate(ids, **options)
        for run in runs:
            for text, how in texts:
                alone, seen = run(text, how), []

                def hook(
                    value: torch.Tensor, hook: Any, run: Any = run, text: Any = text, how: Any = how, s: Any = seen
                ):
                    s.append(None)
                    if len(s) == when + 1:
                        s.append(run(text, how))
                        s += [None] * 9

                with model.hooks([("blocks.0.hook_resid_post", hook)]):
                    assert torch.equal(model.generate(ids, **options), wanted)
                (got,) = (one for one in seen if one is not None)
                torch.testing.assert_close(got, alone, rtol=0, atol=1e-4)


def test_beams_without_a_cache_keep_the_prompt_s_end() -> None:
    """Their rows change places at every step."""
    model = shared_model("narrow-heads", "bridge")
    ids = random_tokens(model, 2, 9)
    options = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3, "pad_token_id": 0}
    with gs.splice(model, random_sae(model.dims, "res", 0), positions=[2, -1]):
        for run in (model.original_model.generate, model.hf_generate):
            cached, uncached = (run(ids, use_cache=cache, **options).tolist() for cache in (True, False))
            assert cached == uncached


def test_a_pass_that_is_interrupted_leaves_the_tracker_as_it_was(model: Any) -> None:
    """Ctrl-C in the middle of a generation; the next one is right."""
    ids = random_tokens(model, 1, 7)
    with gs.splice(model, random_sae(model.dims, "res", 0), positions=[-1]):
        wanted = model.generate(ids, **GREEDY)

        def interrupt(value: torch.Tensor, hook: Any) -> None:
            raise KeyboardInterrupt

        for run in (model, lambda text: model.generate(text, **GREEDY)):
            with pytest.raises(KeyboardInterrupt), model.hooks([("blocks.1.hook_resid_post", interrupt)]):
                run(ids)
            assert torch.equal(model.generate(ids, **GREEDY), wanted)


@pytest.mark.parametrize("given", [torch.tensor([95, 5]), {95, 5}, (95, 5)], ids=["tensor", "set", "tuple"])
def test_stops_in_any_holder(model: Any, given: Any) -> None:
    ids = random_tokens(model, 1, 5)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(
        model.generate(ids, eos_token_id=given, **options), model.generate(ids, eos_token_id=[5, 95], **options)
    )

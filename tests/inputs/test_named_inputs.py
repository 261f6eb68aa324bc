"""The input of a pass by the names of Hugging Face, as ``**tokenizer(...)`` gives it, and calls without one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, KeywordError, SpliceError, UnknownKeywordError
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import random_sae, random_tokens, shared_model

GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "stop_at_eos": False}


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return shared_model("narrow-heads", request.param)


def _calls(model: Any) -> dict[str, Callable[..., torch.Tensor]]:
    """Every method that runs the model on an input, as a tensor."""
    sae = random_sae(model.dims, "res", 0)
    calls: dict[str, Callable[..., torch.Tensor]] = {
        "forward": model,
        "run_with_hooks": model.run_with_hooks,
        "run_with_cache": lambda *args, **given: model.run_with_cache(*args, **given)[0],
        "run_with_saes": lambda *args, **given: model.run_with_saes(*args, saes=[sae], **given),
        "run_with_cache_with_saes": lambda *args, **given: model.run_with_cache_with_saes(*args, saes=[sae], **given)[
            0
        ],
        "run_with_hooks_with_saes": lambda *args, **given: model.run_with_hooks_with_saes(*args, saes=[sae], **given),
        "generate": lambda *args, **given: model.generate(*args, **GREEDY, **given),
        "generate_stream": lambda *args, **given: torch.cat(
            list(model.generate_stream(*args, **GREEDY, **given)), dim=1
        ),
    }
    if model.backend == "bridge":
        calls["hf_generate"] = lambda *args, **given: model.hf_generate(*args, **GREEDY, **given)
    return calls


NAMES = [*_calls(shared_model("narrow-heads", "bridge"))]


def _call(model: Any, name: str) -> Callable[..., torch.Tensor]:
    calls = _calls(model)
    if name not in calls:
        pytest.skip("HookedTransformer has no hf_generate")
    return calls[name]


@pytest.mark.parametrize("name", NAMES)
def test_every_method_takes_what_a_tokenizer_returns(model: Any, name: str) -> None:
    """The same pass of the same ids, so results are equal to the bit."""
    call = _call(model, name)
    encoded = model.tokenizer(["abc", "defghi"], return_tensors="pt", padding=True)
    with torch.no_grad():
        wanted = call(encoded)
        assert torch.equal(call(**encoded), wanted)
        ids = random_tokens(model)
        wanted = call(ids)
        for named in ({"input_ids": ids}, {"input": ids}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
            assert torch.equal(call(**named), wanted)


@pytest.mark.parametrize("name", NAMES)
def test_no_input_and_two_inputs_raise(model: Any, name: str) -> None:
    call, ids = _call(model, name), random_tokens(model)
    for nothing in ((), (None,)):
        with pytest.raises(GemmaScopeError, match="no input"):
            call(*nothing)
    for named in ({"input_ids": ids}, {"inputs_embeds": torch.zeros(1, 2, 64)}):
        with pytest.raises(KeywordError, match="several inputs"):
            call(ids, **named)


@pytest.mark.parametrize("name", ["forward", "run_with_hooks", "run_with_cache"])
def test_embeddings_by_name(model: Any, name: str) -> None:
    call, ids = _calls(model)[name], random_tokens(model)
    with torch.no_grad():
        embeddings = model.run_with_cache(ids, names_filter="hook_embed")[1]["hook_embed"]
        assert torch.equal(call(inputs_embeds=embeddings), call(embeddings))


def test_one_text_in_an_array(model: Any) -> None:
    assert torch.equal(model.to_tokens(np.array("abc")), model.to_tokens("abc"))
    for one in (np.array("abc"), np.array(["abc"]), pd.Series(["abc"])):
        assert model.generate(one, **GREEDY) == model.generate("abc", **GREEDY)
        if model.backend == "bridge":
            wanted = model.hf_generate("abc", **GREEDY)
            assert model.hf_generate(one, **GREEDY) == (wanted if one.ndim == 0 else [wanted])


def test_no_text_is_named(model: Any) -> None:
    for nothing in ([], (), np.array([], dtype=str)):
        with pytest.raises(GemmaScopeError, match="An empty"):
            model.to_tokens(nothing)
    with pytest.raises(GemmaScopeError, match="prepend_bos is False"):
        model.to_tokens(["", ""], prepend_bos=False)


def test_several_texts_for_one_prompt() -> None:
    """Hugging Face returns them row by row; beams in particular are deterministic."""
    model = shared_model("narrow-heads", "bridge")
    for options in ({"num_beams": 3, "do_sample": False}, {"do_sample": True}):
        options |= {"max_new_tokens": 4, "num_return_sequences": 3, "stop_at_eos": False}
        torch.manual_seed(0)
        rows = model.hf_generate("abc", return_type="tokens", **options)
        torch.manual_seed(0)
        assert model.hf_generate("abc", **options) == [model.tokenizer.decode(row[1:]) for row in rows]
        torch.manual_seed(0)
        assert len(model.hf_generate(["abc", "defg"], **options)) == 6
    assert isinstance(model.hf_generate("abc", max_new_tokens=2), str)


def test_what_only_hugging_face_generates_is_named(model: Any) -> None:
    for method in (model.generate, model.generate_stream):
        for name in ("num_return_sequences", "num_beams"):
            with pytest.raises(UnknownKeywordError, match="hf_generate"):
                method("abc", **{name: 2})


def test_a_pass_from_a_layer_names_the_backend_that_has_it(model: Any) -> None:
    ids = random_tokens(model)
    with torch.no_grad():
        logits, cache = model.run_with_cache(ids, names_filter="blocks.1.hook_resid_pre")
        residual = cache["blocks.1.hook_resid_pre"]
        for run in (model, model.run_with_hooks):
            if model.backend == "hooked_transformer":
                torch.testing.assert_close(run(residual, start_at_layer=1), logits, rtol=0, atol=1e-5)
                continue
            with pytest.raises(SpliceError, match='backend="hooked_transformer"'):
                run(residual, start_at_layer=1)


def test_a_text_that_is_none_is_named_by_its_row(model: Any) -> None:
    """In whatever holds the texts, although they are read one by one."""
    texts = ["some text " * 9] * 3 + [float("nan")]
    for data in (texts, pd.Series(texts), iter(texts)):
        with pytest.raises(GemmaScopeError, match=r"Text 3 is nan \(float\)"):
            gs.evaluate(model, random_sae(model.dims, "res", 0), data, context=16, progress=False)

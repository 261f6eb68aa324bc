"""One way in for texts: whatever stands for them gives the ids and masks of Hugging Face's tokenizer on each alone."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.text.batch import TokenBatch, as_batch
from tests.helpers import CharTokenizerFactory, hooked, random_gemma
from tests.inputs.ways import TEMPLATE, TEXTS, alone, conversations, ways

BACKENDS = ("bridge", "hooked_transformer")
NAMES = list(ways(CharTokenizerFactory.get()))


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    made = {backend: hooked(random_gemma("narrow-heads"), backend) for backend in BACKENDS}
    for model in made.values():
        model.tokenizer.chat_template = TEMPLATE
    return made


def rows(batch: TokenBatch) -> list[list[int]]:
    return [ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask, strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_every_way_gives_the_ids_of_each_text_alone(models: dict[str, Any], backend: str, name: str) -> None:
    tokenizer = CharTokenizerFactory.get()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = as_batch(models[backend], **ways(tokenizer)[name])
    assert rows(batch) == [ids.tolist() for ids in alone(tokenizer, TEXTS)]
    assert batch.ids.dtype == torch.long and batch.mask.dtype == torch.bool
    assert batch.ids.shape == batch.mask.shape
    again = as_batch(models[backend], batch)
    assert torch.equal(again.ids, batch.ids) and torch.equal(again.mask, batch.mask)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_text_one_row_one_conversation(models: dict[str, Any], backend: str) -> None:
    model, (first, *_) = models[backend], alone(CharTokenizerFactory.get(), TEXTS)
    for way in (
        TEXTS[0],
        np.array(TEXTS[0]),
        [TEXTS[0]],
        first,
        first[None],
        first.tolist(),
        first.numpy(),
        list(first),
    ):
        assert rows(as_batch(model, way)) == [first.tolist()]
    assert rows(as_batch(model, pd.Series(first.tolist()))) == [first.tolist()]
    tokenizer = CharTokenizerFactory.get()
    tokenizer.chat_template = TEMPLATE
    for options in ({}, {"add_generation_prompt": True}):
        wanted = [tokenizer.apply_chat_template(one, **options)["input_ids"] for one in conversations()]
        assert rows(as_batch(model, conversations(), **options)) == wanted
        assert rows(as_batch(model, conversations()[0], **options)) == wanted[:1]
        assert rows(as_batch(model, conversations()[0][0], **options)) == wanted[:1]
        as_text = [tokenizer.apply_chat_template(one, tokenize=False, **options) for one in conversations()]
        assert rows(as_batch(model, as_text)) == wanted
    encoded = tokenizer.apply_chat_template(conversations()[0], return_tensors="pt")
    assert rows(as_batch(model, encoded)) == [encoded["input_ids"][0].tolist()]


@pytest.mark.parametrize("backend", BACKENDS)
def test_to_tokens_is_hugging_faces_and_puts_one_bos(models: dict[str, Any], backend: str) -> None:
    model, tokenizer = models[backend], CharTokenizerFactory.get()
    for side in ("left", "right"):
        wanted = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side=side)["input_ids"]
        assert torch.equal(model.to_tokens(TEXTS, padding_side=side), wanted)
        assert torch.equal(model.to_tokens(["<bos>" + text for text in TEXTS], padding_side=side), wanted)
    bare = tokenizer(TEXTS[0], return_tensors="pt", add_special_tokens=False)["input_ids"]
    assert torch.equal(model.to_tokens(TEXTS[0], prepend_bos=False), bare)
    assert model.to_tokens("").tolist() == [[2]]
    assert model.to_tokens("<bos><bos>a").tolist()[0][:2] == [2, 2]  # what was asked for
    assert model.to_single_token("a") == tokenizer.encode("a", add_special_tokens=False)[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_text_is_never_cut_without_a_word(models: dict[str, Any], backend: str) -> None:
    model, text = models[backend], "a" * 200  # the context is 128
    with pytest.raises(gs.GemmaScopeError, match="201 tokens, more than the model's context of 128"):
        as_batch(model, ["short", text])
    assert as_batch(model, text, truncate=True).ids.shape == (1, 128)
    with pytest.warns(UserWarning, match="201 tokens") as said:
        assert model.to_tokens(text).shape == (1, 128)
    assert len(said) == 1 and said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.to_tokens(text, truncate=True).shape == (1, 128)
        assert model.to_tokens(text, truncate=False).shape == (1, 201)


MADE_BADLY: dict[str, tuple[Any, str]] = {
    "nothing": (None, "neither text nor token ids"),
    "empty list": ([], "An empty list"),
    "empty series": (pd.Series([], dtype=object), "An empty Series"),
    "empty ids": (torch.zeros(0, dtype=torch.long), "at least one token"),
    "empty rows": ([[]], "at least one token"),
    "no row": (torch.zeros(0, 5, dtype=torch.long), "at least one token"),
    "one number": (5, "neither text nor token ids"),
    "one number in a tensor": (torch.tensor(5), "at least one token"),
    "three dimensions": (torch.ones(1, 1, 2, dtype=torch.long), r"shape \[1, 1, 2\]"),
    "nested lists": ([[[2, 3]]], "neither text nor ids"),
    "floats": (torch.ones(1, 2), "integers, not torch.float32"),
    "complex": (torch.ones(1, 2, dtype=torch.complex64), "integers, not torch.complex64"),
    "bools": (np.array([True]), "integers, not torch.bool"),
    "list of floats": ([2.0, 3.0], "neither text nor ids"),
    "list of bools": ([True], "neither text nor ids"),
    "too large": ([2, 96], r"are from 2 to 96, but the model has 0\.\.95"),
    "negative": (torch.tensor([[2, -100]]), "are from -100 to 2"),
    "bytes": (b"abc", "neither text nor token ids"),
    "set": ({"a", "b"}, "neither text nor token ids"),
    "list of bytes": ([b"abc"], "neither text nor ids"),
    "surrogate": (["fine", "x\ud800"], r"Text 1 is not valid Unicode: character 1 is the surrogate '\\ud800'"),
    "mixed": (["a", 2], "give one kind"),
    "gap": (pd.Series(["a", None]), "neither text nor ids"),
    "table": (pd.DataFrame({"text": ["a"]}), "neither text nor token ids"),
    "records": ([{"text": "a"}], "give the column"),
    "other mapping": ({"text": "a"}, "has no input_ids"),
    "two dimensions of text": (np.array([["a"]]), r"array of shape \[1, 1\]"),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MADE_BADLY)
def test_what_is_no_text_is_named(models: dict[str, Any], backend: str, name: str) -> None:
    given, message = MADE_BADLY[name]
    with pytest.raises(gs.GemmaScopeError, match=message):
        as_batch(models[backend], given)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1]], "shape"),
        ([[1, 0, 1, 1]], "hole"),
        ([[1, 2, 1, 1]], "other values"),
        ([[0.5, 1, 1, 1]], "other values"),
        (torch.ones(1, 1, 4, 4), "shape"),
        ("no", "not an array of numbers"),
    ],
)
def test_masks_are_checked(models: dict[str, Any], mask: Any, message: str) -> None:
    with pytest.raises(gs.GemmaScopeError, match=message):
        as_batch(models["bridge"], torch.tensor([[2, 5, 6, 7]]), mask)


def test_an_explicit_mask_wins(models: dict[str, Any]) -> None:
    ids = torch.tensor([[0, 2, 5, 0], [0, 0, 0, 0]])
    assert as_batch(models["bridge"], ids).mask.tolist() == [[False, True, True, False], [False] * 4]
    assert as_batch(models["bridge"], ids, [[1, 1, 1, 1], [0, 0, 0, 0]]).mask.tolist() == [[True] * 4, [False] * 4]
    encoding = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert as_batch(models["bridge"], encoding).mask.all()
    assert not as_batch(models["bridge"], encoding, torch.zeros_like(ids)).mask.any()
    assert as_batch(models["bridge"], "<pad>a").mask.all()  # a text that holds the padding token is text


def test_text_needs_a_tokenizer_and_messages_a_template() -> None:
    bare = gs.load_model(hf_model=random_gemma("narrow-heads"), check=False)
    for text in ("a", ["a"], conversations()):
        with pytest.raises(gs.GemmaScopeError, match="tokenizer"):
            as_batch(bare, text)
    with pytest.raises(gs.GemmaScopeError, match="no tokenizer"):
        bare.to_tokens("a")
    assert as_batch(bare, [[2, 3], [2]]).mask.tolist() == [[True, True], [False, True]]
    with pytest.raises(gs.GemmaScopeError, match="template"):
        as_batch(hooked(random_gemma("narrow-heads"), "bridge", check=False), conversations())

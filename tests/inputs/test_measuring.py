"""Evaluations of any way of giving texts: the numbers of Hugging Face's plain model on each text alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.studies import firing_frequencies
from gemma_scope_tl.text.rows import as_rows, pack_texts
from gemma_scope_tl.viz.latent_facts import PageText, latent_facts
from tests.helpers import CharTokenizerFactory, hooked, random_gemma, random_sae
from tests.inputs.ways import TEMPLATE, TEXTS, alone, conversations, padded, ways

ROUNDING = 1e-5  # float32
NAMES = [
    "lists",
    "left-padded",
    "right-padded uint8 array",
    "pads unknown, with mask",
    "encoding left",
    "encoding right",
    "column of lists",
]


@pytest.fixture(scope="module", params=["bridge", "hooked_transformer"])
def model(request: pytest.FixtureRequest) -> Any:
    made = hooked(random_gemma("narrow-heads"), request.param)
    made.tokenizer.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def sae(model: Any) -> Any:
    return random_sae(model.dims, "res", 0)


@pytest.fixture(scope="module")
def by_hand(sae: Any) -> dict[str, float]:
    """The metrics of the texts by the formulas, on the plain model, a text at a time."""
    plain, seen = random_gemma("narrow-heads"), list[torch.Tensor]()
    splicing = False

    def layer(_module: Any, _args: Any, out: torch.Tensor) -> torch.Tensor | None:
        seen.append(out[0, 1:])
        acts = out @ sae.W_enc + sae.b_enc
        recons = torch.where(acts > sae.threshold, acts, 0.0) @ sae.W_dec + sae.b_dec
        return torch.cat([out[:, :1], recons[:, 1:]], dim=1) if splicing else None

    losses: dict[str, list[torch.Tensor]] = {"loss_clean": [], "loss_spliced": []}
    handle = plain.model.layers[0].register_forward_hook(layer)
    with torch.no_grad():
        for name, kept in losses.items():
            splicing = name == "loss_spliced"
            seen = [] if not splicing else seen
            for ids in alone(CharTokenizerFactory.get(), TEXTS):
                logits = plain(ids[None]).logits[0, 1:-1]  # from an ordinary token to an ordinary token
                kept.append(torch.nn.functional.cross_entropy(logits, ids[2:], reduction="none"))
    handle.remove()
    x = torch.cat(seen[: len(TEXTS)])
    acts = x @ sae.W_enc + sae.b_enc
    acts = torch.where(acts > sae.threshold, acts, 0.0)
    error = (x - acts @ sae.W_dec - sae.b_dec).square().sum()
    return {
        **{name: float(torch.cat(kept).mean()) for name, kept in losses.items()},
        "l0": float((acts > 0).sum(-1).float().mean()),
        "fvu": float(error / (x - x.mean(0)).square().sum()),
        "tokens": len(x),
        "sequences": len(TEXTS),
    }


def agrees(table: pd.DataFrame, wanted: dict[str, float]) -> None:
    for name, value in wanted.items():
        assert table[name].item() == pytest.approx(value, rel=ROUNDING), name


@pytest.mark.parametrize("name", NAMES)
def test_evaluate_is_that_of_each_text_alone(model: Any, sae: Any, by_hand: dict[str, float], name: str) -> None:
    given = ways(CharTokenizerFactory.get())[name]
    mask = given.get("attention_mask")
    agrees(gs.evaluate(model, sae, given["text"], progress=False, attention_mask=mask), by_hand)


def test_fillers_batches_and_positions_change_nothing(model: Any, sae: Any, by_hand: dict[str, float]) -> None:
    rows = alone(CharTokenizerFactory.get(), TEXTS)
    filler = torch.zeros_like(rows[0])
    right = gs.evaluate(model, sae, padded(rows, "right"), progress=False)
    by_position = gs.evaluate(model, sae, padded(rows, "right"), progress=False, by_position=True)
    for data in (padded([filler, *rows, filler], "left"), torch.nn.functional.pad(padded(rows, "left"), (2, 3))):
        for batch_size in (1, 2, 8):
            found = gs.evaluate(model, sae, data, batch_size=batch_size, progress=False)
            agrees(found, by_hand)
            numbers = found.select_dtypes("number").columns
            pd.testing.assert_frame_equal(found[numbers], right[numbers], rtol=ROUNDING, atol=1e-6)
        found = gs.evaluate(model, sae, data, progress=False, by_position=True)
        pd.testing.assert_frame_equal(found, by_position, rtol=1e-4, atol=1e-5)
        first, second = (firing_frequencies(model, sae, one, progress=False) for one in (data, padded(rows, "right")))
        pd.testing.assert_frame_equal(first, second)
        pages = [latent_facts(PageText(model, one), sae, np.int64(5)) for one in (data, padded(rows, "right"))]
        assert pages[0].tokens == pages[1].tokens == by_hand["tokens"]
        assert pages[0].maximum == pytest.approx(pages[1].maximum, rel=ROUNDING)
        assert [one.tokens for one in pages[0].examples] == [one.tokens for one in pages[1].examples]


def test_conversations_are_rows_and_texts_are_packed_with_one_bos(model: Any) -> None:
    tokenizer = model.tokenizer
    rendered = [tokenizer.apply_chat_template(one, tokenize=False) for one in conversations()]
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    rows = as_rows(model, conversations(), 8)
    assert [ids[mask].tolist() for ids, mask in zip(rows.ids, rows.mask, strict=True)] == wanted
    assert (rows.ids[:, 0] == 2).all()
    plain = pack_texts(tokenizer, TEXTS, 6)
    for texts in (pd.Series(TEXTS), (text for text in TEXTS), np.array(TEXTS), ["<bos>" + text for text in TEXTS]):
        assert torch.equal(as_rows(model, texts, 6).ids, plain)
    assert (plain[:, 1:] != 2).all()
    endless = iter(lambda: "some text", None)
    assert as_rows(model, endless, 6, limit=3).ids.shape == (3, 6)  # read as far as needed


def test_what_cannot_be_measured_is_named(model: Any, sae: Any) -> None:
    ids = padded(alone(CharTokenizerFactory.get(), TEXTS), "right")
    for data, options, message in (
        ([], {}, "empty list"),
        (ids[:, :1], {}, "at least two tokens"),
        (torch.zeros(2, 4, dtype=torch.long), {}, "at least two tokens"),
        (TEXTS, {"attention_mask": [[1]]}, "only with token ids"),
        (TEXTS * 99, {"context": 500}, "longer than the model's context, 128"),
        ([None], {}, "neither text nor ids"),
        ({"text": TEXTS}, {}, "no input_ids"),
    ):
        with pytest.raises(gs.GemmaScopeError, match=message):
            gs.evaluate(model, sae, data, progress=False, **options)
    for nothing, message in (
        ([], "No SAE"),
        (None, "One or several SAEs were expected"),
        ("res", "One or several SAEs were expected"),
    ):
        with pytest.raises(gs.GemmaScopeError, match=message):
            gs.evaluate(model, nothing, ids, progress=False)


def test_without_a_tokenizer_the_advice_works(sae: Any, by_hand: dict[str, float]) -> None:
    bare = gs.load_model(hf_model=random_gemma("narrow-heads"), check=False)
    rows = [ids.tolist() for ids in alone(CharTokenizerFactory.get(), TEXTS)]
    with pytest.raises(gs.GemmaScopeError, match="exclude_special_tokens=False"):
        gs.evaluate(bare, sae, rows, progress=False)
    agrees(gs.evaluate(bare, sae, rows, progress=False, exclude_special_tokens=[0, 1, 2]), by_hand)
    every = gs.evaluate(bare, sae, rows, progress=False, exclude_special_tokens=False)
    assert every["tokens"].item() == sum(map(len, rows))  # padding is no text
    with pytest.raises(gs.GemmaScopeError, match="load_model its tokenizer"):
        firing_frequencies(bare, sae, rows, progress=False)

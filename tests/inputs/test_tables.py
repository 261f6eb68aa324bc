"""Tables of any way of giving texts are those of each text alone: rows, positions, numbers."""

from __future__ import annotations

from typing import Any

import pandas as pd
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.attributions.gradients import ablation_effects
from gemma_scope_tl.attributions.graph import circuit
from gemma_scope_tl.attributions.targets import logit, logit_difference, token_loss
from tests.helpers import CharTokenizerFactory, hooked, random_gemma, random_sae
from tests.inputs.ways import TEMPLATE, TEXTS, alone, conversations, padded, ways

CLOSE = {"rtol": 1e-3, "atol": 1e-5}  # float32, in which a batch rounds otherwise than a text alone
NAMES = [
    "list",
    "right-padded",
    "pads unknown, with mask",
    "encoding left",
    "with a filler row",
    "fillers between",
    "wide",
    "messages",
]  # test_as_batch.py has all ways; these are the layouts
KEYS = ["sequence", "position", "token", "latent"]


@pytest.fixture(scope="module", params=["bridge", "hooked_transformer"])
def model(request: pytest.FixtureRequest) -> Any:
    made = hooked(random_gemma("narrow-heads"), request.param)
    made.tokenizer.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def saes(model: Any) -> list[Any]:
    return [random_sae(model.dims, site, layer, d_sae=96) for site, layer in (("res", 0), ("mlp", 1))]


def way(name: str) -> tuple[dict[str, Any], list[str], list[int]]:
    """Arguments, the texts that they stand for, and each one's row."""
    tokenizer = CharTokenizerFactory.get()
    tokenizer.chat_template = TEMPLATE
    rows = alone(tokenizer, TEXTS)
    filler = torch.zeros_like(rows[0])
    if name == "with a filler row":
        return {"text": padded([*rows, filler], "left")}, TEXTS, [0, 1, 2]
    if name == "fillers between":
        return {"text": padded([filler, rows[0], filler, rows[1], rows[2]], "right")}, TEXTS, [1, 3, 4]
    if name == "wide":
        return {"text": torch.nn.functional.pad(padded(rows, "left"), (3, 4))}, TEXTS, [0, 1, 2]
    if name == "messages":
        texts = [tokenizer.apply_chat_template(one, tokenize=False) for one in conversations()]
        return {"text": conversations()}, [text.removeprefix("<bos>") for text in texts], [0, 1, 2]
    return ways(tokenizer)[name], TEXTS, [0, 1, 2]


@pytest.fixture(scope="module")
def by_itself(model: Any, saes: list[Any]) -> Any:
    kept: dict[Any, pd.DataFrame] = {}

    def table(what: str, text: str) -> pd.DataFrame:
        if (what, text) not in kept:
            options = {"exclude_special_tokens": False} if what == "all" else {}
            if what == "attribute":
                kept[what, text] = gs.attribute(model, text, saes, logit_difference("a", "b"))
            else:
                kept[what, text] = gs.features(model, text, saes, **options)
        return kept[what, text]

    return table


def compare(found: pd.DataFrame, wanted: list[pd.DataFrame], rows: list[int], by: list[str], value: list[str]) -> None:
    whole = pd.concat([one.assign(sequence=row) for one, row in zip(wanted, rows, strict=True)], ignore_index=True)
    first, second = (one.sort_values(by, kind="stable").reset_index(drop=True)[[*by, *value]] for one in (found, whole))
    pd.testing.assert_frame_equal(first, second, check_dtype=False, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_features_and_norms(model: Any, saes: list[Any], by_itself: Any, name: str) -> None:
    given, texts, rows = way(name)
    for what, options in (("features", {}), ("all", {"exclude_special_tokens": False})):
        found = gs.features(model, **way(name)[0], saes=saes, **options)
        by = ["sequence", "position", "token", "sae", "latent"]
        compare(found, [by_itself(what, text) for text in texts], rows, by, ["activation"])
        assert (found["position"] >= 0).all()
    del given
    norms = gs.mean_norms(model, **way(name)[0], sites=("res", "att"), batch_size=2)
    one_by_one = [gs.mean_norms(model, text, sites=("res", "att")) for text in texts]
    counts = [int(one["tokens"].iloc[0]) for one in one_by_one]
    assert norms["tokens"].eq(sum(counts)).all()
    total = sum(one["mean_norm"] * count for one, count in zip(one_by_one, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(torch.tensor(norms["mean_norm"]), torch.tensor(total), rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_attributions(model: Any, saes: list[Any], by_itself: Any, name: str) -> None:
    given, texts, rows = way(name)
    if name == "messages":  # what explains the next token opens the answer, as the template does for generation
        options = {"tokenize": False, "add_generation_prompt": True}
        texts = [model.tokenizer.apply_chat_template(one, **options).removeprefix("<bos>") for one in conversations()]
    found = gs.attribute(model, **given, saes=saes, metric=logit_difference("a", "b"))
    wanted = [by_itself("attribute", text) for text in texts]
    by = ["sequence", "site", "kind", "position", "token", "latent"]
    compare(found, wanted, rows, by, ["activation", "attribution"])
    assert found.attrs["metric"] == pytest.approx(sum(one.attrs["metric"] for one in wanted), rel=1e-4)


def test_a_prompt_padded_on_either_side_has_one_circuit(model: Any, saes: list[Any]) -> None:
    (ids, *_) = alone(CharTokenizerFactory.get(), TEXTS)
    wanted = circuit(model, TEXTS[0], saes, "a", nodes=8, edges=20)
    effects = ablation_effects(model, TEXTS[0], saes[0], logit("a"), [(3, 5), (4, 6)])
    for pads in ((3, 0), (0, 4), (2, 2)):
        other = torch.nn.functional.pad(ids, pads)
        found = circuit(model, other, saes, "a", nodes=8, edges=20)
        pd.testing.assert_frame_equal(found.nodes, wanted.nodes, **CLOSE)
        pd.testing.assert_frame_equal(found.edges, wanted.edges, **CLOSE)
        assert found.tokens == wanted.tokens
        assert ablation_effects(model, other, saes[0], logit("a"), [(3, 5), (4, 6)]) == pytest.approx(
            effects, rel=1e-3, abs=1e-5
        )
    with pytest.raises(gs.GemmaScopeError, match="only padding"):
        circuit(model, torch.zeros(1, 4, dtype=torch.long), saes, "a")


def test_words_and_ids_are_one_metric(model: Any, saes: list[Any]) -> None:
    a, b = (model.to_single_token(word) for word in "ab")
    for word, number in (
        ("a", a),
        (logit_difference("a", "b"), logit_difference(a, b)),
        (token_loss("b"), token_loss(b)),
    ):
        first, second = (gs.attribute(model, TEXTS, saes, metric) for metric in (word, number))
        pd.testing.assert_frame_equal(first, second)
        assert first.attrs == second.attrs
    each = gs.attribute(model, TEXTS[:2], saes, logit(["a", "b"]))
    pd.testing.assert_frame_equal(each, gs.attribute(model, TEXTS[:2], saes, logit([a, b])))
    with pytest.raises(gs.GemmaScopeError, match="2 tokens here"):
        gs.attribute(model, TEXTS[0], saes, "ab")
    for metric, message in ((2.5, "A metric is"), (None, "A metric is"), (logit(1.5), "integer"), ("", "0 tokens")):
        with pytest.raises(gs.GemmaScopeError, match=message):
            gs.attribute(model, TEXTS[0], saes, metric)
    with pytest.raises(gs.GemmaScopeError, match="has no tokenizer"):
        logit("a")(model(TEXTS[0]))


def test_positions_of_metrics_count_in_the_text(model: Any, saes: list[Any]) -> None:
    rows = alone(CharTokenizerFactory.get(), TEXTS[:2])
    for position in (0, 2, -1, -3):
        sums = sum(gs.attribute(model, row, saes, logit("a", position)).attrs["metric"] for row in rows)
        for side in ("left", "right"):
            table = gs.attribute(model, padded(rows, side), saes, logit("a", position))
            assert table.attrs["metric"] == pytest.approx(sums, rel=1e-4)
    with pytest.raises(gs.GemmaScopeError, match=r"No position 5: there are 0\.\.2"):
        gs.attribute(model, padded(rows, "right"), saes, logit("a", 5))


def test_special_tokens_are_left_out_by_name_or_by_id(model: Any, saes: list[Any]) -> None:
    letter = model.to_single_token("l")
    every = gs.features(model, TEXTS, saes, exclude_special_tokens=False)
    chosen = gs.features(model, TEXTS, saes, exclude_special_tokens=[letter])
    assert "l" in set(every["token"]) and "<bos>" in set(every["token"]) and "<pad>" not in set(every["token"])
    pd.testing.assert_frame_equal(chosen, every[every["token"] != "l"].reset_index(drop=True))
    default = gs.features(model, TEXTS, saes)
    pd.testing.assert_frame_equal(default, every[every["token"] != "<bos>"].reset_index(drop=True))
    with pytest.raises(gs.GemmaScopeError, match="exclude_special_tokens"):
        gs.features(model, TEXTS, saes, exclude_special_tokens="yes")


def test_long_texts_and_no_saes_are_errors(model: Any, saes: list[Any]) -> None:
    for call in (
        lambda text: gs.features(model, text, saes),
        lambda text: gs.mean_norms(model, text),
        lambda text: gs.attribute(model, text, saes, "a"),
        lambda text: circuit(model, text, saes, "a"),
        lambda text: gs.attribution_graph(model, text, saes),
    ):
        with pytest.raises(gs.GemmaScopeError, match="201 tokens, more than the model's context of 128"):
            call("a" * 200)
        with pytest.raises(gs.GemmaScopeError, match="An empty list"):
            call([])
    for nothing, message in (
        ([], "No SAE"),
        (None, "One or several SAEs were expected"),
        ("res", "One or several SAEs were expected"),
        ([1], "is not an SAE"),
    ):
        for call in (gs.features, lambda m, t, s: gs.attribute(m, t, s, "a"), lambda m, t, s: circuit(m, t, s, "a")):
            with pytest.raises(gs.GemmaScopeError, match=message):
                call(model, TEXTS[0], nothing)


def test_a_word_without_its_space_names_the_one_with_it() -> None:
    model, sae = gs.load_model("bundled"), gs.load_sae("bundled", "res", 2, "1k")
    text = "In the beginning God created the heaven and the"
    with pytest.raises(gs.GemmaScopeError, match="'earth' is 2 tokens here: .* Did you mean ' earth'[?]$"):
        gs.attribute(model, text, sae, "earth")
    assert len(gs.attribute(model, text, sae, " earth"))
    with pytest.raises(gs.GemmaScopeError, match="mind the leading space"):
        gs.attribute(model, text, sae, "earth earth")

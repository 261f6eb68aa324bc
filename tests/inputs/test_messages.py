"""Chat messages: what they must have, and where the next token of a conversation is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gemma_scope_tl.text.batch import as_batch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError
from tests.inputs.ways import TEMPLATE

ASKED = [{"role": "user", "content": "Who made the heaven?"}]


@pytest.fixture(scope="module")
def model() -> Any:
    made = gs.load_model("bundled")
    made.tokenizer.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def saes() -> list[Any]:
    return [gs.load_sae("bundled", "res", layer, width="1k") for layer in (0, 2)]


def test_attributions_explain_the_token_that_generate_gives(model: Any, saes: list[Any]) -> None:
    seen: list[torch.Tensor] = []

    def top(logits: torch.Tensor) -> torch.Tensor:
        seen.append(logits[0, -1].detach())
        return logits[0, -1].max()

    ids = model.generate(ASKED, max_new_tokens=1, do_sample=False, return_type="tokens")
    asked = as_batch(model, ASKED, add_generation_prompt=True).ids
    gs.attribute(model, ASKED, saes, top)
    gs.circuit(model, ASKED, saes, top, nodes=3)
    assert len(seen) >= 2
    for logits in seen:
        torch.testing.assert_close(logits, model(asked)[0, -1].detach(), rtol=1e-4, atol=1e-4)  # another pass rounds so
    if ids.shape[1] > asked.shape[1]:
        assert int(seen[0].argmax()) == int(ids[0, asked.shape[1]])
    for role in ("assistant", "model"):  # its own words are not opened again
        answered = [*ASKED, {"role": role, "content": "God"}]
        table = gs.attribute(model, answered, saes[0], " God")
        assert table["position"].max() == as_batch(model, answered).length.item() - 1


WRONG = [
    ({"role": "user", "contents": "x"}, UnknownNameError, "Nearest: content"),
    ({"role": "user", "content": "x", "naem": "y"}, UnknownNameError, "key of a chat message 'naem'"),
    ({"role": "user"}, GemmaScopeError, "has no 'content'"),
    ({"role": "user", "content": None}, GemmaScopeError, "has no 'content'"),
    ({"role": "user", "content": 5}, GemmaScopeError, "is a int"),
    ({"role": None, "content": "x"}, GemmaScopeError, "has no 'role'"),
]


@pytest.mark.parametrize(("message", "kind", "said"), WRONG)
def test_messages_that_would_be_misread(model: Any, saes: list[Any], message: Any, kind: Any, said: str) -> None:
    for given in (message, [*ASKED, message], [ASKED, [message]]):
        for use in (lambda g: gs.features(model, g, saes), lambda g: model.generate(g, max_new_tokens=1), model):
            with pytest.raises(kind, match=said):
                use(given)


def test_keys_that_a_template_reads_and_parts_of_content(model: Any) -> None:
    tokenizer = model.tokenizer
    try:
        tokenizer.chat_template = (
            "{{ bos_token }}{% for m in messages %}{{ m.name }}{% if m.content is string %}{{ m.content }}{% else %}"
            "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}{% endfor %}"
        )
        parts = [{"role": "user", "name": "Ann", "content": [{"type": "text", "text": " God"}]}]
        whole = as_batch(model, [{"role": "user", "name": "Ann", "content": " God"}]).ids
        assert torch.equal(as_batch(model, parts).ids, whole)
    finally:
        tokenizer.chat_template = TEMPLATE


def test_nothing_to_measure(model: Any, saes: list[Any]) -> None:
    bos = model.tokenizer.bos_token_id
    with pytest.raises(GemmaScopeError, match="nothing to measure"):
        gs.evaluate(model, saes, [[bos, 7], [bos, 9]], progress=False)
    table = gs.evaluate(model, saes, [[bos, 7], [bos, 9, 8]], progress=False, resamples=10)
    assert bool(table["fvu"].notna().all()) and table["delta_loss"].notna().all()

"""The tokenizer that is given is the one that counts: with all its tokens, never loaded again, and left as it was."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from gemma_scope_tl.errors import AdapterError
from gemma_scope_tl.model.loading import load_model
from gemma_scope_tl.model.tokenizer import adds_special_tokens, prepared
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import random_gemma

CHARACTERS = [chr(c) for c in range(32, 120)]
SPECIAL = ["<pad>", "<eos>", "<bos>"]
NAMES = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>"}


class SlowCharacters(PreTrainedTokenizer):
    """A tokenizer in Python alone."""

    def __init__(self, **kwargs: Any) -> None:
        self.ids = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS])}
        super().__init__(**kwargs)

    @property
    def vocab_size(self) -> int:
        return len(self.ids)

    def get_vocab(self) -> dict[str, int]:
        return {**self.ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.ids.get(token, self.ids["?"])

    def _convert_id_to_token(self, index: int) -> str:
        return [*SPECIAL, *CHARACTERS][index]

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def fast(template: str | None = None, **names: str) -> Any:
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate([*SPECIAL, *CHARACTERS])}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    if template is not None:
        core.post_processor = processors.TemplateProcessing(template, special_tokens=[("<bos>", 2), ("<eos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=core, **names)


def added(tokenizer: Any) -> Any:
    tokenizer.add_tokens(["<steer>"])
    return tokenizer


def named(tokenizer: Any, name: str) -> Any:
    tokenizer.name_or_path = name
    tokenizer.init_kwargs["name_or_path"] = name
    return tokenizer


TOKENIZERS: dict[str, Any] = {
    "adds BOS": lambda: fast("<bos> $A", **NAMES),
    "adds no BOS": lambda: fast(**NAMES),
    "adds BOS and EOS": lambda: fast("<bos> $A <eos>", **NAMES),
    "named, adds no BOS": lambda: named(fast(**NAMES), "google/gemma-2-2b"),
    "named, adds BOS": lambda: named(fast("<bos> $A", **NAMES), "google/gemma-2-2b"),
    "with an added token": lambda: added(fast(**NAMES)),
    "without a padding token": lambda: fast("<bos> $A", eos_token="<eos>", bos_token="<bos>"),
    "only BOS": lambda: fast(bos_token="<bos>"),
    "without BOS": lambda: fast(pad_token="<pad>", eos_token="<eos>"),
    "slow": lambda: SlowCharacters(**NAMES),
    "slow, named, with an added token": lambda: added(named(SlowCharacters(**NAMES), "google/gemma-2-2b")),
}


@pytest.fixture(autouse=True)
def nothing_is_loaded_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a given tokenizer is not loaded again")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


def state(tokenizer: Any) -> tuple[Any, ...]:
    return (
        tokenizer.padding_side,
        tokenizer.pad_token,
        tokenizer.bos_token,
        tokenizer.eos_token,
        dict(tokenizer.init_kwargs),
        len(tokenizer),
        tokenizer.name_or_path,
    )


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_given_tokenizer_is_what_counts(kind: str, backend: str) -> None:
    given = TOKENIZERS[kind]()
    before = state(given)
    model = load_model(hf_model=random_gemma(), tokenizer=given, backend=backend, check=False)
    assert state(given) == before  # the caller's own is left alone
    assert model.tokenizer is not given
    assert model.tokenizer.get_vocab() == given.get_vocab()
    plain = given.encode("ab c", add_special_tokens=False)
    bos = [2] if given.bos_token_id is not None else []
    ids = model.to_tokens("ab c")
    assert ids.tolist() == [[*bos, *plain]]
    batch = model.to_tokens(["ab c", "a"])
    assert batch.shape == (2, len(bos) + len(plain))
    assert batch[1, -1] == given.encode("a", add_special_tokens=False)[0]  # padded on the left
    assert model.to_tokens("ab", prepend_bos=False)[0].tolist() == given.encode("ab", add_special_tokens=False)
    assert model(ids).shape == (1, ids.shape[1], 96)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_added_token_stays_one_token(backend: str) -> None:
    model = load_model(hf_model=random_gemma(), tokenizer=added(fast(**NAMES)), backend=backend, check=False)
    assert model.to_single_token("<steer>") == 91
    assert model.to_str_tokens("a<steer>b") == ["<bos>", "a", "<steer>", "b"]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tokenizer_that_is_assigned_is_not_loaded_again_either(backend: str) -> None:
    model = load_model(hf_model=random_gemma(), backend=backend, check=False)
    assert model.tokenizer is None
    model.tokenizer = TOKENIZERS["named, adds no BOS"]()
    assert model.to_tokens("ab").tolist() == [[2, 68, 69]]
    model.set_tokenizer(TOKENIZERS["named, adds BOS"]())
    assert model.to_tokens("ab").tolist() == [[2, 68, 69]]
    assert model.cfg.d_vocab == 96


@pytest.fixture(scope="module")
def both() -> Iterator[list[Any]]:
    from tests.helpers import CharTokenizerFactory

    made = CharTokenizerFactory.get()
    made.name_or_path = "google/gemma-2-2b"
    yield [load_model(hf_model=random_gemma(), tokenizer=made, backend=backend, check=False) for backend in BACKENDS]


TEXTS = ["God created", "a", "", " ", ["a", "In the beginning"]]


@pytest.mark.parametrize("text", TEXTS, ids=str)
@pytest.mark.parametrize("prepend_bos", [None, True, False])
def test_both_backends_tokenize_alike(both: list[Any], text: Any, prepend_bos: bool | None) -> None:
    if text == "" and prepend_bos is False:
        pytest.skip("no tokens at all")
    options = {} if prepend_bos is None else {"prepend_bos": prepend_bos}
    bridge, hooked = (model.to_tokens(text, **options) for model in both)
    assert torch.equal(bridge, hooked)
    assert both[0].to_string(bridge) == both[1].to_string(bridge)
    strings = [model.to_str_tokens(text, **options) for model in both]
    assert strings[0] == strings[1]
    if isinstance(text, str):
        assert strings[0] == [both[0].tokenizer.decode([i]) for i in bridge[0].tolist()]
        assert both[1].to_str_tokens(bridge) == both[0].to_str_tokens(bridge) == strings[0]
        assert both[1].to_str_tokens(bridge[0].numpy()) == strings[0]


def test_both_backends_find_tokens_alike(both: list[Any]) -> None:
    hf_model = random_gemma()
    for model in both:
        assert model.to_single_token("d") == 71
        assert model.to_single_str_token(71) == "d"
        assert model.get_token_position("d", "God did") == 3  # BOS is position 0
        assert model.get_token_position("d", "God did", mode="last") == 7
        assert model.get_token_position("d", "God did", prepend_bos=False) == 2
        with pytest.raises(AssertionError, match="not a single token"):
            model.to_single_token("dd")
        for tokens in ("d", 71, torch.tensor(71), torch.tensor([71, 72]), torch.tensor([[71, 72]])):
            ids = 71 if isinstance(tokens, (str, int)) else tokens
            assert torch.equal(model.tokens_to_residual_directions(tokens), hf_model.lm_head.weight[ids])


def test_what_is_no_tokenizer_is_refused() -> None:
    bare = Tokenizer(models.WordLevel({"a": 0, "?": 1}, unk_token="?"))
    for given, hint in (
        ("google/gemma-2-2b", "not a str"),
        (fast(**NAMES).backend_tokenizer, "PreTrainedTokenizerFast"),
        (type("Processor", (), {"tokenizer": fast(**NAMES)})(), "Give its .tokenizer"),
        (PreTrainedTokenizerFast(tokenizer_object=bare), "no padding, EOS or BOS token"),
    ):
        hf_model = random_gemma()
        with pytest.raises(AdapterError, match=hint):
            load_model(hf_model=hf_model, tokenizer=given)
        load_model(hf_model=hf_model, check=False)  # nothing was wrapped


@pytest.mark.parametrize(
    ("kind", "adds"),
    [("adds BOS", (True, False)), ("adds BOS and EOS", (True, True)), ("slow", (False, False))],
)
def test_what_a_tokenizer_adds_by_itself(kind: str, adds: tuple[bool, bool]) -> None:
    assert adds_special_tokens(TOKENIZERS[kind]()) == adds


def test_a_vocabulary_without_an_a_is_judged_by_its_own_tokens() -> None:
    core = Tokenizer(models.WordLevel({"<bos>": 0, "<unk>": 1, "好": 2}, unk_token="<unk>"))
    core.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", unk_token="<unk>")
    assert adds_special_tokens(made) == (True, False)


def test_the_padding_token_of_the_vocabulary_comes_before_eos() -> None:
    assert prepared(TOKENIZERS["without a padding token"]()).pad_token == "<pad>"
    core = Tokenizer(models.WordLevel({"a": 0, "<end>": 1}, unk_token="a"))
    assert prepared(PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")).pad_token == "<end>"


def test_a_folders_tokenizer_is_loaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    random_gemma().save_pretrained(tmp_path)
    fast(**NAMES).save_pretrained(tmp_path)
    calls: list[Any] = []
    load = AutoTokenizer.from_pretrained
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *a, **k: (calls.append(a), load(*a, **k))[1])
    for backend in BACKENDS:
        calls.clear()
        model = load_model(tmp_path, backend=backend, check=False)
        assert len(calls) == 1
        assert model.to_tokens("ab").tolist() == [[2, 68, 69]]

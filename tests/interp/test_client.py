"""The chat client against an endpoint that breaks in every way it may."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.interp import ChatClient, LocalModel
from gemma_scope_tl.interp.client import AnswerLog, Prompt
from tests.helpers import CharTokenizerFactory, random_gemma
from tests.interp.llm_server import Endpoint

KEY = "sk-very-secret-0123456789"
PROMPT = Prompt("Say.", "Description: cat\nExcerpt 1: 'a cat'\nExcerpt 2: 'a dog'")


def _client(endpoint: Endpoint, **options: object) -> ChatClient:
    return ChatClient("m", endpoint.url, backoff=0.01, **{"timeout": 0.5, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", [429, 500, 503, "garbled", "shapeless", "slow", "closed"])
def test_a_fault_is_tried_again(endpoint: Endpoint, fault: int | str) -> None:
    endpoint.faults = [fault, fault]
    assert _client(endpoint).answers([PROMPT]) == ["[1, 0]"]
    assert len(endpoint.bodies) == 3
    assert endpoint.bodies[0]["messages"] == PROMPT.messages()
    assert endpoint.bodies[0]["model"] == "m"


@pytest.mark.parametrize(
    ("fault", "match"),
    [
        (429, "status 429"),
        ("garbled", "the answer does not have the format of a chat endpoint"),
        ("slow", r"no answer within 0\.2 s"),
    ],
)
def test_it_gives_up(endpoint: Endpoint, fault: int | str, match: str) -> None:
    endpoint.faults = [fault] * 3
    with pytest.raises(GemmaScopeError, match=f"did not answer in 3 attempts: {match}"):
        _client(endpoint, retries=2, timeout=0.2).answers([PROMPT])
    assert len(endpoint.bodies) == 3


def test_nobody_there() -> None:
    with pytest.raises(GemmaScopeError, match="did not answer in 2 attempts: ConnectError"):
        ChatClient("m", "http://127.0.0.1:9/v1", retries=1, backoff=0.01).answers([PROMPT])


def test_the_key_is_sent_and_never_shown(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    log = tmp_path / "answers.jsonl"
    client = _client(endpoint, log=log)
    client.answers([PROMPT])
    assert endpoint.headers[0]["authorization"] == f"Bearer {KEY}"
    assert KEY not in log.read_text() + repr(client)
    for status in (400, 401, 403):  # this endpoint quotes the key in its error
        endpoint.faults = [status]
        with pytest.raises(GemmaScopeError, match=f"status {status}") as caught:
            _client(endpoint).answers([PROMPT])
        assert KEY not in str(caught.value)
    assert len(endpoint.bodies) == 4  # a refusal is not tried again
    with pytest.raises(GemmaScopeError, match="is not sent to models.example without encryption"):
        ChatClient("m", "http://models.example/v1").answers([PROMPT])


def test_no_key_no_header(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTHER_KEY", KEY)
    _client(endpoint).answers([PROMPT])
    assert "authorization" not in endpoint.headers[0]
    _client(endpoint, key_variable="OTHER_KEY").answers([PROMPT])
    assert endpoint.headers[1]["authorization"] == f"Bearer {KEY}"


def test_a_stopped_run_goes_on(endpoint: Endpoint, tmp_path: Path) -> None:
    prompts = [Prompt("Say.", f"Description: {i}\nExcerpt 1: '{i}'\nExcerpt 2: ''") for i in "abdfghijkl"]
    log = tmp_path / "deep" / "answers.jsonl"
    _client(endpoint, log=log).answers(prompts[:4])
    with log.open("a") as file:
        file.write('{"key": "cut sh')  # a crash in the middle of a line
    assert _client(endpoint, log=log).answers(prompts) == ["[1, 0]"] * 10
    assert len(endpoint.bodies) == 10
    assert _client(endpoint, log=log).answers(prompts[::-1]) == ["[1, 0]"] * 10
    assert len(endpoint.bodies) == 10
    assert _client(endpoint, log=log, temperature=1.0).answers(prompts[:1]) == ["[1, 0]"]
    assert len(endpoint.bodies) == 11  # other options are another question
    assert [set(json.loads(line)) for line in log.read_text().splitlines() if "cut" not in line] == [
        {"key", "model", "answer"}
    ] * 11


def test_answers_before_an_error_are_kept(endpoint: Endpoint, tmp_path: Path) -> None:
    log = tmp_path / "answers.jsonl"
    prompts = [Prompt("Say.", f"Description: {i}\nExcerpt 1: '{i}'") for i in "abdfgh"]
    client = _client(endpoint, log=log, concurrency=1)
    client.answers(prompts[:2])
    endpoint.faults = [400]
    with pytest.raises(GemmaScopeError, match="status 400"):
        client.answers(prompts)
    assert len(AnswerLog(log)) >= 2
    assert client.answers(prompts) == ["[1]"] * 6


def test_concurrency_is_bounded(endpoint: Endpoint) -> None:
    endpoint.delay = 0.05
    prompts = [Prompt("Say.", f"Description: {i}\nExcerpt 1: ''") for i in range(12)]
    start = time.monotonic()
    _client(endpoint, concurrency=3, timeout=5).answers([*prompts, *prompts])
    assert endpoint.most == 3
    assert time.monotonic() - start < 12 * 0.05
    assert len(endpoint.bodies) == 12  # equal prompts are asked once


def test_bad_settings() -> None:
    with pytest.raises(GemmaScopeError, match="not the URL of an endpoint"):
        ChatClient("m", "file:///etc/passwd")
    with pytest.raises(GemmaScopeError, match="concurrency must be 1 or more"):
        ChatClient("m", "http://127.0.0.1/v1", concurrency=0)


def test_a_local_model_answers_as_generate_does(tmp_path: Path) -> None:
    hf_model = random_gemma()
    tokenizer = CharTokenizerFactory.get()
    local = LocalModel(hf_model, tokenizer, log=tmp_path / "a.jsonl", max_tokens=5)
    (answer,) = local.answers([PROMPT])
    ids = tokenizer(f"{PROMPT.system}\n\n{PROMPT.user}\n", return_tensors="pt")["input_ids"]
    wanted = hf_model.generate(ids, max_new_tokens=5, do_sample=False)[0, ids.shape[1] :]
    assert answer == tokenizer.decode(wanted, skip_special_tokens=True)
    hf_model.generate = None  # type: ignore[assignment]
    assert LocalModel(hf_model, tokenizer, log=tmp_path / "a.jsonl", max_tokens=5).answers([PROMPT]) == [answer]
    with pytest.raises(GemmaScopeError, match="Cannot load the language model"):
        LocalModel.load(str(tmp_path / "nothing"))

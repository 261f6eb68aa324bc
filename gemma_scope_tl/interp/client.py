"""Language models that answer prompts: an OpenAI-compatible endpoint, or a local causal model of ``transformers``.

The client of endpoints uses httpx, on which the package depends anyway. The ``openai`` package would save about 40
lines here and add five dependencies. It would not keep the log, ensure that the key is only sent encrypted, remove the
key from error messages, or retry after a reply without text.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import time
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from gemma_scope_tl.counts import checked_count, checked_real
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.files import append_line

RETRIED = frozenset((408, 409, 425, 429, 500, 502, 503, 504, 529))
LONGEST_WAIT = 60.0
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Prompt:
    """Instructions and a question."""

    system: str
    user: str

    def messages(self) -> list[dict[str, str]]:
        """The prompt as a list of messages, the form that chat endpoints and templates take."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]


class Answerer(Protocol):
    """A language model that answers prompts."""

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """An answer to each prompt, in the order of the prompts."""
        ...


class AnswerLog:
    """A log of answers by a hash of model, prompt and options, appended to a JSONL file as they arrive.

    A truncated line is ignored, so its prompt is asked again. Without a path, answers are kept in memory only.
    """

    def __init__(self, path: str | PathLike[str] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self._known: dict[str, str] = {}
        self._lock = threading.Lock()
        if self.path is not None:
            self._read(self.path)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, key: str) -> str | None:
        """The answer under this key, if there is one."""
        return self._known.get(key)

    def add(self, key: str, model: str, answer: str) -> None:
        """Keep an answer."""
        with self._lock:
            self._known[key] = answer
            if self.path is None:
                return
            append_line(self.path, json.dumps({"key": key, "model": model, "answer": answer}))

    def _read(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8", errors="replace")
            if text and not text.endswith("\n"):
                with path.open("a", encoding="utf-8") as file:
                    file.write("\n")
        except FileNotFoundError:
            return
        except OSError as error:
            raise GemmaScopeError(f"Cannot continue with the answers in {path}: {error}") from error
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                self._known[str(entry["key"])] = str(entry["answer"])
            except (ValueError, KeyError, TypeError):
                continue


def prompt_key(model: str, prompt: Prompt, options: dict[str, Any]) -> str:
    """A hash of the model's name, the prompt and the options of generation."""
    text = json.dumps([model, prompt.messages(), options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass
class ChatClient:
    """A client of any endpoint with OpenAI's chat protocol.

    The key is read from an environment variable when a request is made, and is kept in no attribute, message or file.
    Without the variable no key is sent, as local servers expect.

    Attributes:
        model: name of the model at the endpoint.
        base_url: the part of the URL before ``/chat/completions``.
        log: an :class:`AnswerLog` or the path of one; prompts whose answers it holds are not sent again.
        key_variable: name of the environment variable with the key.
        timeout: time limit of each request in seconds.
        retries: further attempts after a status such as 429 or 500, a timeout, a broken connection, or a reply
            that does not follow the protocol.
        backoff: seconds before the first further attempt, doubled for each, unless the server states how long to wait.
        concurrency: number of requests in flight at once.
        max_tokens, temperature: settings of generation.

    Raises:
        GemmaScopeError: the URL is not http(s); from ``answers``, an attempt is refused or all have failed.
    """

    model: str
    base_url: str = "https://api.openai.com/v1"
    log: AnswerLog | str | PathLike[str] | None = None
    key_variable: str = "OPENAI_API_KEY"
    timeout: float = 60.0
    retries: int = 5
    backoff: float = 1.0
    concurrency: int = 8
    max_tokens: int = 500
    temperature: float = 0.0
    _log: AnswerLog = field(init=False, repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise GemmaScopeError(f"{self.base_url!r} is not the URL of an endpoint, such as http://127.0.0.1:8000/v1.")
        self.concurrency = checked_count(self.concurrency, "concurrency")
        self.retries = checked_count(self.retries, "retries", least=0)
        self.timeout = checked_real(self.timeout, "timeout", above=0)
        self._log = self.log if isinstance(self.log, AnswerLog) else AnswerLog(self.log)

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """Answer each prompt, in the order of the prompts; equal prompts are sent once."""
        import httpx

        options = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        keys = [prompt_key(self.model, prompt, options) for prompt in prompts]
        asked = {k: p for k, p in zip(keys, prompts, strict=True) if self._log.get(k) is None}
        if asked:
            headers = self._headers()
            with httpx.Client(timeout=self.timeout, headers=headers) as http, _pool(self.concurrency) as pool:
                waiting = [pool.submit(self._ask, http, key, prompt, options) for key, prompt in asked.items()]
                for one in waiting:
                    one.result()
        return [self._log.get(key) or "" for key in keys]

    def _headers(self) -> dict[str, str]:
        key = os.environ.get(self.key_variable)
        if not key:
            return {}
        parts = urlsplit(self.base_url)
        if parts.scheme == "http" and parts.hostname not in _LOOPBACK:
            raise GemmaScopeError(f"The key in {self.key_variable} is not sent to {parts.hostname} without encryption.")
        return {"Authorization": f"Bearer {key}"}

    def _ask(self, http: Any, key: str, prompt: Prompt, options: dict[str, Any]) -> None:
        body = {"model": self.model, "messages": prompt.messages(), **options}
        url = f"{self.base_url.rstrip('/')}/chat/completions"
        for attempt in range(self.retries + 1):
            answer, problem, wait = self._attempt(http, url, body)
            if answer is not None:
                return self._log.add(key, self.model, answer)
            if attempt < self.retries:
                delay = self.backoff * 2**attempt * random.uniform(0.5, 1.0) if wait is None else wait
                time.sleep(min(delay, LONGEST_WAIT))
            else:
                tries = f"{attempt + 1} attempts" if attempt else "1 attempt"
                raise GemmaScopeError(f"{self.model} at {self.base_url} did not answer in {tries}: {problem}.")
        raise AssertionError("a loop of one attempt or more")

    def _attempt(self, http: Any, url: str, body: dict[str, Any]) -> tuple[str | None, str, float | None]:
        """The answer or None, the problem, and the seconds for which the server asks to wait."""
        import httpx

        try:
            response = http.post(url, json=body)
        except httpx.TimeoutException:
            return None, f"no answer within {self.timeout:g} s", None
        except httpx.HTTPError as error:
            return None, f"{type(error).__name__}", None
        if response.status_code in RETRIED:
            return None, f"status {response.status_code}", _seconds(response.headers.get("retry-after"))
        if response.status_code != 200:
            raise GemmaScopeError(self._refusal(response))
        try:
            answer = response.json()["choices"][0]["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            return None, "the answer does not have the format of a chat endpoint", None
        return (answer, "", None) if isinstance(answer, str) else (None, "the answer holds no text", None)

    def _refusal(self, response: Any) -> str:
        said = f"{self.base_url} answered {self.model!r} with status {response.status_code}"
        if response.status_code in (401, 403):  # such bodies may quote the key
            return f"{said}: it needs a valid key in the environment variable {self.key_variable}."
        key = os.environ.get(self.key_variable)
        text = response.text[:300]
        return f"{said}: {text.replace(key, '***') if key else text}"


@dataclass
class LocalModel:
    """A local causal model of ``transformers``, which answers one prompt at a time with greedy decoding.

    Attributes:
        model: a model with ``generate``.
        tokenizer: tokenizer of the model. Without a chat template the prompt is plain text.
        log: as in :class:`ChatClient`.
        max_tokens: maximum length of an answer.
        name: name of the model in the log.
    """

    model: Any
    tokenizer: Any
    log: AnswerLog | str | PathLike[str] | None = None
    max_tokens: int = 200
    name: str = ""
    _log: AnswerLog = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._log = self.log if isinstance(self.log, AnswerLog) else AnswerLog(self.log)
        self.name = self.name or str(getattr(self.model, "name_or_path", "")) or type(self.model).__name__

    @classmethod
    def load(cls, name: str, device: str | None = None, **options: Any) -> LocalModel:
        """Load a model and its tokenizer by name or from a folder; ``options`` are arguments of the class.

        Raises:
            GemmaScopeError: the model cannot be loaded.
        """
        from transformers import AutoModelForCausalLM, AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            model: Any = AutoModelForCausalLM.from_pretrained(name).eval()
        except (OSError, ValueError) as error:
            raise GemmaScopeError(f"Cannot load the language model {name!r}: {error}") from error
        return cls(model.to(device) if device else model, tokenizer, name=name, **options)

    def answers(self, prompts: Sequence[Prompt]) -> list[str]:
        """An answer to each prompt, in the order of the prompts."""
        options = {"max_tokens": self.max_tokens}
        return [self._answer(prompt_key(self.name, prompt, options), prompt) for prompt in prompts]

    def _answer(self, key: str, prompt: Prompt) -> str:
        import torch

        known = self._log.get(key)
        if known is not None:
            return known
        if getattr(self.tokenizer, "chat_template", None):
            merged = [{"role": "user", "content": f"{prompt.system}\n\n{prompt.user}"}]  # Gemma has no system role
            text = self.tokenizer.apply_chat_template(merged, tokenize=False, add_generation_prompt=True)
            given = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        else:
            given = self.tokenizer(f"{prompt.system}\n\n{prompt.user}\n", return_tensors="pt")
        ids = given["input_ids"].to(self.model.device)
        with torch.no_grad():
            out = self.model.generate(ids, max_new_tokens=self.max_tokens, do_sample=False)
        answer = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        self._log.add(key, self.name, answer)
        return answer


@contextmanager
def _pool(workers: int) -> Generator[ThreadPoolExecutor]:
    """A thread pool. If an error ends the context, requests that have not begun are cancelled."""
    pool = ThreadPoolExecutor(workers)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _seconds(value: str | None) -> float | None:
    try:
        return None if value is None else max(0.0, float(value))
    except ValueError:
        return None

"""As much of nnsight as ``docs/coming-from.md`` writes, on PyTorch's own hooks: a trace over a Hugging Face model.

The forward pass runs in a thread and waits at each module whose output the block asks for, so that what the block does
to a tensor in place is what the rest of the pass sees. That is nnsight's way too.
"""

from __future__ import annotations

from queue import Queue
from threading import Thread
from typing import Any

import torch


class Envoy:
    """A module inside a trace: ``.output``, and its submodules by name and number."""

    def __init__(self, module: torch.nn.Module, lm: LanguageModel) -> None:
        self._module, self._lm = module, lm

    @property
    def output(self) -> Any:
        """What the module returns in this pass."""
        return self._lm.trace_of_now.output_of(self._module)

    def __getattr__(self, name: str) -> Envoy:
        return Envoy(getattr(self._module, name), self._lm)

    def __getitem__(self, index: int) -> Envoy:
        return Envoy(self._module[index], self._lm)  # type: ignore[index]


class Trace:
    """One forward pass, step by step."""

    def __init__(self, hf: Any, ids: torch.Tensor) -> None:
        self._asked: Queue[Any] = Queue()
        self._answers: Queue[Any] = Queue()
        self._next: Any = None
        self._hf, self._ids = hf, ids
        self._thread = Thread(target=self._run)

    def output_of(self, module: torch.nn.Module) -> Any:
        """Let the pass go on until ``module`` has returned."""
        self._asked.put(module)
        answer = self._answers.get(timeout=60)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def __enter__(self) -> Trace:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._asked.put(None)
        self._thread.join()

    def _run(self) -> None:
        handles = [module.register_forward_hook(self._pause) for module in self._hf.modules()]
        try:
            self._next = self._asked.get()
            with torch.no_grad():
                self._hf(self._ids, use_cache=False)
        except BaseException as error:
            self._answers.put(error)
        finally:
            for handle in handles:
                handle.remove()

    def _pause(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        while self._next is module:
            self._answers.put(output)
            self._next = self._asked.get()


class LanguageModel(Envoy):
    """nnsight's class of this name. ``hf`` and ``tokenizer`` are set by the test."""

    hf: Any = None
    tokenizer: Any = None

    def __init__(self, name: str, device_map: str | None = None) -> None:
        super().__init__(self.hf, self)

    def trace(self, text: str) -> Trace:
        """A pass over a text."""
        self.trace_of_now = Trace(self.hf, self.tokenizer(text, return_tensors="pt")["input_ids"])
        return self.trace_of_now

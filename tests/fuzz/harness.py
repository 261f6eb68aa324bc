"""A coverage-guided search for inputs that break a reader's contract.

An input that reaches an arc (one line after another) of the reader's modules that no input reached before, or an error
message of a new kind, joins the corpus, from which further inputs are made. Inputs are tried in this process: a crash
of the interpreter leaves its input in the scratch folder.
"""

from __future__ import annotations

import hashlib
import random
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import gemma_scope_tl
from gemma_scope_tl.errors import GemmaScopeError
from tests.fuzz.guard import Guard, Violation
from tests.fuzz.targets import Target

PACKAGE = Path(gemma_scope_tl.__file__).parent
Feature = tuple[str, int, int]


class Arcs:
    """Which line follows which, in some modules."""

    def __init__(self, target: Target) -> None:
        self.files = {str(PACKAGE / f"{name}.py"): name for name in target.traced}
        self.found: set[Feature] = set()

    def collect(self, run: Callable[[], Any]) -> Any:
        """Run something; ``found`` has its arcs afterwards, whatever it raises."""
        self.found = set()
        before = sys.gettrace()
        threading.settrace(self._enter)  # arrays are read by threads of their own
        sys.settrace(self._enter)
        try:
            return run()
        finally:
            sys.settrace(before)
            threading.settrace(before)  # type: ignore[arg-type]

    def _enter(self, frame: FrameType, event: str, arg: Any) -> Any:
        name = self.files.get(frame.f_code.co_filename)
        if name is None:
            return None
        last, found = -frame.f_code.co_firstlineno, self.found

        def line(frame: FrameType, event: str, arg: Any) -> Any:
            nonlocal last
            if event == "line":
                found.add((name, last, frame.f_lineno))
                last = frame.f_lineno
            return line

        return line


@dataclass
class Totals:
    """What a run did."""

    target: str
    seed: int
    executions: int = 0
    seconds: float = 0.0
    accepted: int = 0
    slowest: float = 0.0
    arcs: set[Feature] = field(default_factory=set[Feature])
    kinds: set[str] = field(default_factory=set[str])
    corpus: list[bytes] = field(default_factory=list[bytes])
    good: list[bytes] = field(default_factory=list[bytes])  # those of the corpus that are accepted
    findings: dict[str, tuple[bytes, str]] = field(default_factory=dict[str, "tuple[bytes, str]"])

    def __str__(self) -> str:
        rate = self.executions / max(self.seconds, 1e-9)
        return (
            f"{self.target} (seed {self.seed}): {self.executions} executions in {self.seconds:.0f} s ({rate:.0f} a "
            f"second), {self.accepted} accepted; {len(self.arcs)} arcs, {len(self.kinds)} kinds of error, "
            f"{len(self.corpus)} inputs in the corpus, slowest {self.slowest:.2f} s; {len(self.findings)} findings"
        )


def outcome(target: Target, data: bytes, guard: Guard) -> str:
    """``"ok"``, or the name of the error that the reader raises.

    Raises:
        Violation: when the reader breaks its contract.
    """
    error = _error(target, data, guard)
    return "ok" if error is None else type(error).__name__


def _error(target: Target, data: bytes, guard: Guard) -> GemmaScopeError | None:
    target.place(data)
    try:
        with guard.watch(len(data)):
            target.run(data)
        return None
    except GemmaScopeError as error:
        message = str(error)
        if not any(name in message for name in target.files):
            raise Violation(f"unnamed {type(error).__name__}", f"the error names no file: {message[:300]}") from error
        if target.limit is not None and len(message) > target.limit:
            raise Violation("long message", f"an error of {len(message)} characters: {message[:200]}") from error
        if target.limit is not None and not message.replace("\n", "").isprintable():
            raise Violation("control characters", f"an error with control characters: {message[:300]!r}") from error
        return error
    except Violation:
        raise
    except Exception as error:
        raise Violation(_place(error), "".join(traceback.format_exception(error))[-3000:]) from error


def fuzz(
    target: Target,
    guard: Guard,
    seconds: float,
    seed: int,
    extra: list[bytes],
    report: bool = False,
    executions: int = 1 << 62,
) -> Totals:
    """Search for ``seconds``, or until ``executions`` were made.

    Args:
        target: what to fuzz.
        guard: made once for the process.
        seconds: by the clock.
        seed: of the choices; the same one makes the same inputs.
        extra: inputs to start from besides the seeds.
        report: whether to print findings when they are made, and a line a minute.
        executions: the most there may be, seeds included.
    """
    rng, totals, arcs = random.Random(seed), Totals(target.name, seed), Arcs(target)
    start, minute = time.monotonic(), 1
    for data in [*target.seeds(), *extra]:
        _try(target, data, guard, arcs, totals, report)
    while (now := time.monotonic() - start) < seconds and totals.executions < executions:
        if report and now > 60 * minute:
            totals.seconds, minute = now, minute + 1
            print(totals, flush=True)  # noqa: T201
        pool = totals.corpus
        data = rng.choice(rng.choice([pool, pool[-32:], totals.good or pool]))
        for _ in range(rng.choice([1, 1, 1, 2, 2, 3, 5])):
            data = target.mutate(data, rng, rng.choice(pool))
        _try(target, data, guard, arcs, totals, report)
    totals.seconds, totals.slowest = time.monotonic() - start, guard.slowest
    return totals


def _try(target: Target, data: bytes, guard: Guard, arcs: Arcs, totals: Totals, report: bool) -> None:
    totals.executions += 1
    try:
        error = arcs.collect(lambda: _error(target, data, guard))
    except Violation as violation:
        kept = totals.findings.get(violation.key)
        if kept is None or len(data) < len(kept[0]):
            totals.findings[violation.key] = (data, str(violation))
        if report and kept is None:
            print(f"FINDING {violation.key}\n{violation}", flush=True)  # noqa: T201
        return
    totals.accepted += error is None
    if error is None and (not totals.good or not arcs.found <= totals.arcs):
        totals.good.append(data)
    kind = "" if error is None else _kind(error)
    if not arcs.found <= totals.arcs or kind not in totals.kinds or len(totals.corpus) < 1:
        totals.arcs |= arcs.found
        totals.kinds.add(kind)
        totals.corpus.append(data)


def _kind(error: GemmaScopeError) -> str:
    """An error's message without what differs from one input to the next."""
    line = str(error).split("\n")[0].partition(" ")[2]
    return type(error).__name__ + re.sub(r"'[^']*'|\"[^\"]*\"|\d+|[\[({].*[])}]", "", line)[:40]


def shrink(target: Target, guard: Guard, data: bytes, key: str, tries: int = 300) -> bytes:
    """A smaller input that breaks the contract in the same way."""
    size = max(1, len(data) // 2)
    while tries > 0 and size:
        at, shorter = 0, data
        while at < len(shorter) and tries > 0:
            tries -= 1
            candidate = shorter[:at] + shorter[at + size :]
            if _key(target, guard, candidate) == key:
                shorter = candidate
            else:
                at += size
        size, data = size // 2, shorter
    return data


def _key(target: Target, guard: Guard, data: bytes) -> str | None:
    try:
        _error(target, data, guard)
    except Violation as violation:
        return violation.key
    return None


def _place(error: BaseException) -> str:
    """The exception's type and the last line of ours that it came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "gemma_scope_tl" in f.filename]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else "harness"
    return f"{type(error).__name__} in {where}"


def slug(key: str, data: bytes) -> str:
    """A file name for a finding."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", key).strip("-").lower()[:60]
    return f"{words}-{hashlib.sha256(data).hexdigest()[:8]}"

"""The three walks through the package as call lists: loading an SAE, training a suite, evaluating SAEs.

    python scripts/walks.py load | train | evaluate [--depth N]

Runs the walk on the bundled model and prints which functions of the package called which, from the public function
down to the given depth. A function that was called again by the same caller is listed once, with the number of calls.
The last lines say how many files the walk passes, and how often it enters each from another one.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from inspect import CO_OPTIMIZED
from pathlib import Path
from types import FrameType
from typing import Any

import gemma_scope_tl as gs

PACKAGE = str(Path(gs.__file__).parent)


@dataclass
class Call:
    """A function of the package, and the functions that it called, in the order of the first calls."""

    name: str
    times: int = 0
    calls: dict[str, Call] = field(default_factory=dict)


class Trace:
    """Records calls between functions of the package; frames of libraries between them are skipped."""

    def __init__(self) -> None:
        self.root = Call("")
        self.entries: Counter[str] = Counter()
        self.files: set[str] = set()
        self._stack: list[tuple[int, Call, str]] = [(0, self.root, "")]

    def __call__(self, frame: FrameType, event: str, _arg: Any) -> None:
        """The callback for ``sys.setprofile``."""
        path = frame.f_code.co_filename
        if not path.startswith(PACKAGE) or path.endswith("moved.py"):
            return  # moved.py runs for every module that a library fails to find
        if frame.f_code.co_name.startswith("<") or not frame.f_code.co_flags & CO_OPTIMIZED:
            return  # expressions, and the bodies of modules and classes, which run on import
        if event == "return" and self._stack[-1][0] == id(frame):
            self._stack.pop()
        if event != "call":
            return
        file = path[len(PACKAGE) + 1 : -3].replace("/", ".")
        _, caller, before = self._stack[-1]
        if file != before:
            self.entries[file] += 1
        self.files.add(file)
        name = f"{file}.{frame.f_code.co_name}"
        callee = caller.calls.setdefault(name, Call(name))
        callee.times += 1
        self._stack.append((id(frame), callee, file))


def load() -> Callable[[], Any]:
    """Load one bundled SAE by release and id."""
    from gemma_scope_tl.sae import JumpReLUSAE

    row = gs.list_saes(model="bundled").iloc[0]
    return lambda: JumpReLUSAE.from_pretrained(row["release"], row["id"])


def evaluate() -> Callable[[], Any]:
    """Evaluate two bundled SAEs on a few rows of text."""
    model = gs.load_model("bundled", check=False)
    saes = [gs.load_sae("bundled", site, 1, width="1k") for site in ("res", "mlp")]
    text = ["In the beginning was the word, and the word was long. " * 8] * 8
    return lambda: gs.evaluate(model, saes, text, progress=False)


def train() -> Callable[[], Any]:
    """Train two small SAEs for a few steps on the package's own text."""
    config = {
        "output": str(Path(tempfile.mkdtemp()) / "suite"),
        "model": {"name": "bundled", "device": "cpu"},
        "data": {"dataset": "bundled", "column": "text", "context": 128, "limit_tokens": 20_000},
        "source": {"bucket_rows": 4096, "scale_rows": 4096, "batch_rows": 8},
        "steps": 4,
        "recipe": {"preset": "fast", "batch_size": 256},
        "grid": [{"sites": ["res", "mlp"], "layers": [1], "widths": [256], "target_l0s": [8]}],
        "eval_batches": 2,
        "checkpoint_every": 2,
        "log_every": 2,
    }
    return lambda: gs.train_suite(config, progress=False)


WALKS = {"load": load, "train": train, "evaluate": evaluate}


def listed(call: Call, depth: int, indent: int = 0) -> list[str]:
    """The calls below a call, as indented lines."""
    lines: list[str] = []
    for one in call.calls.values():
        times = f"  x{one.times}" if one.times > 1 else ""
        lines.append(f"{'  ' * indent}{one.name}{times}")
        if indent + 1 < depth:
            lines += listed(one, depth, indent + 1)
    return lines


def main() -> None:
    """Run one walk and print its calls."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("walk", choices=WALKS)
    parser.add_argument("--depth", type=int, default=6, help="how many calls deep (6)")
    chosen = parser.parse_args()
    walk, trace = WALKS[chosen.walk](), Trace()
    sys.setprofile(trace)
    try:
        walk()
    finally:
        sys.setprofile(None)
    print("\n".join(listed(trace.root, chosen.depth)))
    print(f"\n{len(trace.files)} files; entered from another file {sum(trace.entries.values())} times:")
    print(", ".join(f"{name} {times}" for name, times in trace.entries.most_common()))


if __name__ == "__main__":
    main()

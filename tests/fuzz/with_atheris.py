"""The same targets and mutators under libFuzzer, which sees the branches and comparisons of zipfile, json and yaml too.

    pip install atheris && python -m tests.fuzz.with_atheris npz 600

It stops at the first finding, whose input it writes to the current folder.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path


def main(name: str, seconds: int = 60, seed: int = 1) -> None:
    """Fuzz until the time is up or a contract is broken; never returns, libFuzzer exits."""
    import atheris  # pyright: ignore[reportMissingImports]

    for module in [module for module in sys.modules if module.split(".")[0] in ("zipfile", "json", "yaml")]:
        del sys.modules[module]  # so that the next import, instrumented, is the one that everybody uses
    with atheris.instrument_imports(include=["gemma_scope_tl", "zipfile", "json", "yaml"]):
        from tests.fuzz import harness
        from tests.fuzz.guard import Guard
        from tests.fuzz.targets import make_target

    folder = Path(tempfile.mkdtemp(prefix="fuzz_"))
    os.environ["GEMMA_SCOPE_TL_CACHE"] = str(folder / "cache")
    target, guard, corpus = make_target(name, folder), Guard(folder), folder / "corpus"
    corpus.mkdir()
    for index, data in enumerate(target.seeds()):
        (corpus / f"seed-{index}").write_bytes(data)
        harness.outcome(target, data, guard)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = atheris.Mutate(data, max_size) if rng.random() < 0.2 else target.mutate(data, rng, b"")
        return changed[:max_size]

    def cross(data: bytes, other: bytes, max_size: int, seed: int) -> bytes:
        return target.mutate(data, random.Random(seed), other)[:max_size]

    def one(data: bytes) -> None:
        harness.outcome(target, data, guard)

    options = [f"-max_total_time={seconds}", f"-seed={seed}", "-max_len=65536", "-print_final_stats=1", "-timeout=60"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one, custom_mutator=mutate, custom_crossover=cross)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))

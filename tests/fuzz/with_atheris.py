"""The same targets under libFuzzer, through atheris (``pip install atheris``), which is no dependency of the package."""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path
from typing import Any


def run(name: str, seconds: float, seed: int, corpus: Path) -> None:
    """Fuzz until the time is up or a contract is broken; never returns. libFuzzer prints what it does."""
    import atheris  # pyright: ignore[reportMissingImports]

    with atheris.instrument_imports(include=["gemma_scope_tl", "zipfile", "json", "yaml", "ast"]):
        import zipfile  # noqa: F401

        from tests.fuzz import harness
        from tests.fuzz.guard import Guard
        from tests.fuzz.targets import make_target

    folder = Path(tempfile.mkdtemp(prefix="fuzz_"))
    os.environ["GEMMA_SCOPE_TL_CACHE"] = str(folder / "cache")
    target, guard = make_target(name, folder), Guard(folder)
    corpus.mkdir(parents=True, exist_ok=True)
    for index, data in enumerate(target.seeds()):
        (corpus / f"seed-{index}").write_bytes(data)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        rng = random.Random(seed)
        changed = atheris.Mutate(data, max_size) if rng.random() < 0.2 else target.mutate(data, rng, b"")
        return changed[:max_size]

    def cross(data: bytes, other: bytes, max_size: int, seed: int) -> bytes:
        return target.mutate(data, random.Random(seed), other)[:max_size]

    def one(data: bytes) -> Any:
        harness.outcome(target, data, guard)

    options = [f"-max_total_time={int(seconds)}", f"-seed={seed + 1}", "-max_len=65536", "-print_final_stats=1"]
    options += ["-rss_limit_mb=4096", "-timeout=60", f"-artifact_prefix={folder}/", str(corpus)]
    atheris.Setup([sys.argv[0], *options], one, custom_mutator=mutate, custom_crossover=cross)
    atheris.Fuzz()

"""Fuzzing the readers of files that nobody has vouched for.

    python -m tests.fuzz --target npz --seconds 600 --seed 1

searches for inputs that break a reader's contract: any bytes give the right arrays or a ``GemmaScopeError`` that names
the file; nothing is executed, written, or opened elsewhere; time and memory stay in proportion to the file. Targets:
npz, safetensors, yaml, cfg, partial, stamp.

Inputs with new kinds of errors go to ``build/fuzz/<target>``, from where the next run starts. Findings go to
``tests/fuzz/findings/<target>`` and end in ``.unfixed``: ``test_fuzz.py`` expects those to fail. Once one is fixed,
give its file the ending of the right outcome: ``.WeightsError``, ``.RegistryError`` or ``.ok``.

``with_atheris.py`` runs the same targets and mutators under libFuzzer.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tempfile
from pathlib import Path

from gemma_scope_tl.files import write_atomically
from tests.fuzz.guard import Guard
from tests.fuzz.harness import fuzz, shrink, slug
from tests.fuzz.targets import NAMES, make_target

FINDINGS = Path(__file__).parent / "findings"


def main() -> int:
    """Run one target; the exit status is 1 when there are findings."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description="Fuzz one reader.")
    parser.add_argument("--target", choices=NAMES, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corpus", type=Path, default=Path("build/fuzz"), help="folder of inputs with new errors")
    parser.add_argument("--findings", type=Path, default=FINDINGS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz_") as name:
        folder = Path(name)
        os.environ["GEMMA_SCOPE_TL_CACHE"] = str(folder / "cache")
        target, guard = make_target(args.target, folder), Guard(folder)
        corpus: Path = args.corpus / args.target
        kept = [path.read_bytes() for path in sorted(corpus.glob("*"))] if corpus.is_dir() else []
        totals = fuzz(target, guard, args.seconds, args.seed, kept, report=True)
        for data in totals.corpus:
            write_atomically(corpus / hashlib.sha256(data).hexdigest()[:16], data)
        for key, (data, text) in totals.findings.items():
            small = shrink(target, guard, data, key)
            path = write_atomically(args.findings / args.target / f"{slug(key, small)}.unfixed", small)
            print(f"{path} ({len(small)} bytes): {key}\n{text}")  # noqa: T201
    print(totals)  # noqa: T201
    return 1 if totals.findings else 0


if __name__ == "__main__":
    sys.exit(main())

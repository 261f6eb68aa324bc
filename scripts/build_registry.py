"""Derive ``pretrained_yaml/`` from the catalogue that ships with SAELens, which is read as data, not imported.

    python scripts/build_registry.py            writes the files
    python scripts/build_registry.py --check    prints counts and every difference from SAELens; exit 1 if files differ

How the rows of a release are made, and corrected, stands in ``scripts/registry_files``. ``--check`` fails too where
SAELens gives another L0 than the formula of a release's labels. Beside the YAML files and their JSON schema, the
script writes their index (``gemma_scope_tl.registry.index``).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.registry.index import INDEX_NAME, index_text
from gemma_scope_tl.registry.render import json_schema, render_release
from scripts.registry_files import gemma_scope_2, gemma_scope_2_layered
from scripts.registry_files.common import Derived, sae_lens_catalogue
from scripts.registry_files.gemma_scope import SPECS, TRANSCODER_L0S, derive

__all__ = ["FOLDER", "SPECS", "TRANSCODER_L0S", "derive", "derive_all", "differing", "main", "report", "texts"]

FOLDER = Path(__file__).resolve().parents[1] / "pretrained_yaml"


def derive_all(catalogue: Mapping[str, Any] | None = None) -> list[Derived]:
    """Every release file, derived from SAELens's catalogue (the installed one by default)."""
    catalogue = sae_lens_catalogue() if catalogue is None else catalogue
    return [
        *(derive(spec, catalogue) for spec in SPECS),
        *gemma_scope_2.derive_all(catalogue),
        *gemma_scope_2_layered.derive_all(),
    ]


def texts(derived: Iterable[Derived]) -> dict[str, str]:
    """The text of every file of the folder, by its name."""
    derived = list(derived)
    files = [(render_release(d.file), d.file) for d in derived]
    written = {f"{file.release}.yaml": text for text, file in files}
    return written | {"schema.json": json_schema(), INDEX_NAME: index_text(files)}


def differing(folder: Path, wanted: Mapping[str, str]) -> list[str]:
    """Names of the files in ``folder`` that are missing or not as derived."""

    def current(name: str) -> str | None:
        path = folder / name
        return path.read_bytes().decode("utf-8") if path.is_file() else None

    return [name for name, text in wanted.items() if current(name) != text]


def report(derived: Iterable[Derived]) -> str:
    """Counts for each release, the formula's hits, and every difference from SAELens with its reason."""
    derived = list(derived)
    line = "{:<40}{:>6}{:>11}{:>13}{:>12}{:>16}".format
    counts: list[tuple[int, ...]] = []
    shown: list[str] = []
    for d in derived:
        saes = d.file.saes
        marked = [sum(bool(getattr(sae, name)) for sae in saes) for name in ("canonical", "neuronpedia", "unverified")]
        counts.append((len(saes), *marked, d.equal, d.compared))
        shown.append(line(d.file.release, len(saes), *marked, f"{d.equal} of {d.compared}" if d.compared else ""))
    *totals, equal, compared = (sum(column) for column in zip(*counts, strict=True))
    out = [line("release", "SAEs", "canonical", "neuronpedia", "unverified", "L0 by formula"), *shown]
    out += [line("total", *totals, f"{equal} of {compared}"), "", "differences from SAELens's catalogue"]
    out += [f"  {x.release}: {x.what} ({x.reason})" for d in derived for x in d.differences]
    return "\n".join(out)


def main(arguments: list[str] | None = None) -> int:
    """Write the files, or compare them with ``--check``, and return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a file is not as derived")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="folder of the files")
    options = parser.parse_args(arguments)
    derived = derive_all()
    wanted = texts(derived)
    stale = differing(options.folder, wanted)
    missed = sum(d.compared - d.equal for d in derived)
    if options.check:
        print(report(derived), "", sep="\n")
        if missed:
            print(f"the formula misses {missed} L0s")
        print(f"not as derived: {', '.join(stale)}" if stale else f"all {len(wanted)} files are as derived")
        return 1 if stale or missed else 0
    for name in stale:
        write_atomically(options.folder / name, wanted[name])
    print(f"{len(stale)} of {len(wanted)} files written to {options.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

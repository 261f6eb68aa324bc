"""What artefacts are made from, by name, and fingerprints of it.

A fingerprint is a sha256 of paths and contents. Where only values matter, such as a recipe, it is of the values, so
that a comment or another layout of a file leaves nothing behind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemma_scope_tl.model.sizes import family_and_sizes
from gemma_scope_tl.registry.listing import select_rows
from gemma_scope_tl.sites import LAYERED_SITES
from gemma_scope_tl.training.config import load_config
from gemma_scope_tl.training.grid import groups_of
from gemma_scope_tl.training.layered_spec import LayeredSpec
from gemma_scope_tl.training.spec import LATER, SAESpec

ROOT = Path(__file__).resolve().parents[2]
BUNDLED, SECOND = "gemma_scope_tl/bundled", "gemma_scope_tl/bundled/gemma3"
"""The folder of what comes with the package, and within it that of the second bundled model."""
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
ROW = ("release", "id", "site", "layer", "width", "l0", "path", "canonical")
"""What an artefact may depend on of a row of the registry."""
TRAINED_BY = ("data", "source", "steps", "tokens", "grid", "seed")
"""The keys of a configuration on which trained weights depend, beside the recipe of each SAE."""


def sha256(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def files(*patterns: str) -> list[Path]:
    """The files of the repository that match the patterns, in order."""
    return sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()})


def of_files(*patterns: str) -> str:
    """The fingerprint of files: of their paths and contents."""
    return of_values((path.relative_to(ROOT).as_posix(), sha256(path)) for path in files(*patterns))


def of_values(values: Iterable[Any]) -> str:
    """The fingerprint of values that JSON can hold."""
    text = json.dumps(list(values), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _model(folder: str) -> str:
    return of_files(*(f"{folder}/model/{name}" for name in MODEL_FILES))


def _suite(name: str, files: str, *, layered: bool = False) -> str:
    chosen = [row for row in select_rows(name) if (row.site in LAYERED_SITES) == layered]
    columns = (*ROW, "layers") if layered else ROW
    rows = [[getattr(row, column) for column in columns] for row in chosen]
    return of_values([rows, of_files(files)])


def _recipe(name: str, configuration: str | None = None) -> str:
    config = load_config(ROOT / "configs" / f"{configuration or name}.yaml")
    shown = config.model_dump(mode="json", include=set(TRAINED_BY))
    family, sizes = family_and_sizes(name)
    groups = groups_of(config, sizes.dims, family)
    return of_values([shown, [[group.steps, *map(_spec, group.specs)] for group in groups]])


def _spec(spec: SAESpec | LayeredSpec) -> dict[str, Any]:
    """An SAE's description without keys that are not used, so that it stays the same when there are more of them."""
    return {key: value for key, value in asdict(spec).items() if value or key not in LATER}


def _documents(*keys: str) -> list[list[Any]]:
    lines = (ROOT / BUNDLED / "text" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return [[json.loads(line).get(key) for key in keys] for line in lines]


INPUTS: dict[str, Callable[[], str]] = {
    "model": lambda: _model(BUNDLED),
    "model-gemma3": lambda: _model(SECOND),
    "text": lambda: of_values(_documents("domain", "text")),
    "grouping of the text": lambda: of_values(_documents("source")),
    "recipe": lambda: _recipe("bundled"),
    "recipe-gemma3": lambda: _recipe("bundled-gemma3"),
    "suite": lambda: _suite("bundled", f"{BUNDLED}/saes/**/params.npz"),
    "suite-gemma3": lambda: _suite("bundled-gemma3", f"{SECOND}/saes/*_all/**/params.safetensors"),
    "recipe-gemma3-layers": lambda: _recipe("bundled-gemma3", "bundled-gemma3-layers"),
    "layers-gemma3": lambda: _suite("bundled-gemma3", f"{SECOND}/saes/c*/**/*.safetensors", layered=True),
    "log": lambda: of_files(f"{BUNDLED}/saes/training.jsonl"),
    "results": lambda: of_files(f"{BUNDLED}/results/*.csv"),
    "notebook sources": lambda: of_files("tutorials/source/*.py"),
    "searched settings": lambda: of_files("benchmarks/results/search/bundled.json"),
}
"""Name to fingerprint: the bundled model, the held-out text and the groups of its documents, the configuration of the
suite with the recipe of each SAE, the SAEs with their rows in the registry, the log of their training, their measured
results, the notebooks' sources, and the settings that the search for the comparison of recipes chose. Names that end in
``-gemma3`` are of the second bundled model."""


class Fingerprints:
    """Fingerprints that are computed once; :meth:`forget` after files have changed."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def of(self, names: Iterable[str]) -> dict[str, str]:
        """Name to fingerprint.

        Raises:
            KeyError: there is no input of a name.
        """
        for name in names:
            if name not in self._known:
                self._known[name] = INPUTS[name]()
        return {name: self._known[name] for name in names}

    def forget(self) -> None:
        """Compute them anew when they are next asked for."""
        self._known.clear()

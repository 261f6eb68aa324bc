"""Make the published crosscoder and cross-layer transcoder of the second bundled model: train, round, register."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

import gemma_scope_tl as gs
from gemma_scope_tl.registry.locate import BUNDLED_SAES
from gemma_scope_tl.registry.render import render_release
from gemma_scope_tl.registry.schema import LAYER_FILE, parse_release
from gemma_scope_tl.registry.widths import width_label
from gemma_scope_tl.training.config import load_config
from gemma_scope_tl.weights.checks import CONFIG_NAME
from scripts.bundled.bundles import GEMMA3, REPO
from scripts.bundled.files import read_jsonl, write_text
from scripts.bundled.layers_card import write_card
from scripts.bundled.mixture import write_mixture
from scripts.bundled.sae_publish import LICENSE, store_narrow
from scripts.bundled.sae_suite import REGISTRY, SIGNIFICANT_BITS, VECTOR_BITS, significant, swap, write_log

CONFIG = REPO / "configs" / "bundled-gemma3-layers.yaml"
LABEL = "medium"
"""The label of both coders. What it means for several layers Gemma Scope 2 does not say."""
CARD, LOG = "README-layers.md", "training-layers.jsonl"
LIMIT = 3_000_000
"""Bytes of the files of both coders."""
RELEASES = {
    "clt": "A cross-layer transcoder of the bundled small Gemma 3: MLP inputs of all layers to MLP outputs of the same "
    "and later layers, with skip connections",
    "crosscoder": "A weakly causal crosscoder of the residual stream of the bundled small Gemma 3 after layers 1 to 4",
}


def train(work: Path, report: Callable[[str], object], overrides: Sequence[str] = ()) -> Path:
    """Train both coders, or continue their training, and return the folder of the run.

    Args:
        work: the folder with the tokens of the training text.
        report: called with a line of progress.
        overrides: `"key=value"` for the configuration.
    """
    config = load_config(CONFIG, overrides)
    mixture = work / "mixture.parquet"
    if not mixture.exists():
        report(f"{mixture}: {write_mixture(work, mixture)} rows of tokens")
    report(f"trained {len(gs.train_suite(config))} coders")
    return Path(config.output)


def publish(suite: Path, report: Callable[[str], object], registry: Path = REGISTRY) -> list[dict[str, Any]]:
    """Round the trained weights, and write them, registry files, log and card.

    Args:
        suite: the folder that training wrote.
        report: called with a line for each coder.
        registry: the folder of the registry files.

    Returns:
        The rows of the registry.

    Raises:
        ValueError: the files are larger than the package allows.
    """
    facts = json.loads((suite / "suite.json").read_text(encoding="utf-8"))
    staging = suite / "staging"
    shutil.rmtree(staging, ignore_errors=True)
    rows = [_rounded(suite / row["path"], staging, row) for row in facts["saes"]]
    size = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    if size > LIMIT:
        raise ValueError(f"the coders have {size:,} bytes, more than {LIMIT:,}: train narrower ones")
    root = GEMMA3.folder / BUNDLED_SAES.name
    swap(staging, root)
    for row in rows:
        _register(registry, row)
        report(f"{row['path']}: {row['d_sae']} latents")
    write_log(suite / "metrics.jsonl", root / LOG)
    seconds = sum(row["seconds"] for row in read_jsonl(suite / "runs.jsonl"))
    write_card(root / CARD, facts["saes"], rows, size=size, seconds=seconds)
    return rows


def name_of(row: Mapping[str, Any]) -> str:
    """The folder of a coder, as in Gemma Scope 2.

    >>> name_of({"site": "clt", "width": "768", "layers": [0, 1], "affine": True})
    'clt/width_768_l0_medium_affine'
    """
    layers = "" if row["site"] == "clt" else f"layer_{'_'.join(map(str, row['layers']))}_"
    return f"{row['site']}/{layers}width_{row['width']}_l0_{LABEL}{'_affine' if row.get('affine') else ''}"


def _rounded(folder: Path, staging: Path, row: Mapping[str, Any]) -> dict[str, Any]:
    """Write a coder with rounded values, and return its row of the registry."""
    name = name_of(row)
    to = staging / name
    to.mkdir(parents=True)
    bits = {name.lower(): count for name, count in SIGNIFICANT_BITS.items()}
    hashes: list[str] = []
    for number in range(len(row["layers"])):
        path = to / LAYER_FILE.format(number)
        arrays = load_file(folder / path.name)
        save_file({key: _short(value, bits.get(key, VECTOR_BITS)) for key, value in arrays.items()}, path)
        store_narrow(path)
        hashes.append(hashlib.sha256(path.read_bytes()).hexdigest())
    shutil.copyfile(folder / CONFIG_NAME, to / CONFIG_NAME)
    return {
        "id": name.split("/", 1)[1],
        "site": row["site"],
        "layer": None,
        "layers": list(row["layers"]),
        "width": width_label(row["d_sae"]),
        "d_sae": row["d_sae"],
        "d_in": row["d_in"],
        "l0": float(row["target_l0"]),
        "label": LABEL,
        **({"affine": bool(row.get("affine"))} if row["site"] == "clt" else {}),
        "path": name,
        "sha256s": hashes,
    }


def _short(value: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(significant(value.numpy(), bits)))


def _register(registry: Path, row: dict[str, Any]) -> None:
    """Write the registry file of a coder's release."""
    name = f"{GEMMA3.name}-{row['site']}"
    about = {"release": name, "repo": GEMMA3.name, "model": GEMMA3.name, "format": GEMMA3.layout}
    about |= {"license": LICENSE, "description": RELEASES[row["site"]]}
    notes = ["The L0 is the target of training, of all layers together, and not a measurement."]
    release = parse_release({**about, "notes": notes, "saes": [row]}, f"{name}.yaml")
    write_text(registry / f"{name}.yaml", render_release(release))

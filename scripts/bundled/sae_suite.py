"""Make the published SAE suite from the trained model: train, round, measure as shipped, register, describe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoTokenizer

import gemma_scope_tl as gs
from gemma_scope_tl.model.sizes import family_and_sizes
from gemma_scope_tl.registry.locate import BUNDLED_MODEL, BUNDLED_SAES, HELD_OUT_TEXT
from gemma_scope_tl.sae.save import write_npz
from gemma_scope_tl.training.config import load_config
from gemma_scope_tl.training.grid import groups_of
from gemma_scope_tl.weights.checks import PARAMS_NAME
from scripts.bundled.bundles import REPO, Bundle
from scripts.bundled.files import read_jsonl, write_atomic
from scripts.bundled.mixture import write_mixture
from scripts.bundled.sae_card import write_card
from scripts.bundled.sae_publish import Published, name_of, publish_folder, write_coder, write_registry
from scripts.bundled.tokenizer import BOS, PAD

REGISTRY = REPO / "pretrained_yaml"
LIMIT = 6_000_000
"""Bytes of the files of a suite in Gemma Scope 2's layout, which are not compressed on the disk."""
SIGNIFICANT_BITS = {"W_enc": 5, "W_dec": 5}
VECTOR_BITS = 8
"""Significant bits that are kept: five for matrices (a random error of 1.3 % of a weight), and eight for vectors, as in
bfloat16. Zeros compress well, and the suite must be small."""


def train(work: Path, bundle: Bundle, report: Callable[[str], object], overrides: Sequence[str] = ()) -> Path:
    """Train the suite of the bundle's configuration, or continue its training, and return its folder.

    Args:
        work: the folder with the tokens of the training text.
        bundle: the model and its suite.
        report: called with a line of progress.
        overrides: `"key=value"` for the configuration.
    """
    config = load_config(bundle.suite_config, overrides)
    mixture = work / "mixture.parquet"
    if not mixture.exists():
        report(f"{mixture}: {write_mixture(work, mixture)} rows of tokens")
    table = gs.train_suite(config)
    report(f"trained {len(table)} SAEs")
    return Path(config.output)


def publish(
    suite: Path,
    bundle: Bundle,
    *,
    windows: int | None,
    report: Callable[[str], object],
    registry: Path = REGISTRY,
) -> list[Published]:
    """Round the trained weights, measure them as shipped, and write weights, registry files, log and card.

    Args:
        suite: the folder that training wrote.
        bundle: the model and its suite.
        windows: number of held-out windows to measure on; None for all.
        report: called with a line for each SAE.
        registry: the folder of the registry files.

    Raises:
        ValueError: the files are larger than the package allows.
    """
    facts = json.loads((suite / "suite.json").read_text(encoding="utf-8"))
    staging = suite / "staging"
    shutil.rmtree(staging, ignore_errors=True)
    rounded = staging / "rounded"
    for row in facts["saes"]:
        _round(suite / row["path"], rounded / row["path"], bundle, row)
    family, sizes = family_and_sizes(bundle.name)
    groups = groups_of(load_config({"output": str(suite), **facts["config"]}), sizes.dims, family)
    recipes = {spec.name: spec.recipe for group in groups for spec in group.specs}
    pairs = [(row, rounded / row["path"]) for row in facts["saes"]]
    table = _measure(bundle, pairs, heldout_tokens(limit=windows), suite / "measured")
    published: list[Published] = []
    for row, found in zip(facts["saes"], table.to_dict("records"), strict=True):
        metrics = {str(name): value for name, value in found.items()}
        name = name_of(staging, bundle, row, metrics["l0"], sizes.dims.n_layers)
        source, recipe = rounded / row["path"], recipes[row["name"]]
        published.append(publish_folder(staging, source, name, bundle, row, recipe, metrics))
        report(f"{name}: L0 {metrics['l0']:.1f}, FVU {metrics['fvu']:.4f}, delta loss {metrics['delta_loss']:.4f}")
    shutil.rmtree(rounded)
    size = sum(p.size for p in published)
    if bundle.layout == "gemma_scope_2" and size > LIMIT:
        raise ValueError(f"the suite has {size:,} bytes, more than {LIMIT:,}: train fewer or narrower SAEs")
    root = bundle.folder / BUNDLED_SAES.name
    swap(staging, root)
    write_registry(registry, bundle, published)
    write_log(suite / "metrics.jsonl", root / "training.jsonl")
    seconds = sum(row["seconds"] for row in read_jsonl(suite / "runs.jsonl"))
    clean = float(table["loss_clean"].iloc[0])
    write_card(root / "README.md", bundle, published, facts["config"], clean=clean, seconds=seconds)
    return published


def heldout_tokens(*, context: int = 256, limit: int | None = None) -> torch.Tensor:
    """Windows `[n, context]` of the bundled held-out documents, each with BOS first; the tail of a document is padded.

    With `limit`, that many windows spread evenly over the documents.
    """
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
    windows: list[list[int]] = []
    for row in read_jsonl(HELD_OUT_TEXT):
        ids = tokenizer(row["text"], add_special_tokens=False, verbose=False)["input_ids"]
        pieces = [ids[i : i + context - 1] for i in range(0, len(ids), context - 1)]
        windows += [[BOS, *p, *[PAD] * (context - 1 - len(p))] for p in pieces if len(p) >= 32]
    picked = range(len(windows))
    if limit is not None and limit < len(windows):
        picked = [int(i) for i in torch.linspace(0, len(windows) - 1, limit)]
    return torch.tensor([windows[i] for i in picked])


def significant(values: np.ndarray, bits: int) -> np.ndarray:
    """`values` rounded to `bits` significant binary digits, still float32."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 2.0**bits) / 2.0**bits, exponent).astype(np.float32)


def _round(folder: Path, to: Path, bundle: Bundle, row: dict[str, Any]) -> None:
    """Write the trained SAE in `folder` with rounded values into `to`, in the layout that ships."""
    with np.load(folder / PARAMS_NAME, allow_pickle=False) as file:
        arrays = {name: significant(file[name], SIGNIFICANT_BITS.get(name, VECTOR_BITS)) for name in file.files}
    write_atomic(to / PARAMS_NAME, lambda temporary: write_npz(temporary, arrays, compress=True))
    if bundle.layout == "gemma_scope_2":
        write_coder(to, to / "coder", bundle, row)
        (to / PARAMS_NAME).unlink()
        for path in (to / "coder").iterdir():
            path.replace(to / path.name)
        (to / "coder").rmdir()


def _measure(
    bundle: Bundle, saes: list[tuple[dict[str, Any], Path]], tokens: torch.Tensor, cache: Path
) -> pd.DataFrame:
    """A row for each SAE, read from the file that will ship; ``cache`` is a folder for continuing a stopped run."""
    model = gs.load_model(bundle.name)
    loaded = []
    for row, folder in saes:
        kind = gs.JumpReLUTranscoder if row["site"] == "transcoder" else gs.JumpReLUSAE
        loaded.append(kind.from_folder(folder, model=bundle.name, site=row["site"], layer=row["layer"]))
    return gs.evaluate(model, loaded, tokens, batch_size=16, ablations=("zero",), resamples=200, cache=cache)


def swap(staging: Path, root: Path) -> None:
    """Replace the folders of an earlier run, for every site."""
    root.mkdir(parents=True, exist_ok=True)
    for folder in staging.iterdir():
        shutil.rmtree(root / folder.name, ignore_errors=True)
        shutil.move(folder, root / folder.name)
    shutil.rmtree(staging)


def write_log(log: Path, to: Path) -> None:
    """The training log with numbers of four digits, every tenth of its steps and the last."""
    rows = list(read_jsonl(log))
    steps = sorted({row["step"] for row in rows})
    kept = {*steps[:: max(1, len(steps) // 10)], steps[-1]}
    short = [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    text = "".join(json.dumps(row) + "\n" for row in short if row["step"] in kept)
    write_atomic(to, lambda temporary: temporary.write_text(text, encoding="utf-8"))

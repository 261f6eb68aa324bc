"""Make the published SAE suite from the trained model: train, round, measure as shipped, register, describe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import AutoTokenizer

import gemma_scope_tl as gs
from gemma_scope_tl.activations.source import Place
from gemma_scope_tl.sae.save import write_npz
from gemma_scope_tl.training.config import load_config
from scripts.bundled.files import read_jsonl, write_atomic
from scripts.bundled.mixture import write_mixture
from scripts.bundled.sae_publish import Published, publish_folder, write_card, write_registry
from scripts.bundled.tokenizer import BOS, PAD

REPO = Path(__file__).resolve().parents[2]
BUNDLED = REPO / "gemma_scope_tl" / "bundled"
REGISTRY = REPO / "pretrained_yaml"
CONFIG = REPO / "configs" / "bundled.yaml"
SIGNIFICANT_BITS = {"W_enc": 5, "W_dec": 5}
VECTOR_BITS = 8
"""Significant bits that are kept: five for matrices (a random error of 1.3 % of a weight), and eight for vectors, as in
bfloat16. Zeros compress well, and the suite must be small."""


def train(work: Path, report: Callable[[str], object]) -> Path:
    """Train the suite of ``configs/bundled.yaml``, or continue its training, and return its folder."""
    config = load_config(CONFIG)
    mixture = work / "mixture.parquet"
    if not mixture.exists():
        report(f"{mixture}: {write_mixture(work, mixture)} rows of tokens")
    table = gs.train_suite(config)
    report(f"trained {len(table)} SAEs")
    return Path(config.output)


def publish(suite: Path, *, windows: int | None, report: Callable[[str], object]) -> list[Published]:
    """Round the trained weights, measure them as shipped, and write weights, registry files, log and card.

    Args:
        suite: the folder that training wrote.
        windows: number of held-out windows to measure on; None for all.
        report: called with a line for each SAE.
    """
    facts = json.loads((suite / "suite.json").read_text(encoding="utf-8"))
    staging = suite / "staging"
    shutil.rmtree(staging, ignore_errors=True)
    for row in facts["saes"]:
        _round(suite / row["path"] / "params.npz", staging / "rounded" / row["path"] / "params.npz")
    tokens = heldout_tokens(limit=windows)
    pairs = [(row, staging / "rounded" / row["path"]) for row in facts["saes"]]
    table = _measure(pairs, tokens, suite / "measured")
    published: list[Published] = []
    for row, metrics in zip(facts["saes"], table.to_dict("records"), strict=True):
        metrics = {str(name): value for name, value in metrics.items()}
        place = Place(row["site"], row["layer"])
        published.append(publish_folder(staging, staging / "rounded" / row["path"], place, row, metrics))
        report(f"{published[-1].folder}: FVU {metrics['fvu']:.4f}, delta loss {metrics['delta_loss']:.4f}")
    shutil.rmtree(staging / "rounded")
    root = BUNDLED / "saes"
    _swap(staging, root)
    write_registry(REGISTRY, published)
    _write_log(suite / "metrics.jsonl", root / "training.jsonl")
    seconds = sum(row["seconds"] for row in read_jsonl(suite / "runs.jsonl"))
    write_card(
        root / "README.md", published, facts["config"], clean=float(table["loss_clean"].iloc[0]), seconds=seconds
    )
    return published


def heldout_tokens(*, context: int = 256, limit: int | None = None) -> torch.Tensor:
    """Windows `[n, context]` of the bundled held-out documents, each with BOS first; the tail of a document is padded.

    With `limit`, that many windows spread evenly over the documents.
    """
    tokenizer = AutoTokenizer.from_pretrained(BUNDLED / "model")
    windows: list[list[int]] = []
    for row in read_jsonl(BUNDLED / "text" / "heldout.jsonl"):
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


def _round(path: Path, to: Path) -> None:
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: significant(file[name], SIGNIFICANT_BITS.get(name, VECTOR_BITS)) for name in file.files}
    write_atomic(to, lambda temporary: write_npz(temporary, arrays, compress=True))


def _measure(saes: list[tuple[dict[str, Any], Path]], tokens: torch.Tensor, cache: Path) -> pd.DataFrame:
    """A row for each SAE, read from the file that will ship; ``cache`` is a folder for continuing a stopped run."""
    model = gs.load_model("bundled")
    loaded = []
    for row, folder in saes:
        kind = gs.JumpReLUTranscoder if row["site"] == "transcoder" else gs.JumpReLUSAE
        loaded.append(kind.from_folder(folder, model="bundled", site=row["site"], layer=row["layer"]))
    return gs.evaluate(model, loaded, tokens, batch_size=16, ablations=("zero",), resamples=200, cache=cache)


def _swap(staging: Path, root: Path) -> None:
    """Replace the folders of an earlier run, for every site."""
    root.mkdir(parents=True, exist_ok=True)
    for folder in staging.iterdir():
        shutil.rmtree(root / folder.name, ignore_errors=True)
        shutil.move(folder, root / folder.name)
    shutil.rmtree(staging)


def _write_log(log: Path, to: Path) -> None:
    """The training log with numbers of four digits, every tenth of its steps and the last."""
    rows = list(read_jsonl(log))
    steps = sorted({row["step"] for row in rows})
    kept = {*steps[:: max(1, len(steps) // 10)], steps[-1]}
    short = [{k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
    text = "".join(json.dumps(row) + "\n" for row in short if row["step"] in kept)
    write_atomic(to, lambda temporary: temporary.write_text(text, encoding="utf-8"))

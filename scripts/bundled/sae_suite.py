"""From the trained model to the published SAE suite: train, round, measure, register, describe."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.activations.source import Place
from gemma_scope_tl.sae.save import write_npz
from scripts.bundled.mixture import write_mixture
from scripts.bundled.sae_card import write_card
from scripts.bundled.sae_publish import Published, describe, write_registry
from scripts.bundled.windows import heldout_tokens

REPO = Path(__file__).resolve().parents[2]
BUNDLED = REPO / "gemma_scope_tl" / "bundled"
REGISTRY = REPO / "pretrained_yaml"
CONFIG = REPO / "configs" / "bundled.yaml"
MATRICES = ("W_enc", "W_dec")
BITS = {name: 5 for name in MATRICES}
"""Significant bits that are kept of the matrices' values; the vectors keep bfloat16's 8."""


def train(work: Path, report: Callable[[str], object]) -> Path:
    """Train the suite of ``configs/bundled.yaml`` (again: where it was stopped) and return its folder."""
    mixture = work / "mixture.parquet"
    if not mixture.exists():
        report(f"{write_mixture(work, mixture)} rows of tokens")
    config = gs.training.config.load_config(CONFIG)
    gs.train_suite(config)
    return REPO / config.output


def publish(suite: Path, *, windows: int | None, report: Callable[[str], object]) -> list[Published]:
    """Round the trained weights, measure them as shipped, and write weights, registry files, log and card.

    Args:
        suite: the folder that training wrote.
        windows: held-out windows to measure on; None for all.
        report: told a line for each SAE.
    """
    staging = suite / "staging"
    shutil.rmtree(staging, ignore_errors=True)
    tokens = heldout_tokens(BUNDLED / "model", BUNDLED / "text" / "heldout.jsonl", limit=windows)
    folders = round_all(suite, staging)
    table = measure(list(folders), list(folders.values()), tokens)
    published: list[Published] = []
    for (place, folder), row in zip(folders.items(), table.to_dict("records"), strict=True):
        published.append(describe(staging, folder, Place.parse("/".join(place.split("/")[:2])), row))
        report(f"{published[-1].folder}: L0 {row['l0']:.1f}, FVU {row['fvu']:.4f}, delta loss {row['delta_loss']:.4f}")
    root = BUNDLED / "saes"
    swap(staging, root)
    write_registry(REGISTRY, published)
    facts = json.loads((suite / "suite.json").read_text(encoding="utf-8"))
    shutil.copyfile(suite / "metrics.jsonl", root / "training.jsonl")
    write_card(root / "README.md", published, facts, table)
    return published

"""A bundle that is made in seconds: the second bundled model and its suite at a tiny size, by the scripts' own code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from gemma_scope_tl.registry import catalog, locate
from scripts.bundled import report
from scripts.bundled.bundles import GEMMA3, Bundle, gemma3_config
from scripts.bundled.card import write_card
from scripts.bundled.domains import WEIGHTS
from scripts.bundled.export import export_checkpoint
from scripts.bundled.files import read_jsonl, write_jsonl
from scripts.bundled.sae_publish import Published
from scripts.bundled.sae_suite import publish, train
from scripts.bundled.tokenizer import tokenize_corpus
from scripts.bundled.train_model import TrainConfig
from scripts.bundled.train_model import train as train_model

TRAINING = TrainConfig(
    total_tokens=6 * 512, batch=8, context=64, warmup_tokens=1024, compile=False, log_every=1, evaluations=1,
    eval_windows=1,
)  # fmt: skip
STEPS = 12
SUITE = (f"steps={STEPS}", "recipe.batch_size=128", "source.bucket_rows=2048", "eval_batches=1", "log_every=4")


def small_config() -> Any:
    """The shape rules of the bundle: heads (2 of 24) wider than the width, one key-value head, 5:1, a short window."""
    config = gemma3_config()
    config.update(
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_attention_heads": 2,
            "head_dim": 24,
            "query_pre_attn_scalar": 24,
            "sliding_window": 8,
        }
    )
    return config


SMALL = replace(GEMMA3, config=small_config)


@dataclass(frozen=True)
class Made:
    """What the scripts made: working folder, registry files, the SAEs, and the metrics of the model."""

    work: Path
    registry: Path
    bundle: Bundle
    published: list[Published]
    metrics: dict[str, Any]


def write_work(work: Path) -> None:
    """A working folder as after `corpus` and `tokenizer`, with a little of the bundled held-out text as the corpus."""
    rows = list(read_jsonl(locate.HELD_OUT_TEXT))
    for domain in WEIGHTS:
        own = [{"text": row["text"]} for row in rows if row["domain"] == domain]
        write_jsonl(work / "corpus" / f"{domain}.train.jsonl", own[:3])
        write_jsonl(work / "corpus" / f"{domain}.heldout.jsonl", own[3:5])
    shutil.copytree(
        locate.BUNDLED_MODEL, work / "tokenizer", ignore=lambda _, names: [n for n in names if "tokenizer" not in n]
    )
    shutil.copy(locate.BUNDLED_MODEL / "corpus.json", work / "corpus.json")
    tokenize_corpus(work)


@contextmanager
def made(root: Path) -> Generator[Made]:
    """Make the bundle; within the context it is where the package's own would be, and its rows are in the registry."""
    work, package, registry = root / "work", root / "package", root / "registry"
    for folder in (work, package / "bundled", registry):
        folder.mkdir(parents=True)
    write_work(work)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(locate, "_PACKAGE", package)
        patch.setattr(report, "NEW_TOKENS", 2)
        (package / "bundled" / "model").symlink_to(locate.BUNDLED_MODEL)
        train_model(work, SMALL, TRAINING)
        step = export_checkpoint(work, SMALL)
        metrics = report.measure(work, SMALL, step, limit=1)
        write_card(work, SMALL)
        data = (f"output={root / 'suite'}", f"data.dataset={work / 'mixture.parquet'}")
        patch.setattr("scripts.bundled.sae_suite.write_mixture", lambda work, path: _few_rows(work, path))
        suite = train(work, SMALL, lambda line: None, (*data, *SUITE))
        published = publish(suite, SMALL, windows=4, report=lambda line: None, registry=registry)
        patch.setattr(locate, "builtin_folder", lambda: registry)
        catalog.clear_cache()
        yield Made(work, registry, SMALL, published, metrics)
    catalog.clear_cache()


def _few_rows(work: Path, path: Path) -> int:
    from scripts.bundled.mixture import write_mixture

    return write_mixture(work, path, rows=48)


def read_json(path: Path) -> Any:
    """The content of a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))

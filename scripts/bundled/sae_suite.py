"""From the trained model to the published SAE suite: train, round, write, measure, register, describe."""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from scripts.bundled.sae_data import heldout_tokens, is_text, load_bundled
from scripts.bundled.sae_eval import Evaluator, Shipped
from scripts.bundled.sae_publish import Published, write_card, write_registry, write_weights
from scripts.bundled.train_saes import Suite, SuiteConfig, folded_arrays, train_suite

REPO = Path(__file__).resolve().parents[2]
BUNDLED = REPO / "gemma_scope_tl" / "bundled"
REGISTRY = REPO / "pretrained_yaml"


def build(work: Path, config: SuiteConfig, *, windows: int | None, report: Callable[[str], object]) -> list[Published]:
    """Train the suite on the bundled model and write everything that is shipped.

    Args:
        work: the folder with the tokenized corpus.
        config: the run's settings.
        windows: held-out windows to measure on; None for all.
        report: told a line now and then.
    """
    log = work / "saes" / "training.jsonl"
    suite = train_suite(BUNDLED / "model", work, log, config)
    report(f"trained {len(suite.runs)} SAEs in {suite.seconds / 60:.1f} minutes")
    return publish(suite, config, log, windows=windows, report=report)


def publish(
    suite: Suite, config: SuiteConfig, log: Path, *, windows: int | None, report: Callable[[str], object]
) -> list[Published]:
    """Measure the SAEs as shipped and write weights, registry files, log and card."""
    staging = work_folder(log)
    model = load_bundled(BUNDLED / "model")
    tokens = heldout_tokens(BUNDLED / "model", BUNDLED / "text" / "heldout.jsonl", limit=windows)
    evaluator = Evaluator(model, tokens)
    evaluator.prepare(list(suite.scales))
    published: list[Published] = []
    for run in suite.runs:
        arrays = folded_arrays(run, suite.scales[run.place])
        published.append(write_weights(staging, run.place, arrays, evaluator(run.place, Shipped(arrays))))
        _assert_written(staging / published[-1].folder / "params.npz", arrays)
        report(f"{published[-1].folder}: {_short(published[-1].metrics)}")
    root = BUNDLED / "saes"
    swap(staging, root)
    write_registry(REGISTRY, published)
    _write_log(log, root / "training.jsonl", published)
    facts = {
        "recipe": asdict(config.recipe),
        "targets": config.targets,
        "steps": config.steps,
        "batch": config.recipe.batch_size,
        "activations": config.steps * config.recipe.batch_size,
        "minutes": suite.seconds / 60,
        "heldout": int(is_text(tokens).sum()),
        "clean": evaluator.clean,
        "machine": f"{config.threads} cores ({platform.machine()})",
    }
    write_card(root / "README.md", published, facts)
    return published


def work_folder(log: Path) -> Path:
    """An empty folder beside the log, for weights on their way."""
    folder = log.parent / "staging"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def swap(staging: Path, root: Path) -> None:
    """Put every site's folder in place of an earlier run's."""
    root.mkdir(parents=True, exist_ok=True)
    for folder in staging.iterdir():
        shutil.rmtree(root / folder.name, ignore_errors=True)
        shutil.move(folder, root / folder.name)


def _assert_written(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with np.load(path, allow_pickle=False) as file:
        if sorted(file.files) != sorted(arrays) or not all(np.array_equal(file[k], v) for k, v in arrays.items()):
            raise OSError(f"{path} does not hold what was written")


def _write_log(log: Path, to: Path, published: list[Published]) -> None:
    rows = [{"event": "result", "sae": p.folder, **{k: round(v, 6) for k, v in p.metrics.items()}} for p in published]
    to.write_text(log.read_text(encoding="utf-8") + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _short(metrics: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())

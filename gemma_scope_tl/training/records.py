"""The files in a run's folder that say what it is: ``run.json`` when it begins, ``suite.json`` when it is done."""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from gemma_scope_tl import __version__
from gemma_scope_tl.activations.source import Place
from gemma_scope_tl.files import write_atomically, writing
from gemma_scope_tl.training.config import SuiteConfig, TrainingStateError

if TYPE_CHECKING:
    import pandas as pd

RUN_NAME, SUITE_NAME, METRICS_NAME, CHECKPOINTS = "run.json", "suite.json", "metrics.jsonl", "checkpoints"
LOCK_NAME = ".lock"


@contextmanager
def alone(folder: Path) -> Generator[None]:
    """Within the context, no other process trains in ``folder``.

    Raises:
        TrainingStateError: one does.
    """
    lock = FileLock(folder / LOCK_NAME)
    with writing(folder / LOCK_NAME):
        try:
            lock.acquire(timeout=0)
        except Timeout:
            what = f"Another process trains in {folder}"
            raise TrainingStateError(f"{what}: wait for it, or give another output.") from None
    try:
        yield
    finally:
        lock.release()


def write_run(folder: Path, config: SuiteConfig) -> None:
    """Say that a run of ``config`` has begun in ``folder``."""
    _write(folder / RUN_NAME, "run", config, {})


def write_suite(
    folder: Path, config: SuiteConfig, scales: Mapping[Place, float], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Say that the suite of ``config`` is complete: the scale of every place, and a row for each SAE."""
    facts = {"scales": {place.key: scale for place, scale in scales.items()}, "saes": list(rows)}
    _write(folder / SUITE_NAME, "suite", config, facts)


def read_record(path: Path) -> dict[str, Any]:
    """What one of the two files says.

    Raises:
        TrainingStateError: it cannot be read, or is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict) and isinstance(found.get("config"), dict):
            return found
        reason = "it has no configuration"
    except FileNotFoundError:
        reason = "it is missing"
    except OSError as error:
        why = f"{path} cannot be read: {error.strerror or error}"
        raise TrainingStateError(f"{why}. Check its permissions and the disk; it may be sound.") from error
    except ValueError as error:
        reason = str(error)
    raise TrainingStateError(f"{path} is not what a run writes: {reason}. Restore it, or choose another output.")


def suite_table(folder: Path) -> pd.DataFrame:
    """A row for each SAE of a finished run."""
    import pandas as pd

    return pd.DataFrame(read_record(folder / SUITE_NAME)["saes"]).astype({"layer": "Int64"})


def _write(path: Path, kind: str, config: SuiteConfig, facts: Mapping[str, Any]) -> None:
    head = {"format": f"gemma_scope_tl {kind}", "version": __version__, "config": config.results}
    write_atomically(path, json.dumps({**head, **facts}, indent=1) + "\n")

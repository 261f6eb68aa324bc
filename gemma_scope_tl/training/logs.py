"""Where a run's metrics go: a file of JSON lines always, TensorBoard and W&B if they are asked for.

Loggers see numbers and nothing else, so they cannot change what is trained. Neither library is imported before it is
used: ``pip install 'gemma-scope-tl[tensorboard]'`` or ``'gemma-scope-tl[wandb]'``.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.files import writing
from gemma_scope_tl.training.config import LoggerSection, SuiteConfig, TrainingStateError

Row = Mapping[str, Any]
_GO_ON = "Make room and start the same run again: it goes on from its last checkpoint."
_LABELS = ("name", "site", "layer", "width", "d_sae", "step")


class Logger(Protocol):
    """Takes metrics."""

    def log(self, step: int, rows: Sequence[Row]) -> None:
        """Take a row for each SAE: ``name`` and numbers."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class MetricsFile:
    """``metrics.jsonl``: an object a line, a line for each SAE at each logged step, and nothing that differs between
    equal runs."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        """Open it and cut off what was written after a checkpoint.

        Args:
            path: made if need be.
            keep_bytes: its length at the checkpoint; 0 begins anew.

        Raises:
            TrainingStateError: it is shorter than that.
            WriteError: it cannot be written.
        """
        self._path = path
        with writing(path):
            path.touch()
        size = path.stat().st_size
        if size < keep_bytes:
            raise TrainingStateError(
                f"{path} has {size} bytes, and {keep_bytes} were there at the checkpoint: it was cut or replaced. "
                "Restore it, or start the run over."
            )
        with writing(path):
            self._file = path.open("r+b", buffering=0)
            self._file.truncate(keep_bytes)
            self._file.seek(keep_bytes)

    def log(self, step: int, rows: Sequence[Row]) -> None:
        """Append rows."""
        lines = "".join(json.dumps({"step": step, **row}) + "\n" for row in rows).encode()
        with writing(self._path, _GO_ON):
            while lines:
                lines = lines[self._file.write(lines) :]

    def sync(self) -> int:
        """Flush to the disk; the file's length."""
        with writing(self._path, _GO_ON):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Flush and close."""
        try:
            self.sync()
        finally:
            self._file.close()


class TensorBoardLogger:
    """Scalars ``name/metric``. After a resume, what an earlier process logged of the same steps is hidden."""

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", error) from error
        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step or None)

    def log(self, step: int, rows: Sequence[Row]) -> None:
        """As the protocol says."""
        for row in rows:
            for key, value in _numbers(row).items():
                self._writer.add_scalar(f"{row['name']}/{key}", value, step)

    def close(self) -> None:
        """As the protocol says."""
        self._writer.close()


class WandbLogger:
    """One W&B run for the suite, metrics ``name/metric`` over ``step``; a resumed run goes on in the same one."""

    def __init__(self, section: LoggerSection, config: SuiteConfig, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb", error) from error
        run_id = hashlib.sha256(f"{folder.resolve()} {json.dumps(config.results)}".encode()).hexdigest()[:16]
        self._run: Any = wandb.init(
            project=section.project,
            name=section.name,
            mode=section.mode,
            id=run_id,
            resume="allow",
            dir=str(folder),
            config=config.model_dump(mode="json"),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, rows: Sequence[Row]) -> None:
        """As the protocol says."""
        values = {f"{row['name']}/{key}": value for row in rows for key, value in _numbers(row).items()}
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """As the protocol says."""
        self._run.finish()


def open_loggers(config: SuiteConfig, folder: Path, first_step: int) -> list[Logger]:
    """The loggers that a configuration asks for.

    Raises:
        GemmaScopeError: a library is not installed.
    """
    loggers: list[Logger] = []
    for section in config.loggers:
        if section.kind == "tensorboard":
            place = Path(section.folder) if section.folder else folder / "tensorboard"
            loggers.append(TensorBoardLogger(place, first_step))
        else:
            loggers.append(WandbLogger(section, config, folder))
    return loggers


def _numbers(row: Row) -> dict[str, float]:
    """The metrics of a row, without what says which SAE it is."""
    return {
        key: float(value)
        for key, value in row.items()
        if key not in _LABELS and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _missing(extra: str, error: ImportError) -> GemmaScopeError:
    return GemmaScopeError(
        f"The {extra} logger needs {extra} ({error}): pip install 'gemma-scope-tl[{extra}]', or take it out of loggers."
    )

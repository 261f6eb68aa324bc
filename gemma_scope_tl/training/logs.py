"""Loggers of metrics: a file of JSON lines in every run, and TensorBoard and W&B on request.

Loggers receive numbers only, so they cannot change the training. TensorBoard and W&B are imported on use:
``pip install 'gemma-scope-tl[tensorboard]'`` or ``'gemma-scope-tl[wandb]'``.
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
_GO_ON = "Make room and start the same run again: it continues from its last checkpoint."
_LABELS = ("name", "site", "layer", "width", "d_sae", "step")


class Logger(Protocol):
    """A receiver of metrics."""

    def log(self, step: int, rows: Sequence[Row]) -> None:
        """Log one row for each SAE: ``name`` and numbers."""
        ...

    def close(self) -> None:
        """Write what is still buffered, and release resources."""
        ...


class MetricsFile:
    """``metrics.jsonl``: a JSON object for each SAE at each logged step, the same in equal runs."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        """Open the file and cut off what was written after the last checkpoint.

        Args:
            path: path of the file, which is created if it does not exist.
            keep_bytes: length of the file at the checkpoint; 0 starts an empty file.

        Raises:
            TrainingStateError: the file is shorter than ``keep_bytes``.
            WriteError: the file cannot be written.
        """
        self._path = path
        with writing(path):
            path.touch()
        size = path.stat().st_size
        if size < keep_bytes:
            raise TrainingStateError(
                f"{path} has {size} bytes, and had {keep_bytes} at the checkpoint: it was cut or replaced. "
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
        """Flush to the disk, and return the length of the file."""
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
    """Log scalars ``name/metric`` to TensorBoard. A resumed run replaces what was logged after its checkpoint."""

    def __init__(self, folder: Path, first_step: int) -> None:
        try:
            from torch.utils.tensorboard.writer import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard", error) from error
        self._writer: Any = SummaryWriter(str(folder), purge_step=first_step or None)

    def log(self, step: int, rows: Sequence[Row]) -> None:
        for row in rows:
            for key, value in _numbers(row).items():
                self._writer.add_scalar(f"{row['name']}/{key}", value, step)

    def close(self) -> None:
        self._writer.close()


class WandbLogger:
    """One W&B run for the suite, with metrics ``name/metric`` over ``step``; a resumed run continues the same one."""

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
        values = {f"{row['name']}/{key}": value for row in rows for key, value in _numbers(row).items()}
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


def open_loggers(config: SuiteConfig, folder: Path, first_step: int) -> list[Logger]:
    """Open the loggers that a configuration names.

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
    """The metrics of a row, without the columns that identify the SAE."""
    return {
        key: float(value)
        for key, value in row.items()
        if key not in _LABELS and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _missing(extra: str, error: ImportError) -> GemmaScopeError:
    return GemmaScopeError(
        f"The {extra} logger needs {extra} ({error}): pip install 'gemma-scope-tl[{extra}]', or remove it from loggers."
    )

"""What a run's folder holds of an earlier run, when a new one starts it over.

The earlier run's files are moved into a hidden folder, and removed after the first step of the new run. If the new run
fails before that (its data, its model or the SAEs that it starts from are missing), they are moved back. Three names
tell a later process how far a process came that was killed: files in ``MOVING`` are a part of the earlier run, those in
``ASIDE`` are all of it, and those in ``GONE`` are to be removed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gemma_scope_tl.files import make_folder, writing
from gemma_scope_tl.sites import LAYERED_SITES, SITES
from gemma_scope_tl.training.checkpoint import CHECKPOINTS, METRICS_NAME, RUN_NAME, RUNS_NAME, SUITE_NAME, read_record

MOVING, ASIDE, GONE = ".earlier.moving", ".earlier", ".earlier.gone"
OWN = (SUITE_NAME, RUN_NAME, METRICS_NAME, RUNS_NAME, CHECKPOINTS)
"""What every run writes into its folder, beside the folders of its sites."""


class EarlierRun:
    """The earlier run of a folder. A context, at whose end its files are back unless they were discarded.

    The process must hold the folder's lock.
    """

    def __init__(self, folder: Path, also: Iterable[str] = ()) -> None:
        """Move back what a killed process left aside.

        Args:
            folder: the run's folder.
            also: further names that the run has in it.
        """
        self.folder, self.own = folder, (*OWN, *also)
        shutil.rmtree(folder / GONE, ignore_errors=True)
        self.put_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.put_back()

    def set_aside(self) -> None:
        """Move the files of the earlier run aside. Its records name the sites whose folders are its own.

        Raises:
            TrainingStateError: a record cannot be read.
            WriteError: the folder cannot be written to.
        """
        names = [*self.own, *sites_of_run(self.folder)]
        make_folder(self.folder / MOVING)
        self._move(names, self.folder, self.folder / MOVING)
        with writing(self.folder):
            os.replace(self.folder / MOVING, self.folder / ASIDE)

    def discard(self) -> None:
        """Remove what was moved aside."""
        if (self.folder / ASIDE).exists():
            with writing(self.folder):
                os.replace(self.folder / ASIDE, self.folder / GONE)
            shutil.rmtree(self.folder / GONE, ignore_errors=True)

    def put_back(self) -> None:
        """Move the files back, in place of what the new run has written; nothing if none are aside."""
        if (self.folder / ASIDE).exists():
            for name in self.own:
                _remove(self.folder / name)
            with writing(self.folder):
                os.replace(self.folder / ASIDE, self.folder / MOVING)
        if (self.folder / MOVING).exists():
            names = [path.name for path in (self.folder / MOVING).iterdir()]
            self._move(names, self.folder / MOVING, self.folder)
            with writing(self.folder):
                (self.folder / MOVING).rmdir()

    @staticmethod
    def _move(names: Iterable[str], source: Path, target: Path) -> None:
        for name in names:
            if (source / name).exists():
                with writing(target / name):
                    os.replace(source / name, target / name)


def sites_of_run(folder: Path) -> list[str]:
    """The sites of a folder's run, in the order of the site table: those of its configuration and of its SAEs.

    The kinds of coders over several layers, which have folders too, come last.

    Raises:
        TrainingStateError: ``run.json`` or ``suite.json`` cannot be read.
    """
    found: set[Any] = set()
    for name in (RUN_NAME, SUITE_NAME):
        if (folder / name).exists():
            record = read_record(folder / name)
            for entry in record["config"].get("grid") or ():
                found.update(entry.get("sites") or ())
            found.update(row.get("site") for row in record.get("saes") or ())
    return [site for site in (*SITES, *LAYERED_SITES) if site in found]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)

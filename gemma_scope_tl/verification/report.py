"""The report of a verification: one JSON file that can be sent, and the results of SAEs that a later run continues."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import torch

from gemma_scope_tl.diagnose import PACKAGES, installed_version
from gemma_scope_tl.files import make_folder, write_atomically
from gemma_scope_tl.verification.diagnosis import KINDS, Fault

FORMAT = 1
REPORT_NAME = "report.json"
SAES_FOLDER = "saes"
CACHE_FOLDER = "cache"


@dataclass(frozen=True)
class Report:
    """The result of a verification.

    Attributes:
        content: everything, as plain data; the content of the JSON file.
        path: the JSON file, if one was written.
    """

    content: dict[str, Any]
    path: Path | None = None

    @property
    def ok(self) -> bool:
        """Whether something was measured and nothing is wrong."""
        return self.content["verdict"] == "pass"

    @property
    def faults(self) -> list[Fault]:
        """Everything that is wrong, of the model, of each SAE and of their order."""
        return [Fault(one["kind"], one["text"]) for one in self.content["faults"]]

    @property
    def saes(self) -> list[dict[str, Any]]:
        """The results of the SAEs."""
        return self.content["saes"]

    def rows(self) -> list[dict[str, Any]]:
        """A row for each SAE, for printing: the row's L0, the measurements with their intervals, and the verdict."""
        return [_table_row(one) for one in self.saes]


class Store:
    """The results of single SAEs in a folder, each written whole or not at all.

    Args:
        folder: the folder of the verification; None keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        if folder is not None:
            make_folder(folder / SAES_FOLDER)

    def load(self, name: str, key: Mapping[str, Any]) -> dict[str, Any] | None:
        """The result under a name, if it was made from the same things."""
        if self.folder is None:
            return None
        with suppress(OSError, ValueError, LookupError, TypeError):
            held = json.loads(self._path(name).read_text(encoding="utf-8"))
            if held["key"] == _digest(key):
                return cast("dict[str, Any]", held["result"])
        return None

    def save(self, name: str, key: Mapping[str, Any], result: Mapping[str, Any]) -> None:
        """Keep a result."""
        if self.folder is not None:
            write_atomically(self._path(name), _json({"key": _digest(key), "result": result}))

    def _path(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / SAES_FOLDER / f"{name.replace('/', '--')}.json"


def make_report(
    facts: Mapping[str, Any],
    model_faults: Sequence[Fault],
    saes: Sequence[Mapping[str, Any]],
    shared: Sequence[Fault],
    orderings: Sequence[Mapping[str, Any]],
    folder: Path | None,
) -> Report:
    """Put the parts together, decide, and write the file.

    Args:
        facts: what was verified, where and with what.
        model_faults: faults of the model.
        saes: the results of the SAEs, which list their own faults.
        shared: faults that several SAEs share, and faults of their order.
        orderings: the comparisons of the sample with the paper's orderings.
        folder: where the file is written; None for nowhere.
    """
    own = [fault for sae in saes for fault in sae["faults"]]
    faults = [*map(asdict, model_faults), *map(asdict, shared), *own]
    measured = sum(sae["status"] != "skipped" for sae in saes)
    verdict = "fail" if faults else "pass" if measured else "nothing measured"
    content = {
        "format": FORMAT,
        "verdict": verdict,
        "faults": [{**fault, "means": KINDS[fault["kind"]]} for fault in faults],
        **facts,
        "saes": list(saes),
        "orderings": list(orderings),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    content = cast("dict[str, Any]", _plain(content))
    path = None if folder is None else write_atomically(folder / REPORT_NAME, _json(content))
    return Report(content, path)


def surroundings(device: str) -> dict[str, Any]:
    """The versions and the machine."""
    on_gpu = device.startswith("cuda") and torch.cuda.is_available()
    machine = {
        "system": platform.platform(),
        "python": sys.version.split()[0],
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(torch.device(device)) if on_gpu else device,
    }
    return {"versions": {name: installed_version(name) for name in PACKAGES}, "machine": machine}


def _table_row(sae: Mapping[str, Any]) -> dict[str, Any]:
    measured: Mapping[str, Any] = sae.get("measured") or {}
    row: dict[str, Any] = {"release": sae["release"], "id": sae["id"], "row L0": sae["row_l0"]}
    for name in ("l0", "fvu", "delta_loss"):
        row |= {end: measured.get(end) for end in (name, f"{name}_low", f"{name}_high")}
    row["loss_recovered"] = measured.get("loss_recovered")
    kinds = ", ".join(dict.fromkeys(fault["kind"] for fault in sae["faults"]))
    row["verdict"] = f"{sae['status']}: {kinds}" if kinds else sae["status"]
    return row


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()


def _json(value: Any) -> str:
    return json.dumps(_plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _plain(value: Any) -> Any:
    """Plain data, with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in cast("Sequence[Any]", value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value

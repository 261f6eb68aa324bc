"""What the sources of numbers hold: JSON, JSON lines, CSV and YAML as data, cards as text, and Python as modules."""

from __future__ import annotations

import json
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

ROOT = Path(__file__).resolve().parents[2]


@cache
def read(source: str) -> Any:
    """The content of a file: a frame for tables and logs, a module for code, a list of rows for the registry's folder.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: files of this kind cannot be read.
    """
    path = ROOT / source
    if not path.exists():
        raise FileNotFoundError(f"{source}, the source of a number, does not exist.")
    if source == "pretrained_yaml":
        import gemma_scope_tl as gs

        return gs.list_saes()
    if path.is_dir():
        return pd.concat([pd.read_csv(part) for part in sorted(path.glob("*.csv"))], ignore_index=True)
    kind = path.suffix
    if kind == ".json":
        return json.loads(path.read_text(encoding="utf-8"))
    if kind == ".jsonl":
        return pd.read_json(path, lines=True, precise_float=True)  # as json reads numbers
    if kind == ".csv":
        return pd.read_csv(path)
    if kind == ".yaml":
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    if kind == ".md":
        return path.read_text(encoding="utf-8")
    if kind == ".py":
        return import_module(source.removesuffix(".py").replace("/", "."))
    raise ValueError(f"{source}: numbers come from json, jsonl, csv, yaml, md and py files.")

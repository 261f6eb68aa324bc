"""Token rows of the training mixture, as the Parquet file that `configs/bundled.yaml` trains SAEs on."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pandas as pd
import torch

from scripts.bundled.data import load_token_batches

ROWS, CONTEXT, SEED = 26_000, 256, 1


def write_mixture(work: Path, path: Path, rows: int = ROWS) -> int:
    """Write `rows` rows of BOS and 255 tokens, column `tokens`, drawn from the domains by their weights."""
    batch = 16
    batches = load_token_batches(work, batch, CONTEXT, SEED)
    tokens = torch.cat(list(islice(batches, -(-rows // batch))))[:rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    pd.DataFrame({"tokens": list(tokens.to(torch.int32).numpy())}).to_parquet(partial)
    partial.replace(path)
    return len(tokens)

"""Text, tokens and stored activations: the residual stream after one layer, in chunks that survive a killed run.

Text: WikiText-2, Python's standard library and its manual, from the pinned packages of ``scripts/bundled/sources.py``,
with the same held-out split. Rows are ``<|endoftext|>`` and 255 consecutive tokens; documents are separated by
``<|endoftext|>``. Activations at that token and at a row's first positions are left out: see :data:`SINKS`.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from transformers import AutoTokenizer

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.text.rows import pack_texts
from scripts.bundled.corpus import build_domain
from scripts.bundled.domains import DOMAINS
from scripts.bundled.files import read_jsonl
from scripts.smollm2.model import LAYER, Halves, load_model

SHARES = {"wikipedia": 0.6, "code": 0.2, "docs": 0.2}
"""Domains and their share of the rows."""
SEPARATOR, SEPARATOR_ID = "<|endoftext|>", 0
SINKS = 8
"""Positions left out at the start of each row, where activations of the separator, and of the first comma, full stop or
line break after it, have norms a hundred times as large as others."""
CONTEXT, CHUNK_ROWS, BATCH_ROWS, SEED = 256, 64, 8, 0


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer with the separator of the model's pretraining as BOS and EOS."""
    return AutoTokenizer.from_pretrained(folder, bos_token=SEPARATOR, eos_token=SEPARATOR)


def token_rows(work: Path, split: str, tokens: int) -> Tensor:
    """About ``tokens`` tokens as rows ``[n, 256]`` in a fixed shuffled order; more tokens only add rows at the end.

    Args:
        split: ``train`` or ``heldout``.

    Raises:
        GemmaScopeError: the text holds fewer tokens.
    """
    rows = _all_rows(work, split)
    count = -(-tokens // CONTEXT)
    if count > len(rows):
        raise GemmaScopeError(f"The {split} text holds {len(rows) * CONTEXT} tokens, {tokens} were asked for.")
    return rows[:count]


def _all_rows(work: Path, split: str) -> Tensor:
    path = work / f"{split}_tokens.npy"
    if not path.exists():
        tokenizer = load_tokenizer(work / "model")
        parts = [pack_texts(tokenizer, _texts(work, name, split), CONTEXT) for name in SHARES]
        total = min(len(part) / share for part, share in zip(parts, SHARES.values(), strict=True))
        parts = [part[: int(total * share)] for part, share in zip(parts, SHARES.values(), strict=True)]
        rows = torch.cat(parts)
        rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))]
        write_atomically(path, _npy(rows.to(torch.int32).numpy()))
    return torch.from_numpy(np.load(path)).long()


def _texts(work: Path, name: str, split: str) -> list[str]:
    path = work / "corpus" / f"{name}.{split}.jsonl"
    if not path.exists():
        build_domain(next(domain for domain in DOMAINS if domain.name == name), work)
    return [row["text"] for row in read_jsonl(path)]


def kept(rows: Tensor) -> Tensor:
    """The positions for training, splicing and measuring, ``[n, 256]``: ordinary tokens after the first few."""
    mask = rows != SEPARATOR_ID
    mask[:, :SINKS] = False
    return mask


def harvest(work: Path, tokens: int) -> Path:
    """Write the activations of about ``tokens`` training tokens, float16, ``work/activations/<chunk>.npy [kept, d]``.

    Existing chunks are kept, so a stopped run continues, and a longer run adds to a shorter one.
    """
    rows, folder = token_rows(work, "train", tokens), work / "activations"
    halves = Halves(load_model(work / "model"), LAYER)
    chunks = list(enumerate(rows.split(CHUNK_ROWS)))
    for number, chunk in track(chunks, f"activations behind layer {LAYER}"):
        path = folder / f"{number:05d}.npy"
        if len(chunk) == CHUNK_ROWS and not path.exists():
            found = torch.cat([halves.stream(batch)[kept(batch)] for batch in chunk.split(BATCH_ROWS)])
            write_atomically(path, _npy(found.to(torch.float16).numpy()))
    return folder


def load_activations(folder: Path, limit: int | None = None) -> Tensor:
    """The stored activations ``[n, d]`` in float16, the first ``limit`` of them.

    Raises:
        GemmaScopeError: fewer activations are stored.
    """
    parts, found = [], 0
    for path in sorted(folder.glob("*.npy")):
        if limit is not None and found >= limit:
            break
        parts.append(torch.from_numpy(np.load(path)))
        found += len(parts[-1])
    if not parts or (limit is not None and found < limit):
        raise GemmaScopeError(f"{folder} holds {found} activations, {limit or 'some'} are needed: run 'harvest'.")
    return torch.cat(parts)[:limit]


def describe(x: Tensor) -> dict[str, float]:
    """Norms of activations ``[n, d]``, which show outliers."""
    norms = x.float().norm(dim=-1)
    found = {"median": norms.median(), "p99": norms.quantile(0.99), "max": norms.max()}
    return {name: value.item() for name, value in found.items()} | {"rms": norms.square().mean().sqrt().item()}


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()

"""Tests never ask the network for anything, and leave nothing in the user's cache or for the next test."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["GEMMA_SCOPE_TL_CACHE"] = tempfile.mkdtemp(prefix="gemma_scope_tl_")
atexit.register(shutil.rmtree, os.environ["GEMMA_SCOPE_TL_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Sums have other last bits with other numbers of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)

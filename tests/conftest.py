"""Tests never ask the network for anything, and leave nothing in the user's cache or for the next test."""

import atexit
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker runs on each processor, so more threads would only compete
    os.environ["OMP_NUM_THREADS"] = "1"  # child processes read this
    torch.set_num_threads(1)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["GEMMA_SCOPE_TL_CACHE"] = tempfile.mkdtemp(prefix="gemma_scope_tl_")
atexit.register(shutil.rmtree, os.environ["GEMMA_SCOPE_TL_CACHE"], ignore_errors=True)

SLOW_KINDS = ("tutorials", "browser", "ray", "kill", "fuzz")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything of a slow kind is slow: ``-m "not slow"`` is the fast tier.

    Tutorials take longest and come first, so that no worker process is left with one when the others are done.
    """
    for item in items:
        if any(item.get_closest_marker(kind) for kind in SLOW_KINDS):
            item.add_marker("slow")
    items.sort(key=lambda item: item.get_closest_marker("tutorials") is None)


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """The last bits of sums depend on the number of threads."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def _shared_models_stay_as_they_were() -> Iterator[None]:
    """Checked after each file, so that the error names the file that changed a shared model."""
    yield
    helpers = sys.modules.get("tests.helpers")
    for number, (name, model, before) in enumerate(helpers.SHARED if helpers else []):
        model.zero_grad()
        after = helpers.state_of(model)
        helpers.SHARED[number] = (name, model, after)
        changed = [key for key in before if before[key] != after[key]]
        assert changed == [], f"this file's tests left other {changed} in the shared model {name}"

"""Public names are imported at their first use, without the garbage collector, which is as it was afterwards."""

from __future__ import annotations

import gc
import subprocess
import sys

import pytest

import gemma_scope_tl as gs

WATCHED = """
import gc, importlib.abc, sys

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "pydantic":
            print(gc.isenabled())

sys.meta_path.insert(0, Watch())
import gemma_scope_tl as gs
gs.list_saes
print(gc.isenabled())
gc.disable()
gs.registry
print(gc.isenabled())
"""


def test_the_collector_rests_during_an_import_only() -> None:
    """A user's own choice is kept, and the libraries below are imported without a collection."""
    done = subprocess.run([sys.executable, "-c", WATCHED], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True", "False"]


def test_the_collector_returns_after_an_import_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        assert not gc.isenabled()
        raise ImportError(name)

    monkeypatch.setattr(gs, "import_module", fail)
    with pytest.raises(ImportError, match="sae.loading"):
        gs.__getattr__("load_sae")
    assert gc.isenabled()

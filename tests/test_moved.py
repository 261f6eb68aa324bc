"""Modules under their old names: each warns, and gives what the new one has."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module

import pytest

import gemma_scope_tl as gs
from gemma_scope_tl.moved import NAMES


@pytest.mark.filterwarnings("default::DeprecationWarning")
def test_every_old_name_warns_and_leads_to_a_module_that_is_there() -> None:
    for old, new in NAMES.items():
        sys.modules.pop(f"gemma_scope_tl.{old}", None)
        with pytest.warns(DeprecationWarning, match=f"gemma_scope_tl.{old} is now gemma_scope_tl.{new}"):
            module = import_module(f"gemma_scope_tl.{old}")
        here = import_module(f"gemma_scope_tl.{new}")
        public = [name for name in vars(here) if not name.startswith("_")]
        for name in public:
            assert getattr(module, name) is getattr(here, name), (old, name)


def test_what_is_in_neither_raises() -> None:
    with pytest.raises(ImportError, match="nothing_here"):
        pass  # pyright: ignore
    with pytest.raises(ModuleNotFoundError, match="gemma_scope_tl.nothing_here"):
        import_module("gemma_scope_tl.nothing_here")


def test_an_old_room_as_an_attribute() -> None:
    code = (
        "import gemma_scope_tl as gs\n"
        "from gemma_scope_tl.inputs import as_batch, as_saes\n"
        "from gemma_scope_tl.splicing import ExcludeTokens, splice, translate_hook_name\n"
        "print(gs.adapters.loading.load_model is gs.load_model, splice is gs.splice)\n"
    )
    out = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.split() == ["True", "True"]
    assert "adapters" not in gs.__all__  # it would warn whoever imports everything

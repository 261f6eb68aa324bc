"""Modules under their old names: each warns, and gives what the new one has."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType

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
        public = [name for name, value in vars(here).items() if name[0] != "_" and not isinstance(value, ModuleType)]
        for name in public:
            assert getattr(module, name) is getattr(here, name), (old, name)


def test_what_is_in_neither_raises() -> None:
    old = import_module("gemma_scope_tl.adapters.loading")
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = old.nothing_here
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


DOCUMENTED = """
from gemma_scope_tl.attributions.ablations import ablation_effects
from gemma_scope_tl.attributions.graph import latent_edges
from gemma_scope_tl.attributions.targets import logit_difference
from gemma_scope_tl.demo.app import build_app
from gemma_scope_tl.demo.serving import launch
from gemma_scope_tl.evals.bridges import run_sae_lens_evals
from gemma_scope_tl.evals.metrics import fvu
from gemma_scope_tl.evals.packing import as_tokens
from gemma_scope_tl.evals.packing import pack_texts
from gemma_scope_tl.evals.texts import read_texts
from gemma_scope_tl.interp import ChatClient
from gemma_scope_tl.interp import Sampling, detection_scores, explain, simulation_scores, top_examples
from gemma_scope_tl.studies import base_on_tuned, roll_out
from gemma_scope_tl.studies import binned_by_position, by_domain, firing_frequencies, labelled_texts, sparsity_fidelity
from gemma_scope_tl.studies import bundled_concepts, probe_concepts
from gemma_scope_tl.training.config import load_config
from gemma_scope_tl.training.plan import plan_suite
from gemma_scope_tl.training.recipe import FAST, PAPER
from gemma_scope_tl.training.recipe import PAPER
from gemma_scope_tl.viz.circuit_figure import draw_circuit
from gemma_scope_tl.viz.figures import latent_heatmap, new_figure
from gemma_scope_tl.viz.figures import latent_heatmap, new_figure, save_figure
from gemma_scope_tl.viz.figures import new_figure
from gemma_scope_tl.viz.figures import new_figure, save_figure
from gemma_scope_tl.viz.figures import save_figure
from gemma_scope_tl.viz.latent_facts import PageText
from gemma_scope_tl.viz.study_figures import domain_figure, fidelity_figure, frequency_figure, position_figure
from gemma_scope_tl.viz.training_figures import training_curves
"""
"""Every import of a module of the package in the documents and tutorials of version 0.1."""


def test_imports_of_the_earlier_documents_work() -> None:
    subprocess.run([sys.executable, "-W", "ignore", "-c", DOCUMENTED], capture_output=True, text=True, check=True)


def test_no_page_names_a_module_by_its_old_name() -> None:
    root = Path(gs.__file__).parent.parent
    pages = [root / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
    pages += [*root.glob("docs/**/*.md"), *root.glob("tutorials/**/*.ipynb"), *root.glob("tutorials/**/*.py")]
    old = re.compile(
        r"(?:gemma_scope_tl\.|gs\.|`)(" + "|".join(re.escape(name) for name in NAMES if "." in name) + r")\b"
    )
    found = [f"{page.name}: {name}" for page in pages for name in old.findall(page.read_text(encoding="utf-8"))]
    assert not found, found

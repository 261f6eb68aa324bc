"""Gemma Scope in TransformerLens and SAELens.

Public names are imported when they are first used: ``import gemma_scope_tl`` loads neither torch nor sae_lens.
"""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.moved import NAMES as _MOVED
from gemma_scope_tl.moved import MovedModules

__version__ = "0.1.0"

sys.meta_path.append(MovedModules())

_NAMES = {
    "About": "release.release_saes",
    "AdapterMismatch": "errors",
    "GemmaScopeError": "errors",
    "JumpReLUSAE": "sae.jumprelu",
    "JumpReLUTranscoder": "sae.jumprelu",
    "ablate": "interventions",
    "attribute": "attributions.gradients",
    "attribution_graph": "attributions.making",
    "circuit": "attributions.graph",
    "clamp": "interventions",
    "evaluate": "evals.suite",
    "export_suite": "release.export",
    "feature_page": "viz.latent_page",
    "features": "latents.table",
    "graph_notes": "viz.graph_notes",
    "list_saes": "registry",
    "load_latents": "sae.partial",
    "load_model": "model.loading",
    "load_sae": "sae.loading",
    "load_suite": "sae.suite",
    "mean_norms": "interventions",
    "read_graph": "attributions.graph_json",
    "register_release": "registry",
    "register_with_sae_lens": "interop.releases",
    "save_sae": "sae.save",
    "scale": "interventions",
    "splice": "model.splicing",
    "steer": "interventions",
    "top_tokens": "latents.logit_lens",
    "train_suite": "training.suite",
    "unregister_release": "registry",
    "upload_suite": "release.upload",
    "verify": "verification.run",
    "write_graph": "attributions.graph_json",
    "write_graph_page": "viz.graph_page",
}
_MODULES = ("attributions", "errors", "evals", "model", "registry", "sae", "sites", "training", "viz", "weights")

__all__ = ["__version__", *_NAMES, *_MODULES]

# pyright: reportUnusedImport=false, reportUnsupportedDunderAll=false
if TYPE_CHECKING:
    from gemma_scope_tl import attributions, errors, evals, model, registry, sae, sites, training, viz, weights
    from gemma_scope_tl.attributions.gradients import attribute
    from gemma_scope_tl.attributions.graph import circuit
    from gemma_scope_tl.attributions.graph_json import read_graph, write_graph
    from gemma_scope_tl.attributions.making import attribution_graph
    from gemma_scope_tl.errors import AdapterMismatch, GemmaScopeError
    from gemma_scope_tl.evals.suite import evaluate
    from gemma_scope_tl.interop.releases import register_with_sae_lens
    from gemma_scope_tl.interventions import ablate, clamp, mean_norms, scale, steer
    from gemma_scope_tl.latents.logit_lens import top_tokens
    from gemma_scope_tl.latents.table import features
    from gemma_scope_tl.model.loading import load_model
    from gemma_scope_tl.model.splicing import splice
    from gemma_scope_tl.registry import list_saes, register_release, unregister_release
    from gemma_scope_tl.release.export import export_suite
    from gemma_scope_tl.release.release_saes import About
    from gemma_scope_tl.release.upload import upload_suite
    from gemma_scope_tl.sae.jumprelu import JumpReLUSAE, JumpReLUTranscoder
    from gemma_scope_tl.sae.loading import load_sae
    from gemma_scope_tl.sae.partial import load_latents
    from gemma_scope_tl.sae.save import save_sae
    from gemma_scope_tl.sae.suite import load_suite
    from gemma_scope_tl.training.suite import train_suite
    from gemma_scope_tl.verification.run import verify
    from gemma_scope_tl.viz.graph_notes import graph_notes
    from gemma_scope_tl.viz.graph_page import write_graph_page
    from gemma_scope_tl.viz.latent_page import feature_page


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(_imported(_NAMES[name]), name)
    if name in _MODULES or name in _MOVED:
        return _imported(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _imported(module: str) -> ModuleType:
    """Import a module of this package without the cyclic garbage collector.

    The libraries below make many objects while they are imported, hardly any of them garbage, which the collector
    would traverse again and again; without it their import takes a tenth to a fifth less time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return import_module(f"{__name__}.{module}")
    finally:
        if collecting:
            gc.enable()


def __dir__() -> list[str]:
    return sorted(__all__)

"""Import of modules by the names they had in the previous release.

Code that imports an old name keeps working for one release and gets a ``DeprecationWarning`` with the new name. A
finder in ``sys.meta_path`` serves the old names, so no file is kept for them.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, cast

_PACKAGE = __name__.rpartition(".")[0]

NAMES = {
    "activations.bucketed": "activations.source",
    "activations.chat": "text.tokenizing",
    "activations.documents": "text.documents",
    "activations.packer": "text.pack",
    "activations.direct_file": "activations.folder",
    "activations.room": "activations.writer",
    "activations.sequences": "text.pack",
    "activations.shards": "activations.writer",
    "activations.spare": "activations.buckets",
    "activations.squares": "activations.source",
    "activations.store": "activations.writer",
    "activations.stored": "activations.reader",
    "activations.token_rows": "text.token_rows",
    "adapters": "model",
    "adapters.base": "model.hooked",
    "adapters.bridge": "model.bridge",
    "adapters.check": "model.check",
    "adapters.generation": "model.generation",
    "adapters.given": "model.loading",
    "adapters.hooked_transformer": "model.hooked_transformer",
    "adapters.keywords": "model.keywords",
    "adapters.loading": "model.loading",
    "adapters.plain": "model.plain",
    "adapters.prompts": "model.generation",
    "adapters.reference": "model.plain",
    "adapters.repairs": "model.check",
    "adapters.tokenizer": "model.tokenizer",
    "attached": "model.attached",
    "attributions.ablations": "attributions.gradients",
    "attributions.parts": "attributions.decomposition",
    "attributions.rows": "attributions.decomposition",
    "cli.choice": "cli.options",
    "cli.demo": "cli.tools",
    "cli.doctor": "cli.tools",
    "cli.one_sae": "cli.options",
    "cli.tables": "cli.output",
    "contributing.facts": "contributing.folder_metadata",
    "contributing.places": "contributing.repositories",
    "contributing.remote_headers": "contributing.repositories",
    "demo.names": "demo.hosts",
    "demo.suite_grid": "demo.views",
    "demo.waiting": "demo.queue_rules",
    "evals.bridges": "interop.run_evals",
    "evals.importance": "evals.next_token",
    "evals.intervals": "evals.metrics",
    "evals.packing": "text.rows",
    "evals.step": "evals.run",
    "evals.store": "evals.cache",
    "evals.subjects": "evals.saes",
    "evals.tables": "evals.suite",
    "evals.texts": "text.documents",
    "evals.units": "evals.sums",
    "feature_table": "latents.table",
    "inputs": "text",
    "inputs.batch": "text.batch",
    "inputs.choices": "sae.choices",
    "inputs.tokenizing": "text.tokenizing",
    "interp.explain": "interp.explanations",
    "interp.scoring": "interp.explanations",
    "interventions.sources": "sae.access",
    "logit_lens": "latents.logit_lens",
    "owners": "model.owners",
    "positions": "model.positions",
    "registry.containment": "registry.locate",
    "release.about": "release.release_saes",
    "release.items": "release.release_saes",
    "release.upload_errors": "weights.hub_errors",
    "sae.indices": "sae.arguments",
    "sae.loading_methods": "sae.sae_lens_methods",
    "sae.placement": "sae.choices",
    "sae.sae_lens_releases": "interop.releases",
    "sae.saving_methods": "sae.sae_lens_methods",
    "sae.tensors": "sae.arguments",
    "sae.training": "interop.training_sae",
    "sae.transcoder": "sae.jumprelu",
    "sae.unfinished": "sae.config",
    "splicing": "model.splicing",
    "splicing.copies": "model.copies",
    "splicing.keywords": "model.keywords",
    "splicing.mixin": "model.splicing",
    "splicing.names": "model.hook_names",
    "studies.precision": "studies.fidelity",
    "studies.random_twin": "studies.random_saes",
    "text_read": "text.tokens",
    "tokens": "text.tokens",
    "tracker": "model.tracker",
    "training.calibration": "training.plan",
    "training.cluster": "training.ray.cluster",
    "training.config_problems": "training.config_file",
    "training.config_values": "training.config_file",
    "training.costs": "training.plan",
    "training.job_table": "training.ray.job_table",
    "training.jobs": "training.ray.jobs",
    "training.joining": "training.ray.merge_jobs",
    "training.model_sizes": "model.sizes",
    "training.parallel": "training.shard",
    "training.penalties": "training.optimizer",
    "training.progress": "training.running",
    "training.records": "training.checkpoint",
    "training.releasing": "training.release",
    "training.runners": "interop.runners",
    "training.sources": "training.source_factory",
    "training.state": "training.place",
    "training.steering": "training.optimizer",
    "training.stopping": "training.running",
    "training.weights": "training.stack",
    "viz.interp_figure": "viz.study_figures",
    "viz.latent_html": "viz.latent_page",
    "viz.panels": "viz.figures",
    "weights.mapping": "weights.load",
    "weights.row_cache": "weights.partial",
    "weights.sniff": "weights.checks",
}
"""The old and the new name of each module that has moved, both without the name of the package."""

_ELSEWHERE = {
    "activations.store.fingerprint": "weights.fingerprint:sampled_fingerprint",
    "interventions.sources.place_of": "sae.access:locate",
    "evals.store.Store": "evals.cache:MetricsCache",
    "attached.decode_with_skip": "sae.access",
    "attached.locate": "sae.access",
    "inputs.as_indices": "sae.arguments",
    "inputs.as_saes": "sae.choices",
    **{f"inputs.choices.{name}": "sae.arguments" for name in ("as_index", "as_indices", "is_index", "shown")},
    "splicing.ExcludeTokens": "text.tokens",
    "splicing.translate_hook_name": "model.hook_names",
}


class _OldModule(ModuleType):
    """A module with an old name. It is callable if it contains a function of the same name.

    Importing ``interp.explain`` replaces the function ``explain`` in ``interp`` by the module, so calls of the module
    are passed on to the function.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, self.__name__.rpartition(".")[2])(*args, **kwargs)


# Not derived from the classes of importlib.abc, whose import would take a third of the time of importing this package.
class MovedModules:
    """Finder and loader for old names: an empty module that looks up every attribute in its new module."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec for a module that has moved, and None for any other."""
        package, _, name = fullname.partition(".")
        if package != _PACKAGE or name not in NAMES:
            return None
        return ModuleSpec(fullname, cast("Any", self), is_package="." not in name)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return an empty module."""
        return _OldModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Warn, and give the module a ``__getattr__`` that reads the new module."""
        name = module.__name__.partition(".")[2]
        new = NAMES[name]
        warnings.warn(
            f"{module.__name__} is now {_PACKAGE}.{new}; the old name will be removed in the next release.",
            DeprecationWarning,
            stacklevel=2,
        )

        def attribute(wanted: str) -> Any:
            if wanted.startswith("__"):
                raise AttributeError(f"module {module.__name__!r} has no attribute {wanted!r}")
            if f"{name}.{wanted}" in NAMES:
                return import_module(f"{module.__name__}.{wanted}")
            home, _, renamed = _ELSEWHERE.get(f"{name}.{wanted}", new).partition(":")
            return getattr(import_module(f"{_PACKAGE}.{home}"), renamed or wanted)

        vars(module)["__getattr__"] = attribute

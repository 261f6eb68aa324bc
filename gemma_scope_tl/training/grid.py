"""The SAEs of a run, from the grid of its configuration."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from gemma_scope_tl.families import Family
from gemma_scope_tl.registry.widths import width_label
from gemma_scope_tl.sites import LAYERED_SITES, ModelDims, Place, get_site
from gemma_scope_tl.training.config import GridEntry, SuiteConfig, TrainingStateError
from gemma_scope_tl.training.layered_spec import LayeredGroup, LayeredSpec
from gemma_scope_tl.training.recipe import Recipe
from gemma_scope_tl.training.spec import SAESpec


@dataclass(frozen=True)
class Group:
    """SAEs of one place and one length of training, which are stepped together.

    Attributes:
        place: the place that the SAEs read.
        steps: length of the training in steps.
        specs: the SAEs.
    """

    place: Place
    steps: int
    specs: tuple[SAESpec, ...]

    @property
    def places(self) -> tuple[Place, ...]:
        """The place that is read, as groups that read several have more."""
        return (self.place,)

    @property
    def name(self) -> str:
        """The name of the group, unique in a run, from which file names are made."""
        return f"{self.place.key.replace('/', '_')}_{self.steps}_steps"


AnyGroup = Group | LayeredGroup
"""SAEs of one place, or a coder over several layers."""


def groups_of(config: SuiteConfig, dims: ModelDims, family: Family | None = None) -> list[AnyGroup]:
    """The SAEs of a run, in groups, in the order of the grid.

    Args:
        config: the configuration of the run.
        dims: the sizes of the model.
        family: the model's; None for the first family that has each site.

    Raises:
        TrainingStateError: two SAEs have the same name, ``only`` leaves no SAE, or one of its patterns matches none.
        SpliceError: the model does not have one of the layers.
        GemmaScopeError: a recipe does not suit a width.
    """
    groups: dict[tuple[Place | str, int], list[Any]] = {}
    names: list[str] = []
    for entry, recipe in zip(config.grid, config.recipes, strict=True):
        steps = _steps(config, entry, recipe)
        for place, spec in _all_specs(config, entry, dims, family, steps):
            names.append(spec.name)
            if not config.only or any(fnmatchcase(spec.name, pattern) for pattern in config.only):
                groups.setdefault((place or spec.name, steps), []).append(spec)
    double = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if double:
        raise TrainingStateError(f"The grid has these SAEs twice: {', '.join(double[:5])}.")
    idle = [pattern for pattern in config.only if not any(fnmatchcase(name, pattern) for name in names)]
    if idle:
        raise TrainingStateError(f"only: {idle[0]!r} fits no SAE of the grid. Names are like {names[0]!r}.")
    return [
        LayeredGroup(steps, specs[0]) if isinstance(key, str) else Group(key, steps, tuple(specs))
        for (key, steps), specs in groups.items()
    ]


def places_of(groups: Sequence[AnyGroup]) -> list[Place]:
    """The places that groups read, without repetition."""
    return list(dict.fromkeys(place for group in groups for place in group.places))


def scaled_places_of(groups: Sequence[AnyGroup]) -> list[Place]:
    """The places that are divided by a scale of their own: what is read, and what coders over several layers write."""
    layered = [place for group in groups if isinstance(group, LayeredGroup) for place in group.spec.writes]
    return list(dict.fromkeys([*places_of(groups), *layered]))


def last_step(config: SuiteConfig) -> int:
    """Steps of the longest training in the whole grid, after which SAEs are measured.

    SAEs that ``only`` leaves out count too, so that an SAE is measured on the same activations with and without it.
    """
    return max(_steps(config, entry, recipe) for entry, recipe in zip(config.grid, config.recipes, strict=True))


def _steps(config: SuiteConfig, entry: GridEntry, recipe: Recipe) -> int:
    own = entry.steps is not None or entry.tokens is not None
    steps, tokens = (entry.steps, entry.tokens) if own else (config.steps, config.tokens)
    if steps is not None:
        return steps
    assert tokens is not None  # the configuration was checked
    return -(-tokens // recipe.batch_size)


def _all_specs(
    config: SuiteConfig, entry: GridEntry, dims: ModelDims, family: Family | None, steps: int
) -> Iterator[tuple[Place | None, SAESpec | LayeredSpec]]:
    """The coders of an entry, with the place that is read; None for those that read several."""
    if entry.spans_layers:
        for kind in entry.sites:
            for spec in _layered_specs(config, entry, kind, dims, family, steps):
                yield None, spec
        return
    for place in _places(entry, dims, family):
        for spec in _specs(config, entry, place, get_site(place.site, family).d_in(dims), steps):
            yield place, spec


def _layered_specs(
    config: SuiteConfig, entry: GridEntry, kind: str, dims: ModelDims, family: Family | None, steps: int
) -> Iterator[LayeredSpec]:
    """The coders of one kind. Presets that follow the width and L0 get those of a layer."""
    site = get_site(LAYERED_SITES[kind], family)
    layers = tuple(range(dims.n_layers)) if entry.layers == "all" else tuple(entry.layers)
    for layer in layers:
        site.check_layer(layer, dims)
    whole, d_in, count = len(layers) == dims.n_layers, site.d_in(dims), len(layers)
    shown = "all" if whole else "_".join(map(str, layers))
    shared: dict[str, Any] = {"init_from": entry.init_from or "", "all_layers": whole}
    shared |= {"l0_start": entry.l0_start, "l0_decay_steps": entry.l0_decay_steps}
    for d_sae, skip in itertools.product(entry.widths, entry.skips):
        head, tail = f"{kind}/layers_{shown}/width_{width_label(d_sae)}", "_affine" if skip else ""
        own: dict[str, Any] = {"d_sae": max(1, d_sae // count), "steps": steps}
        for value in entry.lambdas or ():
            name = f"{head}/lambda_{value:g}{tail}"
            recipe = replace(config.recipe_at(entry, d_in, **own), l0_coefficient=value)
            yield LayeredSpec(name, kind, layers, d_sae, recipe, _seed(config.seed, name), skip=skip, **shared)
        for value in entry.target_l0s or ():
            name = f"{head}/target_l0_{value:g}{tail}"
            recipe = config.recipe_at(entry, d_in, target_l0=value / count, **own)
            yield LayeredSpec(name, kind, layers, d_sae, recipe, _seed(config.seed, name), value, skip, **shared)


def _places(entry: GridEntry, dims: ModelDims, family: Family | None) -> list[Place]:
    layers = range(dims.n_layers) if entry.layers == "all" else entry.layers
    places: dict[Place, None] = {}
    for site in (get_site(name, family) for name in entry.sites):
        for layer in layers if site.per_layer else [None]:
            site.check_layer(layer, dims)
            places[Place(site.name, layer)] = None
    return list(places)


def _specs(config: SuiteConfig, entry: GridEntry, place: Place, d_in: int, steps: int) -> list[SAESpec]:
    specs: list[SAESpec] = []
    for d_sae, skip in itertools.product(entry.widths, entry.skips):
        head, tail = f"{place.key}/width_{width_label(d_sae)}", "_affine" if skip else ""
        also: dict[str, Any] = {"skip": skip, "init_from": entry.init_from or ""}
        for value in entry.lambdas or ():
            name = f"{head}/lambda_{value:g}{tail}"
            recipe = replace(config.recipe_at(entry, d_in, d_sae=d_sae, steps=steps), l0_coefficient=value)
            specs.append(SAESpec(name, place, d_sae, recipe, _seed(config.seed, name), **also))
        for value in entry.target_l0s or ():
            name = f"{head}/target_l0_{value:g}{tail}"
            recipe = config.recipe_at(entry, d_in, d_sae=d_sae, target_l0=value, steps=steps)
            specs.append(SAESpec(name, place, d_sae, recipe, _seed(config.seed, name), target_l0=value, **also))
    return specs


def _seed(seed: int, name: str) -> int:
    """The seed of an SAE's initial weights. It depends on the run's seed and the SAE's name, not on other SAEs."""
    return int(np.random.SeedSequence([seed, zlib.crc32(name.encode())]).generate_state(1, np.uint32)[0])

"""Model families: everything that differs from one family of models to the next, as data.

Nothing outside this room names a family. A hooked model carries its own (``model.family``); whatever else needs one
looks it up by a configuration, a model's name, or the family's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gemma_scope_tl.errors import AdapterError, GemmaScopeError, unknown_name
from gemma_scope_tl.families.base import BACKENDS, Backend, Family, ModelDims, ModelSizes, Place, Site
from gemma_scope_tl.families.gemma2 import GEMMA2

__all__ = [
    "BACKENDS",
    "Backend",
    "Family",
    "ModelDims",
    "ModelSizes",
    "Place",
    "Site",
    "families",
    "family_named",
    "family_of_config",
    "family_of_model",
    "forget_family",
    "hub_ids",
    "register_family",
]

_FAMILIES: dict[str, Family] = {}


def families() -> tuple[Family, ...]:
    """All families, in the order in which they were registered; the first is the default."""
    return tuple(_FAMILIES.values())


def register_family(family: Family) -> None:
    """Make a family known to ``load_model``, the registry and everything else.

    Raises:
        GemmaScopeError: when the name or a model type is taken, or a site reads or writes other sites than the site of
            this name in another family does.
    """
    for known in families():
        shared = set(family.model_types) & set(known.model_types) | {family.name} & {known.name}
        if shared:
            raise GemmaScopeError(f"{', '.join(sorted(shared))} belongs to the family {known.name!r} already.")
        for name in family.sites.keys() & known.sites.keys():
            one, other = family.sites[name], known.sites[name]
            if (one.reads, one.writes, one.per_layer) != (other.reads, other.writes, other.per_layer):
                raise GemmaScopeError(
                    f"Site {name!r} reads {one.reads} and writes {one.writes} in {family.name}, but {other.reads} and "
                    f"{other.writes} in {known.name}: give it another name."
                )
    _FAMILIES[family.name] = family


def forget_family(name: str) -> None:
    """Undo :func:`register_family`."""
    family_named(name)
    del _FAMILIES[name]


def family_named(name: str) -> Family:
    """The family with this name.

    Raises:
        UnknownNameError: with the nearest names.
    """
    if name not in _FAMILIES:
        raise unknown_name("model family", name, _FAMILIES)
    return _FAMILIES[name]


def family_of_config(config: Any, source: str) -> Family:
    """The family that a Hugging Face configuration belongs to.

    Args:
        config: a configuration, or a mapping of its values.
        source: what the error calls it.

    Raises:
        AdapterError: when it is of no known family.
    """
    kind = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    for family in families():
        if kind in family.model_types:
            return family
    known = " or ".join(family.title for family in families())
    raise AdapterError(f"{source} is a {kind or 'model of unknown type'!r}, not a {known}.")


def family_of_model(model: str | None, site: str | None = None) -> Family:
    """The family of the model that SAEs name: the one that released it.

    A name that no family knows (a model of the user's, or None) is taken for the first family that has the ``site``,
    and without one for the default family.
    """
    name = (model or "").rpartition("/")[2].lower()
    for family in families():
        if family.base_name(name) in family.sizes:
            return family
    return next((family for family in families() if site in family.sites), families()[0])


def hub_ids() -> dict[str, str]:
    """The Hub's id of each released model of all families, base and instruction-tuned, by the model's name."""
    return {name: hub_id for family in families() for name, hub_id in family.hub_ids.items()}


register_family(GEMMA2)

"""Model families: what differs between families of models, as data.

Nothing outside this package names a family. A hooked model has its family in ``model.family``. Other code looks the
family up by a Hugging Face configuration, by the name of a model, or by the name of the family.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gemma_scope_tl.errors import AdapterError, GemmaScopeError, checked_text, unknown_name
from gemma_scope_tl.families.base import (
    BACKENDS,
    Backend,
    Family,
    ModelDims,
    ModelSizes,
    Place,
    Site,
    Wrapper,
)
from gemma_scope_tl.families.gemma2 import GEMMA2
from gemma_scope_tl.families.gemma3 import GEMMA3
from gemma_scope_tl.families.layered import LAYERED_SITES, refused_layered

__all__ = [
    "BACKENDS",
    "LAYERED_SITES",
    "AssumedFamilyWarning",
    "Backend",
    "Family",
    "ModelDims",
    "ModelSizes",
    "Place",
    "Site",
    "Wrapper",
    "assumed_family",
    "bare_name",
    "bundled_names",
    "depends_on_family",
    "families",
    "family_named",
    "family_of_config",
    "family_of_model",
    "forget_family",
    "hub_ids",
    "named_family",
    "names_with",
    "plain_name",
    "refused_layered",
    "register_family",
    "stated_family",
]

_FAMILIES: dict[str, Family] = {}


class AssumedFamilyWarning(FutureWarning):
    """Nothing says of which family a model is, although it matters, so the first family is assumed.

    It will be an error in a later release.
    """


def families() -> tuple[Family, ...]:
    """All families, in the order in which they were registered; the first is the default."""
    return tuple(_FAMILIES.values())


def register_family(family: Family) -> None:
    """Add a family, so that ``load_model`` and the registry accept its models and sites.

    Raises:
        GemmaScopeError: when the name or a model type is taken, or a site reads or writes other sites than the site of
            the same name in another family.
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
    if checked_text("model family", name, _FAMILIES) not in _FAMILIES:
        raise unknown_name("model family", name, _FAMILIES)
    return _FAMILIES[name]


def family_of_config(config: Any, source: str) -> Family:
    """The family that a Hugging Face configuration belongs to.

    Args:
        config: a configuration, or a mapping of its values.
        source: name of the configuration in the error message.

    Raises:
        AdapterError: when its model type belongs to no registered family.
    """
    kind = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    for family in families():
        if kind in family.model_types:
            return family
    known = " or ".join(family.title for family in families())
    raise AdapterError(f"{source} is a {kind or 'model of unknown type'!r}, not a {known}.")


def named_family(model: str | None) -> Family | None:
    """The family that released a model, by the model's name, or that has a small model of this name in this package.

    None for a name that no family lists, such as that of a user's own model.

    >>> named_family("google/gemma-3-1b-it").name, named_family("my-model")
    ('gemma3', None)
    """
    name = (model or "").rpartition("/")[2].lower()
    for family in families():
        if family.base_name(name) in family.sizes or (name and name == family.bundled):
            return family
    return None


def family_of_model(model: str | None, site: str | None = None) -> Family:
    """The family of a model by its name, or the first family that has the ``site`` if no family lists the name.

    For a kind of coders of several layers, the site is the one that they read. Without a ``site`` that is the default
    family. Whether the choice matters says :func:`depends_on_family`; where an
    SAE gets its hooks and units, :func:`assumed_family` makes it and warns.
    """
    site = LAYERED_SITES.get(str(site), site)
    first = next((family for family in families() if site in family.sites), families()[0])
    return named_family(model) or first


def depends_on_family(site: str | None) -> bool:
    """Whether coders at a site differ between the families that have it: in hooks, modules or units of their files.

    >>> depends_on_family("res"), depends_on_family("transcoder")
    (False, True)
    """
    site = LAYERED_SITES.get(str(site), site)
    meanings = [_meaning(family, site) for family in families() if site is not None and site in family.sites]
    return any(one != meanings[0] for one in meanings)


def _meaning(family: Family, name: str) -> tuple[Any, ...]:
    """What a site is in a family, without its description."""
    site = family.sites[name]
    return replace(site, description=""), family.embedding_scale if site.joins == "embedding" else None


def assumed_family(model: str | None, site: str | None, source: str, how: str = "family=") -> Family:
    """As :func:`family_of_model`, for a model whose family nothing says, with a warning if it matters.

    Args:
        model: the model's name, or None.
        site: the site of the coder, or None if it is unknown too.
        source: the origin of the coder, for the message.
        how: where the user can say the family.

    Warns:
        AssumedFamilyWarning: coders at the site differ between families.
    """
    family = family_of_model(model, site)
    if named_family(model) is None and depends_on_family(site):
        warnings.warn(
            f"{source}: {_unknown(model)}, and coders at site {site!r} differ between families of models. "
            f"{family.title} is assumed. Give {how} ({names_with(site)}); a later release will raise an error.",
            AssumedFamilyWarning,
            stacklevel=3,
        )
    return family


def names_with(*sites: str | None) -> str:
    """The names of the families that have these sites, in a sentence."""
    wanted = {LAYERED_SITES.get(str(site), site) for site in sites} - {None}
    return " or ".join(family.name for family in families() if wanted <= family.sites.keys())


def _unknown(model: str | None) -> str:
    return "the model is not named" if model is None else f"no family lists the model {model!r}"


def stated_family(family: Family, model: str | None, *sites: str) -> str | None:
    """What a file that names a model must say about its family: None if that follows from the model's name.

    Args:
        family: the family.
        model: the model's name, or None.
        sites: the sites of the coders that the file describes. For a model that no family lists, the family is stated
            if it is not the default, or if the coders differ between families.

    >>> stated_family(GEMMA3, "gemma-3-1b"), stated_family(GEMMA3, "my-model", "res")
    (None, 'gemma3')
    >>> stated_family(GEMMA2, "my-model", "res"), stated_family(GEMMA2, "my-model", "transcoder")
    (None, 'gemma2')
    """
    named = named_family(model)
    if named is None and not any(map(depends_on_family, sites)):
        named = family_of_model(model, *sites[:1])
    return None if named is not None and named.name == family.name else family.name


def bundled_names() -> tuple[str, ...]:
    """The names of the small models that come with this package, the default first.

    >>> bundled_names()
    ('bundled', 'bundled-gemma3')
    """
    return tuple(dict.fromkeys(family.bundled for family in families() if family.bundled))


def hub_ids() -> dict[str, str]:
    """The Hub's id of each released model of all families, base and instruction-tuned, by the model's name."""
    return {name: hub_id for family in families() for name, hub_id in family.hub_ids.items()}


def plain_name(model: str) -> str:
    """The registry's name of a released model, without its publisher and without a suffix of base models.

    Names by another publisher are those of other models, which may have been trained further, and stay as they are.

    >>> plain_name("google/gemma-3-1b-pt"), plain_name("gemma-3-1b-it"), plain_name("someone/gemma-2-2b")
    ('gemma-3-1b', 'gemma-3-1b-it', 'someone/gemma-2-2b')
    """
    for family in families():
        owner, _, short = model.rpartition("/")
        name = family.plain_name(short)
        if owner in ("", family.owner) and family.base_name(name) in family.sizes:
            return name
    return model


def bare_name(model: str) -> str:
    """The name of a model in files and rows that say what SAEs were trained on: :func:`plain_name` without an owner.

    >>> bare_name("google/gemma-v3-1b-pt"), bare_name("someone/gemma-2-2b"), bare_name("someone/their-model-pt")
    ('gemma-3-1b', 'gemma-2-2b', 'their-model-pt')
    """
    return plain_name(model.rpartition("/")[2])


register_family(GEMMA2)
register_family(GEMMA3)

"""Lookups in the site tables of all model families.

A site table lists where coders (SAEs and transcoders) read and write. Each family defines its own, as in
:mod:`gemma_scope_tl.families.gemma2`, and only :mod:`gemma_scope_tl.families` contains hook names and the widths of
sites. Layers count from 0.

Code that runs a model takes the sites from the family of the model. The functions here work without one: they return
what all families share (the places that a site reads and writes), or use the first family that has the site.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from gemma_scope_tl.errors import GemmaScopeError, SpliceError, checked_text, unknown_name
from gemma_scope_tl.families import (
    BACKENDS,
    LAYERED_SITES,
    Backend,
    Family,
    ModelDims,
    Place,
    Site,
    families,
    family_named,
    refused_layered,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "BACKENDS",
    "LAYERED_SITES",
    "SITES",
    "Backend",
    "ModelDims",
    "Place",
    "Site",
    "SiteName",
    "check_hook_is_not_refused",
    "flatten_heads",
    "get_site",
    "known_site",
    "layer_of_hook",
    "layers_text",
    "parse_place",
    "site_of_hook",
    "target_of",
    "unflatten_heads",
    "with_targets",
]


SiteName = str
"""The name of a site, for annotations."""


class _Sites(Mapping[str, Site]):
    """The sites of all families by name, each from the first family that has a site of this name."""

    def __getitem__(self, name: str) -> Site:
        for family in families():
            if name in family.sites:
                return family.sites[name]
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys(name for family in families() for name in family.sites))

    def __len__(self) -> int:
        return len(list(iter(self)))


SITES: Mapping[str, Site] = _Sites()


def get_site(name: str, family: str | Family | None = None) -> Site:
    """The row of the site table with this name.

    Args:
        name: such as ``"res"``.
        family: a family or its name; None for the first family that has the site.

    Raises:
        UnknownNameError: with the nearest names.

    >>> get_site("res").hook_name(20, backend="bridge")
    'blocks.20.hook_out'
    >>> get_site("transcoder").hook_name_out(3, backend="hooked_transformer")
    'blocks.3.hook_mlp_out'
    >>> get_site("att").d_in(ModelDims(26, 2304, 8, 256))
    2048
    """
    if family is not None:
        return (family_named(family) if isinstance(family, str) else family).site(name)
    try:
        return SITES[checked_text("site", name, SITES)]
    except KeyError:
        raise (refused_layered(name) or unknown_name("site", name, SITES)) from None


def known_site(name: str) -> SiteName:
    """Return the name of a site, or of a kind of coders that span several layers, which rows name in its place.

    Raises:
        UnknownNameError: with the nearest names.
    """
    known = [*SITES, *LAYERED_SITES]
    if checked_text("site", name, known) not in known:
        raise unknown_name("site", name, known)
    return name


def layers_text(layers: Sequence[int]) -> str:
    """Layers in a few characters.

    >>> layers_text((7, 13, 17, 22)), layers_text(range(26))
    ('7, 13, 17, 22', '0-25')
    """
    whole = len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]}-{layers[-1]}" if whole else ", ".join(map(str, layers))


def parse_place(key: str) -> Place:
    """The place with this ``key``.

    Raises:
        UnknownNameError: no such site.
        GemmaScopeError: the layer is missing or not a number.

    >>> parse_place("att/layer_0")
    Place(site='att', layer=0)
    """
    name, _, rest = key.partition("/layer_")
    number = int(rest) if rest.isascii() and rest.isdigit() and len(rest) < 10 else None
    if get_site(name).per_layer != (number is not None) or (number is None and key != name):
        raise GemmaScopeError(f"{key!r} is not a place: write 'res/layer_3', or 'embedding'.")
    return Place(name, number)


def target_of(place: Place) -> Place:
    """The place whose tensor the coders at ``place`` reconstruct. It differs from ``place`` only for transcoders.

    Raises:
        SpliceError: for a site whose coders write several tensors.

    >>> target_of(Place("transcoder", 3))
    Place(site='mlp', layer=3)
    """
    written = get_site(place.site).writes_at(place.layer)
    if len(written) != 1:
        raise SpliceError(f"Coders at {place.key} write {len(written)} tensors, but only one is supported here.")
    return written[0]


def with_targets(places: Sequence[Place]) -> list[Place]:
    """``places`` and the places that the coders there write, without duplicates."""
    written = (target for place in places for target in get_site(place.site).writes_at(place.layer))
    return list(dict.fromkeys([*places, *written]))


def site_of_hook(
    hook_name: str, hook_name_out: str | None = None, family: Family | None = None
) -> tuple[Site, int | None]:
    """The site and layer that a hook name of either backend belongs to.

    Args:
        hook_name: the hook that a coder reads.
        hook_name_out: the hook that a transcoder writes.
        family: the family whose sites are searched; None for all families.

    Raises:
        UnknownNameError: when no site has this hook; names the nearest hook names.
        SpliceError: for a hook that is mistaken for a site, with the reason.

    >>> site, layer = site_of_hook("blocks.7.attn.hook_z")
    >>> site.name, layer
    ('att', 7)
    """
    layer = layer_of_hook(hook_name)
    sites = [site for one in (families() if family is None else (family,)) for site in one.sites.values()]
    for site in sites:
        if site.per_layer == (layer is None):
            continue
        reads = {site.hook_name(layer, b) for b in BACKENDS}
        writes = {site.hook_name_out(layer, b) for b in BACKENDS}
        if hook_name in reads and (hook_name_out or (hook_name if not site.is_transcoder else None)) in writes:
            return site, layer
    check_hook_is_not_refused(hook_name, family)
    known = {site.hook_name(layer or 0, b) for site in sites for b in BACKENDS}
    given = hook_name if hook_name_out in (None, hook_name) else f"{hook_name} -> {hook_name_out}"
    raise unknown_name("Gemma Scope hook", given, sorted(known))


def check_hook_is_not_refused(hook_name: str, family: Family | None = None) -> None:
    """Raise for a hook that is mistaken for a site of ``family``, or of any family without one.

    Raises:
        SpliceError: with the reason.
    """
    layer = layer_of_hook(hook_name)
    for one in families() if family is None else (family,):
        for template, why in one.refused_hooks.items():
            if template.format(layer=layer) == hook_name:
                raise SpliceError(f"{hook_name} is no site of {one.title}: {why.format(layer=layer)}.")


def layer_of_hook(hook_name: str) -> int | None:
    """The layer in ``blocks.L.…``, or None."""
    parts = hook_name.split(".")
    numbered = len(parts) > 2 and parts[0] == "blocks" and parts[1].isascii() and parts[1].isdigit()
    return int(parts[1]) if numbered and len(parts[1]) < 10 else None


def flatten_heads(z: torch.Tensor) -> torch.Tensor:
    """``[batch, pos, head, d_head]`` -> ``[batch, pos, head * d_head]``; other shapes are unchanged."""
    return z.flatten(-2) if z.ndim == 4 else z


def unflatten_heads(z: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """``[batch, pos, head * d_head]`` -> the shape of ``like``, with or without a dimension of heads."""
    return z.reshape(like.shape)

"""Access to the place, decoder rows and activations of an SAE or of loaded latents.

The functions accept SAEs of this package, SAEs of SAELens, and :class:`~gemma_scope_tl.sae.latents.Latents`, so that
other packages need not distinguish them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.families import Family, families, family_of_model
from gemma_scope_tl.sae.arguments import as_index, as_indices, is_index, shown
from gemma_scope_tl.sae.choices import bring
from gemma_scope_tl.sae.config import FAMILY, OF_IDENTITY, Identity
from gemma_scope_tl.sae.latents import Latents
from gemma_scope_tl.sae.layered import LayeredCoder, not_of_several_layers
from gemma_scope_tl.sites import Site, site_of_hook

if TYPE_CHECKING:
    from sae_lens import SAE

    from gemma_scope_tl.registry.schema import SAERow

    SAEOrLatents = SAE[Any] | Latents
    LatentNames = tuple[int, int] | Iterable[tuple[int, int]] | torch.Tensor


def locate(sae: SAEOrLatents, family: Family | None = None) -> tuple[Site, int | None]:
    """The site and layer that an SAE, a transcoder or loaded latents belong to.

    An SAE of this package has attributes for them. For an SAE of SAELens they follow from the hooks in its metadata.

    Args:
        sae: an SAE or latents.
        family: the family of the site; None for :func:`trained_family`.

    Raises:
        SpliceError: when the site is unknown, or for a layered coder, which belongs to several layers.
        UnknownNameError: for a site or a hook that does not exist.
    """
    check_is_not_layered(sae)
    name = getattr(sae, "site", None)
    if name is not None:
        return (family or trained_family(sae)).site(name), getattr(sae, "layer", None)
    if isinstance(sae, Latents):
        raise SpliceError("The site of these latents is unknown: give them a site and a layer.")
    hook = sae.cfg.metadata.hook_name
    if hook is None:
        raise SpliceError("The site of this SAE is unknown: load it with site= and layer=.")
    return site_of_hook(hook, sae.cfg.metadata.hook_name_out, family)


def check_is_not_layered(sae: Any) -> None:
    """Raise :class:`SpliceError` for a layered coder, for functions of one SAE."""
    if isinstance(sae, LayeredCoder):
        raise SpliceError(not_of_several_layers(sae))


def places_of(coder: SAEOrLatents | LayeredCoder, family: Family | None = None) -> list[tuple[Site, int | None]]:
    """The site and layer of :func:`locate`, or those of every layer of a layered coder.

    Raises:
        SpliceError, UnknownNameError: as :func:`locate`.
    """
    if not isinstance(coder, LayeredCoder):
        return [locate(coder, family)]
    site = (family or trained_family(coder)).site(coder.site)
    return [(site, layer) for layer in coder.layers]


def layered_hook_name(coder: LayeredCoder, k: int, reads: bool = False) -> str:
    """HookedTransformer's name of the hook that a layered coder writes, or ``reads``, at its layer ``k``.

    Raises:
        SpliceError: when the family of the coder's model is unknown, and the hook differs between families.
    """
    row = coder.row
    known = _said_family(coder, OF_IDENTITY) if row is None else row.model_family
    sites = [one.site(coder.site) for one in families() if coder.site in one.sites and known in (None, one)]
    several = {
        (site.hook_name if reads else site.hook_name_out)(coder.layers[k], "hooked_transformer") for site in sites
    }
    if len(several) != 1:
        raise SpliceError(
            f"The model of this {coder.kind} is unknown, and what it reads is another tensor in each family of models: "
            "set its model_name or its family."
        )
    return several.pop()


def trained_family(sae: SAEOrLatents | LayeredCoder) -> Family:
    """The family of the model that an SAE, a layered coder or latents were trained on.

    It is the one that the registry row or the metadata states, or else the one that the name of the model belongs to,
    or the only one that has the hooks in the metadata. If all of that is unknown, it is the first family that has the
    site.
    """
    row = getattr(sae, "row", None)
    if row is not None:
        return row.model_family
    return _said_family(sae, OF_IDENTITY) or family_of_model(None, getattr(sae, "site", None))


def check_trained_on(sae: SAEOrLatents | LayeredCoder, family: Family, model: str | None) -> None:
    """Check that an SAE or latents were not trained on another model than the one of this family and name.

    Models of equal width have equal shapes, so a foreign SAE would run and give numbers without a meaning. An SAE that
    says nothing may belong to any model, and one that names a model which no family knows to any family; the hooks in
    its metadata may be assumed ones.

    Args:
        sae: an SAE, a layered coder or latents.
        family: the family of the model. In another one, a hook of one name may give another tensor.
        model: the model's name in SAEs; None if it is unknown. An SAE of a base model fits the tuned model too (Gemma
            Scope, section 4.5), and the other way round.

    Raises:
        SpliceError: for an SAE of another model or family.
    """
    _check_name(_model_of(sae), family, model)
    row = getattr(sae, "row", None)
    if row is not None:
        _check_family_of_row(row, family)
        return
    said = _said_family(sae, ("model_name", FAMILY))
    if said is not None and said.name != family.name:  # by name, as a copy of a model has a copy of its family
        name = _model_of(sae)
        trained = f" ({name})" if name else ""
        raise SpliceError(f"The SAE was trained on a {said.title}{trained}, and this model is a {family.title}.")


def check_row_trained_on(row: SAERow, family: Family, model: str | None) -> None:
    """As :func:`check_trained_on`, for the SAE of a row of the registry, which need not be loaded."""
    _check_name(row.model, family, model)
    _check_family_of_row(row, family)


def _check_name(trained: str | None, family: Family, model: str | None) -> None:
    if trained and model and _base_name(trained, family) != _base_name(model, family):
        raise SpliceError(f"The SAE was trained on {trained!r}; this model is {model!r}.")


def _check_family_of_row(row: SAERow, family: Family) -> None:
    if row.model_family.name != family.name:  # which decided the units of an embedding's SAE
        raise SpliceError(
            f"{row.release}/{row.id} was loaded as an SAE of a {row.model_family.title}, and this model is a "
            f"{family.title}. If the SAE is of such a model, its registry file needs `family: {family.name}`."
        )


def _base_name(model: str, family: Family) -> str:
    return family.base_name(model.split("/")[-1].lower())


def _said_family(sae: SAEOrLatents | LayeredCoder, names: Iterable[str]) -> Family | None:
    """The family that the model's name or these entries of the metadata tell; None if they tell none."""
    if isinstance(sae, LayeredCoder):
        said = {FAMILY: sae.family}
    else:
        said = {} if isinstance(sae, Latents) else {name: sae.cfg.metadata.get(name) for name in names}
    return Identity("", _model_of(sae), getattr(sae, "site", None), metadata=said).known_family


def _model_of(sae: SAEOrLatents | LayeredCoder) -> str | None:
    name = getattr(sae, "model_name", None)
    if not name and not isinstance(sae, (Latents, LayeredCoder)):
        name = sae.cfg.metadata.get("model_name")
    return name if isinstance(name, str) else None


def chosen_latents(sae: SAEOrLatents, latents: int | Iterable[int]) -> list[int]:
    """Indices of latents as a list, checked against the latents of ``sae``.

    Raises:
        SpliceError: for no latent, a latent that does not exist, or one that is given twice.
        UnknownNameError: for a latent that is not among the loaded ones.
    """
    from gemma_scope_tl.sae.base import checked_latents

    check_is_not_layered(sae)
    if not isinstance(sae, Latents):
        return checked_latents(latents, sae.cfg.d_sae)
    chosen = as_indices(latents)
    for latent in chosen:
        sae.position(latent)
    return checked_latents(chosen, max(chosen, default=0) + 1)


def layered_latents(coder: LayeredCoder, latents: LatentNames) -> list[tuple[int, int]]:
    """Latents of a layered coder as pairs of the coder's layer, counted from 0, and the index within that layer.

    Args:
        coder: a layered coder.
        latents: a pair ``(model's layer, index)``, several, or an array ``[n, 2]`` of them.

    Raises:
        SpliceError: for no latent, one that does not exist or is given twice, or anything but such pairs.
    """
    given: list[Any] = latents.tolist() if isinstance(latents, (torch.Tensor, np.ndarray)) else _listed(latents)
    pairs = [tuple(given)] if len(given) == 2 and all(map(is_index, given)) else given
    chosen: list[tuple[int, int]] = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise SpliceError(
                f"A latent of a {coder.kind} is a pair of a layer and an index, such as ({coder.layers[0]}, 17); "
                f"given: {shown(pair)}."
            )
        k, index = coder.index_of(as_index(pair[0])), as_index(pair[1])
        if not 0 <= index < coder.widths[k]:
            raise SpliceError(
                f"No latent {index}: layer {coder.layers[k]} of this {coder.kind} has latents 0..{coder.widths[k] - 1}."
            )
        chosen.append((k, index))
    if not chosen:
        raise SpliceError("No latents were given: name at least one.")
    if len(set(chosen)) < len(chosen):
        raise SpliceError(f"A latent is given twice: {[(coder.layers[k], index) for k, index in chosen]}.")
    return chosen


def _listed(latents: Any) -> list[Any]:
    several = isinstance(latents, Iterable) and not isinstance(latents, (str, bytes, Mapping))
    return list(latents) if several else [latents]


def decoder_rows(sae: SAEOrLatents, latents: list[int]) -> Float[torch.Tensor, "k d_out"]:
    """The decoder rows of some latents, through which gradients flow."""
    return sae.decoder_rows(latents) if isinstance(sae, Latents) else sae.W_dec[latents]


def encode_latents(
    sae: SAEOrLatents, x: Float[torch.Tensor, "... d_in"], latents: list[int] | None = None
) -> Float[torch.Tensor, "... k"]:
    """Activations of some latents (None for all of ``sae``) on ``x``, heads flattened.

    Hooks on the SAE's hook points do not run, because caches and edits of an attached SAE concern the pass of the
    model. ``sae`` is moved in place to the device of ``x``.

    Raises:
        SpliceError: for loaded latents without encoder columns.
    """
    from sae_lens.saes.sae import _disable_hooks  # pyright: ignore[reportPrivateUsage]

    from gemma_scope_tl.sae.base import GemmaScopeMixin

    bring(sae, x.device)
    if isinstance(sae, Latents):
        acts = sae.encode(x)
        return acts if latents is None else acts[..., [sae.position(latent) for latent in latents]]
    if isinstance(sae, GemmaScopeMixin) and latents is not None:
        return sae.encode(x, latents=latents)
    with flat_heads(sae), _disable_hooks(sae):
        acts = sae.encode(x.to(sae.dtype))
    return acts if latents is None else acts[..., latents]


def decode_with_skip(sae: SAE[Any], acts: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The output for latents ``acts`` of ``x``, with the skip path of a skip transcoder, which ``decode`` lacks."""
    out = sae.decode(acts)
    w_skip = getattr(sae, "W_skip", None)
    return out if w_skip is None else out + x.to(out.dtype) @ w_skip.T


@contextmanager
def flat_heads(sae: Any) -> Generator[None]:
    """Let SAELens's SAEs at attention heads accept ``[..., n_heads * d_head]``, as those of this package do."""
    reshapes = bool(getattr(sae, "hook_z_reshaping_mode", False))
    if reshapes:
        sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        if reshapes:
            sae.turn_on_forward_pass_hook_z_reshaping()

"""What interventions and tables ask of a whole SAE or of a few loaded latents, whichever it is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.model.attached import locate
from gemma_scope_tl.sae.arguments import as_indices
from gemma_scope_tl.sae.choices import bring
from gemma_scope_tl.sae.latents import Latents
from gemma_scope_tl.sites import Site, get_site

if TYPE_CHECKING:
    from sae_lens import SAE

    Source = SAE[Any] | Latents


def place_of(source: Source) -> tuple[Site, int | None]:
    """The site and layer of an SAE, a transcoder or loaded latents.

    Raises:
        SpliceError: when it does not say.
    """
    if not isinstance(source, Latents):
        return locate(source)
    if source.site is None:
        raise SpliceError("These latents do not say where they belong: give them a site and a layer.")
    return get_site(source.site), source.layer


def chosen_latents(source: Source, latents: int | Iterable[int]) -> list[int]:
    """Indices of latents as a list, checked against what ``source`` has.

    Raises:
        SpliceError: when there is none, no such latent, or one twice.
        UnknownNameError: when it is not among the loaded ones.
    """
    from gemma_scope_tl.sae.arguments import checked_latents

    if not isinstance(source, Latents):
        return checked_latents(latents, source.cfg.d_sae)
    chosen = as_indices(latents)
    for latent in chosen:
        source.position(latent)
    return checked_latents(chosen, max(chosen, default=0) + 1)


def decoder_rows(source: Source, latents: list[int]) -> Float[torch.Tensor, "k d_out"]:
    """Decoder rows; gradients reach them."""
    return source.decoder_rows(latents) if isinstance(source, Latents) else source.W_dec[latents]


def encode_latents(
    source: Source, x: Float[torch.Tensor, "... d_in"], latents: list[int] | None = None
) -> Float[torch.Tensor, "... k"]:
    """Activations of some latents (None: all that ``source`` has) on flat ``x``, passing none of its hook points.

    ``source`` moves to the device of ``x``, in place.

    Raises:
        SpliceError: for loaded latents without encoder columns.
    """
    from gemma_scope_tl.sae.base import GemmaScopeMixin

    bring(source, x.device)
    if isinstance(source, Latents):
        acts = source.encode(x)
        return acts if latents is None else acts[..., [source.position(latent) for latent in latents]]
    if isinstance(source, GemmaScopeMixin) and latents is not None:
        return source.encode(x, latents=latents)
    acts = _encode_quietly(source, x.to(source.dtype))
    return acts if latents is None else acts[..., latents]


def _encode_quietly(sae: SAE[Any], x: torch.Tensor) -> torch.Tensor:
    """``encode`` without hooks: an attached SAE's caches and edits are not for this."""
    from sae_lens.saes.sae import _disable_hooks  # pyright: ignore[reportPrivateUsage]

    reshaping = sae.hook_z_reshaping_mode
    if reshaping:  # x is flat here; a stock SAE must be told
        sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        with _disable_hooks(sae):
            return sae.encode(x)
    finally:
        if reshaping:
            sae.turn_on_forward_pass_hook_z_reshaping()

"""The JumpReLU SAE, and ``load_sae``."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE as SAELensJumpReLUSAE

from gemma_scope_tl.sae.base import GemmaScopeMixin


class JumpReLUSAE(GemmaScopeMixin, SAELensJumpReLUSAE):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A Gemma Scope SAE: ``f = JumpReLU_theta(x W_enc + b_enc)``, ``x_hat = f W_dec + b_dec``.

    A :class:`sae_lens.SAE`, so SAELens' analysis functions take it. See :class:`GemmaScopeMixin` for what differs.
    """


def load_sae(
    model: str,
    site: str,
    layer: int | None = None,
    width: str | int | None = None,
    l0: int | float | str = "canonical",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    release: str | None = None,
) -> Any:
    """The SAE of a model at a site, by what it is rather than by name.

    Args:
        model: such as ``"gemma-2-2b"``.
        site: ``res``, ``mlp``, ``att``, ``embedding`` or ``transcoder``.
        layer: counts from 0; None for the embedding.
        width: such as ``"65k"``, or the number of latents; by default ``"16k"``.
        l0: ``"canonical"`` (nearest to 100), a number that exists, or ``"closest:50"``.
        device, dtype: as :meth:`JumpReLUSAE.from_pretrained`.
        release: look in this release alone; needed where two have such an SAE.

    Raises:
        RegistryError: when two releases have such an SAE and ``release`` is not given.
        UnknownNameError: when the registry has no such SAE, with the nearest ones.
        WeightsError: when the file cannot be had or fails a check.
    """
    from gemma_scope_tl.registry.catalog import find
    from gemma_scope_tl.sae.loading import load_row

    return load_row(find(model, site, layer, width, l0, release=release), device=device, dtype=dtype)

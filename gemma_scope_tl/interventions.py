"""Hooks that steer or ablate latents, for plain ``run_with_hooks`` and inside ``generate``.

Each function gives a ``(hook name, hook)`` pair for ``fwd_hooks``. The names are HookedTransformer's, which models from
``load_model`` understand on both backends. Such a model also tells the hook where BOS, EOS and padding stand, and they
are left alone by default; on any other TransformerLens model, which cannot tell, every position is edited.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.sites import flatten_heads, unflatten_heads
from gemma_scope_tl.splicing import locate
from gemma_scope_tl.tokens import TokenTracker, special_token_ids

if TYPE_CHECKING:
    from sae_lens import SAE

Positions = slice | Sequence[int] | None


class Intervention:
    """A forward hook that edits a site's activations at chosen positions.

    Subclasses give :meth:`edited`. Heads are flattened before and restored after; the dtype stays the model's.
    """

    def __init__(self, positions: Positions = None, exclude_special_tokens: bool = True) -> None:
        self.positions, self.exclude_special_tokens = positions, exclude_special_tokens
        self._tracker: TokenTracker | None = None
        self._special: tuple[int, ...] = ()

    def edited(self, x: Float[torch.Tensor, "batch pos d"]) -> Float[torch.Tensor, "batch pos d"]:
        """The activations after the edit, as if it applied everywhere."""
        raise NotImplementedError  # pragma: no cover - an abstract method

    def bound_to(self, tracker: TokenTracker, tokenizer: Any) -> Intervention:
        """A copy that knows the token ids of the pass it runs in."""
        bound = copy.copy(self)
        if self.exclude_special_tokens:
            bound._tracker, bound._special = tracker, special_token_ids(tokenizer)
        return bound

    def __call__(self, value: torch.Tensor, hook: Any = None) -> torch.Tensor:
        """Edit ``[batch, pos, d]`` or ``[batch, pos, head, d_head]``."""
        x = flatten_heads(value)
        keep = self._untouched(x)
        out = unflatten_heads(self.edited(x).to(value.dtype), value)
        if keep is None:
            return out
        return torch.where(keep.reshape(*keep.shape, *[1] * (value.ndim - 2)), value, out)

    def _untouched(self, x: torch.Tensor) -> torch.Tensor | None:
        """True at positions (``[batch, pos]``) that must stay as they are; None when there are none."""
        keep = None
        if self.positions is not None:
            keep = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            keep[:, self.positions] = False
        if self._tracker is not None and self._special:
            special = self._tracker.mask(x, self._special)
            keep = special if keep is None else keep | special
        return keep


class Steer(Intervention):
    """Adds a fixed vector."""

    def __init__(self, vector: Float[torch.Tensor, " d"], positions: Positions, exclude_special_tokens: bool) -> None:
        super().__init__(positions, exclude_special_tokens)
        self.vector = vector

    def edited(self, x: torch.Tensor) -> torch.Tensor:
        """``x + vector``."""
        return x + self.vector.to(x.device, torch.promote_types(x.dtype, self.vector.dtype))


class Ablate(Intervention):
    """Takes away what some latents contribute."""

    def __init__(self, sae: SAE[Any], latents: list[int], positions: Positions, exclude_special_tokens: bool) -> None:
        super().__init__(positions, exclude_special_tokens)
        self.sae, self.latents = sae, latents

    def edited(self, x: torch.Tensor) -> torch.Tensor:
        """``x - f[latents] @ W_dec[latents]``: the rest of the SAE's reconstruction and its error stay."""
        acts = self.sae.encode(x.to(self.sae.dtype))[..., self.latents]
        return x - acts @ self.sae.W_dec[self.latents]


def steer(
    sae: SAE[Any],
    latent: int,
    scale: float,
    positions: Positions = None,
    exclude_special_tokens: bool = True,
) -> tuple[str, Steer]:
    """Add ``scale`` times a latent's decoder row to the site's activations.

    Args:
        sae: an SAE, or a transcoder (whose output is steered).
        latent: index of the latent.
        scale: in units of the activation; Gemma Scope's rows have unit norm, so it is the length that is added.
        positions: indices along the position axis of the tensor at hand; None for all. While generating with a cache
            that tensor holds one position.
        exclude_special_tokens: leave BOS, EOS and padding alone, on models from ``load_model``.

    Raises:
        SpliceError: when there is no such latent, or the SAE does not say where it belongs.
    """
    site, layer = locate(sae)
    (latent,) = _checked_latents(sae, [latent])
    vector = sae.W_dec[latent].detach() * scale
    return site.hook_name_out(layer, "hooked_transformer"), Steer(vector, positions, exclude_special_tokens)


def ablate(
    sae: SAE[Any],
    latents: int | Iterable[int],
    positions: Positions = None,
    exclude_special_tokens: bool = True,
) -> tuple[str, Ablate]:
    """Remove latents' contributions from the site's activations, without splicing the SAE.

    Args:
        sae: an SAE whose input is its output's site.
        latents: index or indices.
        positions, exclude_special_tokens: as for :func:`steer`.

    Raises:
        SpliceError: for a transcoder (its input is elsewhere: splice it with the error term and edit
            ``hook_sae_acts_post``), or a latent that does not exist.
    """
    site, layer = locate(sae)
    if site.is_transcoder:
        raise SpliceError(
            "A transcoder's input is elsewhere: splice it with use_error_term and edit hook_sae_acts_post."
        )
    chosen = _checked_latents(sae, [latents] if isinstance(latents, int) else latents)
    return site.hook_name(layer, "hooked_transformer"), Ablate(sae, chosen, positions, exclude_special_tokens)


def _checked_latents(sae: SAE[Any], latents: Iterable[int]) -> list[int]:
    chosen = [int(latent) for latent in latents]
    wrong = [latent for latent in chosen if not 0 <= latent < sae.cfg.d_sae]
    if wrong:
        raise SpliceError(f"No latent {wrong[0]}: this SAE has latents 0..{sae.cfg.d_sae - 1}.")
    return chosen

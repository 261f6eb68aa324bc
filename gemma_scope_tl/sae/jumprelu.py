"""JumpReLU SAEs and transcoders (Gemma Scope, section 2.2 and appendix B)."""

from __future__ import annotations

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE as SAELensJumpReLUSAE
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder as SAELensJumpReLUSkipTranscoder
from sae_lens.saes.transcoder import JumpReLUTranscoder as SAELensJumpReLUTranscoder

from gemma_scope_tl.sae.arguments import checked_tensor
from gemma_scope_tl.sae.base import GemmaScopeMixin
from gemma_scope_tl.sae.building import builds


@builds("jumprelu")
class JumpReLUSAE(GemmaScopeMixin, SAELensJumpReLUSAE):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A Gemma Scope SAE: ``f = JumpReLU_theta(x W_enc + b_enc)``, ``x_hat = f W_dec + b_dec``.

    It is a :class:`sae_lens.SAE`, so SAELens's analysis functions accept it. :class:`GemmaScopeMixin` lists the
    differences.
    """


@builds("jumprelu_transcoder")
class JumpReLUTranscoder(GemmaScopeMixin, SAELensJumpReLUTranscoder):  # pyright: ignore[reportIncompatibleMethodOverride]
    """``f = JumpReLU_theta(x W_enc + b_enc)``, ``y_hat = f W_dec + b_dec [..., d_out]``.

    ``x`` is the output of the pre-MLP RMSNorm *without* its gain, and ``y`` is what the MLP adds to the residual
    stream.
    """

    is_transcoder = True

    def forward_with_activations(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Reconstruction ``[..., d_out]``, as from :meth:`forward`, and latents ``[..., d_sae]``."""
        x = self._floating(x)
        acts = self.encode(x)
        out, skipped = self.decode(acts, like=x), self.skip(x)
        return (out if skipped is None else out + skipped).to(x.dtype), acts


@builds("jumprelu_skip_transcoder")
class JumpReLUSkipTranscoder(JumpReLUTranscoder, SAELensJumpReLUSkipTranscoder):  # pyright: ignore[reportIncompatibleMethodOverride]
    """A transcoder with a linear path: ``y_hat = f W_dec + b_dec + x W_skip^T``, ``W_skip [d_out, d_in]``."""

    def skip(self, x: torch.Tensor) -> torch.Tensor:
        """``x W_skip^T``, ``[..., d_in] -> [..., d_out]``, in the SAE's dtype."""
        return checked_tensor(x, self.get_name(), self.W_skip.device).to(self.dtype) @ self.W_skip.T

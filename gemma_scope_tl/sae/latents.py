"""Some latents of an SAE: their decoder rows, biases and thresholds, and optionally their encoder columns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float

from gemma_scope_tl.errors import SpliceError, unknown_name
from gemma_scope_tl.sae.arguments import checked_tensor

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow


@dataclass(frozen=True)
class Latents:
    """The parameters of n chosen latents of an SAE, for example for steering.

    Attributes:
        latents: indices in the SAE, in the order of the rows below.
        W_dec: ``[n, d_out]``, in the units of the site's tensor.
        b_enc, threshold: ``[n]``; the thresholds are float32 or wider.
        W_enc: ``[d_in, n]``, or None if not read, since a column of a remote file requires the whole matrix.
        b_dec: ``[d_out]``, or None if not read.
        site, layer: the place of the SAE.
        model_name: the model that the SAE was trained on, None if unknown.
        row: the registry row of the SAE, if there is one.
    """

    latents: tuple[int, ...]
    W_dec: Float[torch.Tensor, "n d_out"]
    b_enc: Float[torch.Tensor, " n"]
    threshold: Float[torch.Tensor, " n"]
    W_enc: Float[torch.Tensor, "d_in n"] | None = None
    b_dec: Float[torch.Tensor, " d_out"] | None = None
    site: str | None = None
    layer: int | None = None
    model_name: str | None = None
    row: SAERow | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def position(self, latent: int) -> int:
        """The position of a latent of the SAE in ``latents``.

        Raises:
            UnknownNameError: when it was not loaded.
        """
        try:
            return self.latents.index(latent)
        except ValueError:
            raise unknown_name("loaded latent", latent, map(str, self.latents), "Load it with load_latents.") from None

    def decoder_rows(self, latents: list[int]) -> Float[torch.Tensor, "k d_out"]:
        """Decoder rows of some of these latents, by their indices in the SAE."""
        return self.W_dec[[self.position(latent) for latent in latents]]

    def encode(self, x: Float[torch.Tensor, "... d_in"]) -> Float[torch.Tensor, "... n"]:
        """Activations of these latents: ``JumpReLU_theta(x W_enc + b_enc)``, the same as those of the whole SAE.

        Raises:
            SpliceError: when the encoder was not loaded, or ``x`` has another width or is not a tensor of real numbers.
            DeviceError: when ``x`` is on another device. Latents are moved automatically only when used with a model.
        """
        if self.W_enc is None:
            raise SpliceError("These latents were loaded without their encoder columns: load them from a local file.")
        x = checked_tensor(x, "A set of latents", self.W_enc.device)
        if x.shape[-1:] != self.W_enc.shape[:1]:
            raise SpliceError(
                f"These latents read [..., {self.W_enc.shape[0]}], but the given tensor is {list(x.shape)}."
            )
        pre = x.to(self.W_enc.dtype) @ self.W_enc + self.b_enc
        return torch.where(pre <= self.threshold, 0.0, pre)

    def to(self, device: str | torch.device) -> Latents:
        """The same latents on another device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **moved)  # pyright: ignore[reportArgumentType]

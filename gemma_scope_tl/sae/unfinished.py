"""What is said to whoever loads a training checkpoint as an SAE.

A checkpoint of the training class holds log thresholds and an unfolded ``b_dec``, in the units of scaled activations.
Its architecture word is known to SAELens's training classes alone, so SAELens's own ``SAE.load_from_disk`` would fail
with a bare ``KeyError``. Importing this module, which any use of this package's SAEs does, puts a sentence there.
"""

from __future__ import annotations

from dataclasses import dataclass

from sae_lens.registry import SAE_CLASS_REGISTRY, register_sae_class
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

from gemma_scope_tl.errors import GemmaScopeError

UNFINISHED = "gemma_scope_jumprelu"
HOW_TO_FINISH = (
    "A finished run has saved an SAE beside its checkpoints. To make one of the checkpoint: "
    "sae = sae_lens.TrainingSAE.load_from_disk(checkpoint); sae.fold_activation_norm_scaling_factor(factor), with the "
    "factor in its activation_scaler.json unless that is null; sae.save_inference_model(folder)."
)


@dataclass
class UnfinishedConfig(JumpReLUSAEConfig):
    """The configuration that a checkpoint would have as an SAE: it cannot be made."""

    @classmethod
    def architecture(cls) -> str:
        """SAELens's word for the training class."""
        return UNFINISHED

    def __post_init__(self) -> None:
        """Raise :class:`GemmaScopeError`."""
        raise GemmaScopeError(f"This is a training checkpoint, not an SAE. {HOW_TO_FINISH}")


if UNFINISHED not in SAE_CLASS_REGISTRY:
    register_sae_class(UNFINISHED, JumpReLUSAE, UnfinishedConfig)

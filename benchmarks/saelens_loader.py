"""Stock SAELens on a local Gemma Scope file: SAELens's loader, with the file in place of the download."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

from sae_lens.loading import pretrained_sae_loaders


def load_with_sae_lens(path: Path, dtype: str) -> Any:
    """Do what ``sae_lens.SAE.from_pretrained`` does after the download."""
    from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

    with mock.patch.object(pretrained_sae_loaders, "hf_hub_download", return_value=str(path)):
        cfg, state, _ = pretrained_sae_loaders.gemma_2_sae_huggingface_loader(
            "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71", device="cpu"
        )
    d_in, d_sae = state["W_enc"].shape
    kept: dict[str, Any] = {
        "d_in": d_in,
        "d_sae": d_sae,
        "apply_b_dec_to_input": cfg["apply_b_dec_to_input"],
        "dtype": dtype,
    }
    sae = JumpReLUSAE(JumpReLUSAEConfig(**kept))
    sae.load_state_dict(state)
    return sae

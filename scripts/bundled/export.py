"""Write the model folder that ships with the package: weights, configs and tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import Gemma2ForCausalLM, GenerationConfig

from scripts.bundled.tokenizer import BOS, EOS, PAD, load_tokenizer, save_tokenizer
from scripts.bundled.train_model import checkpoint_model

MODEL_FOLDER = Path("gemma_scope_tl/bundled/model")
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")


def write_model_folder(model: Gemma2ForCausalLM, folder: Path) -> None:
    """Save fp32 weights and configs into `folder`; each file is replaced by a rename."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.config.architectures = ["Gemma2ForCausalLM"]
    model.generation_config = GenerationConfig(pad_token_id=PAD, eos_token_id=EOS, bos_token_id=BOS)
    model.save_pretrained(partial)
    for name in MODEL_FILES:
        (partial / name).chmod(0o644)
        (partial / name).replace(folder / name)
    shutil.rmtree(partial)


def export_checkpoint(work: Path, folder: Path = MODEL_FOLDER) -> int:
    """Write the model of the last checkpoint and the tokenizer into `folder`; returns the checkpoint's step."""
    model, step = checkpoint_model(work)
    write_model_folder(model, folder)
    save_tokenizer(load_tokenizer(work), folder)
    return step

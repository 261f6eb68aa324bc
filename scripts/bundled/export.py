"""Write the model folder that ships with the package: weights, configs and tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from scripts.bundled.bundles import SPECIAL, Bundle
from scripts.bundled.tokenizer import load_tokenizer, save_tokenizer
from scripts.bundled.train_model import checkpoint_model

MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors")


def write_model_folder(model: Any, bundle: Bundle, folder: Path) -> None:
    """Save weights, rounded to the bundle's dtype, and configs into `folder`; each file is replaced by a rename."""
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.config.architectures = [type(model).__name__]
    model.generation_config = GenerationConfig(**SPECIAL)
    model.to(bundle.dtype).save_pretrained(partial)
    for name in MODEL_FILES:
        (partial / name).chmod(0o644)
        (partial / name).replace(folder / name)
    shutil.rmtree(partial)


def export_checkpoint(work: Path, bundle: Bundle) -> int:
    """Write the model of the last checkpoint and the tokenizer into the bundle; returns the checkpoint's step.

    All bundled models have one tokenizer, whose files are in each folder, where Hugging Face looks for them.
    """
    model, step = checkpoint_model(work, bundle)
    write_model_folder(model, bundle, bundle.model_folder)
    save_tokenizer(load_tokenizer(work), bundle.model_folder)
    return step

"""Sizes of the models that are trained on, without loading one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_scope_tl.errors import AdapterError, unknown_name
from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from gemma_scope_tl.sites import ModelDims


@dataclass(frozen=True)
class ModelSizes:
    """What memory and time of a forward pass depend on.

    Attributes:
        dims: what the sites' widths depend on.
        kv_heads: key and value heads.
        d_ff: width of the MLP's hidden layer.
        d_vocab: rows of the embedding.
    """

    dims: ModelDims
    kv_heads: int
    d_ff: int
    d_vocab: int

    @property
    def block_parameters(self) -> int:
        """Entries of the matrices of one block."""
        d, heads = self.dims.d_model, self.dims.n_heads * self.dims.d_head
        return 2 * d * heads + 2 * d * self.kv_heads * self.dims.d_head + 3 * d * self.d_ff

    @property
    def parameters(self) -> int:
        """Of the whole model; the unembedding is the embedding."""
        norms = self.dims.d_model * (4 * self.dims.n_layers + 1)
        return self.dims.n_layers * self.block_parameters + self.d_vocab * self.dims.d_model + norms

    def flops_per_token(self, blocks: int, context: int) -> float:
        """Of a forward pass through some blocks: 2 for each weight, and 4 a head entry for each position attended to,
        half the context on average."""
        heads = self.dims.n_heads * self.dims.d_head
        return blocks * (2.0 * self.block_parameters + 4.0 * heads * context / 2)


_KNOWN = {
    "gemma-2-2b": ModelSizes(ModelDims(26, 2304, 8, 256), 4, 9216, 256_000),
    "gemma-2-9b": ModelSizes(ModelDims(42, 3584, 16, 256), 8, 14_336, 256_000),
    "gemma-2-27b": ModelSizes(ModelDims(46, 4608, 32, 128), 16, 36_864, 256_000),
}


def sizes_of(name: str) -> ModelSizes:
    """Sizes of the model that ``load_model`` calls by this name.

    Known models and folders are not loaded; of any other Hugging Face id the config alone is fetched.

    Raises:
        AdapterError: there is no such config, or it is no Gemma 2's.
    """
    if name == "bundled":
        return _from_folder(BUNDLED_MODEL)
    last = name.rstrip("/").split("/")[-1].lower().removesuffix("-it")
    if Path(name).is_dir():
        return _from_folder(Path(name))
    if last in _KNOWN and name.count("/") <= 1:
        return _KNOWN[last]
    if name.count("/") != 1:
        raise unknown_name("model", name, ["bundled", *_KNOWN], "A local folder or a Hugging Face id works too.")
    from transformers import AutoConfig

    try:
        return _from_config(AutoConfig.from_pretrained(name).to_dict(), name)
    except (OSError, ValueError) as error:
        raise AdapterError(f"Cannot read the config of {name}: {error}") from error


def _from_folder(folder: Path) -> ModelSizes:
    path = folder / "config.json"
    try:
        return _from_config(json.loads(path.read_text(encoding="utf-8")), str(folder))
    except (OSError, ValueError) as error:
        raise AdapterError(f"Cannot read the model's config {path}: {error}") from error


def _from_config(config: Mapping[str, Any], name: str) -> ModelSizes:
    if config.get("model_type") != "gemma2":
        raise AdapterError(f"{name} is a {config.get('model_type', 'model of unknown type')!r}, not a Gemma 2.")
    return ModelSizes(
        ModelDims.from_config(config),
        int(config["num_key_value_heads"]),
        int(config["intermediate_size"]),
        int(config["vocab_size"]),
    )

"""The sizes and the family of a model that is not loaded, for the places of a run and estimates of memory and time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_scope_tl.errors import AdapterError, unknown_name
from gemma_scope_tl.families import Family, ModelSizes, bundled_names, families, family_of_config
from gemma_scope_tl.registry.locate import MODEL_FOLDER, bundle_folder


def sizes_of(name: str) -> ModelSizes:
    """Sizes of the model that ``load_model`` loads by this name, with the errors of :func:`family_and_sizes`."""
    return family_and_sizes(name)[1]


def family_and_sizes(name: str) -> tuple[Family, ModelSizes]:
    """Family and sizes of the model that ``load_model`` loads by this name.

    Weights are never loaded. For a Hugging Face id that is not a released model, the config is fetched.

    Raises:
        UnknownNameError: for a name that is not a model, folder or Hugging Face id.
        AdapterError: when there is no such config, or it is of no known family.
    """
    if (bundle := bundle_folder(name)) is not None:
        return _from_folder(bundle / MODEL_FOLDER)
    if Path(name).is_dir():
        return _from_folder(Path(name))
    last = name.rstrip("/").split("/")[-1].lower()
    if name.count("/") <= 1:
        for family in families():
            if family.base_name(last) in family.sizes:
                return family, family.sizes[family.base_name(last)]
    if name.count("/") != 1:
        known = [model for family in families() for model in family.sizes]
        raise unknown_name("model", name, [*bundled_names(), *known], "A local folder or a Hugging Face id works too.")
    from transformers import AutoConfig

    try:
        return _from_config(AutoConfig.from_pretrained(name).to_dict(), name)
    except (OSError, ValueError) as error:
        raise AdapterError(f"Cannot read the config of {name}: {error}") from error


def _from_folder(folder: Path) -> tuple[Family, ModelSizes]:
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if family_of_config(config, str(folder)).text_config(config) is not config:  # such files leave defaults out
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(folder).to_dict()
        return _from_config(config, str(folder))
    except (OSError, ValueError) as error:
        raise AdapterError(f"Cannot read the model's config {path}: {error}") from error


def _from_config(config: Mapping[str, Any], name: str) -> tuple[Family, ModelSizes]:
    family = family_of_config(config, name)
    return family, ModelSizes.from_config(family.text_config(config))

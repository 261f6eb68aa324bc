"""The source of activations that a configuration describes: a store, or a model with packed text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.activations.source import Source
from gemma_scope_tl.dtypes import parse_dtype
from gemma_scope_tl.registry.locate import HELD_OUT_TEXT
from gemma_scope_tl.sites import Place
from gemma_scope_tl.text.token_rows import TokenRows
from gemma_scope_tl.training.config import SuiteConfig

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

OpenSource = Callable[[Sequence[Place]], Source]
"""A function that makes the source of some places; equal places give equal batches."""


def source_opener(config: SuiteConfig, model: GemmaModel | None = None, progress: bool = True) -> OpenSource:
    """A function that makes the sources of a run. A streaming run loads its model and packs its tokens here, once.

    Args:
        config: the configuration of the run.
        model: a model from ``load_model``; by default the configuration's model is loaded.
        progress: show progress bars.

    Raises:
        GemmaScopeError: the model, the text or the store cannot be used.
    """
    section = config.source
    shared: dict[str, Any] = {
        "bucket_rows": section.bucket_rows,
        "seed": config.seed,
        "dtype": parse_dtype(section.dtype),
        "device": section.device,
    }
    path = section.path
    if path is not None:  # the configuration was checked, so the source is a store
        from gemma_scope_tl.activations.reader import StoreSource

        return lambda places: StoreSource(path, places, **shared)
    from gemma_scope_tl.activations.streaming import StreamSource

    loaded, rows = load_data(config, model, progress)
    return lambda places: StreamSource(loaded, rows, places, batch_rows=section.batch_rows, **shared)


def load_run_model(config: SuiteConfig) -> GemmaModel:
    """Load the model that a configuration names.

    Raises:
        GemmaScopeError: the model cannot be used.
    """
    from gemma_scope_tl.model.loading import load_model

    section = config.model
    return load_model(section.name, backend=section.backend, dtype=section.dtype, device=section.device)


def load_data(config: SuiteConfig, model: GemmaModel | None = None, progress: bool = True) -> tuple[Any, TokenRows]:
    """Load the model of a run and its packed tokens; the configuration must have ``data``.

    Raises:
        GemmaScopeError: the model or the text cannot be used.
    """
    from gemma_scope_tl.text.pack import pack_tokens

    data = config.data
    assert data is not None  # the configuration was checked
    loaded = model or load_run_model(config)
    rows = pack_tokens(
        str(HELD_OUT_TEXT) if data.dataset == "bundled" else data.dataset,
        loaded.tokenizer,
        data.context,
        data.folder or Path(config.output) / "tokens",
        **data.model_dump(include={"column", "split", "config", "revision", "streaming", "chat", "limit_tokens"}),
        progress=progress,
    )
    return loaded, rows

"""The activations that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gemma_scope_tl.activations.source import Source
from gemma_scope_tl.dtypes import parse_dtype
from gemma_scope_tl.registry.locate import HELD_OUT_TEXT
from gemma_scope_tl.sites import Place
from gemma_scope_tl.text.token_rows import TokenRows
from gemma_scope_tl.training.config import SuiteConfig

OpenSource = Callable[[Sequence[Place]], Source]
"""Makes the source of some places; equal places give equal batches."""


def source_opener(config: SuiteConfig, model: Any = None, progress: bool = True) -> OpenSource:
    """What makes the sources of a run. Loads the model and packs the tokens, once, if the source streams.

    Args:
        config: the run.
        model: a model from ``load_model``; loaded unless given.
        progress: show bars.

    Raises:
        GemmaScopeError: whatever is wrong with the model, the text or the store.
    """
    own = config.source
    shared: dict[str, Any] = {
        "bucket_rows": own.bucket_rows,
        "seed": config.seed,
        "dtype": parse_dtype(own.dtype),
        "device": own.device,
    }
    if own.kind == "store":
        from gemma_scope_tl.activations.reader import StoreSource

        assert own.path is not None  # the configuration was checked
        path = own.path
        return lambda places: StoreSource(path, places, **shared)
    return _streaming(config, model, shared, progress)


def _streaming(config: SuiteConfig, model: Any, shared: dict[str, Any], progress: bool) -> OpenSource:
    from gemma_scope_tl.activations.streaming import StreamSource

    loaded, rows = load_data(config, model, progress)
    return lambda places: StreamSource(loaded, rows, places, batch_rows=config.source.batch_rows, **shared)


def load_data(config: SuiteConfig, model: Any = None, progress: bool = True) -> tuple[Any, TokenRows]:
    """The model of a run and its packed tokens; the configuration has ``data``.

    Raises:
        GemmaScopeError: whatever is wrong with the model or the text.
    """
    from gemma_scope_tl.model.loading import load_model
    from gemma_scope_tl.text.pack import pack_tokens

    data, own = config.data, config.model
    assert data is not None  # the configuration was checked
    loaded = model or load_model(own.name, backend=own.backend, dtype=own.dtype, device=own.device)
    rows = pack_tokens(
        str(HELD_OUT_TEXT) if data.dataset == "bundled" else data.dataset,
        loaded.tokenizer,
        data.context,
        data.folder or Path(config.output) / "tokens",
        column=data.column,
        split=data.split,
        config=data.config,
        revision=data.revision,
        streaming=data.streaming,
        chat=data.chat,
        limit_tokens=data.limit_tokens,
        progress=progress,
    )
    return loaded, rows

"""JumpReLU SAEs and transcoders, as :class:`sae_lens.SAE` objects.

The names are imported on first use, because the import of SAELens is slow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gemma_scope_tl.sae.jumprelu import JumpReLUSAE, JumpReLUSkipTranscoder, JumpReLUTranscoder
    from gemma_scope_tl.sae.loading import load_sae
    from gemma_scope_tl.sae.save import save_sae

__all__ = ["JumpReLUSAE", "JumpReLUSkipTranscoder", "JumpReLUTranscoder", "load_sae", "save_sae"]

_HOMES = {**dict.fromkeys(__all__, "jumprelu"), "load_sae": "loading", "save_sae": "save"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

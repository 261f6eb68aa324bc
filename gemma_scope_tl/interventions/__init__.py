"""Hooks that steer, clamp, scale or ablate latents in ``run_with_hooks`` and ``generate``.

Each function returns a ``(hook name, hook)`` pair for ``fwd_hooks``. The names are those of HookedTransformer, which
models from ``load_model`` accept on both backends. Such a model also gives the hook the positions of BOS, EOS and
padding, which are not edited by default, and the positions of the text in the current pass. On any other
TransformerLens model every position may be edited, and positions count in the tensor that the hook receives.
"""

from gemma_scope_tl.interventions.functions import ablate, clamp, scale, steer
from gemma_scope_tl.interventions.hooks import (
    Ablate,
    Clamp,
    Intervention,
    LatentEdit,
    Scale,
    Steer,
    SteerLatents,
    SteerRows,
)
from gemma_scope_tl.interventions.norms import mean_norms
from gemma_scope_tl.model.positions import Positions

__all__ = [
    "Ablate",
    "Clamp",
    "Intervention",
    "LatentEdit",
    "Positions",
    "Scale",
    "Steer",
    "SteerLatents",
    "SteerRows",
    "ablate",
    "clamp",
    "mean_norms",
    "scale",
    "steer",
]

"""Hooks that steer, clamp, scale or ablate latents, for plain ``run_with_hooks`` and inside ``generate``.

Each function returns a ``(hook name, hook)`` pair for ``fwd_hooks``. The names are HookedTransformer's, which models
from ``load_model`` understand on both backends. Such a model also tells the hook where BOS, EOS and padding are,
which are left alone by default, and which positions of the text it is computing. On any other TransformerLens model
every position may be edited, and positions count in the tensor that the hook gets.
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

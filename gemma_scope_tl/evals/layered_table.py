"""The rows of a layered coder in the tables of ``evaluate``."""

from __future__ import annotations

from typing import Any

import torch

from gemma_scope_tl.evals.accumulators import LatentCounts
from gemma_scope_tl.evals.columns import Measured
from gemma_scope_tl.evals.layered import LayeredRun


def measured_layers(run: LayeredRun) -> list[Measured]:
    """What the rows of a coder are made of: all layers together, which has no ``layer``, and then each layer."""
    coder, sums = run.coder, run.sums
    clean = sums.clean.loss
    deviations = [place.deviation.value for place in sums.places]
    fired = [layer.fired for layer in sums.layers]

    def named(layer: int | None, width: int) -> dict[str, Any]:
        row = coder.row
        known = {"release": getattr(row, "release", None), "id": getattr(row, "id", None)}
        return {**known, "site": coder.kind, "layer": layer, "d_sae": width}

    together = Measured(
        named(None, coder.d_sae),
        sums.together.l0,
        LatentCounts(torch.cat([one.fired for one in fired]), fired[0].tokens),
        error=[layer.error for layer in sums.layers],
        deviation=deviations,
        clean=clean,
        loss=sums.together.loss,
        kl=sums.together.kl,
        ablated={kind: piece.value for kind, piece in sums.ablated.items()},
    )
    each = [
        Measured(named(layer, width), one.l0, one.fired, [one.error], [deviation], clean, None, None)
        for layer, width, one, deviation in zip(coder.layers, coder.widths, sums.layers, deviations, strict=True)
    ]
    return [together, *each]

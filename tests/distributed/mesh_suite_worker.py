"""One process of a divided ``train_suite``: ``torchrun -m tests.distributed.mesh_suite_worker OUT LATENTS DATA``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from gemma_scope_tl.training.suite import train_suite
from tests.training.kill import slow_writes
from tests.training.planted import PlantedSource, tiny_config


def mesh_config(out: Path, **changes: Any) -> dict[str, Any]:
    """The tiny run with a transcoder that has a skip connection, beside the one without, and a CLT."""
    config = tiny_config(out, **changes)
    affine = {"sites": ["transcoder"], "layers": [1], "widths": [64], "target_l0s": [6], "steps": 17, "skip": True}
    clt = {**affine, "sites": ["clt"], "layers": [0, 2, 3], "widths": [96]}
    return {**config, "grid": [*config["grid"], affine, clt]}


def main() -> None:
    """Train, and see that every process got the table."""
    slow_writes()
    out, latents, data = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    config = mesh_config(out, mesh={"latents": latents, "data": data})
    assert len(train_suite(config, source=PlantedSource, progress=False)) == 7


if __name__ == "__main__":
    main()

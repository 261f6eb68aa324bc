"""A source of activations with a planted dictionary: any row of it is a function of the seed and its number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gemma_scope_tl.activations.source import BucketedSource
from gemma_scope_tl.sites import ModelDims, Place, get_site, with_targets

DIMS = ModelDims(n_layers=4, d_model=128, n_heads=4, d_head=48)  # of the bundled model
ATOMS, ACTIVE, BLOCK = 96, 5, 64


class PlantedSource(BucketedSource):
    """Sparse combinations of unit atoms, other atoms at each place, the same latents at all."""

    def __init__(self, places: Sequence[Place], *, rows: int = 2_000, bucket_rows: int = 256, seed: int = 0) -> None:
        widths = {place: get_site(place.site).d_in(DIMS) for place in with_targets(places)}
        self.atoms = {place: self._atoms(place, width) for place, width in widths.items()}
        super().__init__(
            widths, rows, bucket_rows=bucket_rows, seed=seed, dtype=torch.float32, device=torch.device("cpu")
        )

    def _atoms(self, place: Place, width: int) -> torch.Tensor:
        generator = np.random.default_rng([*place.site.encode(), place.layer or 0])
        atoms = torch.from_numpy(generator.standard_normal((ATOMS, width))).float()
        return torch.nn.functional.normalize(atoms, dim=1) * 3.0

    def pieces(self, start: int, count: int) -> Iterator[dict[Place, torch.Tensor]]:
        """Rows in blocks, each drawn by its number."""
        end = start + count
        while start < end:
            block = start // BLOCK
            rng = np.random.default_rng([7, block])
            latents = np.zeros((BLOCK, ATOMS), np.float32)
            for row in latents:
                row[rng.choice(ATOMS, ACTIVE, replace=False)] = 1.0 + rng.random(ACTIVE)
            stop = min(end, (block + 1) * BLOCK)
            part = torch.from_numpy(latents[start - block * BLOCK : stop - block * BLOCK])
            yield {place: part @ atoms for place, atoms in self.atoms.items()}
            start = stop


def tiny_config(output: Path, **changes: Any) -> dict[str, Any]:
    """A run of seconds: one SAE at three places and a transcoder, of two lengths."""
    config: dict[str, Any] = {
        "output": str(output),
        "source": {"kind": "store", "path": "planted", "bucket_rows": 256, "scale_rows": 512},
        "steps": 24,
        "recipe": {"preset": "fast", "batch_size": 64, "l0_warm_up_steps": 4, "lr_warm_up_steps": 4},
        "grid": [
            {"sites": ["res"], "layers": [0, 1], "widths": [64], "target_l0s": [4, 9]},
            {"sites": ["transcoder"], "layers": [1], "widths": [64], "lambdas": [0.01], "steps": 17},
        ],
        "eval_batches": 2,
        "checkpoint_every": 5,
        "log_every": 4,
        "threads": 1,
        "seed": 3,
    }
    return {**config, **changes}

"""One process of a divided training run: ``torchrun ... mesh_worker.py LATENT_RANKS DATA_RANKS OUT``.

Every process trains its part; rank 0 writes the whole weights and the status rows.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from gemma_scope_tl.sites import Place
from gemma_scope_tl.training.place import PlaceTrainer
from gemma_scope_tl.training.recipe import FAST, GEMMA_SCOPE_2
from gemma_scope_tl.training.shard import MeshShard, Shard, agreed, process_mesh
from gemma_scope_tl.training.spec import SAESpec

D_IN, D_OUT, BATCH, STEPS = 24, 20, 64, 12


def specs(kind: str) -> list[SAESpec]:
    """Two SAEs or two transcoders of unequal widths; the last SAE has every penalty there is, and one a skip path."""
    recipe = replace(FAST, batch_size=BATCH, lr_warm_up_steps=4, l0_warm_up_steps=4)
    if kind == "transcoder":
        place = Place("transcoder", 0)
        return [SAESpec(f"t{width}", place, width, recipe, 7, target_l0=6.0, skip=width == 64) for width in (64, 128)]
    full = replace(
        GEMMA_SCOPE_2,
        batch_size=BATCH,
        lr=3e-3,
        lr_warm_up_steps=4,
        l0_warm_up_steps=4,
        init_threshold=0.05,
        bandwidth=0.1,
        frequency_coefficient=1e-3,
        matryoshka=(0.25, 0.5),
    )
    place = Place("res", 0)
    return [SAESpec("plain", place, 128, recipe, 5), SAESpec("full", place, 64, full, 6, target_l0=8.0)]


def batches(kind: str) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """The same for every process: sparse sums of planted directions."""
    generator = torch.Generator().manual_seed(3)
    planted = torch.randn(48, D_IN, dtype=torch.float64, generator=generator)
    mixed = torch.randn(D_IN, D_OUT, dtype=torch.float64, generator=generator) / D_IN**0.5
    found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
    for _ in range(STEPS):
        on = torch.rand(BATCH, 48, dtype=torch.float64, generator=generator) < 0.1
        x = (on * torch.rand(BATCH, 48, dtype=torch.float64, generator=generator)) @ planted
        x = x / x.square().sum(1).mean().sqrt()
        found.append((x, x @ mixed if kind == "transcoder" else None))
    return found


def run(kind: str, shard: Shard) -> PlaceTrainer:
    """Train; each process takes its rows of every batch."""
    d_out = D_OUT if kind == "transcoder" else D_IN
    trainer = PlaceTrainer(D_IN, d_out, specs(kind), total_steps=STEPS, shard=shard, dtype=torch.float64)
    own = shard.rows(BATCH)
    for x, y in batches(kind):
        trainer.step(x[own], None if y is None else y[own])
    return trainer


def whole(trainer: PlaceTrainer) -> dict[str, torch.Tensor]:
    """All weights, undivided; every process must call it."""
    shard, found = trainer.shard, dict[str, torch.Tensor]()
    for member, spec in zip(trainer.members, trainer.specs, strict=True):
        for name, local in trainer.weights.of(member.index, member.rows, member.skip).items():
            if name in ("b_dec", "skip") or not isinstance(shard, MeshShard):
                found[f"{spec.name}/{name}"] = local.contiguous()
                continue
            parts = list(shard.whole(local, chunk=7))
            found[f"{spec.name}/{name}"] = parts[0] if local.ndim == 1 else torch.cat(parts, 1)
    return found


def main() -> None:
    """See the module."""
    latents, data, out = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    with process_mesh(latents, data) as shard:
        agreed({"latents": latents, "data": data})
        for kind in ("sae", "transcoder"):
            trainer = run(kind, shard)
            weights, rows = whole(trainer), trainer.status()
            local = max(tensor.shape[0] for tensor in (trainer.weights.enc, trainer.second.dec))
            if shard.latent_rank == 0 and shard.data_rank == 0:
                save_file({k: v.contiguous() for k, v in weights.items()}, out / f"{kind}.safetensors")
                (out / f"{kind}.json").write_text(json.dumps({"rows": rows, "local_latents": local}))


if __name__ == "__main__":
    main()

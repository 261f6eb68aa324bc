"""Training divided over processes equals the undivided run: gloo on two and four processes, by ``torchrun``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.training.shard import WHOLE, MeshShard, process_mesh
from tests.distributed.mesh_worker import run, specs, whole

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("sae", "transcoder")


def torchrun(processes: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the worker on so many processes of this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    worker = ["-m", "tests.distributed.mesh_worker", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *worker], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def undivided() -> dict[str, tuple[dict[str, torch.Tensor], list[dict[str, object]]]]:
    """One process with everything."""
    found = {}
    for kind in KINDS:
        trainer = run(kind, WHOLE)
        found[kind] = whole(trainer), trainer.status()
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("latents", "data"), [(2, 1), (1, 2), (2, 2), (4, 1)], ids=["2x1", "1x2", "2x2", "4x1"])
def test_a_divided_run_is_the_undivided_one(latents, data, undivided, tmp_path) -> None:  # type: ignore[no-untyped-def]
    done = torchrun(latents * data, latents, data, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for kind in KINDS:
        expected, rows = undivided[kind]
        found = load_file(tmp_path / f"{kind}.safetensors")
        report = json.loads((tmp_path / f"{kind}.json").read_text())
        assert set(found) == set(expected)
        for name, tensor in expected.items():
            # float64: sums in another order, through Adam's division by roots of small squares
            torch.testing.assert_close(found[name], tensor, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")
        for here, there in zip(report["rows"], rows, strict=True):
            assert set(here) == set(there)
            for key, value in there.items():
                assert here[key] == (pytest.approx(value, rel=1e-8) if isinstance(value, float) else value), key
        assert report["local_latents"] == sum(spec.d_sae for spec in specs(kind)) // latents  # no rank has them all


def test_a_wrong_number_of_processes_is_refused() -> None:
    with pytest.raises(GemmaScopeError, match=r"torchrun --nproc-per-node 4"), process_mesh(2, 2):
        pass
    with process_mesh() as shard:
        assert shard is WHOLE


def test_parts_must_be_equal() -> None:
    shard = MeshShard(latent_rank=1, latent_ranks=2)
    assert shard.latents(64) == slice(32, 64)
    with pytest.raises(GemmaScopeError, match="cannot be divided equally"):
        shard.latents(63)

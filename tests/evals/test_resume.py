"""Caches and checkpoints: nothing is measured twice, and a killed run goes on to the same bits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals import facts as facts_module
from gemma_scope_tl.evals import run as run_module
from gemma_scope_tl.evals import saes as saes_module
from gemma_scope_tl.evals.cache import MetricsCache, key_of
from gemma_scope_tl.evals.clean_pass import CleanPass
from gemma_scope_tl.evals.suite import Evaluation, measure_suite
from gemma_scope_tl.weights.fingerprint import fingerprint, sampled_fingerprint
from tests.helpers import hooked, random_gemma, random_sae, random_tokens, shared_model

PLACES = [("res", 2), ("att", 1), ("transcoder", 3)]


def case(model: Any = None) -> tuple[Any, list[Any], torch.Tensor]:
    """A random model (the shared one unless another is given), three SAEs of it, and ten rows."""
    model = model or shared_model("grouped", "bridge")
    saes = [random_sae(model.dims, site, layer, seed=i) for i, (site, layer) in enumerate(PLACES)]
    return model, saes, random_tokens(model, batch=10)


def measured(folder: Path | None, **changes: Any) -> Evaluation:
    """The case, evaluated two rows at a time with a checkpoint after each."""
    model, saes, tokens = case()
    options: dict[str, Any] = {"batch_size": 2, "uniformity": 2, "checkpoint_every": 1, "progress": False}
    return measure_suite(model, saes, tokens, cache=folder, **{**options, **changes})


def die_at_the_third_checkpoint(folder: str) -> None:
    """Run in a process of its own: killed while it writes, as by a power cut."""
    write, saved = MetricsCache.save, list[str]()

    def save(self: MetricsCache, key: str, tensors: Any) -> None:
        write(self, key, tensors)
        saved.extend(["checkpoint"] * ("rows" in tensors))
        if len(saved) == 3:
            signal.raise_signal(signal.SIGKILL)

    with patch.object(MetricsCache, "save", save):
        measured(Path(folder))


def _bits(found: Evaluation) -> dict[str, torch.Tensor]:
    pieces = enumerate(found.sums.pieces())
    return {f"{number} {key}": value for number, piece in pieces for key, value in piece.state().items()}


def _same(one: Evaluation, other: Evaluation) -> bool:
    a, b = _bits(one), _bits(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.kill
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    code = f"from tests.evals.test_resume import die_at_the_third_checkpoint as die; die({str(tmp_path)!r})"
    died = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, check=False)
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()[-2000:]
    passes: list[int] = []
    run = CleanPass.run

    def counted(model: Any, tokens: torch.Tensor, places: Any) -> CleanPass:
        passes.append(tokens.shape[0])
        return run(model, tokens, places)

    with patch.object(CleanPass, "run", counted):
        again = measured(tmp_path)
    assert sum(passes) == 4  # of 10 rows, 6 were in the checkpoint; the means were kept
    assert _same(again, measured(None))


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    first = measured(tmp_path)
    with patch.object(run_module, "clean_batches", side_effect=AssertionError("the model ran")):
        second = measured(tmp_path)
        assert _same(first, second)
        assert second.table().equals(first.table())
        measured(tmp_path, ablations=("mean",), uniformity=0)  # a part of it
    names = {path.suffix for path in tmp_path.iterdir()}
    assert names == {".safetensors"}  # no checkpoint and no temporary file is left behind
    assert len(list(tmp_path.iterdir())) == len(first.sums.pieces())


def test_another_sae_shares_what_is_known(tmp_path: Path) -> None:
    model, saes, tokens = case()
    options: dict[str, Any] = {"cache": tmp_path, "progress": False, "ablations": ("zero",)}
    measure_suite(model, saes[:2], tokens, **options)
    restarts: list[str] = []
    restart = CleanPass.restart

    def counted(self: CleanPass, place: Any, value: torch.Tensor) -> torch.Tensor:
        restarts.append(place.key)
        return restart(self, place, value)

    other = random_sae(model.dims, "res", 2, seed=9)
    with patch.object(CleanPass, "restart", counted):
        both = measure_suite(model, [saes[0], other], tokens, **options)
    assert restarts == ["res/layer_2"] * 3  # the check, and the new SAE in two batches: no ablation, no old SAE
    fresh = measure_suite(model, [saes[0], other], tokens, ablations=("zero",), progress=False)
    assert _same(both, fresh)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["model", "sae", "tokens", "sae dtype"])
def test_other_contents_are_measured_anew(tmp_path: Path, what: str) -> None:
    model, saes, tokens = case(hooked(random_gemma(), "bridge"))
    options: dict[str, Any] = {"cache": tmp_path, "progress": False, "ablations": ()}
    before = measure_suite(model, saes[0], tokens, **options).table()
    with torch.no_grad():
        if what == "model":
            model.blocks[3].mlp.out.original_component.weight[0, 0] += 1.0
        elif what == "sae":
            saes[0].b_dec[3] += 1.0
        elif what == "sae dtype":
            saes[0].bfloat16()
        else:
            tokens[4, 7] = 5 if int(tokens[4, 7]) != 5 else 6
    after = measure_suite(model, saes[0], tokens, **options).table()
    assert before["loss_spliced"][0] != after["loss_spliced"][0]


def test_fingerprints_see_one_bit_and_no_layout() -> None:
    module = torch.nn.Linear(64, 300)
    first = fingerprint(module)
    module.weight.data = module.weight.data.T.contiguous().T
    assert fingerprint(module) == first
    assert fingerprint(torch.nn.Linear(64, 300)) != first
    with torch.no_grad():
        module.weight.data = module.weight.data.contiguous()
        module.weight.view(torch.int32)[217, 33] ^= 1
        assert fingerprint(module) != first


def test_damaged_files_and_hooked_models_are_refused(tmp_path: Path) -> None:
    model, saes, tokens = case(hooked(random_gemma(), "bridge"))
    measure_suite(model, saes[0], tokens, cache=tmp_path, ablations=(), progress=False)
    victim = next(iter(tmp_path.iterdir()))
    victim.write_bytes(victim.read_bytes()[:20])
    with pytest.raises(GemmaScopeError, match="damaged"):
        measure_suite(model, saes[0], tokens, cache=tmp_path, ablations=(), progress=False)
    model.add_hook("blocks.0.hook_mlp_out", lambda value, hook: value)
    with pytest.raises(GemmaScopeError, match="hooks on the model"):
        measure_suite(model, saes[0], tokens, cache=tmp_path / "other", progress=False)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["c" * 300, "file/below", "closed"])
def test_a_cache_that_is_no_use_costs_a_warning(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "closed").symlink_to(tmp_path / "closed")  # a loop, which root cannot follow either
    with pytest.warns(UserWarning, match="not kept in the cache") as said:
        found = measured(tmp_path / place, uniformity=0, ablations=())
    assert len([one for one in said if "cache" in str(one.message)]) == 1
    assert _same(found, measured(None, uniformity=0, ablations=()))


def test_keys_depend_on_every_fact_and_on_no_order() -> None:
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1})
    assert len({key_of({"a": 1}), key_of({"a": 2}), key_of({"b": 1})}) == 3
    assert MetricsCache(None).load("x") is None


def test_keys_and_tensors_in_a_cache_stay_as_they_were(tmp_path: Path) -> None:
    """``cache_layout.json`` was written by version 0.1: what it measured is found, and what it began goes on.

    Fingerprints are replaced, so that keys do not depend on the bits of random weights on this machine.
    """
    saved: dict[str, dict[str, Any]] = {}
    write = MetricsCache.save

    def save(self: MetricsCache, key: str, tensors: Any) -> None:
        layout = {name: [str(one.dtype).removeprefix("torch."), list(one.shape)] for name, one in tensors.items()}
        saved.setdefault(key, layout)
        write(self, key, tensors)

    with (
        patch.object(facts_module, "model_facts", lambda model: "model"),
        patch.object(saes_module, "fingerprint", lambda module: "sae"),
        patch.object(MetricsCache, "save", save),
    ):
        measured(tmp_path, batch_size=4)
    assert saved == json.loads((Path(__file__).parent / "cache_layout.json").read_text(encoding="utf-8"))


def test_fingerprints_stay_as_they_were() -> None:
    """Caches hold the strong one and stores of activations the sampled one, as computed by version 0.1."""
    module = torch.nn.Linear(3, 2)
    with torch.no_grad():
        module.weight.copy_(torch.arange(6.0).view(2, 3))
        module.bias.copy_(torch.tensor([0.5, -0.5]))
    assert fingerprint(module) == "798e6eb485d3cecfe47de75f203f9005669d2f1d7e690c125194ccd3055e0ba0"
    assert sampled_fingerprint(module) == "ae5a709951c1451a60402b29bf035b77"

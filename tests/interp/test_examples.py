"""Examples of latents: against a dense computation of our own, and the promises about sampling."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.interp import Sampling, top_examples
from gemma_scope_tl.interp.sampling import Collector
from gemma_scope_tl.sae.sparse import SparseActs

SMALL = Sampling(top=3, quantiles=2, per_quantile=2, silent=3, window=16, pool=64)


@pytest.fixture(scope="module")
def dense(model: Any, sae: Any, tokens: torch.Tensor) -> np.ndarray:
    """Activations ``[rows, windows, 16, d_sae]`` by caching the site and encoding it; 0 at BOS and EOS."""
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        acts = sae.encode(cache["blocks.2.hook_out"])
    acts[(tokens == model.tokenizer.bos_token_id) | (tokens == model.tokenizer.eos_token_id)] = 0
    return acts.reshape(tokens.shape[0], -1, 16, acts.shape[-1]).numpy()


def test_against_a_dense_computation(model: Any, sae: Any, tokens: torch.Tensor, dense: np.ndarray) -> None:
    (found,) = top_examples(model, sae, tokens, batch_size=5, progress=False, sampling=SMALL)
    assert found.tokens == int((tokens != 2).logical_and(tokens != 1).sum())
    np.testing.assert_array_equal(found.fired, (dense != 0).sum((0, 1, 2)))
    np.testing.assert_allclose(found.maxima, dense.max((0, 1, 2)), rtol=1e-4)
    peaks = dense.max(2).reshape(-1, dense.shape[-1])
    for latent in np.flatnonzero(found.fired)[::17].tolist():
        examples = found.of(latent)
        wanted = np.sort(peaks[:, latent][peaks[:, latent] > 0])[::-1][:3]
        got = [e.activation for e in examples if e.kind == "top"]
        np.testing.assert_allclose(got, wanted, rtol=1e-4)
        assert all(e.activation == 0 for e in examples if e.kind == "silent")
        assert len({(e.row, e.start) for e in examples}) == len(examples)
        for e in examples:
            np.testing.assert_allclose(e.values, dense[e.row, e.start // 16, :, latent], rtol=1e-3, atol=1e-4)
            assert e.text == "".join(model.tokenizer.decode([i]) for i in tokens[e.row, e.start : e.start + 16])


def test_quantiles_are_ordered(model: Any, sae: Any, tokens: torch.Tensor) -> None:
    sampling = Sampling(top=2, quantiles=3, per_quantile=3, silent=2, window=16)
    (found,) = top_examples(model, sae, tokens, progress=False, sampling=sampling)
    common = int(found.latents[np.argsort(found.fired)[-30]])
    parts = [[e.activation for e in found.of(common, "quantile") if e.quantile == q] for q in range(3)]
    assert [len(part) for part in parts] == [3, 3, 3]
    assert max(parts[0]) <= min(parts[1]) <= max(parts[1]) <= min(parts[2])
    assert max(parts[2]) <= min(e.activation for e in found.of(common, "top")) + 1e-6


@pytest.mark.slow
def test_batch_size_changes_nothing_and_the_seed_does(model: Any, sae: Any, tokens: torch.Tensor) -> None:
    frames = [
        top_examples(model, sae, tokens, batch_size=size, progress=False, sampling=SMALL, latents=range(200))[0]
        .frame()
        .drop(columns=["activation", "values"])
        for size in (1, 7, 24)
    ]
    assert frames[0].equals(frames[1])
    assert frames[0].equals(frames[2])
    other = Sampling(**{**vars(SMALL), "seed": 1})
    again = top_examples(model, sae, tokens, progress=False, sampling=other, latents=range(200))[0].frame()
    kept, changed = (frame[frame["kind"] == "top"].reset_index(drop=True) for frame in (frames[0], again))
    assert kept.equals(changed[kept.columns])
    assert not frames[0].equals(again[frames[0].columns])


def test_several_saes_share_a_pass(model: Any, sae: Any, tokens: torch.Tensor) -> None:
    other = gs.load_sae("bundled", "att", 1, width="1k")
    together = top_examples(model, [other, sae], tokens, progress=False, sampling=SMALL, latents=[3, 5, 60])
    assert [found.subject.place.site for found in together] == ["att", "res"]
    (alone,) = top_examples(model, sae, tokens, progress=False, sampling=SMALL, latents=[60, 5, 3, 3])
    assert alone.frame().equals(together[1].frame())
    assert set(alone.frame([5])["latent"]) <= {5}


def _random(rows: int, seed: int = 0) -> list[SparseActs]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.rand(rows, 32, 20, generator=generator)
    return [SparseActs.from_dense(torch.where(row > 0.95, row, 0.0)) for row in values]


def _collect(rows: dict[int, SparseActs], sampling: Sampling = SMALL) -> Collector:
    collector = Collector(np.arange(20), 20, 32, sampling)
    for start, acts in rows.items():
        collector.update(np.array([start]), acts, torch.ones(1, 32, dtype=torch.bool))
    return collector


def test_merging_is_seeing_everything() -> None:
    acts = dict(enumerate(_random(90)))
    whole = _collect(acts)
    parts = [_collect({row: acts[row] for row in acts if row % 3 == part}) for part in (2, 0, 1)]
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    assert [parts[0].chosen(i) for i in range(20)] == [whole.chosen(i) for i in range(20)]
    np.testing.assert_array_equal(parts[0].fired, whole.fired)
    assert parts[0].tokens == whole.tokens == 90 * 32
    with pytest.raises(GemmaScopeError, match="can only be merged"):
        whole.merge(_collect({}, Sampling(seed=5)))


def test_memory_does_not_grow() -> None:
    acts = _random(200)
    few, many = _collect(dict(enumerate(acts[:40]))), _collect(dict(enumerate(acts)))
    assert few.nbytes == many.nbytes
    assert many.nbytes <= 20 * SMALL.bytes_per_latent() + 64 * 16 + 20 * 8


def test_the_sample_is_uniform() -> None:
    """Over seeds, each of 60 firing windows stays equally often, whatever its activation and place."""
    sampling = Sampling(top=1, quantiles=1, per_quantile=2, window=32)
    counts = np.zeros(60)
    acts = SparseActs.from_dense(torch.arange(1.0, 61.0).repeat_interleave(32)[:, None])
    for seed in range(300):
        collector = Collector(np.arange(1), 1, 32, Sampling(**{**vars(sampling), "seed": seed}))
        collector.update(np.arange(60), acts, torch.ones(60, 32, dtype=torch.bool))
        counts[collector.sample.of(0)[1]] += 1
    expected = 300 * sampling.reservoir / 60
    assert counts.sum() == 300 * sampling.reservoir
    chi2 = ((counts - expected) ** 2 / expected).sum()
    assert chi2 < 100  # 59 degrees of freedom: 0.1 % of uniform samples exceed 98


def test_what_is_wrong_is_said(model: Any, sae: Any, tokens: torch.Tensor) -> None:
    with pytest.raises(GemmaScopeError, match="window is 2 or more, not 1"):
        Sampling(window=1)
    with pytest.raises(SpliceError, match="the SAE's are 0"):
        top_examples(model, sae, tokens, progress=False, latents=[10**6])
    with pytest.raises(GemmaScopeError, match="or None for all"):
        top_examples(model, sae, tokens, progress=False, latents=[])
    (found,) = top_examples(model, sae, tokens[:2], progress=False, latents=[3], sampling=SMALL)
    with pytest.raises(SpliceError, match="was not collected"):
        found.of(4)

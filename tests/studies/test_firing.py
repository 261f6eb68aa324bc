"""Firing frequencies, against the plain model and NumPy's histogram."""

from __future__ import annotations

import numpy as np
import pytest

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.model.plain import run_reference
from gemma_scope_tl.studies import count_firing, firing_frequencies
from tests.helpers import random_gemma, random_sae, random_tokens, shared_model


def test_histograms_of_several_widths_by_hand() -> None:
    hf, model = random_gemma(), shared_model("grouped", "bridge")
    tokens = random_tokens(hf, batch=5)
    saes = [random_sae(model.dims, "res", 2, d, seed=d) for d in (64, 256)]
    saes.append(random_sae(model.dims, "att", 1, 128, seed=3))
    table = firing_frequencies(model, saes, tokens, batch_size=2, bins=7, progress=False)
    counted = count_firing(model, saes, tokens, batch_size=3, progress=False)
    reference, keep = run_reference(hf, tokens), tokens > 2
    assert len(table) == 3 * 7
    for number, sae in enumerate(saes):
        acts = sae.encode(reference.sites[sae.site, sae.layer][keep])
        fired = (acts > 0).sum(0).numpy()
        assert np.abs(counted[number][1].fired.numpy() - fired).sum() <= 2  # a latent at its threshold
        fired = counted[number][1].fired.numpy()
        rows = table.iloc[number * 7 : (number + 1) * 7]
        n = int(keep.sum())
        wanted, edges = np.histogram(np.log10(fired[fired > 0] / n), 7, (-np.log10(n), 0))
        assert rows["latents"].tolist() == wanted.tolist()
        np.testing.assert_allclose(rows["low"], edges[:-1], rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(rows["high"], edges[1:], rtol=1e-12, atol=1e-12)
        first = rows.iloc[0]
        assert first["dead"] == pytest.approx((fired == 0).mean())
        assert first["dense"] == pytest.approx((fired / n > 0.1).mean())
        assert first["l0"] == pytest.approx(fired.sum() / n)
        assert rows["share"].sum() + first["dead"] == pytest.approx(1)
        assert first["median"] == pytest.approx(np.median(np.log10(fired[fired > 0] / n)))


def test_no_bins_raise() -> None:
    model = shared_model("grouped", "bridge")
    with pytest.raises(GemmaScopeError, match="bins must be 1 or more"):
        firing_frequencies(model, random_sae(model.dims, "res", 1), random_tokens(model), bins=0, progress=False)

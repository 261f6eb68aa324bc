"""Counting firings with a cache folder: the same numbers, nothing twice, and going on after a stop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.studies import firing, firing_frequencies
from tests.helpers import hooked, random_gemma, random_sae, random_tokens


def test_a_stopped_count_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = hooked(random_gemma(), "bridge")
    saes = [random_sae(model.dims, "res", layer) for layer in (0, 1)]
    tokens = random_tokens(model, batch=10)
    options: dict[str, Any] = {"batch_size": 1, "progress": False, "bins": 4}
    wanted = firing_frequencies(model, saes, tokens, **options)
    monkeypatch.setattr(firing, "CHECKPOINT", 3)
    real, seen = firing.read_batches, []

    def stopping(*args: Any) -> Any:
        for batch in real(*args):
            if len(seen) == 8:
                raise KeyboardInterrupt
            seen.append(batch.start)
            yield batch

    monkeypatch.setattr(firing, "read_batches", stopping)
    with pytest.raises(KeyboardInterrupt):
        firing_frequencies(model, saes, tokens, cache=tmp_path, **options)
    seen[:] = []
    pd.testing.assert_frame_equal(firing_frequencies(model, saes, tokens, cache=tmp_path, **options), wanted)
    assert seen == [6, 7, 8, 9]
    seen[:] = []
    more = firing_frequencies(model, [saes[1], saes[0]], tokens, cache=tmp_path, **options)
    assert seen == []
    assert sorted(more["l0"].unique()) == sorted(wanted["l0"].unique())
    model.blocks[0].hook_out.add_hook(lambda value, hook: value)
    with pytest.raises(GemmaScopeError, match="There are hooks on the model"):
        firing_frequencies(model, saes, tokens, cache=tmp_path, **options)

"""What is broken in the installed libraries is mended on the model at hand, checked or not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gemma_scope_tl.errors import AdapterMismatch
from gemma_scope_tl.families.gemma2 import GEMMA2
from gemma_scope_tl.model.bridge import GemmaBridge, build_bridge
from gemma_scope_tl.model.check import attention_fills_cache, repair
from gemma_scope_tl.model.loading import load_model
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import random_gemma, random_tokens


def greedy(model: Any, tokens: torch.Tensor, steps: int = 8) -> list[int]:
    """Greedy ids by whole passes of a plain model, without any cache."""
    ids = tokens
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0].tolist()


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_generation_is_right_whether_checked_or_not(check: bool, backend: str) -> None:
    hf_model, twin = random_gemma(), random_gemma()
    tokens = random_tokens(twin, batch=1, length=6)
    wanted = greedy(twin, tokens)
    model = load_model(hf_model=hf_model, backend=backend, check=check)
    kwargs: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
    assert model.generate(tokens, stop_at_eos=False, **kwargs)[0].tolist() == wanted
    hf_model.generation_config.eos_token_id = None
    hf_model.config.eos_token_id = None
    mask = torch.ones_like(tokens)
    assert hf_model.generate(tokens, attention_mask=mask, pad_token_id=0, **kwargs)[0].tolist() == wanted


def test_a_repair_is_made_only_where_the_defect_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    untouched = build_bridge(random_gemma(), None, None, GEMMA2)
    broken = not attention_fills_cache(untouched)
    model = load_model(hf_model=random_gemma(), check=False)
    assert len(model.fixes) == int(broken)
    assert attention_fills_cache(model)
    monkeypatch.setattr(GemmaBridge, "read_cache_kwarg", lambda self: pytest.fail("there is nothing to mend"))
    repair(model)
    assert len(model.fixes) == int(broken)


def test_a_defect_that_stays_is_an_error_without_a_check_too(monkeypatch: pytest.MonkeyPatch) -> None:
    if attention_fills_cache(build_bridge(random_gemma(), None, None, GEMMA2)):
        pytest.skip("the installed transformer-lens reads transformers' cache: there is no defect to leave")
    monkeypatch.setattr(GemmaBridge, "read_cache_kwarg", lambda self: None)
    with pytest.raises(AdapterMismatch, match="cache argument of attention"):
        load_model(hf_model=random_gemma(), check=False)


def test_a_copy_of_a_model_has_a_repair_of_its_own() -> None:
    model = load_model(hf_model=random_gemma(), check=False)
    if not model.fixes:
        pytest.skip("nothing had to be mended in the installed versions")
    again: Any = copy.deepcopy(model.blocks[0].attn)
    assert again is not model.blocks[0].attn
    assert again._update_kv_cache.args == (again,)

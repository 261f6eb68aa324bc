"""Keys of caches: whatever changes a result changes the key, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.cache import key_of
from gemma_scope_tl.evals.facts import facts_of
from gemma_scope_tl.evals.saes import subjects_of
from gemma_scope_tl.evals.suite import measure_suite
from gemma_scope_tl.interp.neuronpedia import export_neuronpedia
from gemma_scope_tl.model.counted import CountedBatch
from gemma_scope_tl.model.identity import model_facts
from gemma_scope_tl.sites import BACKENDS
from gemma_scope_tl.studies.firing import count_firing
from gemma_scope_tl.weights import fingerprint as module
from gemma_scope_tl.weights.fingerprint import fingerprint
from tests.helpers import CONFIGS, CONFIGS_3, hooked, random_gemma, random_sae, random_tokens, shared_model

CHANGES: dict[str, dict[str, Any]] = {
    "grouped": {
        "sliding_window": 5,
        "query_pre_attn_scalar": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
        "rms_norm_eps": 1e-2,
        "attn_logit_softcapping": 3.0,
        "final_logit_softcapping": 2.0,
        "hidden_activation": "silu",
        "layer_types": ["full_attention"] * 4,
    },
    "gemma3": {
        "sliding_window": 5,
        "query_pre_attn_scalar": 64,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        },
        "rms_norm_eps": 1e-2,
        "hidden_activation": "silu",
        "layer_types": ["full_attention"] * 7,
    },
}


def _made(config: str, backend: str, **changes: Any) -> Any:
    table = CONFIGS if config in CONFIGS else CONFIGS_3
    with patch.dict(table, {config: table[config] | changes}):
        return hooked(random_gemma(config), backend, check=False)


def _key(model: Any) -> str:
    ids = random_tokens(model, batch=2)
    return key_of(facts_of(model, CountedBatch(ids, *(torch.ones_like(ids, dtype=torch.bool),) * 2), ()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("config", CHANGES)
@torch.no_grad()
def test_every_value_that_changes_the_logits_changes_the_key(config: str, backend: str) -> None:
    first = _made(config, backend)
    key, ids = _key(first), random_tokens(first, batch=2)
    logits = first(ids, return_type="logits")
    assert _key(_made(config, backend)) == key  # it depends on nothing else
    for name, value in CHANGES[config].items():
        other = _made(config, backend, **{name: value})
        # Each change moves logits of size 5 by 0.04 or more; the same weights and values give the same bits.
        assert float((other(ids, return_type="logits") - logits).abs().max()) > 1e-2, name
        assert _key(other) != key, name


def test_names_and_versions_are_not_in_the_key() -> None:
    model = hooked(random_gemma(), "bridge", check=False)
    before = model_facts(model)
    config = model.original_model.config
    config.name_or_path, config.transformers_version, config.use_cache = "elsewhere", "99", False
    model.cfg.model_name, model.cfg.device = "another", torch.device("cpu")
    assert model_facts(model) == before
    config.final_logit_softcapping = 29.0  # read by Hugging Face in each pass
    assert model_facts(model) != before


Edit = Callable[[torch.Tensor], torch.Tensor]


def _swapped(one: int, other: int, dim: int) -> Edit:
    def edit(values: torch.Tensor) -> torch.Tensor:
        order = torch.arange(values.shape[dim])
        order[one], order[other] = other, one
        return values.index_select(dim, order)

    return edit


def _entries(values: torch.Tensor) -> torch.Tensor:
    flat = values.clone().view(-1)
    flat[[1001, 5003]] = flat[[5003, 1001]]
    return flat.view_as(values)


EDITS: dict[str, Edit] = {
    "columns": _swapped(3, 17, 1),
    "rows": _swapped(3, 17, 0),
    "distant rows": _swapped(1, 38, 0),
    "entries": _entries,
    "all columns": lambda values: values.roll(1, 1),
    "all rows": lambda values: values.roll(1, 0),
    "transposed": lambda values: values.T.reshape(values.shape),
    "sign of zero": lambda values: torch.where(values == 0, -values, values),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("chunk", [module.CHUNK, 1 << 12])
def test_fingerprints_see_each_moved_entry(chunk: int, dtype: torch.dtype) -> None:
    held = torch.nn.Linear(301, 40, dtype=dtype)
    with patch.object(module, "CHUNK", chunk), torch.no_grad():
        held.weight[5, 7] = 0.0
        values = held.weight.clone()
        found = {"none": fingerprint(held)}
        for name, edit in EDITS.items():
            held.weight.copy_(edit(values))
            found[name] = fingerprint(held)
        assert len(set(found.values())) == len(found)
        held.weight.data = values.T.contiguous().T  # other strides, the same values
        assert fingerprint(held) == found["none"]


def test_fingerprints_of_other_tensors() -> None:
    """Names, shapes, scalars, empty, sparse and boolean tensors, whose entries all count."""
    held, seen = torch.nn.Module(), set[str]()
    mask = torch.zeros(3000, dtype=torch.bool)
    moved = mask.clone()
    mask[11] = moved[12] = True
    for value in (
        torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(6), torch.zeros(()), torch.ones(()), torch.zeros(0),
        torch.zeros(0, 4), torch.eye(3000).to_sparse(), torch.eye(3000).flip(0).to_sparse(), mask, moved,
    ):  # fmt: skip
        held.register_buffer("one", value)
        seen.add(fingerprint(held))
    assert len(seen) == 11
    held.register_buffer("one", torch.zeros(()))
    with_one = fingerprint(held)
    del held.one
    held.register_buffer("other", torch.zeros(()))
    assert fingerprint(held) != with_one


def test_fingerprints_do_not_depend_on_the_number_of_threads() -> None:
    held, before = torch.nn.Linear(64, 300), torch.get_num_threads()
    with patch.object(module, "CHUNK", 1 << 10):
        try:
            torch.set_num_threads(1)
            one = fingerprint(held)
            torch.set_num_threads(3)
            assert fingerprint(held) == one
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_swapped_encoder_columns_are_measured_anew(backend: str, tmp_path: Path) -> None:
    model = shared_model("grouped", backend)
    sae, tokens = random_sae(model.dims, "res", 1), random_tokens(model, batch=4)
    options: dict[str, Any] = {"progress": False, "ablations": ()}
    before = measure_suite(model, sae, tokens, cache=tmp_path, **options).table()
    with torch.no_grad():
        sae.W_enc.copy_(_swapped(1, 2, 1)(sae.W_enc))
    wanted = measure_suite(model, sae, tokens, **options).table()
    assert measure_suite(model, sae, tokens, cache=tmp_path, **options).table().equals(wanted)
    assert not wanted.equals(before)


def _on_sae_point(model: Any, sae: Any) -> Callable[[], None]:
    sae.hook_sae_acts_post.add_hook(lambda value, hook: value * 0)
    return sae.reset_hooks


def _on_sae_module(model: Any, sae: Any) -> Callable[[], None]:
    return sae.hook_sae_input.register_forward_hook(lambda module, args, out: out * 0).remove


def _on_model_point(model: Any, sae: Any) -> Callable[[], None]:
    model.add_hook("blocks.2.hook_mlp_out", lambda value, hook: value * 0)
    return model.reset_hooks


def _on_model_backward(model: Any, sae: Any) -> Callable[[], None]:
    model.add_hook("blocks.2.hook_mlp_out", lambda value, hook: None, dir="bwd")
    return model.reset_hooks


def _on_model_module(model: Any, sae: Any) -> Callable[[], None]:
    return model.blocks[2].register_forward_hook(lambda module, args, out: out).remove


def _attached(model: Any, sae: Any) -> Callable[[], None]:
    model.add_sae(random_sae(model.dims, "res", 0, seed=5))  # before the place that is measured
    return model.reset_saes


HOOKS = [_on_sae_point, _on_sae_module, _on_model_point, _on_model_backward, _on_model_module, _attached]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("put", HOOKS)
def test_what_no_key_describes_is_refused(put: Any, backend: str, tmp_path: Path) -> None:
    """By everything that keeps results; without a folder, all but the export measure with the hooks."""
    model = shared_model("grouped", backend)
    sae, tokens = random_sae(model.dims, "res", 1), random_tokens(model, batch=2)
    options: dict[str, Any] = {"progress": False}
    remove = put(model, sae)
    try:
        for measure in (
            lambda folder: measure_suite(model, sae, tokens, cache=folder, ablations=(), **options),
            lambda folder: count_firing(model, sae, tokens, cache=folder, **options),
        ):
            with pytest.raises(GemmaScopeError, match=r"hooks on the|SAEs are attached"):
                measure(tmp_path / "cache")
            measure(None)
        with pytest.raises(GemmaScopeError, match=r"hooks on the|SAEs are attached"):
            export_neuronpedia(model, sae, tokens, tmp_path / "export", latents=[0], **options)
    finally:
        remove()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    measure_suite(model, sae, tokens, cache=tmp_path / "cache", ablations=(), **options)


def test_the_configuration_of_an_sae_is_in_the_key() -> None:
    """Two SAEs of SAELens with the same weights and another number of latents that fire."""
    from sae_lens import TopKSAE, TopKSAEConfig

    model = shared_model("grouped", "bridge")
    facts: list[Any] = []
    for k in (4, 5):
        config: Any = TopKSAEConfig(d_in=model.dims.d_model, d_sae=96, k=k)
        config.metadata.hook_name = "blocks.1.hook_resid_post"
        sae = TopKSAE(config)
        with torch.no_grad():
            for value in sae.parameters():
                value.fill_(0.25)
        facts.append(subjects_of(model, sae)[0].facts())
    assert facts[0]["weights"] == facts[1]["weights"] and key_of(facts[0]) != key_of(facts[1])

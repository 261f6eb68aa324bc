"""``positions=`` selects the tokens that it selects in splices, in everything that reads or explains tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.attributions.gradients import ablation_effects
from gemma_scope_tl.attributions.graph import latent_edges
from gemma_scope_tl.attributions.targets import logit
from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.interp.examples import top_examples
from gemma_scope_tl.interp.neuronpedia import export_neuronpedia
from gemma_scope_tl.interp.sampling import Sampling
from gemma_scope_tl.model.counted import counted_rows, counted_tokens
from gemma_scope_tl.sites import BACKENDS, Place
from gemma_scope_tl.studies import base_on_tuned, by_domain, count_firing
from gemma_scope_tl.studies.transfer import norm_ratios
from gemma_scope_tl.text.batch import TokenBatch
from gemma_scope_tl.viz.latent_facts import PageText, latent_facts
from tests.helpers import random_sae, random_tokens, shared_model

LENGTHS = [12, 8, 0, 7]
FORMS: dict[str, tuple[Any, Callable[[int, int], bool]]] = {
    "slice": (slice(4, None), lambda at, _: at >= 4),
    "stretch with a step": (slice(1, -2, 2), lambda at, length: at % 2 == 1 and at < length - 2),
    "int": (5, lambda at, _: at == 5),
    "from the end": (np.int64(-1), lambda at, length: at == length - 1),
    "list": ([0, 3, -2], lambda at, length: at in (0, 3, length - 2)),
    "mask [pos]": (torch.arange(6) > 3, lambda at, _: at in (4, 5)),
    "none": (None, lambda at, length: True),
}


def batch_of(side: str, model: Any = None) -> TokenBatch:
    """Rows of several lengths, one of them empty, with an EOS in the middle of one, padded on a side."""
    generator = torch.Generator().manual_seed(0)
    ids, mask = torch.zeros(4, 14, dtype=torch.long), torch.zeros(4, 14, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        first = {"left": 14 - length, "right": 0, "both": 1}[side]
        ids[row, first : first + length] = torch.randint(3, 96, (length,), generator=generator)
        mask[row, first : first + length] = True
        if length:
            ids[row, first] = 2
    ids[1, mask[1].nonzero()[5]] = 1
    return TokenBatch(ids, mask)


def by_loop(batch: TokenBatch, chosen: Callable[[int, int], bool]) -> torch.Tensor:
    out = np.zeros(batch.ids.shape, bool)
    for row, mask in enumerate(batch.mask.numpy()):
        columns = np.flatnonzero(mask)
        for at, column in enumerate(columns):
            out[row, column] = chosen(at, len(columns)) and int(batch.ids[row, column]) > 2
    return torch.from_numpy(out)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_against_a_loop_over_tokens(side: str, form: str) -> None:
    batch, (positions, chosen) = batch_of(side), FORMS[form]
    wanted = by_loop(batch, chosen)
    assert torch.equal(counted_tokens(batch, (0, 1, 2), positions), wanted)
    assert torch.equal(counted_tokens(batch, (0, 1, 2), wanted), wanted)  # a mask [batch, pos] lies over the ids
    model = shared_model("grouped", "bridge")
    rows = counted_rows(model, batch, 14, (0, 1, 2), positions)
    assert torch.equal(rows.mask, torch.arange(12) < torch.tensor(LENGTHS)[:, None])
    assert torch.equal(rows.ids[rows.counted], batch.ids[wanted])
    moved = counted_rows(model, batch, 14, (0, 1, 2), wanted)  # and moves with them
    assert torch.equal(moved.counted, rows.counted)


@pytest.mark.parametrize("config", ["grouped", "gemma3"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_tokens_as_in_a_splice(backend: str, config: str) -> None:
    """Where a splice changes its site is what counts, for every form and on either side of padding."""
    model = shared_model(config, backend)
    sae = random_sae(model.dims, "res", 1)
    name = "blocks.1.hook_resid_post"
    for side in ("left", "right"):
        batch = batch_of(side)
        ids, mask = batch.ids[[0, 1, 3]], batch.mask[[0, 1, 3]]
        seen: list[torch.Tensor] = []
        for positions, _ in FORMS.values():
            seen.clear()
            hooks = [(name, lambda x, hook: seen.append(x.clone()))]  # noqa: B023
            with torch.no_grad(), model.hooks(hooks), model.saes([sae], positions=positions), model.hooks(hooks):
                model(ids, attention_mask=mask.long())
            changed = (seen[0] != seen[1]).any(-1)
            assert torch.equal(changed, counted_tokens(TokenBatch(ids, mask), (0, 1, 2), positions))


TEXTS = ["hello world", "hi", "abcdefg", "another text, longer"]


@pytest.mark.parametrize("config", ["grouped", "gemma3"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch_size", [8, 2])
def test_features_are_the_rows_of_the_whole_table_to_the_bit(config: str, backend: str, batch_size: int) -> None:
    model = shared_model(config, backend)
    saes = [random_sae(model.dims, "res", 1), random_sae(model.dims, "att", 2)]
    options: dict[str, Any] = {"batch_size": batch_size, "top": 7}
    whole = gs.features(model, TEXTS, saes, **options)
    for positions, query in ((slice(4, None), "position >= 4"), ([1, 2], "position in (1, 2)")):
        some = gs.features(model, TEXTS, saes, positions=positions, **options)
        pd.testing.assert_frame_equal(some, whole.query(query).reset_index(drop=True), check_exact=True)
        assert len(some)
    ids = model.tokenizer(TEXTS, padding=True, return_tensors="pt")
    mask = ids["attention_mask"].cumsum(-1) > 4  # padded on the left: position >= 4
    masked = gs.features(model, dict(ids), saes, positions=mask, **options)
    pd.testing.assert_frame_equal(masked, whole.query("position >= 4").reset_index(drop=True), check_exact=True)
    assert not len(gs.features(model, "hi", saes, positions=slice(4, None)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_samplers_against_activations_of_single_rows(backend: str) -> None:
    """Counts, largest activations and mean norms over positions from the fourth on, from rows without padding."""
    model = shared_model("grouped", backend)
    sae = random_sae(model.dims, "res", 1)
    batch = batch_of("left" if backend == "bridge" else "right")
    name, parts = "blocks.1.hook_resid_post", list[torch.Tensor]()
    for row, mask in zip(batch.ids, batch.mask, strict=True):
        ids = row[mask]
        if len(ids):
            _, cache = model.run_with_cache(ids[None], names_filter=name)
            parts.append(cache[name][0][4:][ids[4:] > 2])
    x = torch.cat(parts)
    acts = sae.encode(x)
    fired, largest = (acts > 0).sum(0), acts.max(0).values
    options: dict[str, Any] = {"positions": slice(4, None)}

    (_, counts), *_ = count_firing(model, sae, batch, progress=False, **options)
    assert torch.equal(counts.fired, fired) and counts.tokens == len(x)
    (found,) = top_examples(model, sae, batch, progress=False, sampling=Sampling(window=3), **options)
    assert np.array_equal(found.fired, fired.numpy()) and found.tokens == len(x)
    np.testing.assert_allclose(found.maxima, largest.numpy(), rtol=1e-4, atol=1e-5)  # passes of other shapes
    assert all(value == 0 for one in found for at, value in enumerate(one.values) if one.start + at < 4)
    norms = gs.mean_norms(model, batch, sites="res", layers=1, **options)
    assert norms["tokens"][0] == len(x)
    assert norms["mean_norm"][0] == pytest.approx(x.norm(dim=-1).mean().item(), rel=1e-5)
    facts = latent_facts(PageText(model, batch, **options), sae, int(fired.argmax()))
    assert (facts.tokens, facts.fired) == (len(x), int(fired.max()))
    ratios = norm_ratios(model, model, batch, [Place("res", 1)], positions=slice(4, None))
    assert ratios == {Place("res", 1): 1.0}


def test_studies_pass_positions_on() -> None:
    model = shared_model("grouped", "bridge")
    sae, batch = random_sae(model.dims, "res", 1), batch_of("left")
    options: dict[str, Any] = {"progress": False, "positions": slice(4, None)}
    wanted = gs.evaluate(model, sae, batch, **options)
    domains = by_domain(model, sae, {"one": batch}, **options).drop(columns="domain")
    pd.testing.assert_frame_equal(domains, wanted)
    for positions in (slice(4, None), by_loop(batch, lambda at, _: at >= 4)):
        tuned = base_on_tuned(model, model, batch, sae, rescale=True, progress=False, positions=positions)
        for _, row in tuned.iterrows():
            assert row["scale"] == 1.0
            pd.testing.assert_series_equal(row[list(wanted)], wanted.iloc[0], check_names=False, check_dtype=False)


def test_neuronpedia_export_knows_its_positions(tmp_path: Path) -> None:
    model = shared_model("grouped", "bridge")
    sae, tokens = random_sae(model.dims, "res", 1), random_tokens(model, batch=4)
    options: dict[str, Any] = {"latents": [1, 2], "progress": False}
    (path,) = export_neuronpedia(model, sae, tokens, tmp_path / "some", positions=slice(4, None), **options)
    export_neuronpedia(model, sae, tokens, tmp_path / "whole", **options)
    assert "counted" not in (tmp_path / "whole" / "run_settings.json").read_text()  # older exports continue
    assert path.read_text() != (tmp_path / "whole" / path.name).read_text()
    with pytest.raises(GemmaScopeError, match="other settings"):
        export_neuronpedia(model, sae, tokens, tmp_path / "some", **options)


def _calls(model: Any) -> dict[str, Callable[[Any], Any]]:
    """Every function that takes positions, on one row of twelve tokens."""
    sae, later = random_sae(model.dims, "res", 1), random_sae(model.dims, "res", 2)
    ids = random_tokens(model, batch=1, length=12)
    listed = gs.features(model, ids, later).groupby("position").head(1)
    target = [(int(listed["position"].iloc[-1]), int(listed["latent"].iloc[-1]))]
    quiet: dict[str, Any] = {"progress": False}
    return {
        "splice": lambda p: model.run_with_saes(ids, saes=sae, positions=p),
        "features": lambda p: gs.features(model, ids, sae, positions=p),
        "attribute": lambda p: gs.attribute(model, ids, sae, logit(40), positions=p),
        "circuit": lambda p: gs.circuit(model, ids, [sae, later], logit(40), nodes=5, positions=p),
        "latent_edges": lambda p: latent_edges(model, ids, sae, later, target, positions=p),
        "ablation_effects": lambda p: ablation_effects(model, ids, sae, logit(40), [(5, 3)], positions=p),
        "evaluate": lambda p: gs.evaluate(model, sae, ids, positions=p, **quiet),
        "mean_norms": lambda p: gs.mean_norms(model, ids, "res", 1, positions=p),
        "top_examples": lambda p: top_examples(model, sae, ids, positions=p, **quiet),
        "count_firing": lambda p: count_firing(model, sae, ids, positions=p, **quiet),
        "feature_page": lambda p: gs.feature_page(model, sae, 3, ids, positions=p),
    }


WRONG = [
    (12, "No position 12: row 0 has 12 tokens"),
    ([1, -13], "No position -13: row 0 has 12 tokens"),
    (slice(None, None, -1), "positive step"),
    (torch.ones(1, 11, dtype=torch.bool), "but the batch of tokens"),
    ([0.5], "list of ints"),
    ("4:", "list of ints"),
    (True, "list of ints"),
]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_does_not_exist_raises_as_in_splices(backend: str) -> None:
    for name, call in _calls(shared_model("grouped", backend)).items():
        for positions, match in WRONG:
            with pytest.raises(SpliceError, match=match):
                call(positions)
                pytest.fail(f"{name} took {positions!r}")


def test_a_page_text_has_its_own_positions() -> None:
    model = shared_model("grouped", "bridge")
    sae, text = random_sae(model.dims, "res", 1), PageText(model, random_tokens(model), positions=slice(4, None))
    assert gs.feature_page(model, sae, 3, text).facts.tokens == 2 * 20
    with pytest.raises(GemmaScopeError, match="PageText"):
        gs.feature_page(model, sae, 3, text, positions=slice(4, None))

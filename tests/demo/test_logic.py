"""The demo's numbers are those of direct calls; bad input is refused in words; visitors do not disturb each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.demo import logic, views
from gemma_scope_tl.demo.limits import Limits
from gemma_scope_tl.demo.world import World, load_world
from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError
from gemma_scope_tl.registry.listing import select_rows
from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from gemma_scope_tl.sae.loading import load_row

TEXT = "In the beginning God created the heaven and the earth."


def _places(world: World) -> list[str]:
    """An SAE of every site."""
    return [world.first_name(site, world.layers(site)[-1]) for site in world.sites()]


def _sae(name: str) -> Any:
    release, _, id_ = name.partition("/")
    return load_row(gs.registry.resolve(release, id_))


def test_every_sae_of_the_registry_is_offered(world: World) -> None:
    table = gs.list_saes(model="bundled")
    assert set(world.rows) == {f"{row.release}/{row.id}" for row in table.itertuples()}
    assert set(world.sites()) == set(table["site"])
    listed = [name for site in world.sites() for layer in world.layers(site) for name in world.names(site, layer)]
    assert sorted(listed) == sorted(world.rows)
    assert world.rows[world.start()].canonical


def test_reading_is_what_features_says(world: World) -> None:
    for name in _places(world):
        reading = logic.read_text(world, TEXT, name)
        direct = gs.features(world.model, TEXT, _sae(name))
        assert reading.tokens[0] == "<bos>" and "".join(reading.tokens[1:]) == TEXT
        latent = int(direct["latent"].iloc[len(direct) // 2])
        rows = direct[direct["latent"] == latent]
        expected = np.zeros(len(reading.tokens))
        expected[rows["position"]] = rows["activation"]
        np.testing.assert_allclose(reading.activations(latent), expected, rtol=1e-6)
        top = gs.features(world.model, TEXT, _sae(name), top=5)
        at = int(top["position"].iloc[-1])
        assert reading.top_latents(at, 5)["latent"].tolist() == top[top["position"] == at]["latent"].tolist()
        assert reading.top_latents(0).empty


def test_the_strongest_latent_is_on_the_text(world: World) -> None:
    reading = logic.read_text(world, TEXT, world.start())
    position, latent = reading.strongest()
    values = reading.activations(latent)
    assert values[position] == max(values) > 0
    view = views.reading_view(reading, latent)
    assert [token for token, _ in view] == reading.tokens
    assert view[position][1] == 1.0 and all(share is None or 0 < share <= 1 for _, share in view)
    words = views.reading_words(reading, latent, position)
    assert f"active on {sum(v > 0 for v in values)} of {len(values)}" in words and f"{max(values):.2f}" in words


def test_steering_is_what_the_hook_does(world: World) -> None:
    name = world.start()
    _, latent = logic.read_text(world, TEXT, name).strongest()
    found = logic.steer_text(world, "The king said", name, latent, 0.5, 12)
    tokens = world.model.to_tokens("The king said")
    ids: dict[str, list[int]] = {}
    for key, hooks in (("plain", []), ("steered", [gs.steer(_sae(name), latent, 0.5, unit="norm")])):
        row = tokens
        for _ in range(12):  # greedy, without generate and without a cache
            with torch.no_grad():
                logits = world.model.run_with_hooks(row, fwd_hooks=hooks)
            row = torch.cat([row, logits[:, -1:].argmax(-1)], dim=1)
            if int(row[0, -1]) == world.model.tokenizer.eos_token_id:
                break
        ids[key] = row[0].tolist()
    decode = world.model.tokenizer.decode
    assert found.plain == decode(ids["plain"], skip_special_tokens=True)
    assert found.steered == decode(ids["steered"], skip_special_tokens=True)
    assert found.plain != found.steered
    same = logic.steer_text(world, "The king said", name, latent, 0.0, 12)
    assert same.plain == same.steered == found.plain


def test_sampling_follows_its_seed_and_leaves_the_process_alone(world: World) -> None:
    state = torch.random.get_rng_state()
    first, again, other = (
        logic.steer_text(world, "The king said", world.start(), 0, 0.2, 12, 1.0, seed) for seed in (1, 1, 2)
    )
    assert first == again and first.plain != other.plain
    assert torch.equal(state, torch.random.get_rng_state())


def test_splicing_is_what_run_with_saes_says(world: World) -> None:
    names = _places(world)[:2]
    effect = logic.splice_loss(world, TEXT, names)
    with torch.no_grad():
        clean = world.model(TEXT, return_type="loss").item()
        spliced = world.model.run_with_saes(TEXT, saes=[_sae(name) for name in names], return_type="loss").item()
    assert effect.clean == pytest.approx(clean, rel=1e-5)
    assert effect.spliced == pytest.approx(spliced, rel=1e-5)
    assert effect.change == pytest.approx(effect.table["change"].mean(), abs=1e-5)
    assert effect.table["token"].tolist() == effect.tokens[1:]
    assert f"{effect.change:+.3f}" in views.splice_words(effect)
    same = logic.splice_loss(world, TEXT, names, error_term=True)
    assert same.change == pytest.approx(0, abs=1e-4)
    assert not world.model.acts_to_saes


def test_the_grid_holds_the_registry_s_metrics(world: World) -> None:
    table = views.measured(world)
    assert len(table) == len(world.rows)
    direct = gs.list_saes(model="bundled", with_metrics=True)
    for width in views.widths(table):
        grid = views.suite_grid(table, "fvu", width)
        for row in direct[(direct["width"] == width) & direct["canonical"]].itertuples():
            column = "-" if str(row.layer) == "<NA>" else str(row.layer)
            np.testing.assert_equal(grid.loc[row.site, column], row.fvu)
        shown = views.heat_map(grid, "FVU")
        known = [value for value in grid.to_numpy().ravel() if value == value]
        assert all(f">{value:.3f}<" in shown for value in known)
        assert ("No measurement" in shown) == (not known)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda w, n: logic.read_text(w, "   ", n), "Type some text"),
        (lambda w, n: logic.read_text(w, None, n), "Type some text"),
        (lambda w, n: logic.read_text(w, "a" * 4001, n), "4,000 are allowed"),
        (lambda w, n: logic.read_text(w, "a\ud83d", n), "incomplete character"),
        (lambda w, n: logic.read_text(w, "a b " * 500, n), "256 are allowed"),
        (lambda w, n: logic.read_text(w, TEXT, "no-such-sae"), "Nearest"),
        (lambda w, n: logic.read_text(w, TEXT, None), "Nearest"),
        (lambda w, n: logic.page_facts(w, n, 10**9), "The latent is a number"),
        (lambda w, n: logic.page_facts(w, n, None), "The latent is a number"),
        (lambda w, n: logic.page_facts(w, n, 1.5), "whole number"),
        (lambda w, n: logic.steer_text(w, TEXT, n, 0, float("nan")), "The strength"),
        (lambda w, n: logic.steer_text(w, TEXT, n, 0, 99), "The strength"),
        (lambda w, n: logic.steer_text(w, TEXT, n, 0, 1, 10**6), "new tokens"),
        (lambda w, n: logic.steer_text(w, TEXT, n, 0, 1, 5, -1), "temperature"),
        (lambda w, n: logic.steer_text(w, TEXT, n, 0, 1, 5, 1, "x"), "seed"),
        (lambda w, n: logic.splice_loss(w, TEXT, []), "Choose from 1"),
        (lambda w, n: logic.splice_loss(w, TEXT, None), "Choose from 1"),
        (lambda w, n: logic.splice_loss(w, TEXT, [n] * 2), "attached already"),
    ],
)
def test_bad_input_is_refused_in_words(world: World, call: Any, words: str) -> None:
    with pytest.raises(GemmaScopeError, match=words):
        call(world, world.start())
    assert not world.model.acts_to_saes


def test_a_suite_without_measurements(world: World) -> None:
    """Gemma Scope's own SAEs, of every site and none of them measured here; the embedding has no layer."""
    other = World(world.model, select_rows(model="gemma-2-2b", width="16k"))
    table = views.measured(other)
    assert len(table) == len(other.rows)
    for metric, label in views.GRID_METRICS.items():
        grid = views.suite_grid(table, metric, "16k")
        assert grid.shape[0] >= 3 and {"0", "25"} <= set(grid.columns) and grid.isna().all(axis=None)
        assert "No measurement" in views.heat_map(grid, label)


def test_coders_with_labels_and_skips(world: World) -> None:
    """No two SAEs of a place have one label, and the grid has the medium ones, as none is canonical."""
    rows = select_rows(model="gemma-3-1b", layer=[13])
    other, labels = World(world.model, rows), [""]
    for site in other.sites():
        labels = [views.sae_label(other.rows[name]) for name in other.names(site, 13)]
        assert len(labels) > 8 and len(set(labels)) == len(labels)
    assert "262k latents, L0 20, small, with skip, series subset" in labels
    table = views.measured(other)
    table["fvu"] = np.arange(len(table), dtype=float)
    grid = views.suite_grid(table, "fvu", "16k")
    ids = {float(number): id_ for number, id_ in zip(table["fvu"], table["id"], strict=True)}
    ending = "layer_13_width_16k_l0_medium"
    assert [ids[value].rpartition("/")[2] for value in grid["13"]] == [ending] * 4


def test_a_site_without_layers(world: World) -> None:
    rows = select_rows(model="gemma-2-2b", site="embedding")
    other = World(world.model, rows)
    assert other.sites() == ["embedding"] and other.layers("embedding") == [None]
    assert other.rows[other.start()].site == "embedding"
    assert sorted(other.names("embedding", None)) == sorted(other.rows)
    labels = [views.place_label(row) for row in rows]
    assert len(set(labels)) == len(labels) and all(label.startswith("embedding: ") for label in labels)


def test_a_grid_of_an_unknown_metric(world: World) -> None:
    table = views.measured(world)
    with pytest.raises(UnknownNameError, match="metric"):
        views.suite_grid(table, "nothing", views.widths(table)[0])
    with pytest.raises(UnknownNameError, match="width"):
        views.suite_grid(table, "fvu", "3k")


def test_a_world_without_saes_or_with_other_limits(world: World) -> None:
    with pytest.raises(GemmaScopeError, match="no SAE"):
        World(world.model, [])
    narrow = World(world.model, list(world.rows.values()), Limits(characters=5))
    with pytest.raises(GemmaScopeError, match="5 are allowed"):
        logic.read_text(narrow, TEXT, narrow.start())


@pytest.mark.slow
def test_visitors_at_once_get_their_own_answers(world: World) -> None:
    """Steering and splicing act through hooks on the one model: none may act in another visitor's pass."""
    names = _places(world)
    jobs = [
        (lambda name=name, i=i: logic.read_text(world, f"{TEXT} {i}", name).table.to_dict())
        for i, name in enumerate(names * 3)
    ]
    jobs += [(lambda name=name: logic.splice_loss(world, TEXT, [name]).table.to_dict()) for name in names * 3]
    jobs += [(lambda s=s: logic.steer_text(world, TEXT, names[0], s, 0.7, 6, 0.8, s)) for s in range(6)]
    alone = [job() for job in jobs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda job: job(), jobs))
    assert together == alone


def test_any_model_and_release_by_choice(world: World) -> None:
    release = gs.list_saes(model="bundled")["release"].iloc[-1]
    other = load_world(str(BUNDLED_MODEL), release, rows=2, context=16, dtype="bfloat16")
    assert set(other.rows) == {name for name, row in world.rows.items() if row.release == release}
    assert other.model.cfg.dtype == other.sae(other.start()).dtype == torch.bfloat16
    assert other.text.tokens.shape == (2, 16)
    assert logic.splice_loss(other, TEXT, [other.start()]).clean > 0
    with pytest.raises(UnknownNameError, match="Nearest"):
        load_world("bundledd")
    with pytest.raises(UnknownNameError, match="Nearest"):
        load_world("bundled", "no-such-release")


def test_the_grid_of_a_suite_without_canonical_saes_has_every_site() -> None:
    """Only the residual stream has SAEs of the label medium; small is the label that all sites have."""
    table = gs.list_saes(model="bundled-gemma3", with_metrics=True)
    grid = views.suite_grid(table, "fvu", "256")
    assert grid.index.tolist() == ["res", "mlp", "att", "transcoder"] and grid.columns.tolist() == list("012345")
    small: Any = table[(table["label"] == "small") & ~table["affine"].fillna(False).astype(bool)]
    for site, rows in small.groupby("site"):
        assert grid.loc[str(site)].tolist() == rows.sort_values("layer")["fvu"].tolist()

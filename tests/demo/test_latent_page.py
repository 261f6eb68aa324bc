"""A latent's page: its numbers against direct computations, and hostile tokens that stay text."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.demo.world import World
from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.viz.latent_facts import Excerpt, LatentFacts, PageText, latent_facts, similar_latents
from gemma_scope_tl.viz.latent_page import FeaturePage, document, latent_html, token_spans

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "</style><b>", "'&amp;<!--", "a\nb\t\r"]


def _active_latent(world: World, name: str) -> int:
    table = gs.features(world.model, world.text.tokens[:4], world.sae(name))
    return int(table["latent"].value_counts().index[5])


def test_the_numbers_are_those_of_a_direct_pass(world: World) -> None:
    for site in world.sites():
        name = world.first_name(site, world.layers(site)[0])
        sae, latent = world.sae(name), _active_latent(world, name)
        facts = latent_facts(world.text, sae, latent, examples=6)
        table = gs.features(world.model, world.text.tokens, sae)
        rows = table[table["latent"] == latent]
        assert facts.fired == len(rows) == sum(facts.counts)
        assert facts.maximum == pytest.approx(rows["activation"].max(), rel=1e-5)
        values, edges, below = rows["activation"].to_numpy(), np.array(facts.edges), np.cumsum([0, *facts.counts])
        for number, edge in zip(below, edges, strict=True):  # rounding may move what lies on an edge, the maximum too
            assert (values < edge * (1 - 1e-5)).sum() <= number <= (values < edge * (1 + 1e-5)).sum()
        best = rows.groupby("sequence")["activation"].max().nlargest(6)
        np.testing.assert_allclose([e.activations[e.peak] for e in facts.examples], best, rtol=1e-5)
        for one in facts.examples:
            at = rows[(rows["sequence"] == one.row) & (rows["position"] == one.start + one.peak)]
            assert at["activation"].item() == pytest.approx(one.activations[one.peak], rel=1e-5)
            assert at["token"].item() == one.tokens[one.peak]
        pd.testing.assert_frame_equal(facts.lens, gs.top_tokens(world.model, sae, latent, k=10))


def test_neighbours_are_the_nearest_decoder_rows(world: World) -> None:
    sae = world.sae(world.start())
    rows = sae.W_dec.detach().double().numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cosines = unit @ unit[7]
    cosines[7] = -2
    found = similar_latents(sae, 7, 5)
    order = np.argsort(-cosines)[:5]
    assert found["latent"].tolist() == order.tolist()
    np.testing.assert_allclose(found["cosine"], cosines[order], atol=1e-5)


def test_neuronpedia_where_the_registry_knows_it(world: World) -> None:
    sae = gs.load_sae("bundled", "res", world.layers("res")[0], width=next(iter(world.rows.values())).width)
    assert latent_facts(world.text, sae, 3).neuronpedia is None
    known = gs.registry.resolve("gemma-scope-2b-pt-res", "layer_20/width_16k/canonical")
    sae.row = sae.row.model_copy(update={"neuronpedia": known.neuronpedia})
    facts = latent_facts(world.text, sae, 3)
    assert facts.neuronpedia == "https://www.neuronpedia.org/gemma-2-2b/20-gemmascope-res-16k/3"
    assert f'href="{facts.neuronpedia}"' in latent_html(facts) and facts.neuronpedia_warning is None
    wrong = gs.registry.resolve("gemma-scope-2b-pt-transcoders", "layer_0/width_16k/average_l0_76")
    sae.row = sae.row.model_copy(update={name: getattr(wrong, name) for name in ("neuronpedia", "neuronpedia_warning")})
    assert "on the residual stream" in latent_html(latent_facts(world.text, sae, 3))


def test_a_second_latent_of_a_place_costs_no_pass(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    text, sae = PageText(world.model, rows=4, context=32), world.sae(world.start())
    latent_facts(text, sae, 1)
    monkeypatch.setattr(type(world.model), "run_with_hooks", None)
    latent_facts(text, sae, 2)


def test_a_latent_that_never_fires(world: World) -> None:
    sae = gs.load_sae("bundled", "res", world.layers("res")[0], width=next(iter(world.rows.values())).width)
    sae.threshold.data[5] = 1e9
    facts = latent_facts(world.text, sae, 5)
    assert facts.fired == 0 and facts.examples == [] and facts.counts == []
    assert "none of the" in latent_html(facts)


def test_bad_input(world: World) -> None:
    sae = world.sae(world.start())
    with pytest.raises(SpliceError, match="No latent"):
        gs.feature_page(world.model, sae, sae.cfg.d_sae, world.text)
    with pytest.raises(GemmaScopeError, match="must be 1 or more"):
        gs.feature_page(world.model, sae, 0, world.text, examples=0)
    with pytest.raises(GemmaScopeError, match="must be 1 or more"):
        gs.feature_page(world.model, sae, 0, rows=0)
    with pytest.raises(GemmaScopeError, match="whole SAE"):
        gs.feature_page(world.model, gs.load_latents(*world.start().split("/", 1), latents=[0]), 0, world.text)


def test_a_page_in_a_notebook_and_in_a_file(world: World, tmp_path: Path) -> None:
    texts = ["In the beginning God created the heaven and the earth. " * 30]
    page = gs.feature_page(world.model, world.sae(world.start()), 3, texts, rows=4, context=32)
    assert gs.viz.feature_page is gs.feature_page
    path = page.save(tmp_path / "new" / "page.html")
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]
    saved = path.read_text(encoding="utf-8")
    assert saved == page.html and page._repr_html_() in saved
    assert set(re.findall(r'(?:src|href)="([^"]{5})', saved)) <= {"data:"}


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text = ""
        self.attributes: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data: str) -> None:
        self.text += data


def test_hostile_tokens_stay_text() -> None:
    values = [1.0] * len(HOSTILE)
    lens = pd.DataFrame(
        {
            "kind": ["promoted"] * len(HOSTILE) + ["suppressed"] * len(HOSTILE),
            "token": HOSTILE * 2,
            "logit": values * 2,
        }
    )
    neighbours = pd.DataFrame({"latent": [1], "cosine": [0.5]})
    address = 'https://host/"><script>'
    facts = LatentFacts(
        *(0, 2, "<script>release/id", "res", 1, 10, 1, 1.0),
        *([Excerpt(0, 0, HOSTILE, values, 1)], [0.0, 1.0], [1], lens, neighbours, address),
    )
    parser = _Parser()
    parser.feed(FeaturePage(facts).html)
    page = {"html", "head", "meta", "title", "body", "style", "div", "h1", "h2", "p", "a", "code", "img", "span"}
    lists = {"table", "thead", "tbody", "tr", "th", "td", "ol", "li", "b"}
    assert set(parser.tags) <= page | lists
    assert "onerror" not in parser.attributes
    assert parser.tags.count("img") == 1 and parser.tags.count("style") == 1
    for token in HOSTILE[:4]:
        assert token in parser.text
    assert "<title>&lt;script&gt;</title>" in document("<script>", "")


def test_links_lead_to_pages_and_tokens_turn_nothing_around() -> None:
    lens = pd.DataFrame({"kind": ["promoted", "suppressed"], "token": ["\u202egnp", "\x1b"], "logit": [1.0, -1.0]})
    neighbours = pd.DataFrame({"latent": [1], "cosine": [0.5]})
    tokens = ["a\u202eb", "\x1b[2J", "\u2028", "\ud83d", "👩\u200d💻"]
    for address in ("javascript:alert(1)", "data:text/html,x", "https://host/a"):
        example = [Excerpt(0, 0, tokens, [1.0] * 5, 1)]
        facts = LatentFacts(*(0, 2, "n", "res", 1, 10, 1, 1.0), *(example, [0.0, 1.0], [1], lens, neighbours, address))
        html = FeaturePage(facts).html
        assert ("<a " in html) == address.startswith("https:")
        html.encode()  # no half of a pair is left
        assert not re.search("[\u202e\u2028\x1b]", html) and "👩\u200d💻" in html and "a\\u202eb" in html


def test_colours_follow_the_values() -> None:
    spans = token_spans(["a", "b", "c"], [0.0, 1.0, 2.0], 2.0, peak=2)
    shares = [float(x) for x in re.findall(r"rgba\(234,88,12,([\d.]+)\)", spans)]
    assert shares == sorted(shares) and len(shares) == 2
    assert spans.count("gs-peak") == 1
    assert "background" not in token_spans(["a"], [0.0], 0.0)


def test_activations_are_kept_within_their_memory(world: World) -> None:
    text = PageText(world.model, rows=4, context=32, memory=1)
    for layer in world.layers("res"):
        x = text.activations(world.sae(world.first_name("res", layer)))
        assert torch.isfinite(x).all() and x.shape[:2] == (4, 32)
    assert len(text._held) == 1

"""The page of an attribution graph in Chromium: what it prunes, draws and remembers, and what a visitor does to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gemma_scope_tl.viz.graph_page import write_graph_page
from tests.attribution.example_graph import HOSTILE, random_graph, small_graph

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM.exists(), reason="needs Chromium at /usr/bin/chromium: apt-get install chromium"),
]
VIEW = "graphPage.view()"
ALL = {"node_threshold": 1.0, "edge_threshold": 1.0}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield found
        found.close()


class Visit:
    """A page that is open, and the errors on its console."""

    def __init__(self, browser: Any, path: Path, link: str = "", width: int = 1440, height: int = 900) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height}, has_touch=width < 500)
        self.page = self.context.new_page()
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda said: self.errors.append(said.text) if said.type != "log" else None)
        self.page.on("dialog", lambda dialog: (self.errors.append(dialog.message), dialog.dismiss()))
        self.page.goto(path.as_uri() + link)

    def view(self) -> dict[str, Any]:
        return self.page.evaluate(VIEW)

    def drag(self, start: Any, end: Any) -> None:
        mouse = self.page.mouse
        mouse.move(*start)
        mouse.down()
        mouse.move(start[0] + 9, start[1] + 9)
        mouse.move(*end, steps=3)
        mouse.up()

    def place(self, node: str) -> Any:
        return self.page.evaluate("id => graphPage.place(id)", node)

    def close(self) -> None:
        assert self.errors == []
        self.context.close()


def test_sliders_prune_as_the_graph_does(browser: Any, tmp_path: Path) -> None:
    graph = random_graph(150, 8, 5, 1500, seed=3)
    visit = Visit(browser, write_graph_page(graph, tmp_path / "a.html"))
    for node, edge in ((0.8, 0.98), (0.5, 0.9), (0.97, 0.995), (1.0, 1.0)):
        visit.page.evaluate(
            """([node, edge]) => { for (const [name, value] of [["node", node], ["edge", edge]]) {
              const slider = document.getElementById(`${name}-slider`);
              slider.value = value; slider.dispatchEvent(new Event("input")); } }""",
            [node, edge],
        )
        visit.page.wait_for_timeout(100)
        shown, wanted = visit.view(), graph.pruned(node, edge)
        assert shown["nodes"] == wanted.nodes["node_id"].tolist()
        pairs = wanted.edges()[["source", "target"]]
        assert {tuple(one) for one in shown["edges"]} == set(pairs.itertuples(index=False, name=None))
        assert visit.page.locator("#nodes .node").count() == len(wanted)
    visit.close()


def test_hostile_texts_are_shown_and_do_nothing(browser: Any, tmp_path: Path) -> None:
    visit = Visit(browser, write_graph_page(small_graph(), tmp_path / "a.html", title=HOSTILE[0], **ALL))
    page = visit.page
    assert page.title() == HOSTILE[0] and page.locator("h1").inner_text() == HOSTILE[0]
    for node in ("clt_2_9_3", "transcoder_0_7_2", "logit_41_3"):
        page.mouse.click(*visit.place(node))
        assert node in page.locator("#panel-body").inner_text()
    page.locator(".chip").first.click()
    page.locator("#tab-summary").click()
    assert page.locator("#boxes .box").count() == 2 and page.locator("img").count() == 0
    visit.close()


def test_dragging_makes_supernodes_and_the_link_shows_them(browser: Any, tmp_path: Path) -> None:
    path = write_graph_page(random_graph(40, 5, 3, 300, seed=1), tmp_path / "a.html", **ALL)
    visit = Visit(browser, path)
    latents = [name for name in visit.view()["nodes"] if name.split("_")[0] in ("att", "transcoder", "res")]
    one, two, three, four = latents[:4]
    visit.drag(visit.place(one), visit.place(two))
    visit.page.locator("#group-name").fill("first & <b>")
    visit.page.keyboard.press("Enter")
    chip = visit.page.locator(".chip").first.bounding_box()
    visit.drag(visit.place(three), (chip["x"] + 9, chip["y"] + 9))
    assert visit.view()["supernodes"] == [["first & <b>", two, one, three]]
    visit.page.mouse.click(*visit.place(four))
    visit.page.locator("#group-choice").select_option("+")
    visit.page.locator("#group-name").press("Enter")
    visit.page.mouse.click(*visit.place(four))
    visit.page.locator("#pin").click()
    visit.page.locator("#search").fill("golden")
    visit.page.locator("#tab-summary").click()
    box = visit.page.locator(".box").first.bounding_box()
    visit.drag((box["x"] + 9, box["y"] + 9), (box["x"] + 99, box["y"] + 49))
    visit.page.wait_for_timeout(200)
    link = visit.page.evaluate("location.hash")
    assert link == visit.view()["link"] and "places" in link
    again = Visit(browser, path, link)
    assert again.view() == visit.view()
    assert again.page.locator("#boxes").inner_html() == visit.page.locator("#boxes").inner_html()
    again.close()
    visit.close()


def test_links_of_others_and_by_hand(browser: Any, tmp_path: Path) -> None:
    path = write_graph_page(small_graph(), tmp_path / "a.html")
    plain = Visit(browser, path)
    for link in (
        "#node=7&edge=x&clicked=gone&pinned=[1]&groups={}&places=3",
        "#groups=[[1,2],[],['a']",
        "#%%%",
        "#zoom=1e9",
    ):
        visit = Visit(browser, path, link)
        assert visit.view()["nodes"] == plain.view()["nodes"]
        visit.close()
    plain.close()


def test_the_keyboard_reaches_nodes_pins_and_groups(browser: Any, tmp_path: Path) -> None:
    visit = Visit(browser, write_graph_page(small_graph(), tmp_path / "a.html"))
    page = visit.page
    page.locator("#plot").focus()
    page.keyboard.press("ArrowDown")
    assert page.locator("#said").inner_text().startswith("logit")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    assert "clt_2_9_3" in page.locator("#panel-body").inner_text()
    page.keyboard.press("p")
    assert "pinned=" in visit.view()["link"]
    page.keyboard.press("g")
    assert page.evaluate("document.activeElement.id") == "group-choice"
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    page.keyboard.type("embedding")
    page.wait_for_timeout(100)
    assert "Found (4)" in page.locator("#panel-body").inner_text()
    visit.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_has_a_sheet_and_nothing_runs_over_its_edge(browser: Any, tmp_path: Path, scheme: str) -> None:
    visit = Visit(browser, write_graph_page(random_graph(150, 12, 6, 900), tmp_path / "a.html"), width=390, height=844)
    page = visit.page
    page.emulate_media(color_scheme=scheme)
    page.wait_for_function("scheme => document.documentElement.dataset.theme === scheme", arg=scheme)
    assert not page.locator("#panel-body").is_visible()
    page.locator("#handle").click()
    assert page.locator("#panel-body").is_visible()
    plot, sheet = page.locator("#plot").bounding_box(), page.locator("#panel").bounding_box()
    assert plot["height"] > 100 and plot["y"] + plot["height"] <= sheet["y"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#handle").click()
    assert not page.locator("#panel-body").is_visible()
    visit.close()


def test_fifteen_hundred_nodes_and_twenty_thousand_edges(browser: Any, tmp_path: Path) -> None:
    """A step of a slider and a scroll take a fraction of a second; the bounds are for a busy machine."""
    graph = random_graph(1400, 32, 12, 25_000, seed=2)
    visit = Visit(browser, write_graph_page(graph, tmp_path / "a.html", **ALL))
    took = visit.page.evaluate(
        """async () => {
          const frame = () => new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
          const timed = async (act) => {
            const start = performance.now();
            act();
            await frame();
            await frame();
            return performance.now() - start;
          };
          const slider = document.getElementById("node-slider"), plot = document.getElementById("plot");
          const slide = () => { slider.value = 0.99; slider.dispatchEvent(new Event("input")); };
          return { slide: await timed(slide),
                   scroll: await timed(() => { plot.scrollTop += 40; }), };
        }"""
    )
    counts = visit.page.locator("#counts").inner_text()
    assert " 20,000 edges" in counts and " 1,500 nodes" in counts
    assert took["slide"] < 4000 and took["scroll"] < 1500, json.dumps(took)
    visit.close()

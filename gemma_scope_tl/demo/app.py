"""The web app: forms for :mod:`gemma_scope_tl.demo.logic`. Gradio is imported when an app is built."""

from __future__ import annotations

import time
from dataclasses import dataclass
from html import escape
from typing import Any

from gemma_scope_tl.demo import logic, views
from gemma_scope_tl.demo.limits import whole_number
from gemma_scope_tl.demo.queue_rules import QueueRules
from gemma_scope_tl.demo.serving import as_messages, gradio
from gemma_scope_tl.demo.world import World, load_world
from gemma_scope_tl.viz.latent_page import latent_html

TEXT = "In the beginning God created the heaven and the earth. And the earth was without form."
PROMPT = "In the beginning God created"
INTRODUCTION = """# Gemma Scope
Sparse autoencoders read a language model's activations as latents, a few of which fire on each token.
Choose one, see where its latents fire, follow a latent, steer the model with it, and see how splicing
changes the loss."""

# The model runs one request at a time, and a second request may load its SAE meanwhile. Other requests are queued.
ON_THE_MODEL = {"concurrency_id": "model", "concurrency_limit": 2}


@dataclass(frozen=True)
class Chosen:
    """The form fields that all tabs share: the SAE and the latent."""

    site: Any
    layer: Any
    sae: Any
    latent: Any


def build_app(world: World | str = "bundled", **options: Any) -> Any:
    """The demo as Gradio ``Blocks``: serve it with :func:`~gemma_scope_tl.demo.serving.launch`.

    Args:
        world: the model and SAEs to show, or the name of a model.
        options: arguments of :func:`~gemma_scope_tl.demo.world.load_world`, if ``world`` is a name.

    Raises:
        GemmaScopeError: gradio is not installed, or ``load_world`` fails.
    """
    gr = gradio()
    shown = load_world(world, **options) if isinstance(world, str) else world
    with blocks(gr, shown)(title="Gemma Scope", analytics_enabled=False) as app:
        gr.Markdown(INTRODUCTION)
        chosen = _chooser(gr, shown)
        with gr.Tabs():
            with gr.Tab("Text"):
                _text_tab(gr, app, shown, chosen)
            with gr.Tab("Latent") as latent_tab:
                _latent_tab(gr, latent_tab, shown, chosen)
            with gr.Tab("Steer"):
                _steer_tab(gr, shown, chosen)
            with gr.Tab("Splice"):
                _splice_tab(gr, shown)
            with gr.Tab("Suite"):
                _suite_tab(gr, app, shown)
    return app


def blocks(gr: Any, world: World) -> Any:
    """A ``Blocks`` that escapes error messages and, when it is closed, stops the model."""

    class Demo(gr.Blocks):
        queue_rules: QueueRules | None = None

        async def preprocess_data(self, *args: Any, **options: Any) -> Any:
            """Escape the text of Gradio's errors, which quote the request and are shown as HTML."""
            try:
                return await super().preprocess_data(*args, **options)
            except gr.Error as error:
                raise gr.Error(escape(str(error.message), quote=False), print_exception=False) from error

        def close(self, verbose: bool = True) -> None:
            if self.is_running:
                self._queue.close()
                world.stop()
                if self.queue_rules is not None:
                    self.queue_rules.end()
            super().close(verbose)

        def block_thread(self) -> None:
            try:
                while self.is_running:
                    time.sleep(0.1)
            except KeyboardInterrupt:
                pass
            self.close(verbose=False)

    return Demo


def _chooser(gr: Any, world: World) -> Chosen:
    """Fields for site, layer, SAE and latent. The choices of each field depend on the fields before it."""
    start = world.start()
    row = world.rows[start]

    def layers(site: str) -> list[str]:
        return [views.layer_label(layer) for layer in world.layers(site)]

    def names(site: str, layer: int | None) -> list[tuple[str, str]]:
        return [(views.sae_label(world.rows[name]), name) for name in world.names(site, layer)]

    def choose_site(site: str, label: str) -> tuple[Any, Any]:
        found = layers(site)
        kept = label if label in found else found[len(found) // 2]
        return gr.update(choices=found, value=kept), choose_layer(site, kept)

    def choose_layer(site: str, label: str) -> Any:
        layer = None if label == views.layer_label(None) else whole_number("The layer", label, 0, 10**6)
        return gr.update(choices=names(site, layer), value=world.first_name(site, layer))

    with gr.Row():
        site = gr.Radio(world.sites(), value=row.site, label="Site", scale=2)
        layer = gr.Dropdown(layers(row.site), value=views.layer_label(row.layer), label="Layer", scale=1, min_width=90)
        sae = gr.Dropdown(names(row.site, row.layer), value=start, label="SAE", scale=2)
        latent = gr.Number(0, label="Latent", precision=0, minimum=0, scale=1, min_width=90, elem_id="gs-latent-number")
    site.input(as_messages(choose_site), [site, layer], [layer, sae], api_name=False)
    layer.input(as_messages(choose_layer), [site, layer], [sae], api_name=False)
    return Chosen(site, layer, sae, latent)


def _text_tab(gr: Any, app: Any, world: World, chosen: Chosen) -> None:
    text = gr.Textbox(TEXT, label="Text", lines=2, max_length=world.limits.characters, elem_id="gs-text")
    button = gr.Button("Read", variant="primary", elem_id="gs-read")
    state = gr.State(None)
    tokens = gr.HighlightedText(
        label="Tokens, coloured by the latent; click one for its latents", combine_adjacent=False, elem_id="gs-tokens"
    )
    words = gr.HTML(elem_id="gs-words")
    with gr.Row():
        position = gr.Number(0, label="Token", precision=0, minimum=0, scale=1, min_width=90, elem_id="gs-position")
        table = gr.Dataframe(
            headers=["latent", "activation"],
            label="Its strongest latents; click one to follow it",
            interactive=False,
            scale=4,
            elem_id="gs-latents",
        )

    def read(given: str, sae: str) -> tuple[Any, ...]:
        reading = logic.read_text(world, given, sae)
        place, latent = reading.strongest()
        return (reading, latent, place, *show(reading, latent, place))

    def show(reading: Any, latent: Any, place: Any) -> tuple[Any, ...]:
        if reading is None:
            return [], "Read a text first.", None
        index = logic.checked_latent(world, reading.sae, latent)
        at = whole_number("The token", place, 0, len(reading.tokens) - 1)
        found = reading.top_latents(at).round({"activation": 3})
        return views.reading_view(reading, index), escape(views.reading_words(reading, index, at)), found

    def pick_token(event: Any) -> int:
        at = event.index[0] if isinstance(event.index, (list, tuple)) and event.index else event.index
        return whole_number("The token", at, 0, world.limits.tokens)

    def pick_latent(event: Any) -> int:
        row = getattr(event, "row_value", None)
        return whole_number("The latent", row[0] if isinstance(row, list) and row else row, 0, 10**9)

    pick_token.__annotations__ = pick_latent.__annotations__ = {"event": gr.SelectData}
    views_of = [tokens, words, table]
    seen = [state, chosen.latent, position, *views_of]
    reads = [button.click, text.submit, chosen.sae.change, app.load]
    gr.on(reads, as_messages(read), [text, chosen.sae], seen, api_name="read", **ON_THE_MODEL)
    shows: dict[str, Any] = {"fn": as_messages(show), "inputs": [state, chosen.latent, position], "outputs": views_of}
    tokens.select(as_messages(pick_token), None, [position], api_name=False).success(**shows, api_name=False)
    table.select(as_messages(pick_latent), None, [chosen.latent], api_name=False).success(**shows, api_name=False)
    gr.on([chosen.latent.input, position.input], **shows, api_name="show")


def _latent_tab(gr: Any, tab: Any, world: World, chosen: Chosen) -> None:
    button = gr.Button("Show this latent", variant="primary", elem_id="gs-show-latent")
    page = gr.HTML(elem_id="gs-latent-page")

    def show(sae: str, latent: Any) -> str:
        return latent_html(logic.page_facts(world, sae, latent))

    gr.on(
        [button.click, tab.select, chosen.latent.submit],
        as_messages(show),
        [chosen.sae, chosen.latent],
        [page],
        api_name="latent",
        **ON_THE_MODEL,
    )


def _steer_tab(gr: Any, world: World, chosen: Chosen) -> None:
    limits = world.limits
    gr.Markdown(
        "Adds the latent's decoder row to the activation of every token, as a multiple of the activation's norm."
    )
    prompt = gr.Textbox(PROMPT, label="Prompt", lines=2, max_length=limits.characters, elem_id="gs-prompt")
    with gr.Row():
        bounds = (-limits.strength, limits.strength)
        strength = gr.Slider(*bounds, value=0.4, step=0.05, label="Strength, in norms", elem_id="gs-strength")
        count = gr.Slider(1, limits.new_tokens, value=30, step=1, label="New tokens")
    with gr.Row():
        heat = gr.Slider(0, limits.temperature, value=0, step=0.1, label="Temperature; 0 takes the likeliest token")
        seed = gr.Number(0, label="Seed of sampling", precision=0, minimum=0, maximum=logic.SEEDS)
    button = gr.Button("Continue", variant="primary", elem_id="gs-continue")
    with gr.Row():
        plain = gr.Textbox(label="The model", lines=6, interactive=False, elem_id="gs-plain")
        steered = gr.Textbox(label="The model, steered", lines=6, interactive=False, elem_id="gs-steered")

    def run(text: str, sae: str, latent: Any, *numbers: Any) -> tuple[str, str]:
        found = logic.steer_text(world, text, sae, latent, *numbers)
        return found.plain, found.steered

    gr.on(
        [button.click, strength.release, prompt.submit],
        as_messages(run),
        [prompt, chosen.sae, chosen.latent, strength, count, heat, seed],
        [plain, steered],
        api_name="steer",
        **ON_THE_MODEL,
    )


def _splice_tab(gr: Any, world: World) -> None:
    gr.Markdown("Replaces activations by the SAEs' reconstructions, and shows how the loss of each token changes.")
    choices = [(views.place_label(row), name) for name, row in world.rows.items()]
    saes = gr.Dropdown(
        choices,
        value=[world.start()],
        multiselect=True,
        max_choices=world.limits.spliced,
        label="SAEs, one a place",
        elem_id="gs-saes",
    )
    text = gr.Textbox(TEXT, label="Text", lines=2, max_length=world.limits.characters)
    error_term = gr.Checkbox(False, label="Add the error term: what the SAEs miss, so that nothing changes")
    button = gr.Button("Splice", variant="primary", elem_id="gs-splice")
    words = gr.HTML(elem_id="gs-splice-words")
    tokens = gr.HighlightedText(
        label="Tokens by the change of their loss: red is less likely with the SAEs, violet likelier",
        combine_adjacent=False,
        elem_id="gs-splice-tokens",
    )
    table = gr.Dataframe(
        headers=["position", "token", "clean", "spliced", "change"],
        label="Loss of each token, in nats",
        interactive=False,
        max_height=320,
    )

    def run(given: str, names: list[str], error: bool) -> tuple[Any, ...]:
        effect = logic.splice_loss(world, given, names, error)
        return escape(views.splice_words(effect)), views.splice_view(effect), views.splice_table(effect)

    gr.on(
        [button.click, text.submit],
        as_messages(run),
        [text, saes, error_term],
        [words, tokens, table],
        api_name="splice",
        **ON_THE_MODEL,
    )


def _suite_tab(gr: Any, app: Any, world: World) -> None:
    table = views.measured(world)
    sizes = views.widths(table)
    labels = [(label, name) for name, label in views.GRID_METRICS.items()]
    gr.Markdown("The canonical SAE of each place, as measured on held-out text.")
    with gr.Row():
        metric = gr.Radio(labels, value="fvu", label="Metric", elem_id="gs-metric")
        width = gr.Dropdown(sizes, value=sizes[0], label="Latents")
    view = gr.HTML(elem_id="gs-suite")

    def show(name: str, size: str) -> str:
        grid = views.suite_grid(table, name, size)
        return views.heat_map(grid, views.GRID_METRICS[name], lower_is_better=name != "loss_recovered")

    gr.on([metric.input, width.input, app.load], as_messages(show), [metric, width], [view], api_name="suite")

"""``gemma-scope graph``: the attribution graph of a text, as a page, a graph file and a table."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_scope_tl.cli import checks, options
from gemma_scope_tl.cli.command import Command
from gemma_scope_tl.cli.options import GIB, registry_name, write_table
from gemma_scope_tl.cli.output import note, print_facts, print_rows, progress
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.families import bundled_names

if TYPE_CHECKING:
    from gemma_scope_tl.attributions.attribution_graph import AttributionGraph
    from gemma_scope_tl.registry.schema import SAERow

_LABELS = ("small", "medium", "big")
_NOTED = 150  # latents with promoted tokens on the page, unless another number is given
_FILES = "Files"
_TRACING = (
    *("model", "sae_model", "site", "layer", "width", "release", "coders", "sae_label", "affine", "series"),
    *("target", "logits", "budget", "max_nodes", "positions", "notes", "examples", "backend", "device", "dtype"),
)
"""Options of making a graph, which a graph that is read already has."""


def _site(name: str) -> None:
    """Raise unless it is a site, or a kind of coders that span several layers."""
    from gemma_scope_tl.sites import known_site

    known_site(name)


def _text_or_none(given: str | None) -> str | None:
    return None if given is None else checks.text(given)


@dataclass
class Graph(Command):
    """Trace a text: which latents raise which others and the next token, as a page to explore and a graph file.

    By default the coders are the model's transcoders, one in each layer: canonical ones first, then the narrowest, with
    a skip connection, of the smallest L0. The page opens in any browser; circuit-tracer's viewer and Neuronpedia open
    the graph file.

    Examples:

        gemma-scope graph "In the beginning God created the heaven and the" --out graph.html

        gemma-scope graph "The king said unto the" --model bundled-gemma3 --site transcoder --site att --save graph.json

        gemma-scope graph "The bridge is in San" --model gemma-2-2b --target " Francisco" --budget 4 --save graph.json

        gemma-scope graph --read graph.json --out graph.html --table edges.csv
    """

    text: Annotated[str | None, typer.Argument(help="The text; - reads standard input.", callback=_text_or_none)] = None
    model: options.ModelName = "bundled"
    sae_model: options.SaeModel = None
    site: Annotated[
        list[str] | None,
        typer.Option(help="transcoder, clt, crosscoder, res, mlp or att; several times.", callback=checks.each(_site)),
    ] = None
    layer: options.Layers = None
    width: options.Widths = None
    release: options.Releases = None
    coders: Annotated[str | None, typer.Option(help="Glob over release/id or id of the coders.")] = None
    sae_label: options.SaeLabel = None
    affine: options.Affine = None
    series: options.OneSeries = None
    target: Annotated[
        list[str] | None,
        typer.Option(help="Next token to explain; note the leading space; several times. By default the likeliest."),
    ] = None
    logits: Annotated[int, typer.Option(min=1, help="Most next tokens to explain.")] = 10
    budget: Annotated[float, typer.Option(min=0.001, help="GiB for gradients and decoder rows at a time.")] = 2.0
    max_nodes: Annotated[int, typer.Option(min=1, help="Most latents in the graph.")] = 7500
    positions: options.Positions = None
    node_threshold: Annotated[float, typer.Option(min=0, max=1, help="Share of influence whose nodes are kept.")] = 0.8
    edge_threshold: Annotated[float, typer.Option(min=0, max=1, help="Share of influence whose edges are kept.")] = 0.98
    top: Annotated[int, typer.Option(min=0, help="Latents to print.")] = 12
    out: Annotated[
        Path | None,
        typer.Option(help="The page, an .html file with sliders.", rich_help_panel=_FILES),
    ] = None
    save: Annotated[
        Path | None,
        typer.Option(help="The graph of these thresholds, a .json file for viewers.", rich_help_panel=_FILES),
    ] = None
    listed: Annotated[
        bool,
        typer.Option("--listed", help="Enter it into graph-metadata.json, the viewer's menu.", rich_help_panel=_FILES),
    ] = False
    table: Annotated[
        Path | None,
        typer.Option(help="The edges of these thresholds: .csv, .json or .parquet.", rich_help_panel=_FILES),
    ] = None
    read: Annotated[
        Path | None, typer.Option(help="Take the graph of this .json file, and no text.", rich_help_panel=_FILES)
    ] = None
    notes: Annotated[
        int | None,
        typer.Option(
            min=0, help=f"Latents with promoted tokens on the page; by default {_NOTED}.", rich_help_panel=_FILES
        ),
    ] = None
    examples: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Examples of each of them; by default 4 on bundled models and CUDA, else none.",
            rich_help_panel=_FILES,
        ),
    ] = None
    backend: options.Backend = "bridge"
    device: options.Device = None
    dtype: options.Dtype = "float32"
    as_json: options.Json = False

    def check(self) -> None:
        """Check that there is one text or file, that the coders exist, and that the results can be written."""
        if (self.text is None) == (self.read is None):
            raise typer.BadParameter("give a text, or --read with a graph file")
        for path, ending in ((self.out, ".html"), (self.save, ".json")):
            if path is not None:
                checks.file_format("page" if ending == ".html" else "graph", path, (ending,))
                checks.writable(path)
        if self.table is not None:
            checks.table_file(self.table)
        if self.listed and self.save is None:
            raise typer.BadParameter("--listed enters the file of --save into a menu: give --save")
        self.check_together()
        if self.read is not None:
            checks.readable(self.read)
            return
        self.rows()
        checks.available(self.device)

    def check_together(self) -> None:
        """Raise for an option that has no effect beside the others."""
        given = self.given
        if self.read is not None and (beside := [name for name in given if name in _TRACING]):
            raise typer.BadParameter(f"--read takes a graph as it is, so leave out {_options(beside)}")
        if self.out is None and (beside := [name for name in given if name in ("notes", "examples")]):
            raise typer.BadParameter(f"{_options(beside)} is for the page: give --out, too")
        if self.notes == 0 and self.examples:
            raise typer.BadParameter("--examples adds to the notes on latents, of which --notes 0 has none")
        if self.target and "logits" in given:
            raise typer.BadParameter("--target names the next tokens, and --logits counts the likeliest: give one")

    def run(self) -> None:
        if self.read is not None:
            from gemma_scope_tl.attributions.graph_json import read_graph

            graph, notes = read_graph(self.read), None
        else:
            graph, notes = self.traced()
        pruned = graph.pruned(self.node_threshold, self.edge_threshold)
        self.write(graph, pruned, notes)
        self.show(graph, pruned)
        if not self.written():
            note("note: --out graph.html writes the page, --save graph.json the graph.")

    def rows(self) -> "list[SAERow]":
        """Registry rows of the coders, one for each place.

        Raises:
            GemmaScopeError: no coder fits the conditions.
        """
        from gemma_scope_tl.registry.listing import select_rows

        found = select_rows(
            registry_name(self.model, self.sae_model) if self.sae_model or not self.release else None,
            site=self.site or "transcoder",
            layer=self.layer or None,
            width=self.width or None,
            release=self.release or None,
            pattern=self.coders,
            label=self.sae_label or None,
            affine=self.affine,
            series=self.series,
        )
        if not found:
            raise GemmaScopeError("No coder fits all of these conditions: run `gemma-scope list` to see what exists.")
        chosen: dict[tuple[str, int | None], SAERow] = {}
        for row in sorted(found, key=_rank):
            chosen.setdefault((row.site, row.layer), row)
        return sorted(chosen.values(), key=lambda row: (row.site, -1 if row.layer is None else row.layer))

    def traced(self) -> "tuple[AttributionGraph, Any]":
        """The graph of the text, and notes on its latents if a page is written."""
        from gemma_scope_tl.dtypes import parse_device

        device = parse_device(self.device)
        from gemma_scope_tl.attributions.making import attribution_graph
        from gemma_scope_tl.model.loading import load_model
        from gemma_scope_tl.sae.loading import load_row

        assert self.text is not None
        rows = self.rows()
        note(_named(rows))
        with progress.status("loading"):
            model = load_model(self.model, backend=self.backend, device=device, dtype=self.dtype)
            coders = [load_row(row, device=device, dtype=self.dtype) for row in rows]
        graph = attribution_graph(
            model,
            self.text,
            coders,
            logits=self.target or self.logits,
            max_latent_nodes=self.max_nodes,
            positions=checks.positions(self.positions),
            budget=int(self.budget * GIB),
            progress=sys.stderr.isatty(),
        )
        return graph, self.noted(graph, model, coders, device) if self.out is not None else None

    def noted(self, graph: "AttributionGraph", model: Any, coders: Any, device: Any) -> Any:
        """Notes on the most influential latents."""
        count = _NOTED if self.notes is None else self.notes
        if not count:
            return None
        from gemma_scope_tl.viz.graph_notes import graph_notes

        quick = self.model in bundled_names() or str(device).startswith("cuda")
        examples = (4 if quick else 0) if self.examples is None else self.examples
        if self.examples is None and not quick:
            note("note: the page has no examples of where latents fire; --examples 4 adds them, in minutes on a CPU.")
        with progress.status("collecting what latents promote"):
            return graph_notes(graph, model, coders, latents=count, examples=examples)

    def write(self, graph: "AttributionGraph", pruned: "AttributionGraph", notes: Any) -> None:
        """Write the files that were asked for."""
        if self.out is not None:
            from gemma_scope_tl.viz.graph_page import write_graph_page

            write_graph_page(
                graph,
                self.out,
                notes=notes,
                node_threshold=self.node_threshold,
                edge_threshold=self.edge_threshold,
            )
        if self.save is not None:
            from gemma_scope_tl.attributions.graph_json import write_graph

            write_graph(pruned, self.save, listed=self.listed)
        if self.table is not None:
            write_table(pruned.edges().assign(influence=pruned.edge_influence().to_numpy()), self.table)

    def show(self, graph: "AttributionGraph", pruned: "AttributionGraph") -> None:
        """Print the counts, the logits and the most influential latents."""
        facts = {
            "text": graph.text,
            "nodes": len(graph),
            "edges": int(graph.weights.nnz),
            "nodes kept": len(pruned),
            "edges kept": int(pruned.weights.nnz),
            **{name: round(value, 4) for name, value in graph.scores()._asdict().items()},
            **_missing(graph),
            **{name: str(path) for name, path in self.written().items()},
        }
        nodes = graph.nodes.assign(influence=graph.influence())
        logits = nodes[nodes["kind"] == "logit"].sort_values("probability", ascending=False, kind="stable")
        latents = (
            nodes[nodes["kind"] == "latent"].sort_values("influence", ascending=False, kind="stable").head(self.top)
        )
        told = [{"token": one["label"], "probability": one["probability"]} for one in logits.to_dict("records")]
        rows = [
            {
                "latent": one["label"] or one["node_id"],
                "token": repr(graph.tokens[one["position"]]),
                "activation": one["activation"],
                "influence": one["influence"],
            }
            for one in latents.head(self.top).to_dict("records")
        ]
        if self.as_json:
            print_facts({**facts, "logits": told, "latents": rows}, True)
            return
        if rows:
            print_rows(rows, "the most influential latents\n", False)
        likely = ", ".join(f"{one['token']!r} {one['probability']:.3f}" for one in told[:6])
        print_facts({**facts, "next tokens": likely})

    def written(self) -> dict[str, Path]:
        """The files that are written, by what they are."""
        named = {"page": self.out, "graph file": self.save, "table": self.table}
        return {name: path for name, path in named.items() if path is not None}


def _rank(row: "SAERow") -> tuple[Any, ...]:
    """The order in which coders of one place are taken."""
    label = _LABELS.index(row.label) if row.label in _LABELS else -1
    return (
        not row.canonical,
        row.unverified,
        row.series != "all",
        row.d_sae,
        not row.affine,
        label,
        row.l0,
        row.seed or 0,
    )


def _options(names: list[str]) -> str:
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


def _named(rows: "list[SAERow]") -> str:
    listed = [f"{row.release} {row.id}" for row in rows]
    more = f" and {len(listed) - 4} more" if len(listed) > 5 else ""
    return f"coders: {', '.join(listed[: 4 if more else 5])}{more}"


def _missing(graph: "AttributionGraph") -> dict[str, float]:
    """How far the parts of a target are from its value, at most, where the graph says so."""
    shares = graph.checks["missing_share"].abs()
    return {"largest missing share": float(f"{shares.max():.2g}")} if len(shares) else {}

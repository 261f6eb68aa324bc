"""``gemma-scope explain`` and ``gemma-scope neuronpedia``: explanations of latents, and files for Neuronpedia."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_scope_tl.cli import checks, options
from gemma_scope_tl.cli.options import SeveralSAEs, write_table
from gemma_scope_tl.cli.output import note, print_frame
from gemma_scope_tl.errors import GemmaScopeError

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.interp.client import Answerer

SHOWN = ("site", "layer", "id", "latent", "features", "explanation", "detection", "simulation")


@dataclass(kw_only=True)
class SampledLatents(SeveralSAEs):
    """Options of the verbs that collect examples of where latents fire."""

    latent: options.Latents = None
    window: Annotated[int, typer.Option(min=2, help="Tokens in an example.")] = 32
    seed: options.Seed = 0

    def check(self) -> None:
        """Also check that every SAE has the latents."""
        super().check()
        for row in self.sae_rows():
            checks.latent(row, max(self.latent or [0]))


@dataclass(kw_only=True)
class Explain(SampledLatents):
    """Explain latents with a language model that sees where they fire, and score the explanations.

    Examples:

        gemma-scope explain --site res --layer 2 --canonical --llm gpt-4o-mini --base-url https://api.openai.com/v1

        gemma-scope explain --latent 12 --latent 40 --llm qwen --base-url http://127.0.0.1:8000/v1 --answers a.jsonl

        gemma-scope explain --site res --canonical --count 50 --control --llm qwen --base-url http://127.0.0.1:8000/v1
    """

    llm: Annotated[str, typer.Option(help="The model at the endpoint, or without --base-url a local one.")] = ""
    base_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint, up to /v1.", callback=checks.each(checks.url))
    ] = None
    key_variable: Annotated[str, typer.Option(help="Environment variable with the endpoint's key.")] = "OPENAI_API_KEY"
    answers: Annotated[
        Path | None, typer.Option(help="JSONL file of answers, to continue without repeated requests.")
    ] = None
    count: Annotated[int, typer.Option(min=1, help="Latents of each SAE, drawn among those that fire.")] = 10
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="detection, simulation (default: both).", callback=checks.one_of("method of scoring", checks.SCORES)
        ),
    ] = None
    control: Annotated[
        bool,
        typer.Option(
            help="Also score a random SAE of the same shape, L0 and frequencies; it takes as many requests again."
        ),
    ] = False
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 8
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a request.")] = 60.0
    retries: Annotated[int, typer.Option(min=0, help="Further attempts.")] = 5
    figure: options.Figure = None

    def check(self) -> None:
        """Also check that the figure and the answers can be written, and that a language model is named."""
        super().check()
        self.refuse_cache("explain (whose answers --answers keeps)")
        if self.figure is not None:
            checks.figure_file(self.figure)
        if self.answers is not None:
            checks.writable(self.answers)
        if not self.llm:
            raise GemmaScopeError("Name the language model that explains: --llm NAME, with --base-url for an endpoint.")

    def run(self) -> None:
        from gemma_scope_tl.interp.controls import compare_explanations

        table = self.measure()
        if self.out is not None:
            write_table(table, self.out)
        if self.figure is not None:
            from gemma_scope_tl.viz.figures import save_figure
            from gemma_scope_tl.viz.study_figures import scores_figure

            save_figure(scores_figure(table), self.figure)
        columns = [name for name in SHOWN if name in table.columns and (self.control or name != "features")]
        print_frame(table, f"{len(table)} latents", self.as_json, columns)
        if self.control:
            for row in compare_explanations(table, seed=self.seed).to_dict("records"):
                note(compared(row))

    def client(self) -> "Answerer":
        """The language model: at an endpoint if one is given, otherwise a local one."""
        from gemma_scope_tl.interp.client import ChatClient, LocalModel

        if self.base_url is None:
            return LocalModel.load(self.llm, device=self.device, log=self.answers)
        return ChatClient(
            self.llm,
            self.base_url,
            log=self.answers,
            key_variable=self.key_variable,
            timeout=self.timeout,
            retries=self.retries,
            concurrency=self.concurrency,
        )

    def measure(self) -> "pd.DataFrame":
        """Explanations of every SAE's latents, with scores."""
        from gemma_scope_tl.interp.controls import explanation_study
        from gemma_scope_tl.interp.sampling import Sampling

        client, model = self.client(), self.load_model()
        return explanation_study(
            client,
            model,
            self.suite(model),
            self.tokens(model),
            latents=self.latent or None,
            count=self.count,
            methods=self.method or checks.SCORES,
            control=self.control,
            sampling=Sampling(window=self.window, seed=self.seed),
            seed=self.seed,
            **self.settings(),
        )


def compared(row: Mapping[Any, Any]) -> str:
    """A line with the mean scores of an SAE and its random SAE, and their difference."""
    parts = [
        f"{name} {row[column]:.3f} ({row[f'{column}_low']:.3f} to {row[f'{column}_high']:.3f})"
        for name, column in (("latents", "latents"), ("random SAE", "random"), ("difference", "difference"))
    ]
    name = row["id"] if row["id"] == "all" else f"{row['site']} {row['id']}"
    return f"{row['method']}, {name}, {row['pairs']} pairs of latents: {', '.join(parts)}"


@dataclass
class Neuronpedia(SampledLatents):
    """Write feature JSON in Neuronpedia's shape: examples, histograms, logits, nearest decoder rows.

    Example:

        gemma-scope neuronpedia --site res --layer 2 --canonical --out np
    """

    features_per_batch: Annotated[int, typer.Option(min=1, help="Latents in a file.")] = 128
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the batch-N.json files, one below it for each SAE; by default neuronpedia."),
    ] = field(default=None, kw_only=True)
    table: Path | None = field(init=False, default=None)

    def check(self) -> None:
        """Check also that no cache folder is given."""
        super().check()
        self.refuse_cache("neuronpedia (which continues in --out)")

    def check_out(self) -> None:
        """Check that files can be written to the folder. As in older versions, ``--out`` may also be a table's file."""
        folder = self.out or Path("neuronpedia")
        if folder.suffix in checks.FORMATS:
            note("DeprecationWarning: --out names the folder now; use --json for the table of files.")
            self.table, folder = folder, Path("neuronpedia")
        checks.folder(folder)
        self.out = folder

    def run(self) -> None:
        import pandas as pd

        from gemma_scope_tl.interp.neuronpedia import export_neuronpedia
        from gemma_scope_tl.interp.sampling import Sampling

        model, out = self.load_model(), self.out or Path()
        suite, tokens = self.suite(model), self.tokens(model)
        rows: list[dict[str, Any]] = []
        for key in suite:
            row = suite.rows[key]
            folder = out / row.release / row.id.replace("/", "_")
            paths = export_neuronpedia(
                model,
                suite[key],
                tokens,
                folder,
                latents=self.latent or None,
                features_per_batch=self.features_per_batch,
                sampling=Sampling(window=min(self.window, self.context), seed=self.seed),
                dataset=self.data or "bundled held-out text",
                **self.settings(),
            )
            rows.append({"release": row.release, "id": row.id, "files": len(paths), "folder": str(folder)})
        table = pd.DataFrame(rows)
        if self.table is not None:
            write_table(table, self.table)
        print_frame(table, f"{len(table)} SAEs", self.as_json)

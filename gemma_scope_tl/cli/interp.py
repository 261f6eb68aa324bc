"""``gemma-scope explain`` and ``neuronpedia``: what latents stand for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_scope_tl.cli import checks, options
from gemma_scope_tl.cli.command import verb
from gemma_scope_tl.cli.options import Choice, write_table
from gemma_scope_tl.cli.output import note, print_frame

if TYPE_CHECKING:
    from gemma_scope_tl.interp.client import Answerer

SHOWN = ("site", "layer", "id", "latent", "explanation", "detection", "simulation")


@dataclass
class InterpChoice(Choice):
    """What these verbs share."""

    latent: options.Latents = None
    window: Annotated[int, typer.Option(min=2, help="Tokens in an example.")] = 32
    seed: options.Seed = 0

    def check_latents(self) -> None:
        """See that every SAE has the latents.

        Raises:
            GemmaScopeError: with the SAE that has fewer.
        """
        from gemma_scope_tl.errors import GemmaScopeError

        last = max(self.latent or [0])
        for row in self.sae_rows():
            if last >= row.d_sae:
                raise GemmaScopeError(f"{row.release} {row.id} has latents 0 to {row.d_sae - 1:,}, and no {last:,}.")

    def check(self) -> None:
        """See :class:`Choice`."""
        super().check()
        self.check_latents()


@dataclass
class ExplainChoice(InterpChoice):
    """What ``explain`` asks, and of whom."""

    llm: Annotated[str, typer.Option(help="The model at the endpoint, or without --base-url a local one.")] = ""
    base_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint, up to /v1.", callback=checks.each(checks.url))
    ] = None
    key_variable: Annotated[str, typer.Option(help="Environment variable with the endpoint's key.")] = "OPENAI_API_KEY"
    answers: Annotated[Path | None, typer.Option(help="JSONL file of answers: go on there, and ask nothing twice.")] = (
        None
    )
    count: Annotated[int, typer.Option(min=1, help="Latents of each SAE, drawn among those that fire.")] = 10
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="detection, simulation (default: both).", callback=checks.one_of("method of scoring", checks.SCORES)
        ),
    ] = None
    concurrency: Annotated[int, typer.Option(min=1, help="Requests in flight.")] = 8
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for a request.")] = 60.0
    retries: Annotated[int, typer.Option(min=0, help="Further attempts.")] = 5
    figure: options.Figure = None

    def check(self) -> None:
        """See :class:`Choice`."""
        from gemma_scope_tl.errors import GemmaScopeError

        super().check()
        self.refuse_cache("explain (whose answers --answers keeps)")
        if self.figure is not None:
            checks.figure_file(self.figure)
        if self.answers is not None:
            checks.writable(self.answers)
        if not self.llm:
            raise GemmaScopeError("Name the language model that explains: --llm NAME, with --base-url for an endpoint.")

    def client(self) -> Answerer:
        """Who answers."""
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


def _explain(choice: ExplainChoice) -> None:
    """Explain latents with a language model that sees where they fire, and score the explanations.

    Examples:

        gemma-scope explain --site res --layer 2 --canonical --llm gpt-4o-mini --base-url https://api.openai.com/v1

        gemma-scope explain --latent 12 --latent 40 --llm qwen --base-url http://127.0.0.1:8000/v1 --answers a.jsonl
    """
    import pandas as pd

    from gemma_scope_tl.interp.sampling import Sampling

    client = choice.client()
    model = choice.load_model()
    sampling = Sampling(window=choice.window, seed=choice.seed)
    frames = [_scored(choice, client, found) for found in _found(choice, model, sampling)]
    table = pd.concat(frames, ignore_index=True)
    if choice.out is not None:
        write_table(table, choice.out)
    if choice.figure is not None:
        from gemma_scope_tl.viz.figures import save_figure
        from gemma_scope_tl.viz.study_figures import scores_figure

        save_figure(scores_figure(table), choice.figure)
    columns = [name for name in SHOWN if name in table.columns]
    print_frame(table, f"{len(table)} latents", choice.as_json, columns)


def _found(choice: ExplainChoice, model: Any, sampling: Any) -> Any:
    from gemma_scope_tl.interp.examples import top_examples

    options = {key: value for key, value in choice.options().items() if key != "cache"}
    tokens = choice.tokens(model)
    return top_examples(model, choice.suite(model), tokens, latents=choice.latent, sampling=sampling, **options)


def _scored(choice: ExplainChoice, client: Answerer, found: Any) -> Any:
    import numpy as np

    from gemma_scope_tl.interp.explanations import detection_scores, explain, simulation_scores

    latents = choice.latent
    if not latents:
        firing = found.latents[found.fired > 0]
        drawn = np.random.default_rng(choice.seed).permutation(len(firing))[: choice.count]
        latents = sorted(int(i) for i in firing[drawn])
    table = explain(client, found, latents)
    words = dict(zip(table["latent"].tolist(), table["explanation"].tolist(), strict=True))
    scorers = {"detection": detection_scores, "simulation": simulation_scores}
    for name in (choice.method or checks.SCORES) if words else ():
        scores = scorers[name](client, found, words, seed=choice.seed)
        own = [column for column in scores.columns if column not in table.columns]
        table = table.merge(scores[["latent", *own]], on="latent", how="left")
    return table


@dataclass
class NeuronpediaChoice(InterpChoice):
    """Where ``neuronpedia`` writes."""

    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the batch-N.json files, one below it for each SAE; by default neuronpedia."),
    ] = None

    def __post_init__(self) -> None:
        self.table: Path | None = None

    def check(self) -> None:
        """See :class:`Choice`; the name of a table's file, which this option once was, is still taken for one."""
        folder = self.out or Path("neuronpedia")
        if folder.suffix in checks.FORMATS:
            note("DeprecationWarning: --out names the folder now; for the table of files give --json.")
            self.table, folder = folder, Path("neuronpedia")
        self.out = None
        super().check()
        self.refuse_cache("neuronpedia (which goes on in --out)")
        checks.folder(folder)
        self.out = folder


def _neuronpedia(
    choice: NeuronpediaChoice,
    features_per_batch: Annotated[int, typer.Option(min=1, help="Latents in a file.")] = 128,
) -> None:
    """Write feature JSON in Neuronpedia's shape: examples, histograms, logits, nearest decoder rows.

    Example:

        gemma-scope neuronpedia --site res --layer 2 --canonical --out np
    """
    import pandas as pd

    from gemma_scope_tl.interp.neuronpedia import export_neuronpedia
    from gemma_scope_tl.interp.sampling import Sampling

    model, folder = choice.load_model(), choice.out or Path()
    suite, tokens = choice.suite(model), choice.tokens(model)
    sampling = Sampling(window=min(choice.window, choice.context), seed=choice.seed)
    options = {key: value for key, value in choice.options().items() if key != "cache"}
    rows: list[dict[str, Any]] = []
    for key in suite:
        row = suite.rows[key]
        place = folder / row.release / row.id.replace("/", "_")
        paths = export_neuronpedia(
            model,
            suite[key],
            tokens,
            place,
            latents=choice.latent or None,
            features_per_batch=features_per_batch,
            sampling=sampling,
            dataset=choice.data or "bundled held-out text",
            **options,
        )
        rows.append({"release": row.release, "id": row.id, "files": len(paths), "folder": str(place)})
    table = pd.DataFrame(rows)
    if choice.table is not None:
        write_table(table, choice.table)
    print_frame(table, f"{len(table)} SAEs", choice.as_json)


explain_command = verb(_explain, ExplainChoice)
neuronpedia_command = verb(_neuronpedia, NeuronpediaChoice)

"""``gemma-scope study``: the paper's studies, each a table and a figure."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from gemma_scope_tl.cli import checks, options
from gemma_scope_tl.cli.command import add
from gemma_scope_tl.cli.interp import Explain
from gemma_scope_tl.cli.options import SeveralSAEs, write_table
from gemma_scope_tl.cli.output import print_frame
from gemma_scope_tl.errors import unknown_name
from gemma_scope_tl.families import families

if TYPE_CHECKING:
    import pandas as pd

_FAMILY = families()[0]
_TUNED = f"{next(iter(_FAMILY.sizes))}{_FAMILY.tuned_suffix}"
studies_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="The paper's studies.")


@dataclass(kw_only=True)
class Study(SeveralSAEs):
    """A study, which measures a table that is printed, written to a file and drawn."""

    drawn_by: ClassVar[str]
    """Name of the function of ``viz.study_figures`` that draws the table."""
    shown: ClassVar[tuple[str, ...]]
    """The columns that are printed as a table."""

    figure: options.Figure = None

    def check(self) -> None:
        """Also check that the figure can be written."""
        super().check()
        if self.figure is not None:
            checks.figure_file(self.figure)

    def measure(self) -> "pd.DataFrame":
        """The table."""
        raise NotImplementedError

    def run(self) -> None:
        table = self.measure()
        from gemma_scope_tl.viz import study_figures
        from gemma_scope_tl.viz.figures import save_figure

        if self.out is not None:
            write_table(table, self.out)
        if self.figure is not None:
            save_figure(getattr(study_figures, self.drawn_by)(table), self.figure)
        print_frame(table, f"{len(table)} rows", self.as_json, self.shown)


@dataclass
class Fidelity(Study):
    """L0 against delta loss and FVU by site, layer and width (section 4.1).

    Example:

        gemma-scope study fidelity --site res --out fidelity.csv --figure fidelity.png
    """

    drawn_by = "fidelity_figure"
    shown = ("site", "layer", "width", "skip", "l0", "delta_loss", "delta_loss_best", "fvu")

    def measure(self) -> "pd.DataFrame":
        from gemma_scope_tl.studies.fidelity import sparsity_fidelity

        model = self.load_model()
        return sparsity_fidelity(model, self.suite(model), self.tokens(model), **self.cached_settings())


@dataclass
class Position(Study):
    """The metrics along the sequence, in bins of positions (section 4.2).

    Example:

        gemma-scope study position --layer 2 --canonical --figure position.png
    """

    drawn_by = "position_figure"
    shown = ("site", "layer", "id", "start", "stop", "squared_error", "fvu", "delta_loss")

    def measure(self) -> "pd.DataFrame":
        from gemma_scope_tl.studies.positions import binned_by_position

        model = self.load_model()
        return binned_by_position(model, self.suite(model), self.tokens(model), **self.cached_settings())


@dataclass
class Frequency(Study):
    """How often latents fire, by width: histograms, dead and dense shares (section 4.3).

    Example:

        gemma-scope study frequency --site res --layer 1 --figure frequency.png
    """

    drawn_by = "frequency_figure"
    shown = ("site", "layer", "id", "low", "high", "latents", "share", "dead", "dense")

    bins: Annotated[int, typer.Option(min=1, help="Bins of the histogram.")] = 50

    def measure(self) -> "pd.DataFrame":
        from gemma_scope_tl.studies.firing import firing_frequencies

        model = self.load_model()
        return firing_frequencies(
            model, self.suite(model), self.tokens(model), bins=self.bins, **self.cached_settings()
        )


@dataclass
class Domains(Study):
    """The metrics on each kind of text; --rows counts for each (section 4.6).

    Examples:

        gemma-scope study domains --site res --layer 2 --rows 16 --figure domains.png

        gemma-scope study domains --model gemma-2-2b --width 65k --canonical --pile --subset europarl --subset github
    """

    drawn_by = "domain_figure"
    shown = ("domain", "site", "layer", "id", "l0", "delta_loss", "fvu")

    label: Annotated[str, typer.Option(help="Column with the kind of text.")] = "domain"
    pile: Annotated[bool, typer.Option("--pile", help="The paper's subsets of the Pile, streamed.")] = False
    subset: Annotated[list[str] | None, typer.Option(help="Only this domain; several times.")] = None

    def measure(self) -> "pd.DataFrame":
        from gemma_scope_tl.studies.domains import PILE, PILE_SUBSETS, by_domain, labelled_texts, pile_texts

        if self.pile:
            split = self.split or "test"  # the Pile's own held-out part
            texts: Any = pile_texts(self.subset or PILE_SUBSETS, self.data or PILE, self.column, split)
        else:
            texts = labelled_texts(self.data, self.column, self.label, self.split or "train")
            for name in self.subset or ():
                if name not in texts:
                    raise unknown_name("domain", name, texts)
            texts = {name: texts[name] for name in self.subset or texts}
        model = self.load_model()
        return by_domain(model, self.suite(model), texts, self.rows, self.context, **self.cached_settings())


@dataclass
class Precision(Study):
    """Model and SAEs in bfloat16 against both in float32 (section 4.7).

    Example:

        gemma-scope study precision --canonical --out precision.csv
    """

    drawn_by = "precision_figure"
    shown = ("dtype", "site", "layer", "id", "l0", "fvu", "delta_loss_change")

    dtype: options.Dtypes = None  # pyright: ignore[reportIncompatibleVariableOverride]  # several in place of one

    def measure(self) -> "pd.DataFrame":
        from gemma_scope_tl.studies.fidelity import by_dtype

        names = self.dtype or ["float32", "bfloat16"]
        first = self.load_model(dtype=names[0])
        held = [first]  # popped when by_dtype loads it, so that one model is in memory at a time

        def load(name: str) -> tuple[Any, Any]:
            model = held.pop() if held else self.load_model(dtype=name)
            return model, self.suite(model, dtype=name)

        tokens = self.tokens(first)
        del first
        return by_dtype(load, tokens, names, **self.cached_settings())


@dataclass
class Transfer(Study):
    """Base SAEs on the instruction-tuned model (section 4.5), on text or on the tuned model's own answers to it.

    Examples:

        gemma-scope study transfer --model gemma-2-9b --tuned gemma-2-9b-it --tuned-sae-model gemma-2-9b-it
        --site res --width 16k --data prompts.jsonl --rows 1024 --rollouts 256 --dtype bfloat16

        gemma-scope study transfer --tuned bundled --site res --layer 2 --rollouts 64 --figure transfer.png
    """

    drawn_by = "transfer_figure"
    shown = ("model", "saes", "site", "layer", "id", "l0", "delta_loss", "fvu")

    tuned: Annotated[
        str, typer.Option(help="The tuned model; --model is the base.", callback=checks.each(checks.model))
    ] = _TUNED
    tuned_sae_model: Annotated[str | None, typer.Option(help="The registry's model of its own SAEs.")] = None
    rescale: Annotated[bool, typer.Option("--rescale", help="Also with activations scaled to the base's norm.")] = False
    rollouts: Annotated[
        int, typer.Option(min=0, help="Tokens of answers to --rows prompts, measured separately; 0 for none.")
    ] = 0
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt, with --rollouts.")] = 32
    temperature: Annotated[float, typer.Option(min=0.01, help="Temperature of the answers.")] = 1.0

    def measure(self) -> "pd.DataFrame":
        if self.tuned_sae_model:
            self.sae_rows(self.tuned_sae_model)
        from gemma_scope_tl.studies.rollouts import roll_out
        from gemma_scope_tl.studies.transfer import base_on_tuned

        base, other = self.load_model(), self.load_model(self.tuned)
        own = self.suite(other, self.tuned_sae_model) if self.tuned_sae_model else None
        saes, tokens = self.suite(base), self.tokens(other)
        if self.rollouts:
            prompts, progress = tokens[:, 1 : 1 + self.prompt_tokens], self.settings()["progress"]
            tokens = roll_out(other, prompts, new_tokens=self.rollouts, temperature=self.temperature, progress=progress)
        return base_on_tuned(base, other, tokens, saes, own, rescale=self.rescale, **self.cached_settings())


@dataclass
class Uniformity(Study):
    """Uniformity of active latent importance against L0 (appendix C.3).

    Example:

        gemma-scope study uniformity --layer 2 --rows 16 --figure uniformity.png
    """

    drawn_by = "uniformity_figure"
    shown = ("site", "layer", "id", "l0", "uniformity")

    sampled: Annotated[int, typer.Option(min=1, help="Positions drawn of each row; each takes a backward pass.")] = 8

    def measure(self) -> "pd.DataFrame":
        from gemma_scope_tl.studies.fidelity import importance_uniformity

        model = self.load_model()
        suite, tokens = self.suite(model), self.tokens(model)
        return importance_uniformity(model, suite, tokens, self.sampled, **self.cached_settings())


@dataclass
class Probes(Study):
    """Probes on k latents, against a random SAE's latents and the raw activations; --rows counts for each document.

    Examples:

        gemma-scope study probes --site res --layer 2 --width 1k --canonical --figure probes.png

        gemma-scope study probes --layer 2 --canonical --data reviews.jsonl --label stars --group author --select auroc

        gemma-scope study probes --model gemma-2-2b --layer 12 --canonical --data ag_news --split test
    """

    drawn_by = "probe_figure"
    shown = ("site", "layer", "id", "concept", "features", "k", "l0", "auroc", "over_random")

    label: Annotated[str, typer.Option(help="Column of the label, in a file or data set given by --data.")] = "label"
    group: Annotated[
        str | None, typer.Option(help="Column of each document's source (book, author), kept on one side of the split.")
    ] = None
    documents: Annotated[int, typer.Option(min=4, help="Maximum number of documents of each label.")] = 200
    concept: Annotated[list[str] | None, typer.Option(help="Only this concept; several times.")] = None
    k: Annotated[list[int] | None, typer.Option(min=1, help="Latents that a probe reads; several times.")] = None
    select: Annotated[
        str,
        typer.Option(
            help=f"Score by which latents are selected: {', '.join(checks.SELECTIONS)} (raw, depends on scale).",
            callback=checks.one_of("way to select latents", checks.SELECTIONS),
        ),
    ] = checks.SELECTIONS[0]
    l0_band: Annotated[
        float, typer.Option(min=0.0, help="Largest difference of the random SAE's L0, as a share, on test documents.")
    ] = 0.1
    seed: options.Seed = 0
    context: options.Context = field(default=64, kw_only=True)
    batch_size: options.BatchSize = field(default=32, kw_only=True)

    def check(self) -> None:
        """Also check that no cache folder is given, and that --group has data."""
        super().check()
        self.refuse_cache("probes")
        if self.group is not None and self.data is None:
            raise typer.BadParameter("The bundled text has its own sources: give --data.", param_hint="'--group'")

    def measure(self) -> "pd.DataFrame":
        least = min(self.sae_rows(), key=lambda row: row.d_sae)
        if max(self.k or [1]) > least.d_sae:
            raise typer.BadParameter(f"{least.release} {least.id} has {least.d_sae:,} latents.", param_hint="'--k'")
        from gemma_scope_tl.studies.probe_data import bundled_concepts, labelled_rows, read_grouped, read_labelled
        from gemma_scope_tl.studies.probes import probe_concepts

        given, groups = None, None
        if self.data and self.group:
            columns = (self.group, self.column, self.label, self.split or "train", self.documents)
            given, groups = read_grouped(self.data, *columns)
        elif self.data:
            given = read_labelled(self.data, self.column, self.label, self.split or "train", self.documents)
        model = self.load_model()
        if given:
            data = labelled_rows(model.tokenizer, given, self.context, self.rows, self.label, groups=groups)
        else:
            data = bundled_concepts(model.tokenizer, self.context, self.rows)
        data = data.chosen(self.concept) if self.concept else data
        chosen: dict[str, Any] = {"select": self.select, "l0_band": self.l0_band, "seed": self.seed}
        return probe_concepts(model, self.suite(model), data, self.k or (1, 2, 5, 20), **chosen, **self.settings())


@dataclass(kw_only=True)
class Explanations(Explain):
    """Scores of explanations of latents, beside those of a random SAE of the same L0 and frequencies (section 4.4).

    Like `gemma-scope explain --control`.

    Examples:

        gemma-scope study explanations --site res --layer 2 --canonical --llm qwen --base-url http://127.0.0.1:8000/v1

        gemma-scope study explanations --model gemma-2-2b --layer 12 --canonical --count 100 --method detection
        --data monology/pile-uncopyrighted --rows 2048 --llm gpt-4o-mini --base-url https://api.openai.com/v1
    """

    control: Annotated[bool, typer.Option(help="Score the random SAE; it takes half of the requests.")] = True


for study in (Fidelity, Position, Frequency, Domains, Precision, Transfer, Uniformity, Probes, Explanations):
    add(studies_app, study, study.__name__.lower())

"""``gemma-scope study``: the paper's studies, each a table and a figure."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_scope_tl.cli import checks, options
from gemma_scope_tl.cli.command import add, verb
from gemma_scope_tl.cli.options import Choice, write_table
from gemma_scope_tl.cli.output import print_frame

if TYPE_CHECKING:
    from pandas import DataFrame as Table
else:
    Table = Any  # annotations are read when the verbs are made, and pandas is not imported for that

studies_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="The paper's studies.")


@dataclass
class StudyChoice(Choice):
    """What all studies share."""

    figure: options.Figure = None

    def check(self) -> None:
        """See :class:`Choice`."""
        super().check()
        if self.figure is not None:
            checks.figure_file(self.figure)


@dataclass
class ProbeChoice(StudyChoice):
    """What probes take otherwise."""

    context: options.Context = 64
    batch_size: options.BatchSize = 32

    def check(self) -> None:
        """See :class:`StudyChoice`."""
        super().check()
        self.refuse_cache("probes")


def _command(
    name: str, drawn: str, shown: tuple[str, ...], kind: type[StudyChoice] = StudyChoice
) -> Callable[[Callable[..., Table]], Any]:
    """Make a verb of a study, which prints, writes and draws its table.

    Args:
        name: of the verb.
        drawn: the function of ``viz.study_figures``.
        shown: columns printed for people.
        kind: the options that it shares with others.
    """

    def register(study: Callable[..., Table]) -> Callable[..., Table]:
        @functools.wraps(study)
        def shown_study(choice: StudyChoice, **given: Any) -> None:
            _finish(choice, study(choice, **given), drawn, shown)

        add(studies_app, verb(shown_study, kind), name)
        return study

    return register


def _finish(choice: StudyChoice, table: Table, drawn: str, shown: tuple[str, ...]) -> None:
    from gemma_scope_tl.viz import study_figures
    from gemma_scope_tl.viz.figures import save_figure

    if choice.out is not None:
        write_table(table, choice.out)
    if choice.figure is not None:
        save_figure(getattr(study_figures, drawn)(table), choice.figure)
    print_frame(table, f"{len(table)} rows", choice.as_json, shown)


@_command("fidelity", "fidelity_figure", ("site", "layer", "width", "l0", "delta_loss", "delta_loss_best", "fvu"))
def fidelity(choice: StudyChoice) -> Table:
    """L0 against delta loss and FVU by site, layer and width (section 4.1).

    Example:

        gemma-scope study fidelity --site res --out fidelity.csv --figure fidelity.png
    """
    from gemma_scope_tl.studies.fidelity import sparsity_fidelity

    model = choice.load_model()
    return sparsity_fidelity(model, choice.suite(model), choice.tokens(model), **choice.options())


@_command("position", "position_figure", ("site", "layer", "id", "start", "stop", "squared_error", "fvu", "delta_loss"))
def position(choice: StudyChoice) -> Table:
    """The metrics along the sequence, in bins of positions (section 4.2).

    Example:

        gemma-scope study position --layer 2 --canonical --figure position.png
    """
    from gemma_scope_tl.studies.positions import binned_by_position

    model = choice.load_model()
    return binned_by_position(model, choice.suite(model), choice.tokens(model), **choice.options())


@_command("frequency", "frequency_figure", ("site", "layer", "id", "low", "high", "latents", "share", "dead", "dense"))
def frequency(
    choice: StudyChoice,
    bins: Annotated[int, typer.Option(min=1, help="Bins of the histogram.")] = 50,
) -> Table:
    """How often latents fire, by width: histograms, dead and dense shares (section 4.3).

    Example:

        gemma-scope study frequency --site res --layer 1 --figure frequency.png
    """
    from gemma_scope_tl.studies.firing import firing_frequencies

    model = choice.load_model()
    return firing_frequencies(model, choice.suite(model), choice.tokens(model), bins=bins, **choice.options())


@_command("domains", "domain_figure", ("domain", "site", "layer", "id", "l0", "delta_loss", "fvu"))
def domains(
    choice: StudyChoice,
    label: Annotated[str, typer.Option(help="Column that says what kind of text it is.")] = "domain",
    pile: Annotated[bool, typer.Option("--pile", help="The paper's subsets of the Pile, streamed.")] = False,
    subset: Annotated[list[str] | None, typer.Option(help="Only this domain; several times.")] = None,
) -> Table:
    """The metrics on each kind of text; --rows counts for each (section 4.6).

    Examples:

        gemma-scope study domains --site res --layer 2 --rows 16 --figure domains.png

        gemma-scope study domains --model gemma-2-2b --width 65k --canonical --pile --subset europarl --subset github
    """
    from gemma_scope_tl.errors import unknown_name
    from gemma_scope_tl.studies.domains import PILE, PILE_SUBSETS, by_domain, labelled_texts, pile_texts

    if pile:
        split = choice.split or "test"  # the Pile's own held-out part
        texts: Any = pile_texts(subset or PILE_SUBSETS, choice.data or PILE, choice.column, split)
    else:
        texts = labelled_texts(choice.data, choice.column, label, choice.split or "train")
        for name in subset or ():
            if name not in texts:
                raise unknown_name("domain", name, texts)
        texts = {name: texts[name] for name in subset or texts}
    model = choice.load_model()
    return by_domain(model, choice.suite(model), texts, choice.rows, choice.context, **choice.options())


@_command("precision", "precision_figure", ("dtype", "site", "layer", "id", "l0", "fvu", "delta_loss_change"))
def precision(
    choice: StudyChoice,
    dtype: options.Dtypes = None,
) -> Table:
    """Model and SAEs in bfloat16 against both in float32 (section 4.7).

    Example:

        gemma-scope study precision --canonical --out precision.csv
    """
    from gemma_scope_tl.studies.fidelity import by_dtype

    names = dtype or ["float32", "bfloat16"]
    held: dict[str, Any] = {}

    def load(name: str) -> tuple[Any, Any]:
        model = held.pop("first", None) or choice.load_model(dtype=name)
        return model, choice.suite(model, dtype=name)

    held["first"] = choice.load_model(dtype=names[0])
    return by_dtype(load, choice.tokens(held["first"]), names, **choice.options())


@_command("transfer", "transfer_figure", ("model", "saes", "site", "layer", "id", "l0", "delta_loss", "fvu"))
def transfer(
    choice: StudyChoice,
    tuned: Annotated[
        str, typer.Option(help="The tuned model; --model is the base.", callback=checks.each(checks.model))
    ] = "gemma-2-2b-it",
    tuned_sae_model: Annotated[str | None, typer.Option(help="The registry's model of its own SAEs.")] = None,
    rescale: Annotated[bool, typer.Option("--rescale", help="Also with activations at the base's norm.")] = False,
    rollouts: Annotated[
        int, typer.Option(min=0, help="Answers of so many tokens to --rows prompts, measured apart from them; 0: none.")
    ] = 0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt, with --rollouts.")] = 32,
    temperature: Annotated[float, typer.Option(min=0.01, help="Of the answers.")] = 1.0,
) -> Table:
    """Base SAEs on the instruction-tuned model (section 4.5), on text or on the tuned model's own answers to it.

    Examples:

        gemma-scope study transfer --model gemma-2-9b --tuned gemma-2-9b-it --tuned-sae-model gemma-2-9b-it
        --site res --width 16k --data prompts.jsonl --rows 1024 --rollouts 256 --dtype bfloat16

        gemma-scope study transfer --tuned bundled --site res --layer 2 --rollouts 64 --figure transfer.png
    """
    if tuned_sae_model:
        choice.sae_rows(tuned_sae_model)
    from gemma_scope_tl.studies.rollouts import roll_out
    from gemma_scope_tl.studies.transfer import base_on_tuned

    base, other = choice.load_model(), choice.load_model(tuned)
    own = choice.suite(other, tuned_sae_model) if tuned_sae_model else None
    saes, tokens = choice.suite(base), choice.tokens(other)
    if rollouts:
        prompts, shown = tokens[:, 1 : 1 + prompt_tokens], choice.options()["progress"]
        tokens = roll_out(other, prompts, new_tokens=rollouts, temperature=temperature, progress=shown)
    return base_on_tuned(base, other, tokens, saes, own, rescale=rescale, **choice.options())


@_command("uniformity", "uniformity_figure", ("site", "layer", "id", "l0", "uniformity"))
def uniformity(
    choice: StudyChoice,
    positions: Annotated[int, typer.Option(min=1, help="Positions of each row, a backward pass each.")] = 8,
) -> Table:
    """Uniformity of active latent importance against L0 (appendix C.3).

    Example:

        gemma-scope study uniformity --layer 2 --rows 16 --figure uniformity.png
    """
    from gemma_scope_tl.studies.fidelity import importance_uniformity

    model = choice.load_model()
    suite, tokens = choice.suite(model), choice.tokens(model)
    return importance_uniformity(model, suite, tokens, positions, **choice.options())


@_command("probes", "probe_figure", ("site", "layer", "id", "concept", "features", "k", "auroc"), ProbeChoice)
def probes(
    choice: ProbeChoice,
    label: Annotated[str, typer.Option(help="Column of the label, in a file or data set given by --data.")] = "label",
    documents: Annotated[int, typer.Option(min=4, help="Documents of each label at most.")] = 200,
    concept: Annotated[list[str] | None, typer.Option(help="Only this one; several times.")] = None,
    k: Annotated[list[int] | None, typer.Option(min=1, help="Latents that a probe reads; several times.")] = None,
    seed: options.Seed = 0,
) -> Table:
    """Probes on k latents, against a random SAE's latents and the raw activations; --rows counts for each document.

    Examples:

        gemma-scope study probes --site res --layer 2 --width 1k --canonical --figure probes.png

        gemma-scope study probes --model gemma-2-2b --layer 12 --canonical --data ag_news --split test
    """
    least = min(choice.sae_rows(), key=lambda row: row.d_sae)
    if max(k or [1]) > least.d_sae:
        raise typer.BadParameter(f"{least.release} {least.id} has {least.d_sae:,} latents.", param_hint="'--k'")
    from gemma_scope_tl.studies.probe_data import bundled_concepts, labelled_rows, read_labelled
    from gemma_scope_tl.studies.probes import probe_concepts

    given = choice.data and read_labelled(choice.data, choice.column, label, choice.split or "train", documents)
    model = choice.load_model()
    if given:
        data = labelled_rows(model.tokenizer, given, choice.context, choice.rows, label)
    else:
        data = bundled_concepts(model.tokenizer, choice.context, choice.rows)
    data = data.chosen(concept) if concept else data
    options = {key: value for key, value in choice.options().items() if key != "cache"}
    return probe_concepts(model, choice.suite(model), data, k or (1, 2, 5, 20), seed=seed, **options)

"""``gemma-scope study``: the paper's studies, each a table and a figure."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from gemma_scope_tl.cli.evals import FORMATS, GIB, write_table
from gemma_scope_tl.cli.models import Backend, Device, ModelName, SaeModel
from gemma_scope_tl.cli.output import Json, print_frame, progress

if TYPE_CHECKING:
    import torch
    from pandas import DataFrame as Table
else:
    Table = Any  # annotations are read when the verbs are made, and pandas is not imported for that

studies_app = typer.Typer(no_args_is_help=True, rich_markup_mode="markdown", help="The paper's studies.")

Dtype = Annotated[str, typer.Option(help="Of the model and the SAEs: float32, bfloat16, float16.")]


@dataclass
class Choice:
    """The options that all studies share: which SAEs, on which model and text, and where the answer goes."""

    pattern: Annotated[str | None, typer.Argument(help="Glob over release/id or id of the SAEs.")] = None
    model: ModelName = "bundled"
    sae_model: SaeModel = None
    release: Annotated[list[str] | None, typer.Option(help="Release; may be given several times.")] = None
    site: Annotated[list[str] | None, typer.Option(help="res, mlp, att, embedding, transcoder; several times.")] = None
    layer: Annotated[list[int] | None, typer.Option(help="Layer, from 0; several times.")] = None
    width: Annotated[list[str] | None, typer.Option(help="16k, 65k, …; several times.")] = None
    canonical: Annotated[bool, typer.Option("--canonical", help="Canonical SAEs only.")] = False
    data: Annotated[
        str | None, typer.Option(help="A .txt or .jsonl file, or a data set's name[:config]; by default bundled text.")
    ] = None
    column: Annotated[str, typer.Option(help="Where a .jsonl file or a data set has the text.")] = "text"
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train"
    rows: Annotated[int, typer.Option(min=1, help="Rows of tokens at most.")] = 64
    context: Annotated[int, typer.Option(min=2, help="Tokens in a row, BOS included.")] = 256
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a forward pass.")] = 8
    memory: Annotated[float, typer.Option(min=0.01, help="GiB that tensors may take beside weights.")] = 1.0
    sae_memory: Annotated[float, typer.Option(min=0.01, help="GiB of SAEs to hold at a time.")] = 8.0
    resume: Annotated[Path | None, typer.Option(help="Cache folder: go on there, and measure nothing twice.")] = None
    out: Annotated[Path | None, typer.Option(help="Write all columns to a .csv, .json or .parquet file.")] = None
    figure: Annotated[Path | None, typer.Option(help="Draw the table to this .png file.")] = None
    backend: Backend = "bridge"
    device: Device = None
    as_json: Json = False

    def load_model(self, dtype: str, name: str | None = None) -> Any:
        """The model, or another one by name, on the same backend and device."""
        from gemma_scope_tl.adapters.loading import load_model

        with progress.status("loading"):
            return load_model(name or self.model, backend=self.backend, device=self.device, dtype=dtype)

    def suite(self, model: Any, dtype: str, registry_model: str | None = None) -> Any:
        """The SAEs that fit all conditions, loaded in turn; of another model where one is named."""
        from gemma_scope_tl.errors import GemmaScopeError
        from gemma_scope_tl.registry.listing import select_rows
        from gemma_scope_tl.sae.loading import load_row
        from gemma_scope_tl.sae.suite import SAESuite

        name = None if self.release else self.sae_model or self.model.split("/")[-1]
        rows = select_rows(
            registry_model or name,
            site=self.site or None,
            layer=self.layer or None,
            width=self.width or None,
            release=None if registry_model else self.release or None,
            pattern=self.pattern,
        )
        found = [row for row in rows if row.canonical or not self.canonical]
        if not found:
            raise GemmaScopeError("No SAE fits all of these conditions: see `gemma-scope list` with the same ones.")
        keyed = {(f"{row.release}/{row.id}", row.layer): row for row in found}
        held = int(self.sae_memory * GIB)
        return SAESuite(keyed, lambda row: load_row(row, device=model.cfg.device, dtype=dtype), held)

    def tokens(self, model: Any) -> torch.Tensor:
        """Rows of tokens."""
        from gemma_scope_tl.evals.packing import pack_texts
        from gemma_scope_tl.evals.texts import read_texts

        texts = read_texts(self.data, self.column, self.split)
        return pack_texts(model.tokenizer, texts, self.context, self.rows)

    def options(self) -> dict[str, Any]:
        """What ``evaluate`` takes besides model, SAEs and data."""
        shared = {"batch_size": self.batch_size, "memory_budget": int(self.memory * GIB), "cache": self.resume}
        return {**shared, "progress": sys.stderr.isatty()}


def _command(name: str, drawn: str, shown: tuple[str, ...]) -> Callable[[Callable[..., Table]], Any]:
    """Make a verb of a study: its own options after those of :class:`Choice`; then print, write and draw the table.

    Args:
        name: of the verb.
        drawn: the function of ``viz.study_figures``.
        shown: columns printed for people.
    """

    def register(study: Callable[..., Table]) -> Callable[..., Table]:
        shared = {field.name: field.default for field in fields(Choice)}
        hints = {**get_type_hints(Choice, include_extras=True), **get_type_hints(study, include_extras=True)}
        own = [parameter for parameter in inspect.signature(study).parameters.values() if parameter.name != "choice"]
        defaults = {**shared, **{parameter.name: parameter.default for parameter in own}}

        def command(**given: Any) -> None:
            choice = Choice(**{key: given.pop(key) for key in shared})
            _check_paths(choice)
            _finish(choice, study(choice, **given), drawn, shown)

        kind = inspect.Parameter.KEYWORD_ONLY
        empty = inspect.Parameter.empty
        parameters = [
            inspect.Parameter(key, kind, default=empty if value is MISSING else value, annotation=hints[key])
            for key, value in defaults.items()
        ]
        setattr(command, "__signature__", inspect.Signature(parameters))  # noqa: B010
        command.__annotations__ = {key: hints[key] for key in defaults}
        command.__doc__ = study.__doc__
        studies_app.command(name)(command)
        return study

    return register


def _check_paths(choice: Choice) -> None:
    """Before anything is measured, see that the answer can be written."""
    from gemma_scope_tl.errors import unknown_name

    if choice.out is not None and choice.out.suffix not in FORMATS:
        raise unknown_name("table format", choice.out.suffix, FORMATS)
    if choice.figure is not None and choice.figure.suffix != ".png":
        raise unknown_name("figure format", choice.figure.suffix, [".png"])


def _finish(choice: Choice, table: Table, drawn: str, shown: tuple[str, ...]) -> None:
    from gemma_scope_tl.viz import study_figures
    from gemma_scope_tl.viz.figures import save_figure

    if choice.out is not None:
        write_table(table, choice.out)
    if choice.figure is not None:
        save_figure(getattr(study_figures, drawn)(table), choice.figure)
    print_frame(table if choice.as_json else table[list(shown)], f"{len(table)} rows", choice.as_json)


@_command("fidelity", "fidelity_figure", ("site", "layer", "width", "l0", "delta_loss", "delta_loss_best", "fvu"))
def fidelity(choice: Choice, dtype: Dtype = "float32") -> Table:
    """L0 against delta loss and FVU by site, layer and width (section 4.1).

    Example:

        gemma-scope study fidelity --site res --out fidelity.csv --figure fidelity.png
    """
    from gemma_scope_tl.studies.fidelity import sparsity_fidelity

    model = choice.load_model(dtype)
    return sparsity_fidelity(model, choice.suite(model, dtype), choice.tokens(model), **choice.options())


@_command("position", "position_figure", ("site", "layer", "id", "start", "stop", "squared_error", "fvu", "delta_loss"))
def position(choice: Choice, dtype: Dtype = "float32") -> Table:
    """The metrics along the sequence, in bins of positions (section 4.2).

    Example:

        gemma-scope study position --layer 2 --canonical --figure position.png
    """
    from gemma_scope_tl.studies.positions import binned_by_position

    model = choice.load_model(dtype)
    return binned_by_position(model, choice.suite(model, dtype), choice.tokens(model), **choice.options())


@_command("frequency", "frequency_figure", ("site", "layer", "id", "low", "high", "latents", "share", "dead", "dense"))
def frequency(
    choice: Choice,
    bins: Annotated[int, typer.Option(min=1, help="Bins of the histogram.")] = 50,
    dtype: Dtype = "float32",
) -> Table:
    """How often latents fire, by width: histograms, dead and dense shares (section 4.3).

    Example:

        gemma-scope study frequency --site res --layer 1 --figure frequency.png
    """
    from gemma_scope_tl.studies.firing import firing_frequencies

    model = choice.load_model(dtype)
    options = {key: value for key, value in choice.options().items() if key != "cache"}
    return firing_frequencies(model, choice.suite(model, dtype), choice.tokens(model), bins=bins, **options)


@_command("domains", "domain_figure", ("domain", "site", "layer", "id", "l0", "delta_loss", "fvu"))
def domains(
    choice: Choice,
    label: Annotated[str, typer.Option(help="Column that says what kind of text it is.")] = "domain",
    pile: Annotated[bool, typer.Option("--pile", help="The paper's subsets of the Pile, streamed.")] = False,
    subset: Annotated[list[str] | None, typer.Option(help="Only this domain; several times.")] = None,
    dtype: Dtype = "float32",
) -> Table:
    """The metrics on each kind of text; --rows counts for each (section 4.6).

    Examples:

        gemma-scope study domains --site res --layer 2 --rows 16 --figure domains.png

        gemma-scope study domains --model gemma-2-2b --width 65k --canonical --pile --subset europarl --subset github
    """
    from gemma_scope_tl.errors import unknown_name
    from gemma_scope_tl.studies.domains import PILE, PILE_SUBSETS, by_domain, labelled_texts, pile_texts

    if pile:
        split = "test" if choice.split == "train" else choice.split  # the Pile's own held-out part
        texts: Any = pile_texts(subset or PILE_SUBSETS, choice.data or PILE, choice.column, split)
    else:
        texts = labelled_texts(choice.data, choice.column, label, choice.split)
        for name in subset or ():
            if name not in texts:
                raise unknown_name("domain", name, texts)
        texts = {name: texts[name] for name in subset or texts}
    model = choice.load_model(dtype)
    return by_domain(model, choice.suite(model, dtype), texts, choice.rows, choice.context, **choice.options())


@_command("precision", "precision_figure", ("dtype", "site", "layer", "id", "l0", "fvu", "delta_loss_change"))
def precision(
    choice: Choice,
    dtype: Annotated[list[str] | None, typer.Option(help="Compared with the first; float32, bfloat16.")] = None,
) -> Table:
    """Model and SAEs in bfloat16 against both in float32 (section 4.7).

    Example:

        gemma-scope study precision --canonical --out precision.csv
    """
    from gemma_scope_tl.studies.precision import by_dtype

    names = dtype or ["float32", "bfloat16"]
    held: dict[str, Any] = {}

    def load(name: str) -> tuple[Any, Any]:
        model = held.pop("first", None) or choice.load_model(name)
        return model, choice.suite(model, name)

    held["first"] = choice.load_model(names[0])
    return by_dtype(load, choice.tokens(held["first"]), names, **choice.options())


@_command("transfer", "transfer_figure", ("model", "saes", "site", "layer", "id", "l0", "delta_loss", "fvu"))
def transfer(
    choice: Choice,
    tuned: Annotated[str, typer.Option(help="The tuned model; --model is the base.")] = "gemma-2-2b-it",
    tuned_sae_model: Annotated[str | None, typer.Option(help="The registry's model of its own SAEs.")] = None,
    rescale: Annotated[bool, typer.Option("--rescale", help="Also with activations at the base's norm.")] = False,
    dtype: Dtype = "float32",
) -> Table:
    """Base SAEs on the instruction-tuned model (section 4.5); give rollouts with --data.

    Example:

        gemma-scope study transfer --model gemma-2-9b --tuned gemma-2-9b-it --tuned-sae-model gemma-2-9b-it
        --site res --width 16k --data rollouts.jsonl --dtype bfloat16
    """
    from gemma_scope_tl.studies.transfer import base_on_tuned

    base, other = choice.load_model(dtype), choice.load_model(dtype, tuned)
    own = choice.suite(other, dtype, tuned_sae_model) if tuned_sae_model else None
    saes, tokens = choice.suite(base, dtype), choice.tokens(other)
    return base_on_tuned(base, other, tokens, saes, own, rescale=rescale, **choice.options())


@_command("uniformity", "uniformity_figure", ("site", "layer", "id", "l0", "uniformity"))
def uniformity(
    choice: Choice,
    positions: Annotated[int, typer.Option(min=1, help="Positions of each row, a backward pass each.")] = 8,
    dtype: Dtype = "float32",
) -> Table:
    """Uniformity of active latent importance against L0 (appendix C.3).

    Example:

        gemma-scope study uniformity --layer 2 --rows 16 --figure uniformity.png
    """
    from gemma_scope_tl.studies.fidelity import importance_uniformity

    model = choice.load_model(dtype)
    suite, tokens = choice.suite(model, dtype), choice.tokens(model)
    return importance_uniformity(model, suite, tokens, positions, **choice.options())

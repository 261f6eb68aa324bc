"""The options that verbs share: a type for each option, and the two sets :class:`SeveralSAEs` and :class:`OneSAE`."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from gemma_scope_tl.cli import checks
from gemma_scope_tl.cli.command import Command
from gemma_scope_tl.cli.output import note, progress
from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from gemma_scope_tl.registry.schema import SAERow

GIB = 1 << 30
_SITES = "res, mlp, att, embedding or transcoder"

Positions = Annotated[
    str | None,
    typer.Option(
        help="Leave out all other positions: 4: (from 4 on), 2:9, 0,3,5, -1 (the last).",
        callback=checks.each(checks.positions),
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Text = Annotated[str, typer.Argument(help="The text; - reads standard input.", callback=checks.text)]
Pattern = Annotated[str | None, typer.Argument(help="Glob over release/id or id of the SAEs.")]

ModelName = Annotated[
    str,
    typer.Option(
        help="bundled, bundled-gemma3, gemma-2-2b, gemma-3-1b-it, a Hugging Face id or a folder.",
        callback=checks.each(checks.model),
    ),
]
OtherModel = Annotated[
    str | None,
    typer.Option(
        help="bundled, bundled-gemma3, gemma-2-2b, gemma-3-1b-it, a Hugging Face id or a folder.",
        callback=checks.each(checks.model),
    ),
]
SaeModel = Annotated[str | None, typer.Option(help="The registry's model; by default that of --model.")]
Backend = Annotated[str, typer.Option(help="bridge or hooked_transformer.", callback=checks.each(checks.backend))]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, …; by default CUDA where there is one.", callback=checks.each(checks.device)),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Dtype of the model and the SAEs: float32, bfloat16, float16.", callback=checks.each(checks.dtype)
    ),
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option(help="Dtypes to compare with the first; float32, bfloat16.", callback=checks.each(checks.dtype)),
]

Site = Annotated[str, typer.Option(help=f"{_SITES}.", callback=checks.each(checks.site))]
OneSite = Annotated[str | None, typer.Option(help=f"{_SITES}.", callback=checks.each(checks.site))]
ListedSite = Annotated[
    str | None, typer.Option(help=f"{_SITES}, crosscoder or clt.", callback=checks.each(checks.listed_site))
]
Sites = Annotated[list[str] | None, typer.Option(help=f"{_SITES}; several times.", callback=checks.each(checks.site))]
Layer = Annotated[int, typer.Option(min=0, help="Layer, from 0.")]
OneLayer = Annotated[int | None, typer.Option(min=0, help="Layer, from 0.")]
Layers = Annotated[list[int] | None, typer.Option(min=0, help="Layer, from 0; several times.")]
Width = Annotated[str | None, typer.Option(help="16k, 65k, …; by default the narrowest.", callback=checks.widths)]
OneWidth = Annotated[str | None, typer.Option(help="16k, 65k, 1m, …", callback=checks.widths)]
Widths = Annotated[list[str] | None, typer.Option(help="16k, 65k, …; several times.", callback=checks.widths)]
L0 = Annotated[str, typer.Option(help="canonical, small, medium, big, a number that exists, or closest:50.")]
_LABELS = "Label of the L0: small, medium or big; several times."
Label = Annotated[list[str] | None, typer.Option(help=_LABELS, callback=checks.each(checks.label))]
_FURTHER = "SAEs of one place, width and L0"
"""A panel of its own: the second name of ``--affine`` would narrow the columns of all options beside it."""
SaeLabel = Annotated[list[str] | None, typer.Option("--sae-label", help=_LABELS, callback=checks.each(checks.label))]
Affine = Annotated[
    bool | None,
    typer.Option(
        "--affine/--no-affine",
        help="Transcoders with a skip connection, or coders without one.",
        rich_help_panel=_FURTHER,
    ),
]
SaeSeed = Annotated[
    int | None,
    typer.Option("--sae-seed", min=0, help="Seed of a further run of the same SAE.", rich_help_panel=_FURTHER),
]
OneSeries = Annotated[
    str | None,
    typer.Option(
        help="subset (few layers, more widths and L0s) or all (every layer).",
        callback=checks.each(checks.series),
        rich_help_panel=_FURTHER,
    ),
]
OneRelease = Annotated[
    str | None, typer.Option(help="Release, such as gemma-scope-2b-pt-res.", callback=checks.each(checks.release))
]
Releases = Annotated[
    list[str] | None, typer.Option(help="Release; may be given several times.", callback=checks.each(checks.release))
]
Latent = Annotated[int, typer.Option(min=0, help="Index of the latent.")]
Latents = Annotated[list[int] | None, typer.Option(min=0, help="Latent; several times. By default some that fire.")]

Data = Annotated[
    str | None,
    typer.Option(help="A .txt or .jsonl file, or a data set's name[:config]; by default bundled text."),
]
Context = Annotated[int, typer.Option(min=2, help="Tokens in a row, BOS included.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Rows in a forward pass.")]
Seed = Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Seed of all draws.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")]
TableFile = Annotated[Path | None, typer.Option(help="Write all columns to a .csv, .json or .parquet file.")]
Figure = Annotated[Path | None, typer.Option(help="Draw the table to this .png file.")]


@dataclass(kw_only=True)
class SeveralSAEs(Command):
    """Options for several SAEs: the SAEs, the model, the text, and the files of results."""

    takes_layered: ClassVar[bool] = False
    """Whether the verb takes crosscoders and cross-layer transcoders too; without, they are left out with a note."""
    pattern: Pattern = None
    model: ModelName = "bundled"
    sae_model: SaeModel = None
    release: Releases = None
    site: Sites = None
    layer: Layers = None
    width: Widths = None
    canonical: Annotated[bool, typer.Option("--canonical", help="Canonical SAEs only.")] = False
    sae_label: SaeLabel = None
    affine: Affine = None
    sae_seed: SaeSeed = None
    series: OneSeries = None
    data: Data = None
    column: Annotated[str, typer.Option(help="Column of a .jsonl file or data set with the text.")] = "text"
    split: Annotated[str | None, typer.Option(help="Split of a data set; by default train, of the Pile test.")] = None
    rows: Annotated[int, typer.Option(min=1, help="Maximum number of token rows.")] = 64
    context: Context = 256
    batch_size: BatchSize = 8
    memory: Annotated[float, typer.Option(min=0.01, help="GiB that tensors may take besides weights.")] = 1.0
    sae_memory: Annotated[float, typer.Option(min=0.01, help="GiB of SAEs to hold at a time.")] = 8.0
    positions: Positions = None
    resume: Annotated[Path | None, typer.Option(help="Cache folder, to continue without repeated measurements.")] = None
    out: TableFile = None
    backend: Backend = "bridge"
    device: Device = None
    dtype: Dtype = "float32"
    as_json: Json = False

    def check(self) -> None:
        """Check before loading that the SAEs and texts exist, and that the results can be written.

        Raises:
            GemmaScopeError: a check fails.
        """
        self.check_out()
        if self.resume is not None:
            checks.folder(self.resume)
        if self.data is not None:
            checks.texts(self.data)
        self.sae_rows()
        checks.available(self.device)

    def check_out(self) -> None:
        """Raise :class:`GemmaScopeError` unless the table can be written to ``out``."""
        if self.out is not None:
            checks.table_file(self.out)

    def refuse_cache(self, what: str) -> None:
        """Raise :class:`GemmaScopeError` if ``--resume`` is given to a verb that caches nothing."""
        if self.resume is not None:
            raise GemmaScopeError(f"{what} keeps nothing in a cache folder: omit --resume.")

    def load_model(self, name: str | None = None, dtype: str | None = None) -> Any:
        """Load the model, or one of another name or dtype, on the same backend and device."""
        from gemma_scope_tl.model.loading import load_model

        with progress.status("loading"):
            return load_model(name or self.model, backend=self.backend, device=self.device, dtype=dtype or self.dtype)

    def sae_rows(self, registry_model: str | None = None) -> "list[SAERow]":
        """Registry rows of the SAEs that fit all conditions, for the named model if one is given.

        Raises:
            GemmaScopeError: no SAE fits.
        """
        from gemma_scope_tl.registry.listing import of_one_layer, select_rows

        own = None if self.release else registry_name(self.model, self.sae_model)
        found = select_rows(
            registry_model or own,
            site=self.site or None,
            layer=self.layer or None,
            width=self.width or None,
            release=None if registry_model else self.release or None,
            pattern=self.pattern,
            label=self.sae_label or None,
            affine=self.affine,
            seed=self.sae_seed,
            series=self.series,
        )
        if not self.takes_layered and (left := [row for row in found if row.layers is not None]):
            found = of_one_layer(found, "This command")
            note(f"note: {len(left)} crosscoders and cross-layer transcoders are left out.")
        chosen = [row for row in found if row.canonical or not self.canonical]
        if found and not chosen:
            told = {f"--sae-label {row.label}" for row in found if row.label}
            hint = f"give {' or '.join(sorted(told))}" if told else "choose by --width, or give ids"
            raise GemmaScopeError(f"None of the {len(found)} SAEs that fit the other conditions is canonical: {hint}.")
        if not chosen:
            raise GemmaScopeError("No SAE fits all of these conditions: run `gemma-scope list` to see what exists.")
        return chosen

    def suite(self, model: Any, registry_model: str | None = None, dtype: str | None = None) -> Any:
        """The SAEs of :meth:`sae_rows`, each loaded when it is needed."""
        from gemma_scope_tl.sae.loading import load_row
        from gemma_scope_tl.sae.suite import SAESuite

        keyed = {(f"{row.release}/{row.id}", row.layer): row for row in self.sae_rows(registry_model)}
        held = int(self.sae_memory * GIB)
        return SAESuite(keyed, lambda row: load_row(row, device=model.cfg.device, dtype=dtype or self.dtype), held)

    def tokens(self, model: Any) -> "torch.Tensor":
        """Rows of token ids, ``[rows, context]``."""
        from gemma_scope_tl.text.documents import read_texts
        from gemma_scope_tl.text.rows import pack_texts

        texts = read_texts(self.data, self.column, self.split or "train")
        return pack_texts(model.tokenizer, texts, self.context, self.rows)

    def settings(self) -> dict[str, Any]:
        """The keywords that ``evaluate`` shares with other functions which run the model over tokens."""
        memory = int(self.memory * GIB)
        return {
            "batch_size": self.batch_size,
            "memory_budget": memory,
            "progress": sys.stderr.isatty(),
            "positions": checks.positions(self.positions),
        }

    def cached_settings(self) -> dict[str, Any]:
        """:meth:`settings` and the cache folder of ``--resume``."""
        return {**self.settings(), "cache": self.resume}


@dataclass(kw_only=True)
class OneSAE(Command):
    """Options for one SAE: the model, the SAE, and the format of the results."""

    model: ModelName = "bundled"
    sae_model: SaeModel = None
    site: Site = "res"
    layer: Layer = 2
    width: Width = None
    l0: L0 = "canonical"
    affine: Affine = None
    sae_seed: SaeSeed = None
    series: OneSeries = None
    backend: Backend = "bridge"
    device: Device = None
    dtype: Dtype = "float32"
    as_json: Json = False

    def check(self) -> None:
        """Check that the SAE and the device exist.

        Raises:
            UnknownNameError: the SAE does not exist; the message lists those that do.
            DeviceError: the device does not exist; the message lists those of this machine.
        """
        self.row()
        checks.available(self.device)

    def row(self) -> "SAERow":
        """The SAE's registry row."""
        from gemma_scope_tl.registry import find
        from gemma_scope_tl.registry.listing import select_rows
        from gemma_scope_tl.sites import get_site

        name = registry_name(self.model, self.sae_model)
        layer = self.layer if get_site(self.site).per_layer else None
        width = self.width
        if width is None:
            rows = select_rows(model=name, site=self.site, layer=layer, series=self.series)
            width = min(rows, key=lambda row: row.d_sae).width if rows else "16k"
        chosen: dict[str, Any] = {"affine": self.affine, "seed": self.sae_seed, "series": self.series}
        return find(name, self.site, layer, width, self.l0, **chosen)

    def name(self) -> str:
        """The SAE's release and id, as in results."""
        row = self.row()
        return f"{row.release} {row.id}"

    def named(self, table: "pd.DataFrame") -> "pd.DataFrame":
        """Add the columns ``release`` and ``id`` to a table. For an empty table, print a note that names the SAE."""
        row = self.row()
        if not len(table):
            note(f"note: the table has no rows; the SAE is {self.name()}.")
        return table.assign(release=row.release, id=row.id)

    def check_latent(self, latent: int) -> None:
        """Raise :class:`GemmaScopeError` if the SAE has no such latent."""
        checks.latent(self.row(), latent)

    def load(self) -> tuple[Any, Any]:
        """The model and the SAE, on the same device."""
        from gemma_scope_tl.dtypes import parse_device

        device = parse_device(self.device)
        from gemma_scope_tl.model.loading import load_model
        from gemma_scope_tl.sae.loading import load_row

        with progress.status("loading"):
            sae = load_row(self.row(), device=device, dtype=self.dtype)
            return load_model(self.model, backend=self.backend, device=device, dtype=self.dtype), sae


def registry_name(model: str, sae_model: str | None) -> str:
    """The registry's name of a model that is given by name or folder.

    Raises:
        UnknownNameError: the model has no SAEs; the message names the option for using those of another model.
    """
    from gemma_scope_tl.registry.catalog import checked_model

    if sae_model is not None:
        return checked_model(sae_model)
    try:
        return checked_model(Path(model).name)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error} --sae-model names the model whose SAEs to use for {model}.") from None


def write_table(table: "pd.DataFrame", path: Path) -> None:
    """Write a table atomically, in the format of the path's suffix."""
    from gemma_scope_tl.files import replace_files, write_atomically

    checks.file_format("table", path, checks.FORMATS)
    kind = path.suffix.lower()
    if kind == ".csv":
        write_atomically(path, table.to_csv(index=False))
    elif kind == ".json":
        write_atomically(path, table.to_json(orient="records", indent=2) + "\n")
    else:
        replace_files(path.parent, {path.name: lambda temporary: table.to_parquet(temporary, index=False)})

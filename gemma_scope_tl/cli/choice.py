"""The choice of SAEs, model and text that `eval` and every study share, and verbs made from it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from gemma_scope_tl.cli.models import Backend, Device, ModelName, SaeModel
from gemma_scope_tl.cli.output import Json, progress

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from gemma_scope_tl.registry.schema import SAERow

FORMATS = (".csv", ".json", ".parquet")
GIB = 1 << 30

Dtype = Annotated[str, typer.Option(help="Of the model and the SAEs: float32, bfloat16, float16.")]


@dataclass
class Choice:
    """Which SAEs, on which model and text, and where the answer goes."""

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
    split: Annotated[str | None, typer.Option(help="Split of a data set; by default train, of the Pile test.")] = None
    rows: Annotated[int, typer.Option(min=1, help="Rows of tokens at most.")] = 64
    context: Annotated[int, typer.Option(min=2, help="Tokens in a row, BOS included.")] = 256
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a forward pass.")] = 8
    memory: Annotated[float, typer.Option(min=0.01, help="GiB that tensors may take beside weights.")] = 1.0
    sae_memory: Annotated[float, typer.Option(min=0.01, help="GiB of SAEs to hold at a time.")] = 8.0
    resume: Annotated[Path | None, typer.Option(help="Cache folder: go on there, and measure nothing twice.")] = None
    out: Annotated[Path | None, typer.Option(help="Write all columns to a .csv, .json or .parquet file.")] = None
    backend: Backend = "bridge"
    device: Device = None
    as_json: Json = False

    def check(self) -> None:
        """Before anything is measured, see that the answer can be written.

        Raises:
            UnknownNameError: for a file of another kind.
        """
        check_format("table", self.out, FORMATS)

    def refuse_cache(self, what: str) -> None:
        """Raise :class:`GemmaScopeError` where a cache folder is given to what keeps nothing in one."""
        from gemma_scope_tl.errors import GemmaScopeError

        if self.resume is not None:
            raise GemmaScopeError(f"{what} keeps nothing in a cache folder: leave --resume out.")

    def load_model(self, dtype: str, name: str | None = None) -> Any:
        """The model, or another one by name, on the same backend and device."""
        from gemma_scope_tl.adapters.loading import load_model

        with progress.status("loading"):
            return load_model(name or self.model, backend=self.backend, device=self.device, dtype=dtype)

    def sae_rows(self, registry_model: str | None = None) -> list[SAERow]:
        """Registry rows of the SAEs that fit all conditions; of another model where one is named.

        Raises:
            GemmaScopeError: when none does.
        """
        from gemma_scope_tl.errors import GemmaScopeError
        from gemma_scope_tl.registry.listing import select_rows

        name = None if self.release else self.sae_model or self.model.split("/")[-1]
        found = select_rows(
            registry_model or name,
            site=self.site or None,
            layer=self.layer or None,
            width=self.width or None,
            release=None if registry_model else self.release or None,
            pattern=self.pattern,
        )
        chosen = [row for row in found if row.canonical or not self.canonical]
        if not chosen:
            raise GemmaScopeError("No SAE fits all of these conditions: see `gemma-scope list` with the same ones.")
        return chosen

    def suite(self, model: Any, dtype: str, registry_model: str | None = None) -> Any:
        """The SAEs of :meth:`sae_rows`, loaded in turn."""
        from gemma_scope_tl.sae.loading import load_row
        from gemma_scope_tl.sae.suite import SAESuite

        keyed = {(f"{row.release}/{row.id}", row.layer): row for row in self.sae_rows(registry_model)}
        held = int(self.sae_memory * GIB)
        return SAESuite(keyed, lambda row: load_row(row, device=model.cfg.device, dtype=dtype), held)

    def tokens(self, model: Any) -> torch.Tensor:
        """Rows of tokens."""
        from gemma_scope_tl.evals.packing import pack_texts
        from gemma_scope_tl.evals.texts import read_texts

        texts = read_texts(self.data, self.column, self.split or "train")
        return pack_texts(model.tokenizer, texts, self.context, self.rows)

    def options(self) -> dict[str, Any]:
        """What ``evaluate`` takes besides model, SAEs and data."""
        shared = {"batch_size": self.batch_size, "memory_budget": int(self.memory * GIB), "cache": self.resume}
        return {**shared, "progress": sys.stderr.isatty()}


def verb(function: Callable[..., Any], kind: type[Choice] = Choice) -> Callable[..., None]:
    """A command of the options of ``kind`` and then those of ``function``, which takes ``choice`` beside its own."""
    shared = {field.name: field.default for field in fields(kind)}
    hints = {**get_type_hints(kind, include_extras=True), **get_type_hints(function, include_extras=True)}
    own = [parameter for parameter in inspect.signature(function).parameters.values() if parameter.name != "choice"]
    defaults = {**shared, **{parameter.name: parameter.default for parameter in own}}

    def command(**given: Any) -> None:
        choice = kind(**{key: given.pop(key) for key in shared})
        choice.check()
        function(choice, **given)

    only, empty = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.empty
    parameters = [
        inspect.Parameter(key, only, default=empty if value is MISSING else value, annotation=hints[key])
        for key, value in defaults.items()
    ]
    setattr(command, "__signature__", inspect.Signature(parameters))  # noqa: B010
    command.__annotations__ = {key: hints[key] for key in defaults}
    command.__doc__ = function.__doc__
    return command


def check_format(what: str, path: Path | None, formats: tuple[str, ...]) -> None:
    """Raise :class:`UnknownNameError` unless the path's ending is one of ``formats``."""
    from gemma_scope_tl.errors import unknown_name

    if path is not None and path.suffix not in formats:
        raise unknown_name(f"{what} format", path.suffix, formats)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table whole or not at all, in the format that the path's ending names."""
    from gemma_scope_tl.files import replace_files, write_atomically

    check_format("table", path, FORMATS)
    if path.suffix == ".csv":
        write_atomically(path, table.to_csv(index=False))
    elif path.suffix == ".json":
        write_atomically(path, table.to_json(orient="records", indent=2) + "\n")
    else:
        replace_files(path.parent, {path.name: lambda temporary: table.to_parquet(temporary, index=False)})

"""The choice of SAEs, model and text that `eval` and every study share."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_scope_tl.cli import checks, options
from gemma_scope_tl.cli.output import progress

if TYPE_CHECKING:
    import pandas as pd
    import torch

    from gemma_scope_tl.registry.schema import SAERow

GIB = 1 << 30


@dataclass
class Choice:
    """Which SAEs, on which model and text, and where the answer goes."""

    pattern: options.Pattern = None
    model: options.ModelName = "bundled"
    sae_model: options.SaeModel = None
    release: options.Releases = None
    site: options.Sites = None
    layer: options.Layers = None
    width: options.Widths = None
    canonical: Annotated[bool, typer.Option("--canonical", help="Canonical SAEs only.")] = False
    data: options.Data = None
    column: Annotated[str, typer.Option(help="Where a .jsonl file or a data set has the text.")] = "text"
    split: Annotated[str | None, typer.Option(help="Split of a data set; by default train, of the Pile test.")] = None
    rows: Annotated[int, typer.Option(min=1, help="Rows of tokens at most.")] = 64
    context: options.Context = 256
    batch_size: options.BatchSize = 8
    memory: Annotated[float, typer.Option(min=0.01, help="GiB that tensors may take beside weights.")] = 1.0
    sae_memory: Annotated[float, typer.Option(min=0.01, help="GiB of SAEs to hold at a time.")] = 8.0
    resume: Annotated[Path | None, typer.Option(help="Cache folder: go on there, and measure nothing twice.")] = None
    out: options.TableFile = None
    backend: options.Backend = "bridge"
    device: options.Device = None
    dtype: options.Dtype = "float32"
    as_json: options.Json = False

    def check(self) -> None:
        """See, before anything is loaded, that there are such SAEs and texts, and that the answer can be written.

        Raises:
            GemmaScopeError: with what is wrong.
        """
        if self.out is not None:
            checks.table_file(self.out)
        if self.resume is not None:
            checks.folder(self.resume)
        if self.data is not None:
            checks.texts(self.data)
        self.sae_rows()
        checks.available(self.device)

    def refuse_cache(self, what: str) -> None:
        """Raise :class:`GemmaScopeError` where a cache folder is given to what keeps nothing in one."""
        from gemma_scope_tl.errors import GemmaScopeError

        if self.resume is not None:
            raise GemmaScopeError(f"{what} keeps nothing in a cache folder: leave --resume out.")

    def load_model(self, name: str | None = None, dtype: str | None = None) -> Any:
        """The model, or another one by name or dtype, on the same backend and device."""
        from gemma_scope_tl.adapters.loading import load_model

        with progress.status("loading"):
            return load_model(name or self.model, backend=self.backend, device=self.device, dtype=dtype or self.dtype)

    def sae_rows(self, registry_model: str | None = None) -> list[SAERow]:
        """Registry rows of the SAEs that fit all conditions; of another model where one is named.

        Raises:
            GemmaScopeError: when none does.
        """
        from gemma_scope_tl.errors import GemmaScopeError
        from gemma_scope_tl.registry.listing import select_rows

        own = None if self.release else registry_name(self.model, self.sae_model)
        found = select_rows(
            registry_model or own,
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

    def suite(self, model: Any, registry_model: str | None = None, dtype: str | None = None) -> Any:
        """The SAEs of :meth:`sae_rows`, loaded in turn."""
        from gemma_scope_tl.sae.loading import load_row
        from gemma_scope_tl.sae.suite import SAESuite

        keyed = {(f"{row.release}/{row.id}", row.layer): row for row in self.sae_rows(registry_model)}
        held = int(self.sae_memory * GIB)
        return SAESuite(keyed, lambda row: load_row(row, device=model.cfg.device, dtype=dtype or self.dtype), held)

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


def registry_name(model: str, sae_model: str | None) -> str:
    """The registry's model for a model's name or folder.

    Raises:
        UnknownNameError: it has no SAEs, with the option that says whose to take.
    """
    from gemma_scope_tl.errors import UnknownNameError
    from gemma_scope_tl.registry.catalog import checked_model

    if sae_model is not None:
        return checked_model(sae_model)
    try:
        return checked_model(Path(model).name)
    except UnknownNameError as error:
        raise UnknownNameError(f"{error} --sae-model says whose SAEs to take for {model}.") from None


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table whole or not at all, in the format that the path's ending names."""
    from gemma_scope_tl.files import replace_files, write_atomically

    checks.file_format("table", path, checks.FORMATS)
    kind = path.suffix.lower()
    if kind == ".csv":
        write_atomically(path, table.to_csv(index=False))
    elif kind == ".json":
        write_atomically(path, table.to_json(orient="records", indent=2) + "\n")
    else:
        replace_files(path.parent, {path.name: lambda temporary: table.to_parquet(temporary, index=False)})

"""``gemma-scope eval``: the paper's metrics of any choice of SAEs on one set of tokens."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_scope_tl.cli.models import Backend, Device, ModelName, SaeModel
from gemma_scope_tl.cli.output import Json, print_frame, progress

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.registry.schema import SAERow

SHOWN = (
    "release",
    "id",
    "l0",
    "fvu",
    "delta_loss",
    "delta_loss_low",
    "delta_loss_high",
    "loss_recovered",
    "kl",
    "dead",
)
FORMATS = (".csv", ".json", ".parquet")
GIB = 1 << 30


def eval_command(
    pattern: Annotated[str | None, typer.Argument(help="Glob over release/id or id of the SAEs.")] = None,
    model: ModelName = "bundled",
    sae_model: SaeModel = None,
    release: Annotated[list[str] | None, typer.Option(help="Release; may be given several times.")] = None,
    site: Annotated[list[str] | None, typer.Option(help="res, mlp, att, embedding, transcoder; several times.")] = None,
    layer: Annotated[list[int] | None, typer.Option(help="Layer, from 0; several times.")] = None,
    width: Annotated[list[str] | None, typer.Option(help="16k, 65k, …; several times.")] = None,
    canonical: Annotated[bool, typer.Option("--canonical", help="Canonical SAEs only.")] = False,
    data: Annotated[
        str | None, typer.Option(help="A .txt or .jsonl file, or a data set's name[:config]; by default bundled text.")
    ] = None,
    column: Annotated[str, typer.Option(help="Where a .jsonl file or a data set has the text.")] = "text",
    split: Annotated[str, typer.Option(help="Split of a data set.")] = "train",
    rows: Annotated[int, typer.Option(min=1, help="Rows of tokens at most.")] = 64,
    context: Annotated[int, typer.Option(min=2, help="Tokens in a row, BOS included.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a forward pass.")] = 8,
    memory: Annotated[float, typer.Option(min=0.01, help="GiB that tensors may take beside weights.")] = 1.0,
    sae_memory: Annotated[float, typer.Option(min=0.01, help="GiB of SAEs to hold at a time.")] = 8.0,
    ablation: Annotated[list[str] | None, typer.Option(help="zero, mean (default: both); several times.")] = None,
    uniformity: Annotated[int, typer.Option(min=0, help="Positions a row for the importance of latents.")] = 0,
    by_position: Annotated[bool, typer.Option("--by-position", help="A row per SAE and position.")] = False,
    resume: Annotated[Path | None, typer.Option(help="Cache folder: go on there, and measure nothing twice.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write all columns to a .csv, .json or .parquet file.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the model and the SAEs: float32, bfloat16, float16.")] = "float32",
    backend: Backend = "bridge",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure L0, FVU, delta loss, loss recovered, KL and dead latents of SAEs, all on the same tokens.

    Examples:

        gemma-scope eval --site res

        gemma-scope eval 'layer_1/*' --by-position --out positions.csv

        gemma-scope eval --model gemma-2-2b --width 16k --canonical --rows 512 --context 1024 --resume cache/

        gemma-scope eval --model gemma-2-2b --layer 12 --site mlp --site transcoder --data texts.jsonl --out t.parquet
    """
    _check_out(out)
    chosen = _rows(sae_model or model.split("/")[-1], pattern, release, site, layer, width, canonical)
    loaded, tokens, suite = _load(
        chosen, (model, backend, device, dtype), (data, column, split), (context, rows), sae_memory
    )
    options: dict[str, Any] = {"uniformity": uniformity, "memory_budget": int(memory * GIB), "cache": resume}
    options |= {"ablations": tuple(ablation)} if ablation else {}
    table = _evaluate(loaded, suite, tokens, batch_size, by_position, options)
    if out is not None:
        write_table(table, out)
    shown = table if as_json or by_position else table[list(SHOWN)]
    print_frame(shown, f"{len(chosen)} SAEs on {tokens.shape[0]} x {tokens.shape[1]} tokens", as_json)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table whole or not at all, in the format that the path's ending names."""
    from gemma_scope_tl.files import replace_files, write_atomically

    _check_out(path)
    if path.suffix == ".csv":
        write_atomically(path, table.to_csv(index=False))
    elif path.suffix == ".json":
        write_atomically(path, table.to_json(orient="records", indent=2) + "\n")
    else:
        replace_files(path.parent, {path.name: lambda temporary: table.to_parquet(temporary, index=False)})


def _check_out(path: Path | None) -> None:
    from gemma_scope_tl.errors import unknown_name

    if path is not None and path.suffix not in FORMATS:
        raise unknown_name("table format", path.suffix, FORMATS)


def _rows(
    model: str,
    pattern: str | None,
    release: list[str] | None,
    site: list[str] | None,
    layer: list[int] | None,
    width: list[str] | None,
    canonical: bool,
) -> list[SAERow]:
    from gemma_scope_tl.errors import GemmaScopeError
    from gemma_scope_tl.registry.listing import select_rows

    found = select_rows(
        None if release else model,
        site=site or None,
        layer=layer or None,
        width=width or None,
        release=release or None,
        pattern=pattern,
    )
    chosen = [row for row in found if row.canonical or not canonical]
    if not chosen:
        raise GemmaScopeError("No SAE fits all of these conditions: see `gemma-scope list` with the same ones.")
    return chosen


def _load(
    rows: list[SAERow],
    named: tuple[str, str, str | None, str],
    texts: tuple[str | None, str, str],
    shape: tuple[int, int],
    sae_memory: float,
) -> tuple[Any, Any, Any]:
    """The model (name, backend, device, dtype), rows of tokens (context, most rows), and the SAEs, loaded in turn."""
    from gemma_scope_tl.adapters.loading import load_model
    from gemma_scope_tl.evals.packing import pack_texts
    from gemma_scope_tl.evals.texts import read_texts
    from gemma_scope_tl.sae.loading import load_row
    from gemma_scope_tl.sae.suite import SAESuite

    name, backend, device, dtype = named
    with progress.status("loading"):
        model = load_model(name, backend=backend, device=device, dtype=dtype)
        tokens = pack_texts(model.tokenizer, read_texts(*texts), *shape)
    keyed = {(f"{row.release}/{row.id}", row.layer): row for row in rows}
    held = int(sae_memory * GIB)
    return model, tokens, SAESuite(keyed, lambda row: load_row(row, device=model.cfg.device, dtype=dtype), held)


def _evaluate(
    model: Any, suite: Any, tokens: Any, batch_size: int, by_position: bool, options: dict[str, Any]
) -> pd.DataFrame:
    from gemma_scope_tl.evals.suite import evaluate

    bar = sys.stderr.isatty()
    return evaluate(model, suite, tokens, batch_size=batch_size, progress=bar, by_position=by_position, **options)

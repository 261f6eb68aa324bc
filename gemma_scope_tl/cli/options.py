"""The options that several verbs have, each defined once, with what can be checked of it at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gemma_scope_tl.cli import checks

_SITES = "res, mlp, att, embedding or transcoder"
_MODEL = "bundled, gemma-2-2b, gemma-2-9b-it, a Hugging Face id or a folder."

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Text = Annotated[str, typer.Argument(help="The text; - reads standard input.", callback=checks.text)]
Pattern = Annotated[str | None, typer.Argument(help="Glob over release/id or id of the SAEs.")]

ModelName = Annotated[str, typer.Option(help=_MODEL, callback=checks.each(checks.model))]
OtherModel = Annotated[str | None, typer.Option(help=_MODEL, callback=checks.each(checks.model))]
SaeModel = Annotated[str | None, typer.Option(help="The registry's model; by default that of --model.")]
Backend = Annotated[str, typer.Option(help="bridge or hooked_transformer.", callback=checks.each(checks.backend))]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, …; by default CUDA where there is one.", callback=checks.each(checks.device)),
]
Dtype = Annotated[
    str,
    typer.Option(help="Of the model and the SAEs: float32, bfloat16, float16.", callback=checks.each(checks.dtype)),
]
Dtypes = Annotated[
    list[str] | None,
    typer.Option(help="Compared with the first; float32, bfloat16.", callback=checks.each(checks.dtype)),
]

Site = Annotated[str, typer.Option(help=f"{_SITES}.", callback=checks.each(checks.site))]
OneSite = Annotated[str | None, typer.Option(help=f"{_SITES}.", callback=checks.each(checks.site))]
Sites = Annotated[list[str] | None, typer.Option(help=f"{_SITES}; several times.", callback=checks.each(checks.site))]
Layer = Annotated[int, typer.Option(min=0, help="Layer, from 0.")]
OneLayer = Annotated[int | None, typer.Option(min=0, help="Layer, from 0.")]
Layers = Annotated[list[int] | None, typer.Option(min=0, help="Layer, from 0; several times.")]
Width = Annotated[str | None, typer.Option(help="16k, 65k, …; by default the narrowest.", callback=checks.widths)]
OneWidth = Annotated[str | None, typer.Option(help="16k, 65k, 1m, …", callback=checks.widths)]
Widths = Annotated[list[str] | None, typer.Option(help="16k, 65k, …; several times.", callback=checks.widths)]
L0 = Annotated[str, typer.Option(help="canonical, a number that exists, or closest:50.")]
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
Seed = Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Of all draws.")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")]
TableFile = Annotated[Path | None, typer.Option(help="Write all columns to a .csv, .json or .parquet file.")]
Figure = Annotated[Path | None, typer.Option(help="Draw the table to this .png file.")]

"""``gemma-scope eval``: the paper's metrics of any choice of SAEs on one set of tokens."""

from __future__ import annotations

from typing import Annotated

import typer

from gemma_scope_tl.cli.choice import Choice, Dtype, verb, write_table
from gemma_scope_tl.cli.output import print_frame

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


def _measure(
    choice: Choice,
    ablation: Annotated[list[str] | None, typer.Option(help="zero, mean (default: both); several times.")] = None,
    uniformity: Annotated[int, typer.Option(min=0, help="Positions a row for the importance of latents.")] = 0,
    by_position: Annotated[bool, typer.Option("--by-position", help="A row per SAE and position.")] = False,
    dtype: Dtype = "float32",
) -> None:
    """Measure L0, FVU, delta loss, loss recovered, KL and dead latents of SAEs, all on the same tokens.

    Examples:

        gemma-scope eval --site res

        gemma-scope eval 'layer_1/*' --by-position --out positions.csv

        gemma-scope eval --model gemma-2-2b --width 16k --canonical --rows 512 --context 1024 --resume cache/

        gemma-scope eval --model gemma-2-2b --layer 12 --site mlp --site transcoder --data texts.jsonl --out t.parquet
    """
    from gemma_scope_tl.evals.run import ABLATIONS
    from gemma_scope_tl.evals.suite import evaluate

    chosen = choice.sae_rows()  # an empty choice is found out before the model is loaded
    model = choice.load_model(dtype)
    suite, tokens = choice.suite(model, dtype), choice.tokens(model)
    table = evaluate(
        model,
        suite,
        tokens,
        by_position=by_position,
        uniformity=uniformity,
        ablations=tuple(ablation) if ablation else ABLATIONS,
        **choice.options(),
    )
    if choice.out is not None:
        write_table(table, choice.out)
    shown = table if choice.as_json or by_position else table[list(SHOWN)]
    print_frame(shown, f"{len(chosen)} SAEs on {tokens.shape[0]} x {tokens.shape[1]} tokens", choice.as_json)


eval_command = verb(_measure)

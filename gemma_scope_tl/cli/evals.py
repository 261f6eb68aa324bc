"""``gemma-scope eval``: the paper's metrics of any choice of SAEs on one set of tokens."""

from __future__ import annotations

from typing import Annotated

import typer

from gemma_scope_tl.cli import checks
from gemma_scope_tl.cli.command import verb
from gemma_scope_tl.cli.options import Choice, write_table
from gemma_scope_tl.cli.output import print_frame

SHOWN = ("release", "id", "l0", "fvu", "delta_loss", "loss_recovered", "kl", "dead")


def _measure(
    choice: Choice,
    ablation: Annotated[
        list[str] | None,
        typer.Option(
            help="zero, mean (default: both); several times.", callback=checks.one_of("ablation", checks.ABLATIONS)
        ),
    ] = None,
    uniformity: Annotated[int, typer.Option(min=0, help="Positions a row for the importance of latents.")] = 0,
    by_position: Annotated[bool, typer.Option("--by-position", help="A row per SAE and position.")] = False,
) -> None:
    """Measure L0, FVU, delta loss, loss recovered, KL and dead latents of SAEs, all on the same tokens.

    Intervals are of 95 %; x ± e says how far the farther bound is.

    Examples:

        gemma-scope eval --site res

        gemma-scope eval 'layer_1/*' --by-position --out positions.csv

        gemma-scope eval --model gemma-2-2b --width 16k --canonical --rows 512 --context 1024 --resume cache/

        gemma-scope eval --model gemma-2-2b --layer 12 --site mlp --site transcoder --data texts.jsonl --out t.parquet
    """
    model = choice.load_model()
    from gemma_scope_tl.evals.suite import evaluate

    suite, tokens = choice.suite(model), choice.tokens(model)
    table = evaluate(
        model,
        suite,
        tokens,
        by_position=by_position,
        uniformity=uniformity,
        ablations=tuple(ablation or checks.ABLATIONS),
        **choice.options(),
    )
    if choice.out is not None:
        write_table(table, choice.out)
    title = f"{len(suite)} SAEs on {tokens.shape[0]} x {tokens.shape[1]} tokens"
    print_frame(table, title, choice.as_json, None if by_position else SHOWN)


eval_command = verb(_measure, Choice)

"""``gemma-scope eval``: the paper's metrics of several SAEs on the same tokens."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import typer

from gemma_scope_tl.cli import checks
from gemma_scope_tl.cli.options import SeveralSAEs, write_table
from gemma_scope_tl.cli.output import print_frame

SHOWN = ("release", "id", "l0", "fvu", "delta_loss", "loss_recovered", "kl", "dead")


@dataclass
class Evaluate(SeveralSAEs):
    """Measure L0, FVU, delta loss, loss recovered, KL and dead latents of SAEs, all on the same tokens.

    Intervals have a confidence of 95 %; in x ± e, e is the distance of the farther bound.

    Examples:

        gemma-scope eval --site res

        gemma-scope eval 'layer_1/*' --by-position --out positions.csv

        gemma-scope eval --model gemma-2-2b --width 16k --canonical --rows 512 --context 1024 --resume cache/

        gemma-scope eval --model bundled-gemma3 --site clt --rows 64

        gemma-scope eval --model gemma-2-2b --layer 12 --site mlp --site transcoder --data texts.jsonl --out t.parquet
    """

    takes_layered: ClassVar[bool] = True

    site: Annotated[
        list[str] | None,
        typer.Option(
            help="res, mlp, att, embedding, transcoder, crosscoder or clt; several times.",
            callback=checks.each(checks.listed_site),
        ),
    ] = None
    ablation: Annotated[
        list[str] | None,
        typer.Option(
            help="zero, mean (default: both); several times.", callback=checks.one_of("ablation", checks.ABLATIONS)
        ),
    ] = None
    uniformity: Annotated[int, typer.Option(min=0, help="Positions per row for the importance of latents.")] = 0
    by_position: Annotated[bool, typer.Option("--by-position", help="A row per SAE and position.")] = False

    def run(self) -> None:
        model = self.load_model()
        from gemma_scope_tl.evals.suite import evaluate
        from gemma_scope_tl.sites import LAYERED_SITES

        suite, tokens = self.suite(model), self.tokens(model)
        table = evaluate(
            model,
            suite,
            tokens,
            by_position=self.by_position,
            uniformity=self.uniformity,
            ablations=tuple(self.ablation or checks.ABLATIONS),
            **self.cached_settings(),
        )
        if self.out is not None:
            write_table(table, self.out)
        title = f"{len(suite)} SAEs on {tokens.shape[0]} x {tokens.shape[1]} tokens"
        layers = ("layer",) if LAYERED_SITES.keys() & set(table["site"]) else ()
        print_frame(table, title, self.as_json, None if self.by_position else (*SHOWN[:2], *layers, *SHOWN[2:]))

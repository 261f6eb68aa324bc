"""Quality on the bundled model's residual stream: L0 against FVU and delta loss of this package's and SAELens's recipe.

``python -m benchmarks.pareto search`` searches for the best settings of both (an hour on two idle cores, resumed if
stopped). ``run`` trains both on the same activations and evaluates them on the held-out text (half an hour);
``evaluate`` repeats only the evaluation. ``figure`` draws ``docs/pareto.png`` from ``results/pareto.json``. The
training text is that of the bundled model, which ``python scripts/train_bundled.py corpus`` and ``tokenizer`` make.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

import gemma_scope_tl as gs
from benchmarks.frontier import (
    Budget,
    PeerSettings,
    Trained,
    coefficient_for,
    comparison,
    draw,
    measure,
    ours,
    save_points,
    theirs,
)
from benchmarks.recipe_search import FOLDER, Log, chosen, score_ours, search, search_ours, slower_too
from gemma_scope_tl.activations.harvest import Harvester
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sites import Place
from gemma_scope_tl.text.tokens import special_mask
from gemma_scope_tl.training.recipe import FAST, Recipe
from scripts.bundled.files import write_atomic
from scripts.bundled.sae_suite import heldout_tokens
from scripts.bundled.tokenizer import BOS, EOS, PAD

ROOT = Path(__file__).parents[1]
MODEL = Path(gs.__file__).parent / "bundled" / "model"
HELDOUT = Path(gs.__file__).parent / "bundled" / "text" / "heldout.jsonl"
WORK = ROOT / "build" / "bundled"
FIGURE = ROOT / "docs" / "pareto.png"
PLACE = Place("res", 2)
BUDGET, SEARCH_BUDGET = Budget(d_sae=1_024, steps=2_000), Budget(d_sae=1_024, steps=1_000)
TARGETS, MIDDLE = (4.0, 8.0, 16.0, 32.0), 16.0
"""The first three are 3 to 13 % of the stream's 128 dimensions, the paper's range; the last is above this range."""
PEER_TARGETS = (3.5, 7.0, 16.0, 38.0)
"""The peer's targets extend beyond this package's on both sides, so that no value is extrapolated."""
HELD_ROWS = 50_000

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
Threads = Annotated[int, typer.Option(help="Torch's threads.")]
Quick = Annotated[bool, typer.Option(help="Tiny budgets, to see that everything runs; results go to another file.")]


@app.command(name="search")
def search_command(threads: Threads = 2, quick: Quick = False) -> None:
    """Find the best settings of both."""
    torch.set_num_threads(threads)
    budget = _budget(SEARCH_BUDGET, quick)
    held, x = activations(budget)
    name = _name(quick)
    log = Log(FOLDER / f"{name}.jsonl", PLACE.key)
    found = search(log, x, held, MIDDLE, budget, report=typer.echo)
    recipe = search_ours(log, x, held, MIDDLE, budget, PLACE, report=typer.echo)
    held, x = activations(_budget(BUDGET, quick))
    settled = slower_too(log, x, held, MIDDLE, _budget(BUDGET, quick), found, report=typer.echo)
    recipes = [recipe, replace(recipe, lr=recipe.lr / 2)]
    recipe = min(
        recipes,
        key=lambda one: score_ours(log, x, held, one, MIDDLE, _budget(BUDGET, quick), PLACE, report=typer.echo),
    )
    best: dict[str, Any] = {mode: {"settings": asdict(one), "coefficient": at} for mode, (one, at) in settled.items()}
    best["ours"] = asdict(recipe)
    write_atomically(FOLDER / f"{name}.json", json.dumps(best, indent=2) + "\n")


@app.command()
def run(threads: Threads = 2, quick: Quick = False) -> None:
    """Train both at four sparsities, keep the SAEs, and evaluate them."""
    torch.set_num_threads(threads)
    budget, name = _budget(BUDGET, quick), _name(quick)
    held, x = activations(budget)
    best = chosen(name)
    trained = ours(x, Recipe.from_json(best["ours"]), TARGETS, budget, PLACE)
    trained += ours(x, FAST, TARGETS, budget, PLACE, "ours, FAST unchanged")
    trained += peers(x, held, best, PEER_TARGETS, budget)
    write_atomic(WORK / f"{name}.pt", lambda temporary: torch.save(trained, temporary))
    evaluate(threads, quick)


@app.command()
def evaluate(threads: Threads = 2, quick: Quick = False) -> None:
    """Evaluate what ``run`` trained last; ``run`` does it too."""
    torch.set_num_threads(threads)
    budget, name = _budget(BUDGET, quick), _name(quick)
    held, _ = activations(replace(budget, steps=0))
    points = evaluated(torch.load(WORK / f"{name}.pt", weights_only=False), held)  # our own file
    what = f"bundled model, layer {PLACE.layer} residual stream"
    setting = {"budget": asdict(budget), "place": PLACE.key, "tokens": budget.steps * budget.batch_size}
    path = save_points(name, comparison(points, what), setting=setting, points=points)
    typer.echo(f"{path}\n{_table(points)}")


@app.command()
def figure(out: Annotated[Path, typer.Option(help="Where to.")] = FIGURE, quick: Quick = False) -> None:
    """Draw the figure from the stored results."""
    typer.echo(draw(_name(quick), f"Bundled model, residual stream of layer {PLACE.layer}", out))


def peers(
    x: Tensor, held: Tensor, best: dict[str, Any], targets: Sequence[float], budget: Budget, middle: float = MIDDLE
) -> list[Trained]:
    """SAELens's SAEs with each penalty's best settings; coefficients are adjusted to the targets; all runs are kept.

    Args:
        x: training activations ``[n, d]``.
        held: activations on which L0 is adjusted.
        best: settings of each penalty and the coefficient at the L0 ``middle``, from the search.
        targets: L0s to reach.
        budget: budget of each run.
        middle: see ``best``.
    """
    found: list[Trained] = []
    for mode, entry in best.items():
        if mode == "ours":
            continue
        settings, guess = PeerSettings(**entry["settings"]), float(entry["coefficient"])
        for target in targets:
            quadratic = target if mode == "quadratic" else None

            def train(coefficient: float, settings: PeerSettings = settings, goal: float | None = quadratic) -> float:
                found.append(theirs(x, settings, coefficient, budget, goal))
                return measure(found[-1].arrays, held)["l0"]

            if quadratic is not None:
                train(guess)
            else:
                start = guess * (middle / target) ** 1.4
                coefficient_for(train, target, start, tries=4, close=0.15)
    return found


def activations(budget: Budget) -> tuple[Tensor, Tensor]:
    """``(held [n, d], training [steps * batch_size, d])`` of the place, from the bundled model on its training text."""

    from scripts.bundled.data import load_token_batches

    if not (WORK / "tokens").exists():
        raise GemmaScopeError(
            f"{WORK / 'tokens'} is missing: run 'python scripts/train_bundled.py corpus', then 'tokenizer'."
        )
    harvester, parts, count = Harvester(gs.load_model(MODEL), [PLACE]), list[Tensor](), 0
    wanted = HELD_ROWS + budget.steps * budget.batch_size
    for tokens in load_token_batches(WORK, 16, 256, seed=7):
        parts.append(harvester.run(tokens, ~special_mask(tokens, (PAD, EOS, BOS)))[PLACE])
        count += len(parts[-1])
        if count >= wanted:
            break
    x = torch.cat(parts)
    return x[:HELD_ROWS], x[HELD_ROWS:wanted]


def evaluated(trained: Sequence[Trained], held: Tensor, windows: int = 240) -> list[dict[str, Any]]:
    """A row per SAE: held-out L0, FVU and losses on the bundled text, and the settings of the training.

    Args:
        trained: the SAEs.
        held: activations ``[n, d]`` on which no SAE was trained, for the firing frequencies.
        windows: number of windows of held-out text.
    """
    model = gs.load_model(MODEL)
    tokens = heldout_tokens(limit=windows)
    saes = [JumpReLUSAE.from_arrays(one.arrays, site=PLACE.site, layer=PLACE.layer) for one in trained]
    frame = gs.evaluate(model, saes, tokens)
    names = ["l0", "fvu", "delta_loss", "loss_recovered", "loss_clean", "tokens"]
    return [
        {
            "recipe": one.recipe,
            **row,
            "dense_share": measure(one.arrays, held)["dense_share"],
            "seconds": round(one.seconds, 1),
            "settings": one.settings,
        }
        for one, row in zip(trained, frame[names].to_dict("records"), strict=True)
    ]


def _budget(budget: Budget, quick: bool) -> Budget:
    return Budget(128, 40, 512) if quick else budget


def _name(quick: bool) -> str:
    return "quick_pareto" if quick else "pareto"


def _table(points: list[dict[str, Any]]) -> str:
    lines = [
        f"{p['recipe']:32} L0 {p['l0']:7.2f}  FVU {p['fvu']:.4f}  delta loss {p['delta_loss']:.4f}" for p in points
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    app()

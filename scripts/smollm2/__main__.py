"""SAEs on SmolLM2-135M's middle residual stream, by this package's and SAELens's recipe at several sparsities each.

``python -m scripts.smollm2 all`` does everything: the model's folder (fetched, checked), activations (2.0M tokens, half
an hour on one core), the search for the peer's settings, training, evaluation and the figure (about an hour on two idle
cores). Each step keeps its results, and continues after an interruption. The model's weights are 4-bit quantised. These
steps do not run in CI.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from benchmarks.frontier import Budget, PeerSettings, comparison, draw, load_points, ours, peer_points, save_points
from benchmarks.pareto import BUDGET as BUNDLED_BUDGET
from benchmarks.pareto import peers
from benchmarks.recipe_search import FOLDER, Log, chosen, search, search_ours
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.sites import Place
from gemma_scope_tl.training.recipe import Recipe, fast
from scripts.smollm2.data import describe, load_activations, token_rows
from scripts.smollm2.data import harvest as harvest_activations
from scripts.smollm2.measure import evaluated
from scripts.smollm2.model import LAYER, make_model

ROOT = Path(__file__).parents[2]
FIGURE = ROOT / "docs" / "pareto_smollm2.png"
NAME, BUNDLED = "smollm2_pareto", "pareto"
TOKENS, HELD_ROWS, HELDOUT_TOKENS = 2_000_000, 50_000, 64 * 256
BUDGET, SEARCH_BUDGET = Budget(d_sae=1_024, steps=600), Budget(d_sae=1_024, steps=300)
PLACE = Place("res", LAYER)
TARGETS, PEER_TARGETS, MIDDLE = (8.0, 16.0, 32.0, 64.0), (14.0, 32.0, 76.0), 32.0
WIDTHS = 576 / 128
"""In SAELens's units errors grow with the width of the activations, and so does a coefficient of the same effect."""

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
Work = Annotated[Path, typer.Option(help="Folder for downloads, model, tokens and activations.")]
Threads = Annotated[int, typer.Option(help="Torch's threads.")]
Tokens = Annotated[int, typer.Option(help="Training tokens to harvest.")]
DEFAULT_WORK = Path("build/smollm2")


@app.command()
def model(work: Work = DEFAULT_WORK) -> None:
    """Fetch the quantised weights and save the model as a Hugging Face folder."""
    typer.echo(make_model(work))


@app.command()
def harvest(work: Work = DEFAULT_WORK, tokens: Tokens = TOKENS, threads: Threads = 2) -> None:
    """Store the activations of the training text."""
    torch.set_num_threads(threads)
    make_model(work)
    typer.echo(f"{harvest_activations(work, tokens)}: {describe(load_activations(work / 'activations')[:200_000])}")


@app.command(name="search")
def search_command(work: Work = DEFAULT_WORK, threads: Threads = 2) -> None:
    """Adapt the settings found on the bundled model to this one: the peer's, then ours."""
    torch.set_num_threads(threads)
    held, x = _activations(work)
    log = Log(FOLDER / f"{NAME}.jsonl", f"layer {LAYER}")
    best = {**_search_peer(log, x, held), "ours": asdict(_search_ours(log, x, held))}
    write_atomically(FOLDER / f"{NAME}.json", json.dumps(best, indent=2) + "\n")


def _search_peer(log: Log, x: Tensor, held: Tensor) -> dict[str, Any]:
    """SAELens's learning rates and coefficients."""
    plan = {
        mode: (PeerSettings(**entry["settings"]), float(entry["coefficient"]) * WIDTHS)
        for mode, entry in chosen(BUNDLED).items()
        if mode != "ours"
    }
    stages = {
        mode: (one, (({"lr": one.lr / 3}, {"lr": one.lr * 3}),))
        for mode, (one, _) in plan.items()
        if mode != "quadratic"
    }
    guesses = {mode: guess for mode, (_, guess) in plan.items()}
    found = search(log, x, held, MIDDLE, SEARCH_BUDGET, stages=stages, guesses=guesses, report=typer.echo)
    return {mode: {"settings": asdict(one), "coefficient": at} for mode, (one, at) in found.items()}


def _search_ours(log: Log, x: Tensor, held: Tensor) -> Recipe:
    """This package's settings, rescaled from those of the bundled model, at the full budget that steering L0 needs."""
    start = shortened(Recipe.from_json(chosen(BUNDLED)["ours"]), BUDGET).rescaled(WIDTHS**-0.5)
    return search_ours(log, x, held, MIDDLE, BUDGET, PLACE, start=start, stages=_stages(start), report=typer.echo)


def _stages(start: Recipe) -> list[list[dict[str, Any]]]:
    """The changes tried for this package's recipe: factors around each value of the start."""

    def scaled(factors: tuple[float, ...], *names: str) -> list[dict[str, Any]]:
        return [{name: getattr(start, name) * factor for name in names} for factor in factors]

    return [
        scaled((1 / 4, 1 / 16), "l0_coefficient"),
        scaled((1 / 2, 2.0), "lr"),
        scaled((1 / 3, 2.0), "init_threshold", "bandwidth"),
        scaled((1 / 2,), "init_threshold"),
        [{"betas": (0.0, 0.9)}, {"betas": (0.0, 0.99)}],
        [{"lr_decay": 0.8}],
    ]


@app.command()
def run(
    work: Work = DEFAULT_WORK,
    threads: Threads = 2,
    keep_peer: Annotated[bool, typer.Option(help="Train ours only, and keep the stored results of the peer.")] = False,
) -> None:
    """Train both at several sparsities on the stored activations, and evaluate on held-out text."""
    torch.set_num_threads(threads)
    held, x = _activations(work)
    setting: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct, weights 4-bit quantised (GGUF Q4_1)",
        "place": f"residual stream after layer {LAYER} of 30",
        "budget": asdict(BUDGET),
        "activations": len(x),
        "tokens": BUDGET.steps * BUDGET.batch_size,
    }
    kept = _stored_peer(setting) if keep_peer else []
    best = chosen(NAME)
    trained = ours(x, Recipe.from_json(best["ours"]), TARGETS, BUDGET, PLACE)
    trained += ours(x, shortened(fast(x.shape[1]), BUDGET), TARGETS, BUDGET, PLACE, "ours, preset fast")
    if not keep_peer:
        trained += peers(x, held, best, PEER_TARGETS, BUDGET, MIDDLE)
    points = evaluated(work / "model", token_rows(work, "heldout", HELDOUT_TOKENS), trained) + kept
    rows = comparison(points, "SmolLM2-135M (4-bit), middle residual stream")
    typer.echo(save_points(NAME, rows, setting=setting, points=points))
    for point in points:
        typer.echo({key: point[key] for key in ("recipe", "l0", "fvu", "delta_loss", "alive")})


@app.command()
def figure(out: Annotated[Path, typer.Option(help="Where to.")] = FIGURE) -> None:
    """Draw the figure from the stored results."""
    typer.echo(draw(NAME, f"SmolLM2-135M (4-bit), residual stream after layer {LAYER}", out))


@app.command(name="all")
def everything(work: Work = DEFAULT_WORK, threads: Threads = 2) -> None:
    """All steps, one after the other."""
    harvest(work, TOKENS, threads)
    search_command(work, threads)
    run(work, threads)
    figure()


def _stored_peer(setting: dict[str, Any]) -> list[dict[str, Any]]:
    """The peer's points of the stored results, which must have the same data and budget."""
    stored = load_points(NAME)
    if stored["setting"] != setting:
        raise GemmaScopeError(f"The stored results are of {stored['setting']}, not {setting}: run without --keep-peer.")
    return peer_points(stored["points"])


def shortened(recipe: Recipe, budget: Budget) -> Recipe:
    """The recipe found on the bundled model, with warm-ups scaled to the length of the run."""
    share = budget.steps / BUNDLED_BUDGET.steps
    warm_ups = {name: round(getattr(recipe, name) * share) for name in ("lr_warm_up_steps", "l0_warm_up_steps")}
    return replace(recipe, **warm_ups)


def _activations(work: Path) -> tuple[Tensor, Tensor]:
    """``(held, training)`` activations: the first stored ones are for choosing settings, the rest for training."""
    x = load_activations(work / "activations")
    return x[:HELD_ROWS], x[HELD_ROWS:]


if __name__ == "__main__":
    app()

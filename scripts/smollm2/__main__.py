"""SAEs on SmolLM2-135M's middle residual stream, by this package's and SAELens's recipe at several sparsities each.

``python -m scripts.smollm2 all`` does everything: the model's folder (fetched, checked), activations (0.5M tokens, ten
minutes on one core), the search for both sides' settings, training with three seeds, evaluation and the figure (two to
three hours on one core). Each step keeps its results, and continues after an interruption. The weights are 4-bit
quantised. These steps do not run in CI.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from benchmarks.frontier import SEEDS, Budget, PeerSettings, Trained, comparison, draw, save_points
from benchmarks.recipe_search import (
    CURVE,
    FOLDER,
    TARGETS,
    Data,
    Log,
    OurSettings,
    chosen,
    quiet,
    score_ours,
    score_peer,
    search_ours,
    search_peer,
    store,
    train_all,
    trained_file,
)
from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.sites import Place
from scripts.bundled.files import write_atomic
from scripts.smollm2.data import describe, load_activations, token_rows
from scripts.smollm2.data import harvest as harvest_activations
from scripts.smollm2.measure import evaluated
from scripts.smollm2.model import LAYER, make_model

ROOT = Path(__file__).parents[2]
FIGURE = ROOT / "docs" / "pareto_smollm2.png"
NAME, SEARCH, BUNDLED = "smollm2_pareto", "smollm2", "bundled"
TOKENS, HELD_ROWS, HELDOUT_TOKENS = 500_000, 50_000, 32 * 256
BUDGET = Budget(d_sae=1_024, steps=400)
PLACE = Place("res", LAYER)
STAGES = (("lr", (0.5, 2.0)), ("scale", (0.5, 2.0)))
"""The knobs that are searched again, from the best settings on the bundled model."""
WIDTHS = 576 / 128
"""In SAELens's units errors grow with the width of the activations, and so does a coefficient of the same effect."""

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
Work = Annotated[Path, typer.Option(help="Folder for downloads, model, tokens and activations.")]
Threads = Annotated[int, typer.Option(help="Torch's threads.")]
Part = Annotated[Literal["all", "ours", "peer"], typer.Option(help="ours, peer, or all, which also writes the result.")]
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
def search_command(work: Work = DEFAULT_WORK, threads: Threads = 2, part: Part = "all") -> None:
    """Adapt the settings found on the bundled model to this one: the same knobs for both sides."""
    torch.set_num_threads(threads)
    data = _data(work, BUDGET)
    before = chosen(BUNDLED)
    if part in ("all", "ours"):
        for target in TARGETS:
            _search_ours(data, before, target, typer.echo)
    if part in ("all", "peer"):
        for target in TARGETS:
            _search_peer(data, before, target, typer.echo)
    if part == "all":
        best: dict[str, Any] = {"ours": {}, "peer": {}}
        for target in CURVE:
            nearest = min(TARGETS, key=lambda t, target=target: abs(math.log(t / target)))
            own = _search_ours(data, before, nearest, quiet)
            best["ours"][f"{target:g}"] = {"settings": asdict(own), "fvu": score_ours(data, own, target)}
            settings, guess = _search_peer(data, before, nearest, quiet)
            value, coefficient = score_peer(data, settings, guess, target)
            best["peer"][f"{target:g}"] = {"settings": asdict(settings), "coefficient": coefficient, "fvu": value}
        typer.echo(store(SEARCH, best))


def _search_ours(data: Data, before: dict[str, Any], target: float, report: Callable[[str], Any]) -> OurSettings:
    """This package's settings at a target, from the best ones on the bundled model at this L0."""
    start = OurSettings.from_json(before["ours"][f"{target:g}"]["settings"])
    return search_ours(data, target, start=start, stages=STAGES, report=report)


def _search_peer(
    data: Data, before: dict[str, Any], target: float, report: Callable[[str], Any]
) -> tuple[PeerSettings, float]:
    """SAELens's settings at a target, from the best ones on the bundled model at this L0."""
    entry = before["peer"][f"{target:g}"]
    start = PeerSettings(**entry["settings"])
    guess = float(entry["coefficient"]) * WIDTHS * (target / 16.0) ** 1.4
    return search_peer(data, start.mode, target, start=start, guess=guess, stages=STAGES, report=report)


@app.command()
def run(work: Work = DEFAULT_WORK, threads: Threads = 2, seeds: int = len(SEEDS)) -> None:
    """Train both at every sparsity with every seed on the stored activations, and evaluate on held-out text."""
    torch.set_num_threads(threads)
    points = [point for seed in SEEDS[:seeds] for point in _points(work, seed)]
    setting: dict[str, Any] = {
        "model": "SmolLM2-135M-Instruct, weights 4-bit quantised (GGUF Q4_1)",
        "place": f"residual stream after layer {LAYER} of 30",
        "budget": asdict(BUDGET),
        "tokens": BUDGET.steps * BUDGET.batch_size,
    }
    rows = comparison(points, "SmolLM2-135M (4-bit), middle residual stream")
    typer.echo(save_points(NAME, rows, setting=setting, points=points))
    for point in points:
        typer.echo({key: point[key] for key in ("recipe", "seed", "l0", "fvu", "delta_loss", "alive")})


@app.command(name="seed")
def seed_command(seed: int, work: Work = DEFAULT_WORK, threads: Threads = 1) -> None:
    """Do ``run``'s work of one seed; seeds can run side by side, and ``run`` continues from what they keep."""
    torch.set_num_threads(threads)
    typer.echo(f"seed {seed}: {len(_points(work, seed))} SAEs trained and evaluated")


def _points(work: Path, seed: int) -> list[dict[str, Any]]:
    """The SAEs of one seed, trained and evaluated: from the files of an earlier run where they exist."""
    budget = replace(BUDGET, seed=seed)
    path = trained_file(work, NAME, chosen(SEARCH), budget)
    if not path.exists():
        found = train_all(_data(work, budget), chosen(SEARCH))
        write_atomic(path, lambda temporary: torch.save(found, temporary))
    kept = path.with_suffix(f".{HELDOUT_TOKENS}.json")
    if not kept.exists():
        trained: list[Trained] = torch.load(path, weights_only=False)  # our own file
        points = evaluated(work / "model", token_rows(work, "heldout", HELDOUT_TOKENS), trained)
        write_atomically(kept, json.dumps(points))
    return json.loads(kept.read_text(encoding="utf-8"))


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


def _data(work: Path, budget: Budget) -> Data:
    """The stored activations: the first are for choosing settings, the rest for training."""
    x = load_activations(work / "activations")
    return Data(x[HELD_ROWS:], x[:HELD_ROWS], budget, PLACE, Log(FOLDER / f"{SEARCH}.jsonl", f"layer {LAYER}"))


if __name__ == "__main__":
    app()

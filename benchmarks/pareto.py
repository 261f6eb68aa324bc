"""Quality on the bundled model's residual stream: L0 against FVU and delta loss of this package's and SAELens's recipe.

``python -m benchmarks.pareto search`` searches for the best settings of both (three hours on one core; it resumes if
stopped, and ``--part ours``, ``tanh`` and ``step`` can run side by side first). ``run`` trains both on the same
activations with three seeds and evaluates them on the held-out text (half an hour); ``evaluate`` evaluates again.
``figure`` draws ``docs/pareto.png`` from ``results/pareto.json``. The training text is that of the bundled model, which
``python scripts/train_bundled.py corpus`` and ``tokenizer`` make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor

import gemma_scope_tl as gs
from benchmarks.frontier import SEEDS, Budget, Trained, comparison, draw, measure, save_points
from benchmarks.recipe_search import (
    FOLDER,
    PEERS,
    TARGETS,
    Data,
    Log,
    chosen,
    search_ours,
    search_peer,
    settled,
    store,
    train_all,
    trained_file,
)
from gemma_scope_tl.activations.harvest import Harvester
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sites import Place
from gemma_scope_tl.text.tokens import special_mask
from scripts.bundled.files import write_atomic
from scripts.bundled.sae_suite import heldout_tokens
from scripts.bundled.tokenizer import BOS, EOS, PAD

ROOT = Path(__file__).parents[1]
MODEL = Path(gs.__file__).parent / "bundled" / "model"
HELDOUT = Path(gs.__file__).parent / "bundled" / "text" / "heldout.jsonl"
WORK = ROOT / "build" / "bundled"
FIGURE = ROOT / "docs" / "pareto.png"
PLACE = Place("res", 2)
BUDGET = Budget(d_sae=1_024, steps=400)
"""Of the search and of the comparison: settings are best for the length of the runs in which they were found."""
HELD_ROWS = 50_000

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)
Threads = Annotated[int, typer.Option(help="Torch's threads.")]
Part = Annotated[
    Literal["all", "ours", "tanh", "step"],
    typer.Option(help="ours, one of SAELens's penalties, or all, which also writes the result."),
]
Quick = Annotated[bool, typer.Option(help="Tiny budgets, to see that everything runs; results go to another file.")]


@app.command(name="search")
def search_command(threads: Threads = 2, quick: Quick = False, part: Part = "all") -> None:
    """Find the best settings of both, with the same knobs and the same number of trials."""
    torch.set_num_threads(threads)
    budget = _budget(BUDGET, quick)
    data = _data(budget, quick)
    if part in ("all", "ours"):
        for target in TARGETS:
            search_ours(data, target, report=typer.echo)
    for mode in PEERS:
        if part in ("all", mode):
            for target in TARGETS:
                search_peer(data, mode, target, report=typer.echo)
    if part == "all":
        typer.echo(store(_search(quick), settled(data)))


@app.command()
def run(threads: Threads = 2, quick: Quick = False, seeds: int = len(SEEDS)) -> None:
    """Train both at every sparsity with every seed, keep the SAEs, and evaluate them."""
    torch.set_num_threads(threads)
    name = _name(quick)
    best, trained = chosen(_search(quick)), list[Trained]()
    for seed in SEEDS[:seeds]:
        budget = replace(_budget(BUDGET, quick), seed=seed)
        path = trained_file(WORK, name, best, budget)
        if not path.exists():
            found = train_all(_data(budget, quick), best)
            write_atomic(path, lambda temporary, found=found: torch.save(found, temporary))
        trained += torch.load(path, weights_only=False)  # our own file
        typer.echo(f"seed {seed}: {len(trained)} SAEs in all")
    evaluate(threads, quick, seeds)


@app.command()
def evaluate(threads: Threads = 2, quick: Quick = False, seeds: int = len(SEEDS)) -> None:
    """Evaluate what ``run`` trained last; ``run`` does it too."""
    torch.set_num_threads(threads)
    budget, name = _budget(BUDGET, quick), _name(quick)
    held, _ = activations(replace(budget, steps=0))
    best = chosen(_search(quick))
    files = [trained_file(WORK, name, best, replace(budget, seed=seed)) for seed in SEEDS[:seeds]]
    trained = [one for path in files for one in torch.load(path, weights_only=False)]  # our own files
    points = evaluated(trained, held)
    what = f"bundled model, layer {PLACE.layer} residual stream"
    setting = {"budget": asdict(budget), "place": PLACE.key, "tokens": budget.steps * budget.batch_size}
    rows = [] if quick else comparison(points, what)  # tiny runs do not reach their L0
    path = save_points(name, rows, setting=setting, points=points)
    typer.echo(f"{path}\n{_table(points)}")


@app.command()
def figure(out: Annotated[Path, typer.Option(help="Where to.")] = FIGURE, quick: Quick = False) -> None:
    """Draw the figure from the stored results."""
    typer.echo(draw(_name(quick), f"Bundled model, residual stream of layer {PLACE.layer}", out))


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
            **{str(name): value for name, value in row.items()},
            "seed": one.seed,
            **{key: value for key, value in measure(one.arrays, held).items() if key in ("alive", "dense_share")},
            "seconds": round(one.seconds, 1),
            "settings": one.settings,
        }
        for one, row in zip(trained, frame[names].to_dict("records"), strict=True)
    ]


def _budget(budget: Budget, quick: bool) -> Budget:
    return Budget(128, 40, 512) if quick else budget


def _name(quick: bool) -> str:
    return "quick_pareto" if quick else "pareto"


def _data(budget: Budget, quick: bool) -> Data:
    held, x = activations(budget)
    return Data(x, held, budget, PLACE, Log(FOLDER / f"{_search(quick)}.jsonl", PLACE.key))


def _search(quick: bool) -> str:
    return "quick_bundled" if quick else "bundled"


def _table(points: list[dict[str, Any]]) -> str:
    lines = [
        f"{p['recipe']:32} L0 {p['l0']:7.2f}  FVU {p['fvu']:.4f}  delta loss {p['delta_loss']:.4f}" for p in points
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    app()

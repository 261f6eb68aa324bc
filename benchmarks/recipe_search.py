"""The search for the best settings of both recipes, one setting at a time, at one L0.

The search for SAELens starts from the values of its documentation, once for each penalty. The search for this package
starts from ``FAST`` and keeps the paper's loss and Adam without momentum.

Every run of the search is kept in ``results/search/<name>.jsonl``, and no run is repeated. A candidate's coefficient is
adjusted so that its L0 comes near the target. Its FVU at the target is interpolated from the runs on both sides (or the
two nearest), on activations that no training run sees and that the final evaluation does not use.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.frontier import STEP, Budget, PeerSettings, coefficient_for, measure, ours, theirs
from benchmarks.timing import RESULTS
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sites import Place
from gemma_scope_tl.training.recipe import FAST, Recipe

FOLDER = RESULTS / "search"
RATES = ({"lr": 1e-3}, {"lr": 3e-3}, {"lr": 1e-2}, {"lr": 3e-2})
Stages = tuple[PeerSettings, Sequence[Sequence[dict[str, Any]]]]
GUESSES = {"tanh": 1.0, "step": 0.3, "quadratic": 0.5}
STAGES: dict[str, Stages] = {
    "tanh": (
        PeerSettings(),
        (
            RATES,
            ({"bandwidth": 0.5}, {"bandwidth": 1.0, "init_threshold": 0.5}),
            ({"l0_warm_up": 0.1},),
            ({"ste_to_input": False, "pre_act_loss": None},),
            ({"beta1": 0.0},),
            ({"decoder_init_norm": 1.0},),
        ),
    ),
    "step": (
        replace(STEP, bandwidth=0.5, init_threshold=0.1),  # at its defaults L0 does not fall in runs of this length
        (
            RATES,
            ({"bandwidth": 1.0, "init_threshold": 0.5}, {"bandwidth": 2.0, "init_threshold": 0.1}, {"bandwidth": 0.1}),
            ({"l0_warm_up": 1.0},),
            ({"beta1": 0.0},),
            ({"decoder_init_norm": 1.0},),
            ({"ste_to_input": True, "pre_act_loss": 3e-6},),
        ),
    ),
}
"""The start of each penalty's search, and the changes tried one after the other; a change that helps is kept."""


OUR_STAGES: Sequence[Sequence[dict[str, Any]]] = (
    ({"betas": (0.0, 0.999)}, {"betas": (0.0, 0.99)}, {"betas": (0.0, 0.95)}),
    ({"lr": 4e-3}, {"lr": 1e-2}, {"lr": 1.5e-2}),
    ({"bandwidth": 0.05}, {"bandwidth": 0.2}),
    ({"init_threshold": 0.03}, {"init_threshold": 0.1}),
    ({"l0_warm_up_steps": 500},),
    ({"lr_decay": 0.5},),
)
"""The changes tried for this package's recipe, as above."""


@dataclass
class Log:
    """A log of runs, one JSON object per line: settings, coefficient, budget, and result."""

    path: Path
    data: str

    def runs(self) -> list[dict[str, Any]]:
        """All runs on this data."""
        if not self.path.exists():
            return []
        rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
        return [row for row in rows if row["data"] == self.data]

    def run(self, key: dict[str, Any], train: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result for ``key``: from the file, or from ``train()``, whose result is then added to the file."""
        for row in self.runs():
            if all(row.get(name) == value for name, value in key.items()):
                return row
        row = {"data": self.data, **key, **train()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row


def run_peer(
    log: Log, x: Tensor, held: Tensor, settings: PeerSettings, coefficient: float, budget: Budget
) -> dict[str, Any]:
    """One short run of SAELens's trainer: ``l0``, ``fvu``, ``alive`` on ``held`` and the seconds it took."""
    key = {**asdict(settings), **asdict(budget), "coefficient": float(f"{coefficient:.4g}")}

    def train() -> dict[str, Any]:
        trained = theirs(x, settings, key["coefficient"], budget)
        return {**measure(trained.arrays, held), "seconds": round(trained.seconds, 1)}

    return log.run(key, train)


def search(
    log: Log,
    x: Tensor,
    held: Tensor,
    target: float,
    budget: Budget,
    *,
    stages: Mapping[str, Stages] = STAGES,
    guesses: Mapping[str, float] = GUESSES,
    report: Callable[[str], Any] = print,
) -> dict[str, tuple[PeerSettings, float]]:
    """The best settings of each penalty and their coefficient at the target L0.

    Args:
        log: the log of runs.
        x: training activations ``[n, d]``.
        held: activations on which candidates are compared.
        target: the L0 at which candidates are compared.
        budget: budget of each run.
        stages: start and changes of each penalty; the quadratic penalty takes over the settings of ``step``.
        guesses: coefficients to start from.
        report: called with a line for every candidate.
    """
    found: dict[str, tuple[PeerSettings, float]] = {}
    for mode, (start, changes) in stages.items():
        best, (score, coefficient) = start, _score(log, x, held, start, guesses[mode], target, budget)
        report(f"{mode}: FVU {score:.4f} with {start}")
        for stage in changes:
            scored: list[tuple[tuple[float, float], PeerSettings]] = []
            guess = coefficient
            for one in (replace(best, **change) for change in stage):
                value, guess = _score(log, x, held, one, guess, target, budget)
                scored.append(((value, guess), one))
                report(f"{mode}: FVU {value:.4f} with {one}")
            (value, at), one = min(scored, key=lambda pair: pair[0][0])
            if value < score:
                best, score, coefficient = one, value, at
        found[mode] = (best, coefficient)
    best, _ = found["step"]
    found["quadratic"] = (replace(best, mode="quadratic"), guesses["quadratic"])
    return found


def slower_too(
    log: Log,
    x: Tensor,
    held: Tensor,
    target: float,
    budget: Budget,
    found: Mapping[str, tuple[PeerSettings, float]],
    *,
    report: Callable[[str], Any] = print,
) -> dict[str, tuple[PeerSettings, float]]:
    """Run the best settings again at the full budget, for which half the learning rate may be better."""
    settled: dict[str, tuple[PeerSettings, float]] = {}
    for mode, (best, guess) in found.items():
        if mode == "quadratic":  # takes over the settings of ``step``
            settled[mode] = (replace(settled["step"][0], mode=mode), guess)
            continue
        scored = [
            (_score(log, x, held, one, guess, target, budget), one) for one in (best, replace(best, lr=best.lr / 2))
        ]
        for (value, _), one in scored:
            report(f"{mode}, {budget.steps} steps: FVU {value:.4f} with {one}")
        (_, at), one = min(scored, key=lambda pair: pair[0][0])
        settled[mode] = (one, at)
    return settled


def search_ours(
    log: Log,
    x: Tensor,
    held: Tensor,
    target: float,
    budget: Budget,
    place: Place,
    *,
    start: Recipe = FAST,
    stages: Sequence[Sequence[dict[str, Any]]] = OUR_STAGES,
    report: Callable[[str], Any] = print,
) -> Recipe:
    """This package's best settings at the target L0, to which L0 is steered. Arguments are as for :func:`search`."""

    best = replace(start, batch_size=budget.batch_size)
    lowest = score_ours(log, x, held, best, target, budget, place, report=report)
    for stage in stages:
        tried = [replace(best, **change) for change in stage]
        scored = [(score_ours(log, x, held, one, target, budget, place, report=report), one) for one in tried]
        value, one = min(scored, key=lambda pair: pair[0])
        if value < lowest:
            best, lowest = one, value
    return best


def score_ours(
    log: Log,
    x: Tensor,
    held: Tensor,
    recipe: Recipe,
    target: float,
    budget: Budget,
    place: Place,
    *,
    report: Callable[[str], Any] = print,
) -> float:
    """FVU of this package's recipe at the target L0; infinite if L0 did not come within a factor of two."""
    key = {"mode": "ours", **json.loads(json.dumps(asdict(recipe))), **asdict(budget), "target": target}

    def train() -> dict[str, Any]:
        (trained,) = ours(x, recipe, [target], budget, place)
        return {**measure(trained.arrays, held), "seconds": round(trained.seconds, 1)}

    row = log.run(key, train)
    found = fvu_at([(row["l0"], row["fvu"])], target)
    report(f"ours, {budget.steps} steps: FVU {found:.4f} with {recipe}")
    return found


def _score(
    log: Log, x: Tensor, held: Tensor, settings: PeerSettings, guess: float, target: float, budget: Budget
) -> tuple[float, float]:
    """FVU at the target L0, and the coefficient nearest to it; infinite if no run came within a factor of two."""
    rows: list[dict[str, Any]] = []

    def train(coefficient: float) -> float:
        rows.append(run_peer(log, x, held, settings, coefficient, budget))
        return rows[-1]["l0"]

    best = coefficient_for(train, target, guess, tries=3, close=0.15)
    return fvu_at([(row["l0"], row["fvu"]) for row in rows], target), best


def fvu_at(points: Sequence[tuple[float, float]], target: float, slope: float = -0.5) -> float:
    """FVU at an L0, linear in logarithms through the two nearest points; from a single point with the given slope."""
    near = sorted((p for p in points if p[0] > 0), key=lambda point: abs(math.log(point[0] / target)))[:2]
    if not near or abs(math.log(near[0][0] / target)) > math.log(2.0):
        return math.inf
    at, value = near[0]
    if len(near) == 2 and abs(math.log(near[1][0] / at)) > 0.1:
        measured = math.log(near[1][1] / value) / math.log(near[1][0] / at)
        slope = min(-0.1, max(-1.5, measured))
    return value * (target / at) ** slope


def chosen(name: str) -> dict[str, Any]:
    """The stored result of a search.

    Raises:
        GemmaScopeError: no search has been run.
    """
    path = FOLDER / f"{name}.json"
    if not path.exists():
        raise GemmaScopeError(f"{path} is missing: run the search first.")
    return json.loads(path.read_text(encoding="utf-8"))

"""The search for the best settings of both recipes: the same knobs, in the same order, with the same number of trials.

A search starts from good values and goes through :data:`STAGES`. Each stage tries the values of one
knob; the best value is kept for the stages after it. Values of rates, bandwidths and thresholds are factors of what the
settings have, so that they mean the same for both recipes, which measure activations in different units.

Both recipes are searched at each of :data:`TARGETS` by itself, SAELens's for each of its penalties, and may end with
other settings at each. What this finds for this package is what the rule of its preset ``fast`` is made from; the final
comparison trains both the preset and the settings found.

A trial's FVU at a target is interpolated from runs on both sides of it (or the two nearest), on activations that no run
trains on and that the final evaluation does not use. Coefficients of SAELens are adjusted for this; this package steers
L0 to targets. Every run is kept in ``results/search/<name>.jsonl``, and no run is repeated.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.frontier import STEP, Budget, PeerSettings, Trained, coefficient_for, measure, ours, theirs
from benchmarks.timing import RESULTS
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.sites import Place
from gemma_scope_tl.training.recipe import Recipe, fast

FOLDER = RESULTS / "search"
TARGETS, CURVE = (4.0, 16.0, 64.0), (4.0, 8.0, 16.0, 32.0, 64.0)
Stages = Sequence[tuple[str, Sequence[Any]]]
STAGES: Stages = (
    ("lr", (1 / 3, 3.0)),
    ("betas", ((0.0, 0.95), (0.0, 0.999), (0.9, 0.95), (0.9, 0.999))),
    ("lr_decay", (0.2, 0.5, 1.0)),
    ("scale", (1 / 2, 2.0)),
    ("bandwidth", (1 / 2, 2.0)),
    ("threshold", (1 / 2, 2.0)),
    ("l0_warm_up", (0.1, 0.25, 1.0)),
    ("ste_to_input", (False, True)),
    ("lr_warm_up", (0.0, 0.05)),
    ("lr", (0.6, 1.7)),
)
"""``scale`` is a factor of bandwidth and threshold together; ``lr_decay`` and the warm-ups are shares of the run."""

PEERS: dict[str, tuple[PeerSettings, float]] = {
    "tanh": (PeerSettings(lr=5e-3, bandwidth=1.0, init_threshold=0.5, l0_warm_up=0.1), 0.23),
    "step": (replace(STEP, lr=5e-3, bandwidth=0.1, init_threshold=0.1), 0.28),
}
"""The start of the search for each penalty of SAELens, and a coefficient to start from, at an L0 of 16.

They are what an earlier search of this kind found, from the values of SAELens's documentation (:class:`PeerSettings`).
With those values, runs of this length end far from the best error.
"""

Report = Callable[[str], Any]


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
        key = json.loads(json.dumps(key))
        for row in self.runs():
            if all(row.get(name) == value for name, value in key.items()):
                return row
        row = {"data": self.data, **key, **train()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        return row


@dataclass(frozen=True)
class Data:
    """Activations for training and for comparing, ``[n, d]`` each, the budget of a run, and the log."""

    x: Tensor
    held: Tensor
    budget: Budget
    place: Place
    log: Log


@dataclass(frozen=True)
class OurSettings:
    """Changes to the rule of the preset ``fast``; the names are the knobs'. None and factors of 1 change nothing."""

    lr: float = 1.0
    bandwidth: float = 1.0
    threshold: float = 1.0
    betas: tuple[float, float] | None = None
    lr_decay: float | None = None
    l0_warm_up: float | None = None
    ste_to_input: bool | None = None
    lr_warm_up: float | None = None

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> OurSettings:
        """What ``asdict`` returned, after JSON."""
        betas: Any = data.get("betas")
        values: dict[str, Any] = {**data, "betas": None if betas is None else tuple(betas)}
        return cls(**values)

    def recipe(self, d_in: int, budget: Budget, target: float) -> Recipe:
        """The recipe for a target L0."""
        base = fast(d_in, d_sae=budget.d_sae, target_l0=target, steps=budget.steps)
        changes: dict[str, Any] = {
            "lr": base.lr * self.lr,
            "bandwidth": base.bandwidth * self.bandwidth,
            "init_threshold": base.init_threshold * self.threshold,
        }
        if self.betas is not None:
            changes["betas"] = self.betas
        if self.lr_decay is not None:
            changes["lr_decay"] = self.lr_decay
        if self.ste_to_input is not None:
            changes["ste_to_input"] = float(self.ste_to_input)
        for name in ("l0_warm_up", "lr_warm_up"):
            share = getattr(self, name)
            if share is not None:
                changes[f"{name}_steps"] = round(share * budget.steps)
        return replace(base, batch_size=budget.batch_size, **changes)


def changed_ours(settings: OurSettings, knob: str, value: Any) -> OurSettings:
    """Our settings with another value of a knob."""
    if knob == "scale":
        return replace(settings, bandwidth=settings.bandwidth * value, threshold=settings.threshold * value)
    if knob in ("lr", "bandwidth", "threshold"):
        return replace(settings, **{knob: getattr(settings, knob) * value})
    return replace(settings, **{knob: value})


def changed_peer(settings: PeerSettings, knob: str, value: Any) -> PeerSettings:
    """SAELens's settings with another value of a knob."""
    if knob == "scale":
        return changed_peer(changed_peer(settings, "bandwidth", value), "threshold", value)
    if knob == "threshold":
        return replace(settings, init_threshold=settings.init_threshold * value)
    if knob in ("lr", "bandwidth"):
        return replace(settings, **{knob: getattr(settings, knob) * value})
    if knob == "betas":
        return replace(settings, beta1=value[0], beta2=value[1])
    return replace(settings, **{knob: value})


def climb(
    start: Any, change: Callable[[Any, str, Any], Any], score: Callable[[Any], float], stages: Stages
) -> tuple[Any, float]:
    """Go through the stages from ``start``; returns the best settings and their score."""
    best, lowest = start, score(start)
    for knob, values in stages:
        tried = [change(best, knob, value) for value in values]
        scored = [(score(one), one) for one in tried if one != best]
        value, one = min(scored, key=lambda pair: pair[0])
        if value < lowest:
            best, lowest = one, value
    return best, lowest


def search_ours(
    data: Data,
    target: float,
    *,
    start: OurSettings | None = None,
    stages: Stages = STAGES,
    report: Report = print,
) -> OurSettings:
    """The changes to ``fast`` that give the lowest FVU at a target L0."""

    def score(settings: OurSettings) -> float:
        value = score_ours(data, settings, target)
        report(f"ours at {target:g}: FVU {value:.4f} with {settings}")
        return value

    return climb(start or OurSettings(), changed_ours, score, stages)[0]


def score_ours(data: Data, settings: OurSettings, target: float) -> float:
    """FVU at the target L0, from two SAEs that are steered to L0s a tenth below and above it."""
    recipe = settings.recipe(data.x.shape[1], data.budget, target)
    key = {"mode": "ours", "target_l0": target, "recipe": asdict(recipe), **asdict(data.budget)}

    def train() -> dict[str, Any]:
        recipes = {share * target: recipe for share in (0.9, 1.1)}
        trained = ours(data.x, recipes, data.budget, data.place)
        found = [measure(one.arrays, data.held) for one in trained]
        columns = {name: [row[name] for row in found] for name in found[0]}
        return {**columns, "seconds": round(sum(one.seconds for one in trained), 1)}

    row = data.log.run(key, train)
    return fvu_at(list(zip(row["l0"], row["fvu"], strict=True)), target)


def search_peer(
    data: Data,
    mode: str,
    target: float,
    *,
    start: PeerSettings | None = None,
    guess: float | None = None,
    stages: Stages = STAGES,
    report: Report = print,
) -> tuple[PeerSettings, float]:
    """SAELens's best settings of a penalty at a target L0, and the coefficient nearest to it.

    Args:
        data: what the search reads.
        mode: the penalty.
        target: the L0.
        start: settings to start from; by default those of :data:`PEERS`.
        guess: a coefficient to start from, at an L0 of 16; by default that of :data:`PEERS`.
        stages: the knobs.
        report: called with a line for every trial.
    """
    begin, usual = PEERS[mode]
    near = (usual if guess is None else guess) * (16.0 / target) ** 1.4
    coefficients: dict[PeerSettings, float] = {}
    best: list[tuple[float, PeerSettings]] = []

    def score(settings: PeerSettings) -> float:
        at = coefficients[best[-1][1]] if best else near
        value, coefficients[settings] = score_peer(data, settings, at, target)
        report(f"{mode} at {target:g}: FVU {value:.4f} with {settings}")
        if not best or value < best[-1][0]:
            best.append((value, settings))
        return value

    found, _ = climb(start or begin, changed_peer, score, stages)
    return found, coefficients[found]


def score_peer(data: Data, settings: PeerSettings, guess: float, target: float) -> tuple[float, float]:
    """FVU at the target L0, and the coefficient nearest to it; infinite if no run came within a factor of two."""
    rows: list[dict[str, Any]] = []

    def train(coefficient: float) -> float:
        rows.append(run_peer(data, settings, coefficient))
        return rows[-1]["l0"]

    best = coefficient_for(train, target, guess, tries=3, close=0.15)
    return fvu_at([(row["l0"], row["fvu"]) for row in rows], target), best


def run_peer(data: Data, settings: PeerSettings, coefficient: float) -> dict[str, Any]:
    """One run of SAELens's trainer: ``l0``, ``fvu``, ``alive`` on the held-out activations and its seconds."""
    key = {**asdict(settings), **asdict(data.budget), "coefficient": float(f"{coefficient:.4g}")}

    def train() -> dict[str, Any]:
        trained = theirs(data.x, settings, key["coefficient"], data.budget)
        return {**measure(trained.arrays, data.held), "seconds": round(trained.seconds, 1)}

    return data.log.run(key, train)


def settled(data: Data) -> dict[str, Any]:
    """The result of a finished search, from its log: the best settings of both at every L0 of :data:`CURVE`.

    At an L0 between two searched ones, the settings found at both are tried.
    """
    found: dict[str, Any] = {"ours": {}, "peer": {}}
    own = {target: search_ours(data, target, report=quiet) for target in TARGETS}
    searched = {(mode, t): search_peer(data, mode, t, report=quiet) for mode in PEERS for t in TARGETS}
    for target in CURVE:
        nearest = sorted(TARGETS, key=lambda t, target=target: abs(math.log(t / target)))[:2]
        near = [t for t in nearest if abs(math.log(t / target)) < math.log(2.5)]
        fvu, mine = min(((score_ours(data, own[t], target), own[t]) for t in near), key=lambda one: one[0])
        found["ours"][f"{target:g}"] = {"settings": asdict(mine), "fvu": fvu}
        tried: list[tuple[float, float, PeerSettings]] = []
        for settings, guess in (searched[mode, t] for mode in PEERS for t in near):
            value, coefficient = score_peer(data, settings, guess, target)
            tried.append((value, coefficient, settings))
        value, coefficient, settings = min(tried, key=lambda one: one[0])
        found["peer"][f"{target:g}"] = {"settings": asdict(settings), "coefficient": coefficient, "fvu": value}
    return found


def train_all(data: Data, best: dict[str, Any]) -> list[Trained]:
    """The preset and both recipes with the settings of a search, at every L0 of :data:`CURVE`, with the budget's seed.

    SAELens's coefficients are adjusted with seed 0, to an L0 below and one above each target, so that nothing is
    extrapolated.
    """
    width = data.x.shape[1]
    preset = {t: OurSettings().recipe(width, data.budget, t) for t in CURVE}
    searched = {
        t: OurSettings.from_json(best["ours"][f"{t:g}"]["settings"]).recipe(width, data.budget, t) for t in CURVE
    }
    trained = ours(data.x, preset, data.budget, data.place, "ours")
    trained += ours(data.x, searched, data.budget, data.place, "ours, best found")
    first = replace(data, budget=replace(data.budget, seed=0))
    for target, entry in ((float(key), entry) for key, entry in best["peer"].items()):
        settings, guess = PeerSettings(**entry["settings"]), float(entry["coefficient"])
        for goal in (0.85 * target, 1.15 * target):

            def train(coefficient: float, settings: PeerSettings = settings) -> float:
                return run_peer(first, settings, coefficient)["l0"]

            guess = coefficient_for(train, goal, guess, tries=3, close=0.08)
            trained.append(theirs(data.x, settings, guess, data.budget))
    return trained


def trained_file(folder: Path, name: str, best: dict[str, Any], budget: Budget) -> Path:
    """The file of what :func:`train_all` trains: another for other settings, budgets, seeds or rules."""
    rules = [asdict(fast(128, d_sae=budget.d_sae, target_l0=target, steps=budget.steps)) for target in CURVE]
    digest = hashlib.sha256(json.dumps([best, asdict(budget), rules]).encode()).hexdigest()
    return folder / f"{name}_{budget.seed}_{digest[:12]}.pt"


def quiet(line: str) -> None:
    """Nothing to report: all runs are in the log already."""


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


def store(name: str, found: dict[str, Any]) -> Path:
    """Write the result of a search, which :func:`chosen` reads."""
    return write_atomically(FOLDER / f"{name}.json", json.dumps(found, indent=2) + "\n")


def chosen(name: str) -> dict[str, Any]:
    """The stored result of a search.

    Raises:
        GemmaScopeError: no search has been run.
    """
    path = FOLDER / f"{name}.json"
    if not path.exists():
        raise GemmaScopeError(f"{path} is missing: run the search first.")
    return json.loads(path.read_text(encoding="utf-8"))

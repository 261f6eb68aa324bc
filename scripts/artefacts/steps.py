"""The steps that make every artefact of the bundled model and suite, each after the steps whose outputs it reads."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from scripts.artefacts.inputs import BUNDLED, ROOT, SECOND

CHROMIUM = Path("/usr/bin/chromium")


def nothing() -> str:
    """What most steps need."""
    return ""


def corpus() -> str:
    """What training the suite lacks: the tokens of the training text."""
    folder = ROOT / "build" / "bundled"
    if (folder / "mixture.parquet").exists() or list(folder.glob("tokens/*")):
        return ""
    return "the training text: run `python scripts/train_bundled.py corpus`, then `tokenizer`"


def browser() -> str:
    """What a picture of the demo lacks."""
    missing = [] if find_spec("playwright") else ["`pip install playwright`"]
    missing += [] if CHROMIUM.exists() else [f"Chromium at {CHROMIUM}"]
    return " and ".join(missing)


class Step(NamedTuple):
    """Commands that make artefacts.

    Attributes:
        name: the name on the command line.
        commands: arguments of Python, run one after the other in the root of the repository.
        inputs: names of :data:`~scripts.artefacts.inputs.INPUTS`.
        outputs: patterns of the files that the step writes, and no other step does.
        lacks: returns what this machine lacks for the step, or nothing.
        optional: whether the step may be left out where something is lacking. It then stays on the list.
        note: what to know before running it.
    """

    name: str
    commands: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    lacks: Callable[[], str] = nothing
    optional: bool = False
    note: str = ""


STUDIES = ("position", "frequency", "domains", "precision", "uniformity", "probes")
"""Names of ``scripts.study_page.STUDIES``, which importing that module here would make slow to list."""

MEASURED = ("model", "suite", "text")
ALL_MEASURED = (*MEASURED, "model-gemma3", "suite-gemma3")


def _releases(*names: str) -> str:
    """Options that choose releases of the second bundled model."""
    return " ".join(f"--release bundled-gemma3-{name}" for name in names)


SECOND_STEPS = (
    Step(
        "suite-gemma3",
        ("scripts/train_bundled.py saes --bundle bundled-gemma3",),
        ("model-gemma3", "text", "recipe-gemma3"),
        (
            f"{SECOND}/saes/*_all/**/*",
            f"{SECOND}/saes/README.md",
            f"{SECOND}/saes/training.jsonl",
            "pretrained_yaml/bundled-gemma3-[!c]*.yaml",
        ),
        corpus,
        note="trains all SAEs; a stopped run is continued",
    ),
    Step(
        "results-gemma3",
        (f"scripts/bundled_results.py --model bundled-gemma3 {_releases('res', 'mlp', 'att', 'transcoders')}",),
        ("model-gemma3", "suite-gemma3", "text"),
        (f"{SECOND}/results/bundled-gemma3-[!c]*",),
    ),
    Step(
        "layers-gemma3",
        ("scripts/train_bundled.py layers",),
        ("model-gemma3", "suite-gemma3", "text", "recipe-gemma3-layers"),
        (
            f"{SECOND}/saes/c*/**/*",
            f"{SECOND}/saes/README-layers.md",
            f"{SECOND}/saes/training-layers.jsonl",
            "pretrained_yaml/bundled-gemma3-c*.yaml",
        ),
        corpus,
        note="trains both coders; a stopped run is continued",
    ),
    Step(
        "results-gemma3-layers",
        (f"scripts/bundled_results.py --model bundled-gemma3 {_releases('clt', 'crosscoder')}",),
        ("model-gemma3", "layers-gemma3", "text"),
        (f"{SECOND}/results/bundled-gemma3-c*",),
    ),
)
"""The steps of the second bundled model."""

STEPS = (
    *(SECOND_STEPS if (ROOT / SECOND / "model" / "config.json").exists() else ()),
    Step(
        "suite",
        ("scripts/train_bundled.py saes",),
        ("model", "text", "recipe"),
        (
            f"{BUNDLED}/saes/**/params.npz",
            f"{BUNDLED}/saes/README.md",
            f"{BUNDLED}/saes/training.jsonl",
            "pretrained_yaml/bundled-[!g]*.yaml",
        ),
        corpus,
        note="trains all SAEs; a stopped run is continued",
    ),
    Step("results", ("scripts/bundled_results.py",), MEASURED, (f"{BUNDLED}/results/*",)),
    Step(
        "results-figures",
        ("-m scripts.results_page",),
        ("results", "log"),
        ("docs/fidelity.png", "docs/training.png"),
    ),
    *(
        Step(
            f"study-{name}",
            (f"-m scripts.study_page {name}",),
            (*MEASURED, "grouping of the text"),
            (f"docs/studies/{name}[._]*",),
        )
        for name in STUDIES
    ),
    Step("attribution", ("scripts/attribution_check.py",), MEASURED, ("docs/attribution.json", "docs/attribution.png")),
    Step(
        "interventions",
        ("-m scripts.interventions",),
        ALL_MEASURED,
        ("docs/interventions.csv", "docs/interventions.json", "docs/interventions.png"),
    ),
    Step("tour", ("scripts/demo.py --out docs",), MEASURED, ("docs/demo.png", "docs/circuit.png")),
    Step("tutorials", ("-m scripts.tutorials",), (*MEASURED, "notebook sources"), ("tutorials/*.ipynb",)),
    Step(
        "demo-picture",
        ("-m scripts.demo_picture",),
        (*MEASURED, "results"),
        ("docs/demo-app.png",),
        browser,
        optional=True,
        note="needs a browser",
    ),
    Step(
        "benchmark-evals",
        ("-m benchmarks evals",),
        MEASURED,
        ("benchmarks/results/evals.json",),
        note="times: for an idle machine",
    ),
    Step(
        "benchmark-training-suite",
        ("-m benchmarks training_suite",),
        ("model", "text"),
        ("benchmarks/results/training_suite.json",),
        note="times: for an idle machine",
    ),
    Step(
        "pareto",
        ("-m benchmarks.pareto run", "-m benchmarks.pareto figure"),
        ("model", "text", "searched settings"),
        ("benchmarks/results/pareto.json", "docs/pareto.png"),
        corpus,
        note="trains for half an hour; does not read the suite",
    ),
)

PAGES = "-m scripts.pages"
"""The command that writes tables and numbers into the pages. It is cheap and runs at the end of every run."""

APART = {
    "docs/artefacts.json": "the record of all this",
    "docs/hardware.json": "computed from shapes by scripts.hardware_table",
    "docs/clusters.json": "computed by scripts.plan_cluster",
    "docs/circuit-tracer.json": "of random models, by scripts.tracer_parity",
    "docs/pareto_smollm2.png": "of another model",
    "benchmarks/results/smollm2_pareto.json": "of another model",
    "benchmarks/results/*.json": "of random weights, or times that no retraining of the suite changes",
    "benchmarks/results/search/*.json": "chosen settings; the search for them is a decision, not a step",
}
"""Generated files that no step makes, and why. A file that a step makes is that step's."""


def step_named(name: str) -> Step:
    """The step of a name.

    Raises:
        KeyError: there is none; the message lists all.
    """
    for step in STEPS:
        if step.name == name:
            return step
    raise KeyError(f"There is no step {name!r}; there are {', '.join(step.name for step in STEPS)}.")


def outputs_of(step: Step) -> list[Path]:
    """The files that match a step's outputs."""
    return sorted({path for pattern in step.outputs for path in ROOT.glob(pattern) if path.is_file()})


def commands_of(steps: Iterable[Step]) -> str:
    """The command line that makes steps."""
    return "python -m scripts.artefacts " + " ".join(f"--only {step.name}" for step in steps)

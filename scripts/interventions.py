"""Interventions on latents of attribution graphs, predicted and measured, for each kind of coder.

Example: python -m scripts.interventions --prompts 4 --sources 10

For each kind, latents of graphs of held-out text are set to zero, one at a time, and the changes of later latents and
of differences of logits are measured in the model itself, where everything behind the latent is computed anew. Direct
effects are measured in the frozen pass, too. Writes ``docs/interventions.csv`` (the points in the model),
``interventions.json`` (their fits) and ``interventions.png``.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pandas as pd
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.attributions.measured import measured_effects
from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.sae.layered import LAYERED_KINDS
from gemma_scope_tl.viz.figures import save_figure
from scripts.attribution_check import prompts

ROOT = Path(__file__).resolve().parent.parent
FIRST, SECOND = "bundled", "bundled-gemma3"
TARGETS = {"latents": ("#0072B2", "o"), "logit differences": ("#D55E00", "^")}
"""Groups of targets, with the colours and markers of the figure, which colour-blind people distinguish."""


class Kind(NamedTuple):
    """A kind of coder.

    Attributes:
        title: of its panel.
        model: a bundled model.
        load: loads its coders, one or several at every layer.
    """

    title: str
    model: str
    load: Callable[[], list[Any]]


def _suite(model: str, site: str, width: str, **options: Any) -> list[Any]:
    layers = sorted(gs.list_saes(model=model, site=site)["layer"].dropna().astype(int).unique())
    return [gs.load_sae(model, site, layer, width, **options) for layer in layers]


def _layered(site: str) -> list[Any]:
    (row,) = gs.list_saes(model=SECOND, site=site).itertuples()
    return [gs.JumpReLUSAE.from_pretrained(row.release, row.id)]


KINDS = {
    "res": Kind("residual stream", FIRST, lambda: _suite(FIRST, "res", "1k")),
    "mlp": Kind("MLP output", FIRST, lambda: _suite(FIRST, "mlp", "1k")),
    "att": Kind("attention", FIRST, lambda: _suite(FIRST, "att", "1k")),
    "transcoder": Kind("transcoder", FIRST, lambda: _suite(FIRST, "transcoder", "512")),
    "mixture": Kind(
        "transcoder and attention",
        FIRST,
        lambda: [*_suite(FIRST, "transcoder", "512"), *_suite(FIRST, "att", "1k")],
    ),
    "skip": Kind("skip transcoder", SECOND, lambda: _suite(SECOND, "transcoder", "256", affine=True)),
    "clt": Kind("cross-layer transcoder", SECOND, lambda: _layered("clt")),
    "crosscoder": Kind("crosscoder", SECOND, lambda: _layered("crosscoder")),
}
"""All kinds, in the order of the panels."""


def kinds_here() -> list[str]:
    """The kinds whose coders are bundled."""
    layered = set(gs.list_saes(model=SECOND)["site"])
    return [name for name in KINDS if name not in LAYERED_KINDS or name in layered]


def main() -> None:
    """Measure, write the files, and print the fits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=kinds_here(), metavar="KIND")
    parser.add_argument("--prompts", type=int, default=4, help="prompts of held-out text (default 4)")
    parser.add_argument("--length", type=int, default=16, help="tokens of a prompt, BOS included (default 16)")
    parser.add_argument("--sources", type=int, default=10, help="latents that are ablated, per prompt (default 10)")
    parser.add_argument("--targets", type=int, default=8, help="latents measured for each (default 8)")
    parser.add_argument("--logits", type=int, default=5, help="tokens whose logits are compared (default 5)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the files")
    args = parser.parse_args()
    points, fits = [], []
    for name in args.kinds:
        model, frozen = measure(KINDS[name], args)
        points.append(model.assign(kind=name))
        fits += [{"kind": name, **row, "frozen_error": frozen} for row in fitted(model)]
        for row in [row for row in fits if row["kind"] == name]:
            print(f"{name}, {row['target']}: {row['n']} effects, r {row['pearson']:.2f}, slope {row['slope']:.2f}")
        print(f"    direct effects in the frozen pass: largest error {frozen:.0e} of the largest", flush=True)
    table = pd.concat(points, ignore_index=True)
    columns = ["kind", "prompt", "source", "target", "group", "predicted", "measured"]
    write_atomically(args.out / "interventions.csv", table[columns].to_csv(index=False, float_format="%.3g"))
    settings = {key: getattr(args, key) for key in ("prompts", "length", "sources", "targets", "logits", "seed")}
    facts = {"made_by": "python -m scripts.interventions", "settings": settings, "results": fits}
    write_atomically(args.out / "interventions.json", json.dumps(facts, indent=1) + "\n")
    print(f"figure: {draw(table, fits, args.out / 'interventions.png')}")


def measure(kind: Kind, args: argparse.Namespace) -> tuple[pd.DataFrame, float]:
    """The effects in the model, and the largest error of direct effects in the frozen pass, as a share of the largest
    effect."""
    model, coders = gs.load_model(kind.model, device="cpu"), kind.load()
    frames: list[pd.DataFrame] = []
    error, largest = 0.0, 0.0
    for number, ids in enumerate(prompts(model, args.prompts, args.length)):
        graph = gs.attribution_graph(
            model, ids, coders, logits=args.logits, probability=1.0, max_latent_nodes=None, dtype="float64"
        )
        many = {"sources": args.sources, "targets": args.targets, "seed": args.seed + number}
        table = measured_effects(model, graph, coders, **many)
        frozen = table[table["measured_in"] == "frozen"]
        error = max(error, float((frozen["predicted"] - frozen["measured"]).abs().max()))
        largest = max(largest, float(frozen["measured"].abs().max()))
        frames.append(grouped(table[table["measured_in"] == "model"]).assign(prompt=number))
    return pd.concat(frames, ignore_index=True), error / largest


def grouped(table: pd.DataFrame) -> pd.DataFrame:
    """The effects on latents, and on each difference between the likeliest logit and another one."""
    logits = table[table["target_kind"] == "logit"]
    first = logits.groupby("source", sort=False).transform("first")
    others = logits[logits["target"] != first["target"]]
    differences = others.assign(
        target=first["target"] + " - " + others["target"],
        predicted=first["predicted"] - others["predicted"],
        measured=first["measured"] - others["measured"],
    )
    latents = table[table["target_kind"] != "logit"]
    return pd.concat([latents.assign(group="latents"), differences.assign(group="logit differences")])


def fitted(table: pd.DataFrame) -> list[dict[str, Any]]:
    """For each group of targets Pearson's r, and the slope of the line through 0 that best gives what is measured."""
    rows: list[dict[str, Any]] = []
    for group in TARGETS:
        x, y = table.loc[table["group"] == group, ["predicted", "measured"]].to_numpy(dtype=float).T
        if not len(x):  # an MLP is a constant of the pass, so latents of MLP outputs have no edges to each other
            continue
        r = float(np.corrcoef(x, y)[0, 1])
        rows.append({"target": group, "n": len(x), "pearson": r, "slope": float(x @ y / (x @ x))})
    return rows


def draw(table: pd.DataFrame, fits: list[dict[str, Any]], path: Path) -> Path:
    """Predicted against measured, a panel for each kind of coder."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(table["kind"]))
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(2.6 * columns, 2.75 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, name in zip(axes, names, strict=False):
        panel(ax, table[table["kind"] == name], [row for row in fits if row["kind"] == name], KINDS[name].title)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    for number in range(0, len(axes), columns):
        axes[number].set_ylabel("measured change", fontsize=8)
    for ax in axes[max(0, len(names) - columns) : len(names)]:
        ax.set_xlabel("predicted change", fontsize=8)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    return save_figure(figure, path)


def panel(ax: Any, table: pd.DataFrame, fits: list[dict[str, Any]], title: str) -> None:
    """The effects of one kind of coder, both axes linear within 0.1 of zero and logarithmic outside."""
    reach = 1.3 * float(table[["predicted", "measured"]].abs().to_numpy().max())
    line = np.linspace(-reach, reach, 2001)
    for row in fits:
        color, marker = TARGETS[row["target"]]
        some = table[table["group"] == row["target"]]
        dots: dict[str, Any] = {"s": 9, "alpha": 0.5, "lw": 0, "color": color, "marker": marker}
        ax.scatter(some["predicted"], some["measured"], label=row["target"], **dots)
    ax.plot(line, line, color="0.4", lw=0.8, ls="--", zorder=0, label="measured = predicted")
    ax.set_xscale("symlog", linthresh=0.1)
    ax.set_yscale("symlog", linthresh=0.1)
    ax.set(xlim=(-reach, reach), ylim=(-reach, reach))
    ax.set_title(title, fontsize=9)
    ax.tick_params(labelsize=6.5)
    for number, row in enumerate(fits):
        text, color = f"{row['target']}: r {row['pearson']:.2f}", TARGETS[row["target"]][0]
        box = {"facecolor": "white", "alpha": 0.85, "lw": 0, "pad": 1.0}
        ax.text(0.04, 0.95 - 0.09 * number, text, va="top", transform=ax.transAxes, color=color, fontsize=7, bbox=box)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()

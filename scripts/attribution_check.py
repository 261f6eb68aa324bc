"""A comparison of attributions with ablations: a scatter figure and numbers, on the bundled model and held-out text.

Example: python scripts/attribution_check.py --prompts 16 --pairs 20
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import pandas as pd
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.attributions.gradients import ablation_effects
from gemma_scope_tl.attributions.targets import logit_difference
from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.registry.locate import HELD_OUT_TEXT
from gemma_scope_tl.viz.figures import save_figure

ROOT = Path(__file__).resolve().parent.parent
PLACES = (("res", 2), ("mlp", 1))
METHODS = {"gradient": "activation x gradient", "integrated": "integrated gradients"}
COLORS = {"res": "C0", "mlp": "C1"}


def main() -> None:
    """Measure, write the JSON and the figure, and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=24, help="prompts of held-out text (default 24)")
    parser.add_argument("--length", type=int, default=24, help="tokens of a prompt, BOS included (default 24)")
    parser.add_argument("--pairs", type=int, default=16, help="latents at a token, per prompt and SAE (default 16)")
    parser.add_argument("--steps", type=int, default=32, help="nodes of integrated gradients (default 32)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of attribution.json and .png")
    args = parser.parse_args()
    model = gs.load_model("bundled", device="cpu")
    table = measure(model, prompts(model, args.prompts, args.length), args.pairs, args.steps, args.seed)
    facts: dict[str, Any] = {
        "made_by": "scripts/attribution_check.py",
        "model": "bundled",
        "metric": "logit of the likeliest next token minus that of the second, at the last position",
        "settings": {key: getattr(args, key) for key in ("prompts", "length", "pairs", "steps", "seed")},
        "largest_gap_of_completeness": float(table["gap"].max()),
        "results": [fit(table, site, layer, method) for site, layer in PLACES for method in METHODS],
    }
    write_atomically(args.out / "attribution.json", json.dumps(facts, indent=2) + "\n")
    path = draw(table, facts["results"], args.out / "attribution.png")
    for row in facts["results"]:
        numbers = ", ".join(f"{key} {row[key]:.3f}" for key in ("pearson", "spearman", "slope"))
        print(f"{row['site']} {row['layer']} {row['method']}: {row['pairs']} pairs, {numbers}")
    print(f"largest gap of completeness {facts['largest_gap_of_completeness']:.1e} logits; figure: {path}")


def prompts(model: Any, count: int, length: int) -> list[torch.Tensor]:
    """Prompts ``[1, length]`` from the beginnings of held-out documents, the domains in turn."""
    documents = pd.read_json(HELD_OUT_TEXT, lines=True)
    turn = documents.groupby("domain").cumcount()
    ordered = documents.loc[turn.sort_values(kind="stable").index, "text"]
    rows = [model.to_tokens(text[: 12 * length])[:, :length] for text in ordered]
    rows = [row for row in rows if row.shape[1] == length]
    if len(rows) < count:
        raise SystemExit(f"The held-out text has {len(rows)} prompts of {length} tokens, {count} were asked for.")
    return rows[:count]


def measure(model: Any, tokens: list[torch.Tensor], pairs: int, steps: int, seed: int) -> pd.DataFrame:
    """A row per ablated latent: the predictions of both methods, and the measured change of the metric."""
    frames: list[pd.DataFrame] = []
    for site, layer in PLACES:
        sae = gs.load_sae("bundled", site, layer, width="1k")
        for number, ids in enumerate(tokens):
            with torch.no_grad():
                first, second = model(ids)[0, -1].topk(2).indices.tolist()
            metric = logit_difference(first, second)
            both = {m: gs.attribute(model, ids, sae, metric, method=m, steps=steps) for m in METHODS}
            integrated = both["integrated"]
            key = ["position", "latent"]
            merged = both["gradient"].query("kind == 'latent'").merge(integrated[[*key, "attribution"]], on=key)
            chosen = sample(merged, pairs, seed + number)
            chosen["gradient"], chosen["integrated"] = -chosen["attribution_x"], -chosen["attribution_y"]
            where = [(int(p), int(i)) for p, i in chosen[key].to_numpy()]
            chosen["measured"] = ablation_effects(model, ids, sae, metric, where)
            frames.append(chosen.assign(gap=abs(integrated.attrs["gap"][0])))
    return pd.concat(frames, ignore_index=True)


def sample(table: pd.DataFrame, pairs: int, seed: int) -> pd.DataFrame:
    """Random rows, half of them at the last token, where effects are large; the choice ignores the predictions."""
    last = table[table["position"] == table["position"].max()]
    drawn = last.sample(min(pairs // 2, len(last)), random_state=seed)
    rest = table.drop(drawn.index)
    return pd.concat([drawn, rest.sample(pairs - len(drawn), random_state=seed)], ignore_index=True)


def fit(table: pd.DataFrame, site: str, layer: int, method: str) -> dict[str, Any]:
    """Pearson's and Spearman's r, and the slope of the line through 0 that best gives the measured change."""
    rows = table[(table["site"] == site) & (table["layer"] == layer)]
    x, y = rows[method].to_numpy(), rows["measured"].to_numpy()
    return {
        "site": site,
        "layer": layer,
        "method": method,
        "pairs": len(rows),
        "pearson": float(np.corrcoef(x, y)[0, 1]),
        "spearman": float(np.corrcoef(rows[method].rank(), rows["measured"].rank())[0, 1]),
        "slope": float(x @ y / (x @ x)),
    }


def draw(table: pd.DataFrame, results: list[dict[str, Any]], path: Path) -> Path:
    """Predicted against measured: a panel per method."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    for ax, (method, name) in zip(figure.subplots(1, 2, sharey=True), METHODS.items(), strict=True):
        ax.set_xscale("symlog", linthresh=0.1)
        ax.set_yscale("symlog", linthresh=0.1)
        for site, layer in PLACES:
            rows = table[(table["site"] == site) & (table["layer"] == layer)]
            (row,) = [r for r in results if (r["site"], r["layer"], r["method"]) == (site, layer, method)]
            label = f"{site}, layer {layer}: r {row['pearson']:.3f}, slope {row['slope']:.2f}"
            ax.scatter(rows[method], rows["measured"], s=10, alpha=0.6, color=COLORS[site], label=label)
        reach = 1.05 * float(np.abs(table[[method, "measured"]].to_numpy()).max())
        line = np.linspace(-reach, reach, 1001)
        ax.plot(line, line, color="grey", lw=0.8, zorder=0)
        ax.set_xlabel(f"predicted by {name}")
        ax.set_title(name, fontsize=10)
        ax.legend(fontsize=8)
    figure.axes[0].set_ylabel("change of the logit difference\nwhen the latent is ablated")
    return save_figure(figure, path)


if __name__ == "__main__":
    main()

"""A tour that works offline: load a Gemma 2 and SAEs by name, splice, inspect, steer, and draw. Run: make demo."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table

import gemma_scope_tl as gs
from gemma_scope_tl.attributions.targets import logit_difference
from gemma_scope_tl.families import bundled_names
from gemma_scope_tl.registry.locate import HELD_OUT_TEXT, MODEL_FOLDER, bundle_folder
from gemma_scope_tl.viz.circuit_figure import draw_circuit
from gemma_scope_tl.viz.figures import latent_heatmap, metric_by_layer, new_figure, save_figure

SENTENCE = "In the beginning God created the heaven and the earth. And the earth was without form."
PROMPT = "In the beginning God created the heaven and the"
LAYER = 2
KINDS = [("res", None), ("mlp", None), ("att", None), ("transcoder", False), ("transcoder", True)]
console = Console(width=110)


def main() -> None:
    """Run the tour."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo-output"), help="folder of demo.png and circuit.png")
    out: Path = parser.parse_args().out
    started = time.perf_counter()
    console.rule("1  a really trained small Gemma 2, as a TransformerLens hooked model")
    model = gs.load_model("bundled")
    console.print(
        f"{model.dims.n_layers} layers, d_model {model.dims.d_model}, "
        f"{model.dims.n_heads} heads of {model.dims.d_head}; "
        f"worked around: {', '.join(model.fixes) or 'nothing'}"
    )
    console.rule("2  its SAEs, by name from the registry")
    rows = gs.list_saes(model="bundled")
    console.print(f"{len(rows)} SAEs: " + ", ".join(f"{site} {len(part)}" for site, part in rows.groupby("site")))
    rows = rows[rows["canonical"] & (rows["width"] == "1k") & rows["site"].isin(["res", "mlp", "att"])].reset_index()
    names = zip(rows["release"], rows["id"], strict=True)
    saes = [gs.JumpReLUSAE.from_pretrained(str(release), str(name)) for release, name in names]
    sae = gs.load_sae("bundled", "res", LAYER, width="1k")

    console.rule("3  which latents fire on which token")
    table = gs.features(model, SENTENCE, sae)
    _print_features(table)

    console.rule("4  what splicing costs")
    held_out = pd.read_json(HELD_OUT_TEXT, lines=True).groupby("domain")["text"].first().str[:2500]
    metrics = gs.evaluate(model, saes, list(held_out), progress=console.is_terminal)
    _print_metrics(metrics)
    _print_all_at_once(model, saes, rows)

    console.rule("5  steering one latent")
    latent = _specific_latent(table)
    _print_steering(model, sae, latent)

    console.rule("6  which latents make the next token")
    circuit_path = _print_circuit(model, out)

    show_second(list(held_out))
    path = _draw(model, table, metrics, out)
    console.print(f"\nfigures: {path}, {circuit_path}   ({time.perf_counter() - started:.0f} s)")


def _print_features(table: pd.DataFrame) -> None:
    shown = Table("position", "token", "strongest latents (activation)", box=None)
    for position, rows in table.groupby("position"):
        latents = "  ".join(f"{row.latent} ({row.activation:.1f})" for row in rows.head(4).itertuples())
        shown.add_row(str(position), repr(rows["token"].iloc[0]), latents)
    console.print(shown)
    console.print("BOS is left out: Gemma Scope SAEs are not trained on it.")


def _print_metrics(metrics: pd.DataFrame) -> None:
    shown = Table("site", "layer", "L0", "FVU", "delta loss", "loss recovered", box=None)
    for row in metrics.sort_values(["site", "layer", "l0"]).itertuples():
        numbers = (f"{row.l0:.1f}", f"{row.fvu:.3f}", f"{row.delta_loss:+.3f}", f"{row.loss_recovered:.3f}")
        shown.add_row(str(row.site), str(row.layer), *numbers)
    console.print(shown)
    console.print(
        f"clean loss {metrics['loss_clean'].iloc[0]:.3f} nats, over {metrics['tokens'].iloc[0]:,} held-out tokens"
    )


def _print_all_at_once(model: Any, saes: list[Any], rows: pd.DataFrame) -> None:
    denser = rows.sort_values("l0").groupby(["site", "layer"]).tail(1).index
    chosen = [saes[i] for i in sorted(denser)]
    tokens = model.to_tokens(SENTENCE)
    with torch.no_grad():
        clean = model(tokens, return_type="loss").item()
        spliced = model.run_with_saes(tokens, saes=chosen, return_type="loss").item()
        exact = model.run_with_saes(tokens, saes=chosen, use_error_term=True, return_type="loss").item()
    console.print(
        f"the sentence: {clean:.3f} nats; through {len(chosen)} SAEs at once {spliced:.3f}; "
        f"with their error terms {exact:.3f}"
    )


def _specific_latent(table: pd.DataFrame) -> int:
    """The strongest latent among those that fire on at most two of the sentence's tokens."""
    counts = table.groupby("latent")["activation"].agg(["size", "max"])
    rare = counts[counts["size"] <= 2]
    return int(str((rare if len(rare) else counts)["max"].idxmax()))


def _print_steering(model: Any, sae: Any, latent: int) -> None:
    prompt = model.to_tokens("The king said")
    shown = Table("scale", f"continuation (latent {latent}, res layer {LAYER})", show_lines=True)
    for scale in (0.0, 10.0, 20.0):
        torch.manual_seed(0)
        with model.hooks([gs.steer(sae, latent, scale)]):
            out = model.generate(prompt, max_new_tokens=40, temperature=0.7, top_k=40, return_type="tokens")
        shown.add_row(f"{scale:g}", model.tokenizer.decode(out[0, 1:]))
    console.print(shown)


def _print_circuit(model: Any, out: Path) -> Path:
    saes = list(gs.load_suite("bundled", "res", layers=[0, 1, 2], width="1k").values())
    with torch.no_grad():
        likeliest, second = model(model.to_tokens(PROMPT))[0, -1].topk(2).indices.tolist()
    found = gs.circuit(model, PROMPT, saes, logit_difference(likeliest, second), nodes=20, edges=40)
    console.print(
        f"{PROMPT!r}: logit of {model.tokenizer.decode([likeliest])!r} minus that of "
        f"{model.tokenizer.decode([second])!r} is {found.metric:.2f}; strongest latents:"
    )
    latents = found.nodes[found.nodes["kind"] == "latent"]
    strongest = latents.reindex(latents["attribution"].abs().sort_values(ascending=False).index).head(5)
    for node in strongest.itertuples():
        console.print(f"  layer {node.layer}, latent {node.latent}, at {node.token!r}: {node.attribution:+.2f}")
    figure, axes = new_figure(1)
    draw_circuit(axes[0], found, f"what makes the logit difference of {PROMPT!r}")
    return save_figure(figure, out / "circuit.png")


def show_second(texts: list[str]) -> None:
    """What splicing costs in the other bundled models that this source tree has."""
    for name in bundled_names()[1:]:
        folder = bundle_folder(name)
        if folder is None or not (folder / MODEL_FOLDER / "config.json").is_file():
            continue
        model = gs.load_model(name)
        console.rule(f"7  a small {model.family.title}, and coders of every kind in the layout of its release")
        saes = [gs.load_sae(name, site, LAYER, "256", "small", affine=affine) for site, affine in KINDS]
        metrics = gs.evaluate(model, saes, texts, progress=console.is_terminal)
        shown = Table("coder", "L0", "FVU", "delta loss", "loss recovered", box=None)
        for (site, affine), row in zip(KINDS, metrics.itertuples(), strict=True):
            numbers = (f"{row.l0:.1f}", f"{row.fvu:.3f}", f"{row.delta_loss:+.3f}", f"{row.loss_recovered:.3f}")
            shown.add_row(f"{site}, layer {LAYER}{', with skip' if affine else ''}", *numbers)
        console.print(shown)
        console.print(f"clean loss {metrics['loss_clean'].iloc[0]:.3f} nats")


def _draw(model: Any, table: pd.DataFrame, metrics: pd.DataFrame, out: Path) -> Path:
    figure, axes = new_figure(3)
    tokens = [model.tokenizer.decode([int(i)]) for i in model.to_tokens(SENTENCE)[0]]
    latent_heatmap(axes[0], table, tokens, f"residual stream after layer {LAYER}: the ten strongest latents")
    metric_by_layer(axes[1], metrics, "delta_loss", "delta loss (nats)")
    metric_by_layer(axes[2], metrics, "fvu", "FVU")
    return save_figure(figure, out / "demo.png")


if __name__ == "__main__":
    main()

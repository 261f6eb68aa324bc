"""The card of a suite of SAEs: what they are, how they were trained, and what was measured."""

from __future__ import annotations

import platform
import textwrap
from pathlib import Path
from typing import Any

from gemma_scope_tl.training.recipe import GEMMA_SCOPE_2, PAPER, Recipe
from scripts.bundled.bundles import Bundle
from scripts.bundled.files import write_text
from scripts.bundled.sae_publish import SITES, Published


def _range(values: list[Any]) -> str:
    """One value, or the smallest and the largest."""
    if len(set(values)) == 1:
        return str(values[0])
    return f"{min(values):.3g} to {max(values):.3g}"


MISSED = 0.1
"""An L0 farther away from its target than this share is remarked on."""


def _remarks(published: list[Published]) -> str:
    """Sentences on what a user should know of the suite, from the measurements."""
    missed, far = [p for p in published if _miss(p) > MISSED], max(published, key=_miss)
    found = [
        f"The L0 of {len(missed)} of them is more than a tenth away from its target"
        + (f" (farthest: `{far.folder}`, target {far.target:g})." if _miss(far) > MISSED else ".")
    ]
    shares = {site: [p.metrics["dead"] for p in published if p.place.site == site] for site in SITES}
    worst = max(shares, key=lambda site: max(shares[site], default=0.0))
    found.append(
        "The share of latents that never fire on the held-out text is, in the mean, "
        + ", ".join(f"{sum(dead) / len(dead):.1%} for {site}" for site, dead in shares.items() if dead)
        + f"; it is largest, {max(shares[worst]):.1%}, for an SAE of {worst}."
    )
    return textwrap.fill(" ".join(found), 120)


def _miss(p: Published) -> float:
    return abs(p.metrics["l0"] / p.target - 1.0)


def write_card(
    path: Path, bundle: Bundle, published: list[Published], config: dict[str, Any], *, clean: float, seconds: float
) -> None:
    """Write the card: what the SAEs are, how they were trained, and the table of measurements."""
    published = sorted(published, key=lambda p: p.order)
    labelled = bundle.layout == "gemma_scope_2"
    recipes = [p.recipe for p in published]
    about = {
        "count": len(published),
        "size": sum(p.size for p in published) / 1e6,
        "table": _labelled_table(published, clean) if labelled else _table(published, clean),
        "settings": _settings(recipes, GEMMA_SCOPE_2 if labelled else PAPER, published, config),
        "steps": config["steps"],
        "batch": recipes[0].batch_size,
        "remarks": _remarks(published),
        "minutes": seconds / 60,
        "heldout": published[0].metrics["tokens"],
        "clean": clean,
        "machine": platform.machine(),
    }
    write_text(path, (LABELLED_CARD if labelled else CARD).format(**about))


def _measured(p: Published, clean: float) -> str:
    m = p.metrics
    return (
        f"| {m['fvu']:.4f} | {m['delta_loss']:.4f} | {m['loss_recovered']:.4f} "
        f"| +{m['loss_zero_ablated'] - clean:.3f} | {1.0 - m['dead']:.1%} |"
    )


def _table(published: list[Published], clean: float) -> str:
    lines = ["| site | layer | width | L0 | FVU | delta loss | loss recovered | zero ablation | latents that fire |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for p in published:
        layer = "" if p.place.layer is None else p.place.layer
        lines.append(f"| {p.place.site} | {layer} | {p.d_sae} | {p.metrics['l0']:.1f} {_measured(p, clean)}")
    return "\n".join(lines)


def _labelled_table(published: list[Published], clean: float) -> str:
    lines = [
        "| folder | target L0 | L0 | FVU | delta loss | loss recovered | zero ablation | latents that fire |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for p in published:
        lines.append(f"| `{p.folder}` | {p.target:g} | {p.metrics['l0']:.1f} {_measured(p, clean)}")
    return "\n".join(lines)


def _settings(recipes: list[Recipe], reference: Recipe, published: list[Published], config: dict[str, Any]) -> str:
    """A table of the recipes' values beside those of the paper or report that they follow."""
    quadratic = reference.l0_penalty == "quadratic"
    lines = [f"| setting | {'preset' if quadratic else 'paper'} | here |", "|---|---|---|"]
    names = ("lr", "lr_start", "lr_warm_up_steps", "lr_decay", "betas", "eps", "batch_size", "l0_warm_up_steps")
    names += ("init_threshold", "bandwidth", "ste_to_input", "ste_to_input_fade")
    if quadratic:
        names += ("init_encoder_scale", "b_dec_start", "l0_penalty", "l0_coefficient", "frequency_coefficient")
        names += ("frequency_limit", "matryoshka")
    for name in names:
        lines.append(f"| {name} | {getattr(reference, name)} | {_range([getattr(one, name) for one in recipes])} |")
    targets = ", ".join(f"{target:g}" for target in sorted({p.target for p in published}))
    if quadratic:
        lines.append(f"| L0* | by layer and label | {targets} |")
    else:
        lines.append(f"| lambda | fixed for each SAE | steered: L0 targets {targets} |")
    activations = config["steps"] * recipes[0].batch_size
    lines.append(f"| activations seen | {'not printed' if quadratic else '4e9 and more'} | {activations:.2e} |")
    return "\n".join(lines)


CARD = """# Sparse autoencoders of the bundled Gemma 2

{count} JumpReLU SAEs on the small Gemma 2 in `../model`, in Gemma Scope's layout, {size:.1f} MB in all: every layer's
`res`, `mlp` and `att` site at two widths and three sparsities, transcoders of every layer, and the embedding. They
exist so that loading, splicing, steering and evaluation can be tried and tested offline. The model is small and so are
they: expect what a small model knows. {remarks}

`<site>/layer_L/width_W/average_l0_N/params.npz` holds `W_enc`, `W_dec`, `b_enc`, `b_dec` and `threshold` as float32,
with values of the matrices rounded to five significant binary digits so that they compress. N is the L0 measured below,
rounded. Nothing is subtracted before the encoder, and inputs are raw activations.

## Measurements

By `gs.evaluate`, on the files as they are here, over {heldout} text positions of `../text/heldout.jsonl`, which neither
the model nor the SAEs saw. BOS, EOS and padding are neither replaced nor counted. The model's own loss there is
{clean:.4f} nats a token. Delta loss: the rise when the SAE's output replaces the activations. Loss recovered: 1 - delta
loss / the rise under zero ablation, which is the column after it. FVU: squared error over variance. The recipe was
chosen by FVU in short runs on other activations of the training text (`benchmarks/recipe_search.py`); nothing was
chosen by this text or by a loss, and no SAE of several was picked.

{table}

## Training

Data, credits and licences: the training text of the model, as its card in `../model` and `../text/LICENSES.md` say.
{steps} steps of {batch} activations for each SAE, all in lockstep, all sites of a batch from one forward pass, shuffled
in buckets; {minutes:.0f} minutes on two cores ({machine}) that did other work too. `training.jsonl` is the log,
shortened.

The recipe is the paper's: JumpReLU with the rectangle-kernel pseudo-derivative and log thresholds, squared error plus
lambda times L0, one scale for each site, pre-encoder bias while training (not for transcoders), unit decoder rows with
projected gradients, the encoder started as the decoder's transpose (transcoders: independently). What differs, and why,
stands at `fast` in `gemma_scope_tl/training/recipe.py`; the values, which follow width and target of each SAE:

{settings}

Lambda is steered by a proportional-integral controller on log(L0 / target), so it is not one number for an SAE: it is
in the log. Loss, recipe and fold are tested against formulas written from the paper.

Made by `gemma-scope train configs/bundled.yaml` and `python scripts/train_bundled.py saes`, which does both.
"""

LABELLED_CARD = """# Sparse autoencoders and transcoders of the bundled Gemma 3

{count} JumpReLU SAEs and transcoders of the small Gemma 3 in `../model`, in Gemma Scope 2's layout, {size:.1f} MB in
all: SAEs of the `res`, `mlp` and `att` site of every layer, and transcoders of every layer with a skip connection
(`_affine`) and without. They exist so that loading, splicing, steering and evaluation can be tried and tested offline.
The model is small and so are they: expect what a small model knows. {remarks}

`<kind>_all/layer_L_width_W_l0_<label>[_affine]/params.safetensors` holds `w_enc`, `w_dec`, `b_enc`, `b_dec`,
`threshold` (float32), and `affine_skip_connection` (used as `x @ S`), the others as bfloat16, with values of the
matrices rounded to five significant binary digits (the skip connection's and vectors to eight), which bfloat16 holds
exactly: loaded as float32, the default, they are the values that were measured. `config.json` beside it names the
tensors. A label means the target of L0 in training: from 10 (small) or 30 (medium) in layer 0 to 20 or 60
from a third of the depth on, as in Gemma Scope 2. Nothing is subtracted before the encoder, and inputs are raw
activations; those of transcoders are the output of the pre-MLP norm with its gain.

## Measurements

By `gs.evaluate`, on the files as they are here, over {heldout} text positions of `../../text/heldout.jsonl`, which
neither the model nor the SAEs saw. BOS, EOS and padding are neither replaced nor counted. The model's own loss there is
{clean:.4f} nats a token. Delta loss: the rise when the SAE's output replaces the activations. Loss recovered: 1 - delta
loss / the rise under zero ablation, which is the column after it. FVU: squared error over variance. Nothing was chosen
by this text, and no SAE of several was picked.

{table}

## Training

Data, credits and licences: the training text of the model, as its card in `../model` and `../../text/LICENSES.md` say.
{steps} steps of {batch} activations for each SAE, all in lockstep, all sites of a batch from one forward pass, shuffled
in buckets; {minutes:.0f} minutes on a shared CPU ({machine}). `training.jsonl` is the log, shortened.

The loss is that of the preset `gemma_scope_2`: squared error, the quadratic penalty around a target L0, and a penalty
on latents that fire often. The preset's rates are for runs of a million steps; those of the preset `fast` are used
instead (`gemma_scope_tl/training/recipe.py` gives the reasons), and lambda is fixed for each SAE:

{settings}

Made by `gemma-scope train configs/bundled-gemma3.yaml` and `python scripts/train_bundled.py saes --bundle
bundled-gemma3`, which does both.
"""

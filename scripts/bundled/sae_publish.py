"""Write the trained suite: weights in Gemma Scope's layout, registry files, and the card."""

from __future__ import annotations

import hashlib
import platform
import shutil
import textwrap
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_scope_tl.activations.source import Place
from gemma_scope_tl.registry.render import render_release
from gemma_scope_tl.registry.schema import parse_release
from gemma_scope_tl.registry.widths import width_label
from gemma_scope_tl.training.config import merged_recipe
from gemma_scope_tl.training.recipe import PAPER, Recipe
from scripts.bundled.files import write_text

LICENSE = "MIT"
SITES = ("res", "mlp", "att", "transcoder", "embedding")
RELEASES = {
    "bundled-res": (
        ("res", "embedding"),
        "Residual stream of the bundled small Gemma 2 in every layer, embeddings",
    ),
    "bundled-mlp": (("mlp",), "MLP outputs of the bundled small Gemma 2 in every layer"),
    "bundled-att": (("att",), "Attention head outputs of the bundled small Gemma 2 in every layer"),
    "bundled-transcoders": (("transcoder",), "Transcoders of the bundled small Gemma 2: MLP input to MLP output"),
}


@dataclass(frozen=True)
class Published:
    """One SAE on disk and its held-out measurements."""

    place: Place
    folder: str
    d_in: int
    d_sae: int
    target: float
    sha256: str
    size: int
    metrics: dict[str, Any]

    @property
    def id(self) -> str:
        """The id in the registry: the path below the site's folder, or with it for the embedding beside other sites."""
        return self.folder if self.place.layer is None else self.folder.split("/", 1)[1]


def publish_folder(root: Path, folder: Path, place: Place, row: dict[str, Any], metrics: dict[str, Any]) -> Published:
    """Copy an SAE to `<site>/layer_L/width_W/average_l0_N` below `root`, where N is the held-out L0.

    A second SAE of that name gets a decimal.
    """
    head = f"{place.key}/width_{width_label(row['d_sae'])}/average_l0_"
    name = f"{head}{metrics['l0']:.0f}"
    if (root / name).exists():
        name = f"{head}{metrics['l0']:.1f}"
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, root / name)
    data = (root / name / "params.npz").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    return Published(place, name, row["d_in"], row["d_sae"], row["target_l0"], digest, len(data), metrics)


def write_registry(folder: Path, published: list[Published]) -> list[Path]:
    """Write `bundled-*.yaml`; the middle one of the SAEs of each place and width is canonical."""
    paths: list[Path] = []
    alike: dict[tuple[Place, int], list[Published]] = defaultdict(list)
    for p in published:
        alike[p.place, p.d_sae].append(p)
    middle = {sorted(group, key=lambda p: p.metrics["l0"])[len(group) // 2].folder for group in alike.values()}
    for name, (sites, description) in RELEASES.items():
        saes = [p for p in published if p.place.site in sites]
        saes.sort(key=lambda p: (SITES.index(p.place.site), p.place.layer or 0, p.d_sae, p.metrics["l0"]))
        notes = ["Canonical: the middle one of the SAEs of a layer and width.", "L0 is measured on held-out text."]
        about = {"release": name, "repo": "bundled", "model": "bundled", "license": LICENSE, "description": description}
        rows = [_row(p, canonical=p.folder in middle) for p in saes]
        release = parse_release({**about, "notes": notes, "saes": rows}, f"{name}.yaml")
        paths.append(folder / f"{name}.yaml")
        write_text(paths[-1], render_release(release))
    return paths


def _row(p: Published, *, canonical: bool) -> dict[str, Any]:
    return {
        "id": p.id,
        "site": p.place.site,
        "layer": p.place.layer,
        "width": width_label(p.d_sae),
        "d_sae": p.d_sae,
        "d_in": p.d_in,
        "l0": float(p.folder.rsplit("_", 1)[1]),
        "path": p.folder,
        "canonical": canonical,
        "sha256": p.sha256,
    }


def _recipe(p: Published, config: dict[str, Any]) -> Recipe:
    """The recipe by which an SAE was trained."""
    given = {"d_sae": p.d_sae, "target_l0": p.target, "steps": config["steps"]}
    return merged_recipe(config["recipe"], p.d_in, **given)


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


def write_card(path: Path, published: list[Published], config: dict[str, Any], *, clean: float, seconds: float) -> None:
    """Write the card: what the SAEs are, how they were trained, and the table of measurements."""
    recipes = [_recipe(p, config) for p in published]
    table = ["| site | layer | width | L0 | FVU | delta loss | loss recovered | zero ablation | latents that fire |"]
    table.append("|---|---|---|---|---|---|---|---|---|")
    order = lambda p: (SITES.index(p.place.site), p.place.layer or 0, p.d_sae, p.metrics["l0"])  # noqa: E731
    for p in sorted(published, key=order):
        m = p.metrics
        table.append(
            f"| {p.place.site} | {'' if p.place.layer is None else p.place.layer} | {p.d_sae} | {m['l0']:.1f} "
            f"| {m['fvu']:.4f} | {m['delta_loss']:.4f} | {m['loss_recovered']:.4f} "
            f"| +{m['loss_zero_ablated'] - clean:.3f} | {1.0 - m['dead']:.1%} |"
        )
    settings = ["| setting | paper | here |", "|---|---|---|"]
    names = ("lr", "lr_start", "lr_warm_up_steps", "lr_decay", "betas", "eps", "batch_size", "l0_warm_up_steps")
    for name in (*names, "init_threshold", "bandwidth", "ste_to_input", "ste_to_input_fade"):
        settings.append(f"| {name} | {getattr(PAPER, name)} | {_range([getattr(one, name) for one in recipes])} |")
    targets = sorted({p.target for p in published})
    settings.append(f"| lambda | fixed for each SAE | steered: L0 targets {', '.join(f'{t:g}' for t in targets)} |")
    batch = recipes[0].batch_size
    activations = config["steps"] * batch
    settings.append(f"| activations seen | 4e9 and more | {activations:.2e} |")
    write_text(
        path,
        CARD.format(
            count=len(published),
            size=sum(p.size for p in published) / 1e6,
            table="\n".join(table),
            settings="\n".join(settings),
            steps=config["steps"],
            batch=batch,
            remarks=_remarks(published),
            minutes=seconds / 60,
            heldout=published[0].metrics["tokens"],
            clean=clean,
            machine=platform.machine(),
        ),
    )


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

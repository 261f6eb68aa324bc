"""Write the trained suite: weights in Gemma Scope's layout, registry files, and the card."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gemma_scope_tl.registry.render import render_release
from gemma_scope_tl.registry.schema import ReleaseFile, parse_release
from gemma_scope_tl.registry.widths import width_label
from gemma_scope_tl.sae.save import write_npz
from gemma_scope_tl.training.recipe import PAPER
from scripts.bundled.files import write_atomic, write_text
from scripts.bundled.sae_data import SITES, Place

LICENSE = "MIT"
DESCRIPTIONS = {
    "res": "Residual stream of the bundled small Gemma 2 in every layer",
    "mlp": "MLP outputs of the bundled small Gemma 2 in every layer",
    "att": "Attention head outputs of the bundled small Gemma 2 in every layer",
}


@dataclass(frozen=True)
class Published:
    """One SAE on disk and its held-out measurements."""

    place: Place
    folder: str
    d_in: int
    d_sae: int
    sha256: str
    size: int
    metrics: dict[str, float]

    @property
    def id(self) -> str:
        """The id in the registry: the folder below the site's."""
        return self.folder.split("/", 1)[1]


def write_weights(root: Path, place: Place, arrays: dict[str, np.ndarray], metrics: dict[str, float]) -> Published:
    """Write `<site>/layer_L/width_W/average_l0_N/params.npz` below `root`, N the measured L0, compressed."""
    d_in, d_sae = arrays["W_enc"].shape
    folder = f"{place[0]}/layer_{place[1]}/width_{width_label(d_sae)}/average_l0_{round(metrics['l0'])}"
    path = root / folder / "params.npz"
    if path.exists():
        raise FileExistsError(f"{path}: two SAEs of one site and layer have the same rounded L0")
    write_atomic(path, lambda temporary: write_npz(temporary, arrays, compress=True))
    data = path.read_bytes()
    return Published(place, folder, d_in, d_sae, hashlib.sha256(data).hexdigest(), len(data), metrics)


def write_registry(folder: Path, published: list[Published]) -> list[Path]:
    """Write `bundled-{res,mlp,att}.yaml`; in each layer the SAE with the higher L0 is canonical."""
    paths: list[Path] = []
    for site in SITES:
        saes = sorted((p for p in published if p.place[0] == site), key=lambda p: (p.place[1], p.metrics["l0"]))
        if not saes:
            continue
        densest = {p.place: p for p in saes}
        rows = [_row(p, canonical=densest[p.place] is p) for p in saes]
        release = parse_release(
            {
                "release": f"bundled-{site}",
                "repo": "bundled",
                "model": "bundled",
                "license": LICENSE,
                "description": DESCRIPTIONS[site],
                "notes": ["Canonical: the denser of the two SAEs of a layer.", "L0 is measured on held-out text."],
                "saes": rows,
            },
            f"bundled-{site}.yaml",
        )
        paths.append(_write_release(folder, release))
    return paths


def _write_release(folder: Path, release: ReleaseFile) -> Path:
    path = folder / f"{release.release}.yaml"
    write_text(path, render_release(release))
    return path


def _row(p: Published, *, canonical: bool) -> dict[str, Any]:
    return {
        "id": p.id,
        "site": p.place[0],
        "layer": p.place[1],
        "width": width_label(p.d_sae),
        "d_sae": p.d_sae,
        "d_in": p.d_in,
        "l0": float(round(p.metrics["l0"])),
        "path": p.folder,
        "canonical": canonical,
        "sha256": p.sha256,
    }


def write_card(path: Path, published: list[Published], facts: dict[str, Any]) -> None:
    """Write the card: what the SAEs are, how they were trained, and the table of measurements."""
    recipe = facts["recipe"]
    table = ["| site | layer | width | L0 | FVU | delta loss | loss recovered | zero ablation | latents that fire |"]
    table.append("|---|---|---|---|---|---|---|---|---|")
    for p in sorted(published, key=lambda p: (SITES.index(p.place[0]), p.place[1], p.metrics["l0"])):
        m = p.metrics
        table.append(
            f"| {p.place[0]} | {p.place[1]} | {p.d_sae} | {m['l0']:.1f} | {m['fvu']:.4f} | {m['delta_loss']:.4f} "
            f"| {m['loss_recovered']:.4f} | +{m['zero_delta_loss']:.3f} | {m['alive']:.1%} |"
        )
    settings = ["| setting | paper | here |", "|---|---|---|"]
    settings += [f"| {name} | {getattr(PAPER, name)} | {recipe[name]} |" for name in recipe if name != "l0_coefficient"]
    settings.append(f"| lambda | fixed for each SAE | steered: L0 targets {', '.join(map(str, facts['targets']))} |")
    settings.append(f"| activations seen | 4e9 and more | {facts['activations']:.2e} |")
    write_text(
        path,
        CARD.format(
            count=len(published),
            layers=len({p.place[1] for p in published}),
            size=sum(p.size for p in published) / 1e6,
            table="\n".join(table),
            settings="\n".join(settings),
            **{key: facts[key] for key in ("steps", "batch", "minutes", "heldout", "clean", "machine")},
        ),
    )


CARD = """# Sparse autoencoders of the bundled Gemma 2

{count} JumpReLU SAEs on the small Gemma 2 in `../model`, in Gemma Scope's layout: {layers} layers, the sites `res`,
`mlp` and `att`, two sparsities each, {size:.1f} MB in all. They exist so that loading, splicing, steering and
evaluation can be tried and tested offline. The model is small and so are they: expect what a small model knows.

`<site>/layer_L/width_W/average_l0_N/params.npz` holds `W_enc`, `W_dec`, `b_enc`, `b_dec` and `threshold` as float32,
with values rounded to bfloat16 precision so that they compress. N is the L0 measured below, rounded. Nothing is
subtracted before the encoder, and inputs are raw activations.

## Measurements

On the files as they are here, over {heldout} text positions of `../text/heldout.jsonl`, which neither the model nor
the SAEs saw. BOS, EOS and padding are neither replaced nor counted. The model's own loss there is {clean:.4f} nats a
token. Delta loss: the rise when the SAE's output replaces the activations. Loss recovered: 1 - delta loss / the rise
under zero ablation, which is the column after it. FVU: squared error over variance. Learning rate, bandwidth, first
threshold and controller gains were chosen in short runs by L0 and FVU on 60 windows of this same text; nothing was
chosen by loss, and no SAE of several was picked.

{table}

## Training

Data, credits and licences: the training text of the model, as its card in `../model` and `../text/LICENSES.md` say.
{steps} steps of {batch} activations for each SAE, all in lockstep, all sites of a batch from one forward pass, from an
in-place shuffle buffer; {minutes:.0f} minutes on {machine}. `training.jsonl` is the log.

The recipe is the paper's: JumpReLU with the rectangle-kernel pseudo-derivative and log thresholds, squared error plus
lambda times L0, one scale for each site, pre-encoder bias while training, Adam without momentum, unit decoder rows
with projected gradients, the encoder started as the decoder's transpose. Values that differ, and why, stand at `FAST`
in `gemma_scope_tl/training/recipe.py`:

{settings}

Lambda is steered by a proportional-integral controller on log(L0 / target), so it is not one number for an SAE: it is
in the log. Loss, recipe and fold are tested against formulas written from the paper.

Made by `python scripts/train_bundled.py saes`.
"""

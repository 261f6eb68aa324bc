"""The card of the bundled coders over several layers."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemma_scope_tl.training.recipe import GEMMA_SCOPE_2
from scripts.bundled.files import write_text

NAMES = (
    *("lr", "lr_warm_up_steps", "lr_decay", "betas", "batch_size", "l0_warm_up_steps", "init_threshold", "bandwidth"),
    *("ste_to_input", "l0_penalty", "l0_coefficient", "frequency_coefficient", "frequency_limit", "matryoshka"),
)


def write_card(
    path: Path, trained: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], *, size: int, seconds: float
) -> None:
    """Write the card: what the coders are, how they were trained, and what the run measured.

    Args:
        path: the file.
        trained: the rows of the run's `suite.json`.
        rows: the rows of the registry, in the same order.
        size: bytes of all files.
        seconds: length of the training.
    """
    text = CARD.format(
        size=size / 1e6,
        table="\n".join(_table(trained, rows)),
        settings="\n".join(_settings(trained)),
        steps=trained[0]["steps"],
        batch=trained[0]["batch_size"],
        minutes=seconds / 60,
        machine=platform.machine(),
    )
    write_text(path, text)


def _table(trained: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = ["| folder | layer | L0 of its latents | FVU of its output |", "|---|---|---|---|"]
    for found, row in zip(trained, rows, strict=True):
        lines.append(f"| `{row['path']}` | all | {found['l0']:.1f} (target {row['l0']:g}) | |")
        for layer, l0, fvu in zip(row["layers"], found["l0_layers"], found["fvu_layers"], strict=True):
            lines.append(f"| | {layer} | {l0:.1f} | {fvu:.4f} |")
    return lines


def _settings(trained: Sequence[Mapping[str, Any]]) -> list[str]:
    preset = asdict(GEMMA_SCOPE_2)
    lines = [
        f"| setting | preset | {' | '.join(row['site'] for row in trained)} |",
        f"|---|---|{'---|' * len(trained)}",
    ]
    for name in NAMES:
        values = " | ".join(str(_plain(row["recipe"][name])) for row in trained)
        lines.append(f"| {name} | {_plain(preset[name])} | {values} |")
    return lines


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.4g}"
    return tuple(value) if isinstance(value, list) else value


CARD = """# A crosscoder and a cross-layer transcoder of the bundled Gemma 3

Two JumpReLU coders over several layers of the small Gemma 3 in `../model`, in Gemma Scope 2's layout, {size:.1f} MB in
all. The crosscoder reads and writes the residual stream after layers 1 to 4. The cross-layer transcoder (CLT) reads the
MLP inputs of all six layers (behind the gain of the norm before) and writes the MLP outputs, with a skip connection
from each layer's input to the same layer's output. In both, latents of a layer write that layer and the later ones.
They exist so that loading, splicing, editing, evaluation and attribution graphs can be tried and tested offline. They
have 128 latents a layer: expect what so few can know.

`params_layer_k.safetensors` holds `w_enc [d, m]`, `w_dec [m, layers, d]` with zeros for earlier layers, `b_enc`,
`b_dec` of output `k`, `threshold` (float32), and for the CLT `affine_skip_connection` (used as `x @ S`); the others are
bfloat16, with values of the matrices rounded to five significant binary digits, and those of vectors and skip
connections to eight, which bfloat16 holds exactly. `config.json` names the tensors. Inputs are raw activations, and
nothing is subtracted before the encoder. The L0 in names and registry is the target of all layers together.

## Measurements of the training run

On batches of the training text after the last step, before rounding; FVU is squared error over variance. What the
files as they are here do on held-out text, losses included, is in `../results`, made by
`python -m scripts.artefacts --only results-gemma3-layers`.

{table}

## Training

Data, credits and licences: the training text of the model, as its card in `../model` and `../../text/LICENSES.md` say.
{steps} steps of {batch} tokens, all places of a batch from one forward pass; {minutes:.0f} minutes on a shared CPU
({machine}). `training-layers.jsonl` is the log, shortened.

Both start from coders of single layers in this folder, as Gemma Scope 2's report describes: latents of the earliest
layer first, each of which strikes out the most similar latent of each later layer, and a target L0 that falls from the
sum of theirs. Unlike there, these are no Matryoshka SAEs, so a prefix of them is any half. The loss is squared error in
units of each output's mean square, the quadratic penalty on the L0 of all layers together, and a penalty on latents
that fire often. Rows of all that a latent writes have length 1 in training. Rates are those of the preset `fast`:

{settings}

Made by `gemma-scope train configs/bundled-gemma3-layers.yaml` and `python scripts/train_bundled.py layers`, which does
both.
"""

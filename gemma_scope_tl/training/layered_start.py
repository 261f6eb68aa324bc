"""The start of a coder over several layers from single-layer coders, as Gemma Scope 2's were started (its report,
section 3), or from another coder over the same layers.

The report takes prefixes of single-layer Matryoshka SAEs, the earliest layer first. For each latent that is chosen,
latents of later layers that are most similar to it (decoder of the earlier one times encoder of the later one) are
struck out, since the earlier latent writes their layers too; and the target L0 begins at the sum of the single-layer
L0s. What it does not say is decided here:

- Each chosen latent strikes out one latent of each later layer, the one with the largest product. Where fewer than
  enough are left, those that were struck out follow, in their order.
- A latent of a crosscoder begins with its own decoder row in every later layer too, in raw units, because the residual
  stream carries what is written. A latent of a CLT begins with zeros there: another layer's MLP writes something else.
- Biases and skip paths are those of the single-layer coders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gemma_scope_tl.counts import whole_number
from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError
from gemma_scope_tl.files import checked_path, is_file, is_folder
from gemma_scope_tl.model.sizes import family_and_sizes
from gemma_scope_tl.sites import Place
from gemma_scope_tl.training.checkpoint import SUITE_NAME, read_record
from gemma_scope_tl.training.layered_spec import LayeredSpec
from gemma_scope_tl.training.layered_stack import unfolded
from gemma_scope_tl.training.layered_trainer import LayeredTrainer

_ROWS = 4_096  # chosen latents that are compared with a later layer at a time


@dataclass(frozen=True)
class Single:
    """A single-layer coder for raw activations.

    Attributes:
        text: what ``init_from`` names it.
        arrays: ``W_enc``, ``W_dec``, ``b_enc``, ``b_dec``, ``threshold``, and ``W_skip [d_out, d_in]`` if it has one.
        l0: its L0, if it is known.
    """

    text: str
    arrays: dict[str, Tensor]
    l0: float | None


def begin_layered(trainer: LayeredTrainer, inputs: Sequence[float], outputs: Sequence[float], model: str) -> None:
    """Give a coder that has an ``init_from`` the weights that it names.

    Args:
        trainer: before its first step.
        inputs, outputs: the scales of what each layer reads and writes.
        model: name of the model that is trained on.

    Raises:
        GemmaScopeError: nothing has that name, or what is found is of another place, size or kind.
        WeightsError: a file cannot be obtained or fails a check.
    """
    spec = trainer.spec
    if not spec.init_from:
        return
    first, l0 = _load(spec.starts[0], spec, spec.reads[0], model)
    if hasattr(first, "layers"):
        layers, start = _continued(first, spec, trainer), None
    else:
        coders = [_single(spec.starts[0], first, l0, spec, spec.reads[0], trainer)]
        for text, place in zip(spec.starts[1:], spec.reads[1:], strict=True):
            coders.append(_single(text, *_load(text, spec, place, model), spec, place, trainer))
        layers, start = joined(coders, spec), _sum_of_l0s(coders, spec)
    params = unfolded(layers, inputs, outputs, pre_encoder_bias=not spec.is_transcoder)
    odd = next((name for name, value in params.items() if not bool(torch.isfinite(value).all())), None)
    if odd is not None:
        what = "a decoder row of 0, or a threshold that is not positive"
        raise GemmaScopeError(f"{spec.name}: {spec.init_from} cannot be trained further: layer {odd[0]} has {what}.")
    trainer.start_from(params, start)


@torch.no_grad()
def joined(coders: Sequence[Single], spec: LayeredSpec) -> list[dict[str, Tensor]]:
    """The arrays of each layer of a coder that starts from single-layer ones, for raw activations."""
    chosen = chosen_latents([c.arrays["W_enc"] for c in coders], [c.arrays["W_dec"] for c in coders], spec.width)
    found: list[dict[str, Tensor]] = []
    for j, (coder, own) in enumerate(zip(coders, chosen, strict=True)):
        arrays, rows = coder.arrays, coder.arrays["W_dec"][own]
        w_dec = rows.new_zeros(len(own), len(coders) - j, rows.shape[1])
        if spec.is_transcoder:
            w_dec[:, 0] = rows
        else:
            w_dec += rows.unsqueeze(1)
        layer = {"W_enc": arrays["W_enc"][:, own], "W_dec": w_dec, "b_dec": arrays["b_dec"]}
        layer |= {name: arrays[name][own] for name in ("b_enc", "threshold")}
        if spec.skip:
            skip = arrays.get("W_skip")
            layer["affine_skip_connection"] = (
                rows.new_zeros(arrays["W_enc"].shape[0], rows.shape[1]) if skip is None else skip.T
            )
        found.append(layer)
    return found


def chosen_latents(encoders: Sequence[Tensor], decoders: Sequence[Tensor], width: int) -> list[Tensor]:
    """For each layer the ``width`` latents that a coder over all layers starts with, as the module's docstring says.

    Args:
        encoders, decoders: for each layer ``[d_in, m]`` and ``[m, d_out]`` of a single-layer coder, whose latents are
            in the order of their importance, with ``m`` of ``width`` or more.

    >>> e, zero = torch.eye(3), torch.zeros(3, 3)
    >>> [one.tolist() for one in chosen_latents([e, e], [e, zero], 2)]  # 0 and 1 of the first strike out 0 and 1
    [[0, 1], [2, 0]]
    """
    struck = [torch.zeros(decoder.shape[0], dtype=torch.bool) for decoder in decoders]
    found: list[Tensor] = []
    for j, decoder in enumerate(decoders):
        order = torch.cat([(~struck[j]).nonzero().flatten(), struck[j].nonzero().flatten()])
        own = order[:width]
        found.append(own)
        for k in range(j + 1, len(decoders)):
            for part in own.split(_ROWS):
                struck[k][(decoder[part] @ encoders[k]).argmax(1)] = True
    return found


def _sum_of_l0s(coders: Sequence[Single], spec: LayeredSpec) -> float | None:
    """The L0 from which the target falls; None where the penalty has no target."""
    if spec.recipe.l0_penalty != "quadratic" or spec.l0_start is not None:
        return None
    unknown = next((coder.text for coder in coders if coder.l0 is None), None)
    if unknown is not None:
        what = "its files do not say with which L0 it was trained, at whose sum over the layers the target begins"
        raise GemmaScopeError(f"{spec.name}: {unknown}: {what}. Give l0_start.")
    return sum(coder.l0 for coder in coders if coder.l0 is not None)


def _continued(coder: Any, spec: LayeredSpec, trainer: LayeredTrainer) -> list[dict[str, Tensor]]:
    """The arrays of each layer of a coder of the same kind, layers and widths."""
    found = (coder.kind, tuple(coder.layers), tuple(coder.widths), coder.d_in, coder.d_out)
    wanted = (spec.kind, spec.layers, (spec.width,) * len(spec.layers), trainer.d_in, trainer.d_out)
    if found != wanted or (coder.W_skip is not None and not spec.skip):
        raise GemmaScopeError(
            f"{spec.name}: {spec.init_from} is a {coder.kind} of layers {list(coder.layers)} with {coder.d_sae} "
            f"latents{' and skip paths' if coder.W_skip is not None else ''}, which does not fit."
        )
    names = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
    layers = [{name: getattr(coder, name)[k].detach() for name in names} for k in range(len(spec.layers))]
    if spec.skip and coder.W_skip is not None:
        for k, layer in enumerate(layers):
            layer["affine_skip_connection"] = coder.W_skip[k].detach()
    return layers


def _single(text: str, sae: Any, l0: float | None, spec: LayeredSpec, place: Place, trainer: LayeredTrainer) -> Single:
    """A single-layer coder, after a comparison with what the spec needs."""
    at = (getattr(sae, "site", None), getattr(sae, "layer", None))
    if at != (place.site, place.layer):
        raise GemmaScopeError(f"{spec.name}: {text} is an SAE of {at[0]}, layer {at[1]}, and {place.key} is needed.")
    arrays = {name: value.detach() for name, value in sae.state_dict().items()}
    sizes = (arrays["W_enc"].shape[0], arrays["W_dec"].shape[1])
    if sizes != (trainer.d_in, trainer.d_out) or len(arrays["W_dec"]) < spec.width:
        raise GemmaScopeError(
            f"{spec.name}: {text} has {len(arrays['W_dec'])} latents of widths {sizes[0]} and {sizes[1]}; needed are "
            f"{spec.width} or more of {trainer.d_in} and {trainer.d_out}."
        )
    if "W_skip" in arrays and not spec.skip:
        raise GemmaScopeError(f"{spec.name}: {text} has a skip path, which would be lost: write skip: true.")
    if l0 is None:
        said = sae.cfg.metadata.get("l0")
        l0 = float(said) if isinstance(said, (int, float)) and whole_number(said) != 0 else None
    return Single(text, arrays, l0)


def _load(text: str, spec: LayeredSpec, place: Place, model: str) -> tuple[Any, float | None]:
    """What ``init_from`` names, and the L0 that a run's record says of it."""
    from gemma_scope_tl.registry import catalog
    from gemma_scope_tl.sae.loading import load_folder, load_row

    path, l0 = checked_path(text), None
    if is_folder(path) and is_file(path / SUITE_NAME):
        path, l0 = _of_run(path, spec, place)
    elif not is_folder(path) and not is_file(path):
        release, _, sae_id = text.partition("/")
        try:
            return load_row(catalog.resolve(release, sae_id)), None
        except UnknownNameError as error:
            what = f"{spec.name}: init_from {text!r} is neither a folder nor a release and an id"
            raise GemmaScopeError(f"{what}. {error}") from None
    family = family_and_sizes(model)[0].name  # the name of a model of one's own does not tell it
    if is_folder(path) and any(path.glob("params_layer_*")):
        return load_folder(path, model, spec.kind, family=family, layers=spec.layers), None
    return load_folder(path, model, place.site, place.layer, family=family), l0


def _of_run(folder: Path, spec: LayeredSpec, place: Place) -> tuple[Path, float | None]:
    """In a finished run, the coder with the same name, or else the only SAE of the place, and its L0."""
    rows: list[dict[str, Any]] = read_record(folder / SUITE_NAME).get("saes") or []
    same = [row for row in rows if row.get("name") == spec.name]
    found = same or [
        row
        for row in rows
        if (row.get("site"), row.get("layer")) == (place.site, place.layer) and bool(row.get("affine")) <= spec.skip
    ]
    if len(found) != 1:
        names = ", ".join(str(row.get("name")) for row in found[:3]) or "none"
        raise GemmaScopeError(
            f"{spec.name}: the run in {folder} has {len(found)} SAEs of {place.key} to start from ({names}), and one "
            "is needed: name the folder of one, with the mark {layer}."
        )
    return folder / found[0]["path"], found[0].get("l0")

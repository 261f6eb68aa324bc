"""Naming what is wrong with one SAE: the alternatives that are tried, and the sentence for the one that fits best.

Each alternative is a hypothesis about a fault, and its test is a fit (:mod:`gemma_scope_tl.verification.probe`): the
SAE of another layer fits that layer's tensor, an SAE of another hook fits that hook's, one whose scale was not folded
fits the tensor divided by its scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.families import Place
from gemma_scope_tl.sae.choices import bring
from gemma_scope_tl.sites import target_of
from gemma_scope_tl.verification.probe import Fit, Probe, fit

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel
    from gemma_scope_tl.registry.schema import SAERow

KINDS = {
    "not-finite": "the model's activations overflow in its dtype",
    "first-token": "the first token of each row is counted",
    "embedding-scale": "the model's token embedding has the wrong scale",
    "layer": "the SAE belongs to another layer",
    "hook": "the SAE belongs to another tensor of its block",
    "target": "the transcoder writes another tensor",
    "not-folded": "the scale of training is not folded into the weights",
    "folded-twice": "the scale of training is folded into the weights twice",
    "bias-not-folded": "the decoder's bias is not folded into the encoder's",
    "label": "the L0 is that of another row",
    "l0": "the L0 is outside its band",
    "fvu": "the reconstruction is too bad",
    "loss": "splicing the SAE harms the model too much",
    "precision": "the SAE in bfloat16 differs from the SAE in float32",
    "file": "the file cannot be loaded or does not fit its row",
    "norm": "a norm of the model does not multiply by its gain",
    "model": "the hooked model differs from the plain one",
    "ordering": "SAEs are ordered otherwise than in the paper",
    "neuronpedia": "activations differ from Neuronpedia's",
}
"""The kinds of faults, which the report names."""
BAD = 0.8
"""From this FVU on, all layers are tried and not only the neighbours."""
HEAVY = 10.0
"""Tokens whose error or norm is larger than that of the others by this factor stand out: few of them dominate FVU."""
MANY = 3.0
"""Tokens with more active latents by this factor stand out too. Gemma's BOS has a hundred times as many as others."""


@dataclass(frozen=True)
class Fault:
    """Something that is wrong.

    Attributes:
        kind: a key of :data:`KINDS`.
        text: a sentence with the numbers.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Diagnosis:
    """What the short pass says about one SAE.

    Attributes:
        own: the fit at the SAE's own place.
        best: the alternative that fits clearly better, if there is one.
        faults: what follows from it; empty if the SAE's own place fits best.
        notes: remarks that are no faults.
        tried: number of alternatives.
    """

    own: Fit
    best: Fit | None
    faults: tuple[Fault, ...]
    notes: tuple[str, ...] = ()
    tried: int = 0


def diagnose(model: GemmaModel, sae: Any, row: SAERow, probe: Probe, corrected: Probe | None = None) -> Diagnosis:
    """Compare the SAE's own place with the alternatives.

    Args:
        model: from ``load_model``.
        sae: the SAE of ``row``.
        row: its registry row.
        probe: a short pass of the model.
        corrected: the same pass with another scale of the embedding, if the model's is in doubt.
    """
    place = Place(row.site, row.layer)
    x, y = probe.at(place), probe.at(target_of(place))
    bring(sae, x.device)
    if not (bool(x.isfinite().all()) and bool(y.isfinite().all())):
        empty = Fit(place.key, torch.tensor([math.nan]), torch.tensor([math.inf]))
        what = f"The model's activations at {place.key} are not finite in {x.dtype}".replace("torch.", "")
        return Diagnosis(empty, None, (Fault("not-finite", f"{what}: load it in bfloat16 or float32."),))
    own = fit(sae, x, y, place.key)
    faults: list[Fault] = []
    first = probe.is_first()
    if bool(first.any()) and _stands_out(own, first):
        probe = probe.without_first()
        x, y = _at(probe, place)
        trimmed = fit(sae, x, y, place.key)
        faults.append(Fault("first-token", _first_token(probe, own, trimmed)))
        own = trimmed
    notes = _heavy(sae, x, y, own)
    found = list(alternatives(model, sae, row, probe, corrected, all_layers=not own.fvu < BAD))
    better = [one for one in found if one.clearly_better_than(own)]
    best = min(better, key=lambda one: one.fvu, default=None)
    if best is not None and best.kind == "layer" and own.fvu < BAD:  # the neighbour may not be the best layer
        further = [fit(sae, *_at(probe, other), other.key, "layer") for other in _layers(model, row, all_of_them=True)]
        best = min([best, *further], key=lambda one: one.fvu)
        found += further
    if best is not None:
        faults.append(Fault(best.kind, _sentence(row, place, own, best)))
    return Diagnosis(own, best, tuple(faults), tuple(notes), len(found))


def alternatives(
    model: GemmaModel, sae: Any, row: SAERow, probe: Probe, corrected: Probe | None, all_layers: bool = False
) -> Iterator[Fit]:
    """The fits of all hypotheses about one SAE. The other layers are the two neighbours, or all."""
    place = Place(row.site, row.layer)
    x, y = _at(probe, place)
    if corrected is not None:
        yield fit(sae, *_at(corrected, place), "the model with its embedding rescaled", "embedding-scale")
    for other in _layers(model, row, all_layers):
        yield fit(sae, *_at(probe, other), other.key, "layer")
    yield from _other_tensors(model, sae, row, probe)
    yield from _other_units(sae, row, x, y)


def _at(probe: Probe, place: Place) -> tuple[torch.Tensor, torch.Tensor]:
    return probe.at(place), probe.at(target_of(place))


def _layers(model: GemmaModel, row: SAERow, all_of_them: bool = False) -> list[Place]:
    """The same site in the neighbouring layers, or in all other layers."""
    if row.layer is None:
        return []
    near = range(model.dims.n_layers) if all_of_them else (row.layer - 1, row.layer + 1)
    return [Place(row.site, layer) for layer in near if 0 <= layer < model.dims.n_layers and layer != row.layer]


def _other_tensors(model: GemmaModel, sae: Any, row: SAERow, probe: Probe) -> Iterator[Fit]:
    """The tensors of the block; for a transcoder, those it might read and those it might write."""
    if row.layer is None:
        return
    place = Place(row.site, row.layer)
    x, y = _at(probe, place)
    inputs = {name: value for name, value in probe.block(row.layer, row.d_in).items() if not _same(value, x)}
    site = model.family.site(row.site)
    if not site.is_transcoder:
        for name, value in inputs.items():
            yield fit(sae, value, value, _named(model, row.layer, name), "hook")
        return
    outputs = {n: value for n, value in probe.block(row.layer, row.d_out or row.d_in).items() if not _same(value, y)}
    for name, value in inputs.items():
        yield fit(sae, value, y, _named(model, row.layer, name), "hook")
    for name, value in outputs.items():
        yield fit(sae, x, value, _named(model, row.layer, name), "target")


def _other_units(sae: Any, row: SAERow, x: torch.Tensor, y: torch.Tensor) -> Iterator[Fit]:
    """The same tensors in other units: the scale ``C`` of appendix A, and for the embedding ``sqrt(d_model)``."""
    scale = float(x.double().square().sum(-1).mean().sqrt())
    yield fit(sae, x / scale, y / scale, f"the tensor divided by C = {scale:.4g}", "not-folded")
    yield fit(sae, x * scale, y * scale, f"the tensor multiplied by C = {scale:.4g}", "folded-twice")
    if row.layer is None:
        root = math.sqrt(row.d_in)
        yield fit(sae, x / root, y / root, f"the tensor divided by sqrt(d) = {root:.4g}", "not-folded")
        yield fit(sae, x * root, y * root, f"the tensor multiplied by sqrt(d) = {root:.4g}", "folded-twice")
    if x.shape[1] == y.shape[1] and not getattr(sae, "is_transcoder", False):
        yield fit(sae, x - sae.b_dec.detach().to(x.dtype), y, "the tensor minus b_dec", "bias-not-folded")


def _stands_out(own: Fit, which: torch.Tensor) -> bool:
    """Whether some tokens have far larger errors or far more active latents than the others."""
    which = which[: len(own.errors)]
    pairs = ((values[which].double().mean(), values[~which].double().mean()) for values in (own.errors, own.counts))
    (error, errors), (count, counts) = pairs
    return bool(error > HEAVY * errors) or bool(count > MANY * counts)


def _heavy(sae: Any, x: torch.Tensor, y: torch.Tensor, own: Fit) -> list[str]:
    """A note about few tokens of huge norm, which dominate FVU."""
    norms = x.float().norm(dim=-1)
    keep = norms <= HEAVY * norms.median()
    if bool(keep.all()):
        return []
    count, lighter = int((~keep).sum()), fit(sae, x[keep], y[keep], own.what)
    return [f"{count} of {len(keep)} tokens have more than {HEAVY:g} times the median norm; without them {lighter}"]


def _same(value: torch.Tensor, other: torch.Tensor) -> bool:
    return value.shape == other.shape and bool(torch.equal(value, other))


def _named(model: GemmaModel, layer: int, hook: str) -> str:
    """A hook's name, and the site that it is, if it is one."""
    point = model.hook_dict[hook]
    for site in model.family.sites.values():
        if site.per_layer and model.site_hook_point(site.hook_name(layer, model.backend)) is point:
            return f"site {site.name!r} ({hook})"
    return hook


def _first_token(probe: Probe, own: Fit, trimmed: Fit) -> str:
    first = probe.ids[:, 0].unique().tolist()
    ids = f"id {first[0]}" if len(first) == 1 else f"{len(first)} ids"
    return (
        f"The first token of each row ({ids}) is counted: without it {trimmed}, with it {own}. It is BOS, on which the "
        "SAEs were not trained, so BOS is not among the special ids of the tokenizer."
    )


def _sentence(row: SAERow, place: Place, own: Fit, best: Fit) -> str:
    numbers = f"(there {best}; at its own place {own})"
    match best.kind:
        case "layer":
            return f"{row.id} fits {best.what} better than {place.key} {numbers}: the file of another layer."
        case "hook":
            reads = "reads" if target_of(place) != place else "was trained on"
            return f"{row.id} fits {best.what} better than {place.key} {numbers}: it {reads} that tensor."
        case "target":
            wanted = target_of(place).key
            return f"{row.id} fits the target {best.what} better than {wanted} {numbers}: it writes that tensor."
        case "embedding-scale":
            return f"{row.id} fits {best.what} better {numbers}."
        case "bias-not-folded":
            return f"{row.id} fits {best.what} better {numbers}: b_dec is not folded into b_enc (appendix A)."
        case _:
            return f"{row.id} fits {best.what} better {numbers}: {KINDS[best.kind]} (appendix A)."

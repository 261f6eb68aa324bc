"""Checks of the model itself, which need no SAE: the scale of its embedding, and the gains of its norms.

The check after loading compares the hooked model with the plain one. It cannot see a fault that both have, such as a
library that forgets to scale the embedding. These checks compare the model's tensors with its own weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.evals.clean_pass import removed_after, run_to_final_norm
from gemma_scope_tl.sites import Place
from gemma_scope_tl.verification.diagnosis import Fault
from gemma_scope_tl.verification.probe import Probe

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
"""Relative differences up to these are attributed to rounding; 3e-2 for other dtypes, some steps of bfloat16."""


@dataclass(frozen=True)
class ModelChecks:
    """The results for a model.

    Attributes:
        facts: what was measured, for the report.
        faults: what is wrong.
        embedding_factor: the number by which the embedding would have to be multiplied; 1 if it is right.
        finite: whether all residual streams are finite; otherwise nothing else was checked.
    """

    facts: dict[str, Any]
    faults: tuple[Fault, ...]
    embedding_factor: float = 1.0
    finite: bool = True


def check_model(model: GemmaModel, probe: Probe) -> ModelChecks:
    """Check the embedding and the norms of a model.

    Args:
        model: from ``load_model``.
        probe: a short pass of it.
    """
    overflow = not_finite(model, probe)
    if overflow is not None:
        return ModelChecks({"finite": False}, (overflow,), finite=False)
    faults: list[Fault] = []
    facts: dict[str, Any] = {"finite": True}
    factor = 1.0
    wanted = model.family.embedding_scale(model.dims.d_model)
    scale = embedding_scale(model, probe)
    facts["embedding_scale"] = {"measured": scale, "expected": wanted}
    if scale is not None and not abs(scale / wanted - 1) <= _tolerance(model):
        factor = wanted / scale if scale else 1.0
        faults.append(
            Fault(
                "embedding-scale",
                f"The token embedding is multiplied by {scale:.4g} in place of {wanted:.4g} = sqrt(d_model): every "
                "residual stream is wrong. Plain Hugging Face has the fault too: another version of transformers.",
            )
        )
    norms = wrong_norms(model, probe.ids) if model.backend == "bridge" else None
    facts["norms"] = "only checked on the bridge" if norms is None else {"checked": norms[0], "wrong": len(norms[1])}
    if norms is not None and norms[1]:
        name, text = next(iter(norms[1].items()))
        more = f", and {len(norms[1]) - 1} norms more" if len(norms[1]) > 1 else ""
        faults.append(Fault("norm", f"The norm {name} {text}{more}. Another version of transformers may be right."))
    return ModelChecks(facts, tuple(faults), factor)


def not_finite(model: GemmaModel, probe: Probe) -> Fault | None:
    """The fault of the first residual stream with an infinity or NaN at a counted token; None if all are finite."""
    streams = [site.name for site in model.family.sites.values() if site.joins == "residual"]
    for place in (Place(name, layer) for name in streams for layer in range(model.dims.n_layers)):
        value = probe.at(place)
        if not bool(value.isfinite().all()):
            dtype = str(value.dtype).removeprefix("torch.")
            what = f"The model's activations at {place.key} are not finite in {dtype}"
            return Fault("not-finite", f"{what}: load it in bfloat16 or float32.")
    return None


def embedding_scale(model: GemmaModel, probe: Probe) -> float | None:
    """The factor between the rows of the embedding matrix and the embedding as it enters the first block.

    Returns:
        None where the matrix without the factor is not at hand: HookedTransformer stores the product, and only a tied
        unembedding still has the plain rows.
    """
    seen = probe.hook(model.family.embedding_hooks[model.backend]).double()
    ids = probe.ids[probe.counted][: len(seen)]
    bridge = model.backend == "bridge"
    matrix = model.original_model.get_input_embeddings().weight if bridge else model.W_U.T
    rows = matrix[ids.to(matrix.device)].detach().double().to(seen.device)
    cosine = float((rows * seen).sum() / (rows.norm() * seen.norm()).clamp_min(1e-30))
    if not cosine > 0.99 and not bridge:  # the unembedding is another matrix
        return None
    return float((rows * seen).sum() / rows.square().sum().clamp_min(1e-30))


def wrong_norms(model: GemmaModel, ids: torch.Tensor) -> tuple[int, dict[str, str]]:
    """The norms of the Hugging Face model whose output is not ``x / rms(x) * (1 + weight)``.

    Returns:
        The number of norms that ran, and by the name of each wrong one what it does.
    """
    decoder = model.original_model.get_submodule(model.family.decoder)
    offset = model.family.gain_offset["bridge"]
    width = model.dims.d_model
    seen: dict[str, str | None] = {}

    def check(name: str, module: Any) -> Any:
        def hook(_module: Any, args: Any, out: Any) -> None:
            seen[name] = _what_is_wrong(args[0], out, module.weight.detach(), offset, _tolerance(model))

        return hook

    with removed_after() as handles, torch.no_grad():
        for name, module in decoder.named_modules():
            weight = getattr(module, "weight", None)
            if type(module).__name__.endswith("RMSNorm") and weight is not None and weight.shape == (width,):
                plain = name.replace("._original_component", "")  # the bridge's wrapper of the module
                handles.append(module.register_forward_hook(check(plain, module)))
        run_to_final_norm(model, ids[:1])
    return len(seen), {name: text for name, text in seen.items() if text is not None}


def _what_is_wrong(x: torch.Tensor, out: torch.Tensor, weight: torch.Tensor, offset: float, limit: float) -> str | None:
    x, out, weight = x.double(), out.double(), weight.double()
    unit = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
    if _difference(out, unit * (weight + offset)) <= limit:
        return None
    candidates: Iterable[tuple[str, torch.Tensor]] = (
        (f"multiplies by its weight without adding {offset:g}", unit * weight),
        ("does not multiply by its gain", unit),
        ("passes its input on unchanged", x),
        ("multiplies by its gain and does not divide by the root mean square", x * (weight + offset)),
    )
    for text, wanted in candidates:
        if _difference(out, wanted) <= limit:
            return text
    return f"differs from x / rms(x) * ({offset:g} + weight) by {_difference(out, unit * (weight + offset)):.2g}"


def _difference(got: torch.Tensor, wanted: torch.Tensor) -> float:
    value = float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))
    return value if math.isfinite(value) else math.inf


def _tolerance(model: GemmaModel) -> float:
    return TOLERANCE.get(next(model.parameters()).dtype, 3e-2)

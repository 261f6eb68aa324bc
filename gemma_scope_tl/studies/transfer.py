"""SAEs of a base model on its instruction-tuned sibling (sections 4.5 and C.4)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.accumulators import Mean
from gemma_scope_tl.evals.clean_pass import read_batches
from gemma_scope_tl.evals.saes import Subject, subjects_of
from gemma_scope_tl.evals.suite import evaluate
from gemma_scope_tl.model.counted import counted_rows
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.sae.access import trained_family
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sae.suite import SAESuite
from gemma_scope_tl.sites import Place, get_site
from gemma_scope_tl.studies.positions import binned_by_position
from gemma_scope_tl.studies.rollouts import Rollouts
from gemma_scope_tl.text.batch import Text, TokenBatch
from gemma_scope_tl.text.rows import given_rows, special_ids

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel


def base_on_tuned(
    base: Any,
    tuned: Any,
    data: Text | Rollouts,
    base_saes: Any,
    tuned_saes: Any = None,
    *,
    rescale: bool = False,
    context: int = 256,
    batch_size: int = 8,
    positions: Positions = None,
    **options: Any,
) -> pd.DataFrame:
    """Measure a base model's SAEs on a tuned model's activations, on the same tokens (section 4.5).

    Args:
        base, tuned: the models, of the same sizes.
        data: :func:`~gemma_scope_tl.studies.roll_out` of the tuned model, as in the paper; or texts, which the tuned
            model's tokenizer packs, or token ids.
        base_saes, tuned_saes: SAEs of the base model and, optionally, of the tuned model.
        rescale: measure the base SAEs a second time, with the tuned model's activations scaled to the base model's
            mean norm at the site (appendix C.4), by means of :func:`rescaled`.
        context, batch_size, positions, options: as :func:`~gemma_scope_tl.evals.suite.evaluate` takes them.

    Returns:
        A row per pair of model and SAE: ``model`` (``base`` or ``tuned``), ``saes`` (``base``, ``base rescaled`` or
        ``tuned``), ``scale`` (1 unless rescaled), then the columns of ``evaluate``. For rollouts there are two rows
        each: ``part`` is ``prompt`` or ``rollout``, and the columns are those of ``binned_by_position``.

    Raises:
        GemmaScopeError: the models have different sizes, or a transcoder would have to be rescaled.
    """
    import pandas as pd

    if base.dims != tuned.dims or base.cfg.d_vocab != tuned.cfg.d_vocab:
        raise GemmaScopeError(f"The models differ in their sizes: {base.dims} and {tuned.dims}.")
    parts = data if isinstance(data, Rollouts) else None
    tokens = data.tokens if isinstance(data, Rollouts) else given_rows(tuned, data, context)
    options["positions"] = positions
    pairs: list[tuple[str, str, Any, Any]] = [("base", "base", base, base_saes), ("tuned", "base", tuned, base_saes)]
    scales: dict[Place, float] = {}
    if rescale:
        subjects = subjects_of(base, base_saes)
        scales = norm_ratios(base, tuned, tokens, [subject.place for subject in subjects], batch_size, positions)
        pairs.append(("tuned", "base rescaled", tuned, _all_rescaled(base_saes, subjects, scales)))
    if tuned_saes is not None:
        pairs.append(("tuned", "tuned", tuned, tuned_saes))
    frames: list[pd.DataFrame] = []
    for name, kind, model, saes in pairs:
        table = _measured(model, saes, tokens, parts, batch_size, options)
        places = [Place(site, None if pd.isna(layer) else int(layer)) for site, layer in _sites(table)]
        used = [scales[place] if kind == "base rescaled" else 1.0 for place in places]
        for at, (column, value) in enumerate((("model", name), ("saes", kind), ("scale", used))):
            table.insert(at, column, value)
        frames.append(table)
    return pd.concat(frames, ignore_index=True)


def _measured(
    model: GemmaModel,
    saes: Any,
    tokens: torch.Tensor | TokenBatch,
    parts: Rollouts | None,
    batch_size: int,
    options: Mapping[str, Any],
) -> pd.DataFrame:
    if parts is None:
        return evaluate(model, saes, tokens, batch_size=batch_size, by_position=False, **options)
    edges = [0, parts.prompt, parts.tokens.shape[1]]
    return parts.by_part(binned_by_position(model, saes, parts.tokens, edges, batch_size=batch_size, **options))


def _sites(table: pd.DataFrame) -> Iterable[tuple[str, Any]]:
    return zip(table["site"], table["layer"], strict=True)


@torch.no_grad()
def norm_ratios(
    base: Any,
    tuned: Any,
    tokens: Text,
    places: Sequence[Place],
    batch_size: int = 8,
    positions: Positions = None,
) -> dict[Place, float]:
    """The ratio of mean activation norms, base over tuned model, at each place on the ordinary tokens at ``positions``.

    Raises:
        GemmaScopeError: there is no such token.
    """
    kept = list(dict.fromkeys(places))
    means: list[dict[Place, Mean]] = []
    for model in (base, tuned):
        found = {place: Mean() for place in kept}
        rows = counted_rows(model, tokens, model.cfg.n_ctx, special_ids(model), positions)
        for batch in read_batches(model, rows, kept, batch_size):
            for place, mean in found.items():
                mean.update(batch.activations(place).double().norm(dim=1))
        means.append(found)
    if any(not mean.count for mean in means[0].values()):
        raise GemmaScopeError("There is no ordinary token in the data: all are BOS, EOS or padding.")
    return {place: means[0][place].value / means[1][place].value for place in kept}


@torch.no_grad()
def rescaled(sae: Any, scale: float) -> Any:
    """An SAE whose latents on x are those of ``sae`` on ``scale · x``, and whose output is divided by the scale.

    ``f(s x)`` has the encoder ``s W_enc``; ``x̂(s x) / s`` has the decoder ``W_dec / s`` and the bias ``b_dec / s``.

    Raises:
        GemmaScopeError: the SAE is a transcoder, whose input and output differ in scale, or the scale is not positive.
    """
    if get_site(sae.site).is_transcoder:
        raise GemmaScopeError("A transcoder reads one tensor and writes another, so one scale does not fit both.")
    if not 0 < scale < float("inf"):
        raise GemmaScopeError(f"A scale must be a positive number, not {scale}.")
    arrays = {
        "W_enc": sae.W_enc * scale,
        "b_enc": sae.b_enc,
        "threshold": sae.threshold,
        "W_dec": sae.W_dec / scale,
        "b_dec": sae.b_dec / scale,
    }
    options = {"device": sae.device, "dtype": str(sae.dtype).removeprefix("torch."), "family": trained_family(sae).name}
    made = JumpReLUSAE.from_arrays(arrays, site=sae.site, layer=sae.layer, **options)
    made.row = sae.row
    return made


def _all_rescaled(saes: Any, subjects: list[Subject], scales: Mapping[Place, float]) -> Any:
    """The same SAEs, rescaled; SAEs of a suite are rescaled when they are loaded."""
    if isinstance(saes, SAESuite):
        load = saes.load
        return SAESuite(saes.rows, lambda row: rescaled(load(row), scales[Place(row.site, row.layer)]), saes.memory)
    return [rescaled(subject.get(), scales[subject.place]) for subject in subjects]

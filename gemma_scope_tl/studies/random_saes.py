"""Random SAEs as controls: the same shape and L0 as a trained SAE, with directions that were not trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float

from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.evals.clean_pass import ReadBatch
from gemma_scope_tl.evals.saes import latents_of
from gemma_scope_tl.sae.access import locate, trained_family
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sites import Place

FREQUENCIES = ("equal", "matched")
SAMPLE = 8192
"""Tokens from which the thresholds of a control are computed, and as many on which its L0 is checked."""
L0_BAND = 0.1
"""Largest difference of the control's L0 from that of the SAE, as a share of the latter."""
_CHUNK = 1024  # latents whose pre-activations are sorted at once
_LEAST = 1e-6  # smallest threshold
_SHARE = 0.9  # where a threshold lies between two pre-activations of the sample


@torch.no_grad()
def random_twin(sae: Any, x: Float[torch.Tensor, "n d_in"], seed: int = 0, frequency: str = "equal") -> Any:
    """An SAE of the same shape with random weights, whose thresholds give the same L0 on ``x``.

    Encoder columns and decoder rows are random unit vectors; ``b_enc`` subtracts the mean of ``x``. The threshold of a
    latent is the quantile of its pre-activations above which it fires on the wanted share of the tokens. A quantile
    below zero is moved to zero by the latent's bias, because thresholds are positive.

    Args:
        sae: an SAE or transcoder.
        x: activations that the SAE reads, of a few thousand tokens drawn at random from the text. The L0 is equal on
            these; :func:`checked_l0` compares it on other tokens.
        seed: seed of the weights.
        frequency: ``"equal"``: every latent fires on a share ``L0 / d_sae`` of the tokens; ``"matched"``: latent ``i``
            fires as often as latent ``i`` of the SAE, so that the twin also has its dead and its dense latents.

    Raises:
        UnknownNameError: ``frequency`` is unknown.
        GemmaScopeError: ``x`` is empty.
    """
    if frequency not in FREQUENCIES:
        raise unknown_name("frequency of a random SAE", frequency, FREQUENCIES)
    if not x.shape[0]:
        raise GemmaScopeError("A random twin needs activations, from which its thresholds are computed.")
    site, layer = locate(sae)
    generator = torch.Generator().manual_seed(seed)
    d_sae, d_out = sae.W_dec.shape
    x = x.float().cpu()
    w_enc = torch.nn.functional.normalize(torch.randn(x.shape[1], d_sae, generator=generator), dim=0)
    w_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_out, generator=generator), dim=1)
    b_enc = -x.mean(0) @ w_enc
    fires = _wanted(sae, x, frequency)
    thresholds: list[torch.Tensor] = []
    for columns, bias, count in zip(w_enc.split(_CHUNK, 1), b_enc.split(_CHUNK), fires.split(_CHUNK), strict=True):
        thresholds.append(_quantiles(x @ columns + bias, count))
    quantiles = torch.cat(thresholds)
    arrays = {"W_enc": w_enc, "W_dec": w_dec, "b_dec": torch.zeros(d_out)}
    arrays["b_enc"] = b_enc + (_LEAST - quantiles).clamp_min(0)
    arrays["threshold"] = quantiles.clamp_min(_LEAST)
    family = trained_family(sae).name
    return JumpReLUSAE.from_arrays(arrays, site=site.name, layer=layer, device=sae.device, family=family)


@torch.no_grad()
def checked_l0(
    sae: Any, twin: Any, x: Float[torch.Tensor, "n d_in"], band: float = L0_BAND, name: str = "the SAE"
) -> tuple[float, float]:
    """The L0 of an SAE and of its twin on tokens from which the twin's thresholds were not computed.

    Args:
        sae, twin: an SAE and what :func:`random_twin` made of it.
        x: activations of other tokens than those that ``random_twin`` was given, of all kinds of text.
        band: largest difference, as a share of the SAE's L0.
        name: name of the SAE in the error.

    Raises:
        GemmaScopeError: there are no tokens, or the two differ by more than ``band``, and by more than three standard
            errors of their difference.
    """
    if not x.shape[0]:
        raise GemmaScopeError("The L0 of a random twin is checked on other tokens than those it was made from: none.")
    x = x.to(sae.device)
    mine, its = (latents_of(one, x) for one in (sae, twin))
    difference = (its.offsets.diff() - mine.offsets.diff()).double()
    error = float(difference.std() / x.shape[0] ** 0.5) if x.shape[0] > 1 else float("inf")
    if abs(its.l0 - mine.l0) > max(band * mine.l0, 3 * error):
        raise GemmaScopeError(
            f"The random SAE beside {name} has L0 {its.l0:.2f} in place of {mine.l0:.2f} on {x.shape[0]:,} tokens that "
            f"its thresholds were not computed from; {band:.0%} is tolerated. Give more text, of which the training "
            "documents hold every kind, or a wider l0_band."
        )
    return mine.l0, its.l0


def drawn_tokens(
    counted: Bool[torch.Tensor, "rows pos"], rows: Bool[np.ndarray, " rows"], seed: int
) -> Bool[torch.Tensor, "rows pos"]:
    """Mark at most :data:`SAMPLE` counted tokens of the chosen rows, drawn at random from all of them."""
    whole = counted.cpu().numpy() & rows[:, None]
    drawn = np.random.default_rng(seed).permutation(np.flatnonzero(whole))[:SAMPLE]
    marks = np.zeros(whole.size, bool)
    marks[drawn] = True
    return torch.from_numpy(marks.reshape(whole.shape))


def sampled_activations(
    batches: Iterable[ReadBatch], place: Place, marks: Sequence[Bool[torch.Tensor, "rows pos"]]
) -> list[Float[torch.Tensor, "n d"]]:
    """The activations at the tokens of each mark, from one pass, on the CPU."""
    parts: list[list[torch.Tensor]] = [[] for _ in marks]
    for batch in batches:
        values, width = batch.activations(place), batch.tokens.shape[1]
        for mark, part in zip(marks, parts, strict=True):
            part.append(values[mark[batch.rows, :width].to(batch.counted.device)[batch.counted]].cpu())
    return [torch.cat(part) for part in parts]


def _quantiles(z: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """For each column of ``z``, a number that exactly ``count`` of its ``n`` values exceed.

    It lies near the upper end of the gap between two values, because ``(count + 1 - w) / (n + 1)`` of other values are
    expected to exceed a point at the share ``w`` of the gap: at the lower end, a thousand latents would together fire
    once too often in every ``n / 1000`` tokens. A count of 0 puts it far above all values, a count of ``n`` below them.
    """
    ordered = z.sort(dim=0, descending=True).values
    reach = ordered[:1] - ordered[-1:] + 1.0
    ordered = torch.cat([ordered[:1] + reach, ordered, ordered[-1:] - reach])
    above, below = (ordered.gather(0, at[None]).squeeze(0) for at in (count, count + 1))
    between = below + _SHARE * (above - below)
    return torch.where(count == 0, above, between)


def _wanted(sae: Any, x: torch.Tensor, frequency: str) -> torch.Tensor:
    """Number of the tokens ``x`` on which each latent of the twin is to fire, int64 ``[d_sae]``."""
    acts, d_sae = latents_of(sae, x.to(sae.device)), sae.W_dec.shape[0]
    if frequency == "matched":
        return acts.latents[acts.values != 0].bincount(minlength=d_sae).cpu()
    return torch.full((d_sae,), round(min(1.0, acts.l0 / d_sae) * x.shape[0]))

"""Comparison with Neuronpedia: our activation of a latent on the tokens of its stored examples, and the stored values.

``GET {base}/api/feature/{model}/{source}/{index}`` needs no key. Its JSON has ``activations``, a list of records with
``tokens`` (texts) and ``values`` (the latent's activation on each).
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.model.read import read_places
from gemma_scope_tl.sae.access import encode_latents
from gemma_scope_tl.sites import Place
from gemma_scope_tl.verification.diagnosis import Fault

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel
    from gemma_scope_tl.registry.schema import SAERow

ADDRESS_VARIABLE = "NEURONPEDIA_URL"
ADDRESS = "https://www.neuronpedia.org"
SECONDS = 20.0
LATENTS = 3
EXAMPLES = 2
CORRELATION = 0.9
"""Stored and own activations of a right SAE differ by the dtype of the dashboard's run: they correlate above this."""
PEAK = 0.15
"""And they differ by at most this share at the strongest stored token."""
_SPACES = {"▁": " ", "↵": "\n", "Ġ": " "}


@dataclass(frozen=True)
class Comparison:
    """The result for one SAE.

    Attributes:
        skipped: why nothing was compared; empty if something was.
        latents: for each example ``latent, stored, ours`` at the strongest stored token, and ``correlation``.
        faults: latents that differ.
    """

    skipped: str = ""
    latents: tuple[dict[str, float], ...] = ()
    faults: tuple[Fault, ...] = ()


def compare(model: GemmaModel, sae: Any, row: SAERow, fired: Sequence[int], seed: int, wanted: bool) -> Comparison:
    """Compare some latents with their dashboards.

    Args:
        model: from ``load_model``.
        sae: the SAE of ``row``.
        row: its registry row.
        fired: latents that fired on the text; :data:`LATENTS` of them are drawn.
        seed: seed of the draw.
        wanted: whether the user wants requests to be sent.
    """
    if row.neuronpedia is None:
        return Comparison("Neuronpedia has no dashboard of it")
    if row.neuronpedia_warning is not None:
        return Comparison(f"the dashboard is not comparable: {row.neuronpedia_warning}")
    if not wanted:
        return Comparison("not asked for (--neuronpedia)")
    if not fired:
        return Comparison("no latent fired")
    chosen = random.Random(seed).sample(sorted(fired), min(LATENTS, len(fired)))
    found: list[dict[str, float]] = []
    for latent in chosen:
        try:
            feature = get_feature(row.neuronpedia, latent)
            found += _compared(model, sae, row, latent, feature)
        except GemmaScopeError as error:
            if not found:
                return Comparison(str(error))
    if not found:
        return Comparison("no stored example could be converted to token ids")
    faults = tuple(
        Fault("neuronpedia", _sentence(row, one))
        for one in found
        if not (one["correlation"] >= CORRELATION and abs(one["ours"] - one["stored"]) <= PEAK * one["stored"])
    )
    return Comparison("", tuple(found), faults if 2 * len(faults) > len(found) else ())


def get_feature(source: str, latent: int) -> Mapping[str, Any]:
    """The JSON of one latent.

    Args:
        source: ``model/layer-source``, the id of a registry row.
        latent: its index.

    Raises:
        GemmaScopeError: the server cannot be reached, refuses, or answers with something else.
    """
    import httpx

    address = f"{os.environ.get(ADDRESS_VARIABLE, ADDRESS).rstrip('/')}/api/feature/{source}/{latent}"
    try:
        answer = httpx.get(address, timeout=SECONDS, follow_redirects=True, headers={"User-Agent": "gemma-scope-tl"})
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise GemmaScopeError(f"{address} cannot be reached ({type(error).__name__}: {error})") from error
    if answer.status_code != 200:
        limit = ", the limit of requests" if answer.status_code == 429 else ""
        raise GemmaScopeError(f"{address} answers with status {answer.status_code}{limit}")
    try:
        feature = json.loads(answer.content)
    except ValueError as error:
        raise GemmaScopeError(f"{address} does not answer with JSON") from error
    if not isinstance(feature, Mapping) or not isinstance(feature.get("activations"), list):
        raise GemmaScopeError(f"{address} answers without stored activations")
    return cast("Mapping[str, Any]", feature)


def token_ids(tokenizer: Any, tokens: Sequence[str]) -> list[int] | None:
    """The ids of tokens that are given as texts; None if one is not a token of the tokenizer.

    Dashboards write a token as the vocabulary does (``▁the``), or with a space for ``▁`` and ``↵`` for a line break.
    """
    known: Mapping[str, int] = tokenizer.get_vocab()
    back = {shown: own for own, shown in _SPACES.items() if own != "↵"}
    ids: list[int] = []
    for token in tokens:
        plain = token.replace("↵", "\n")
        forms = [token, plain, *(plain.replace(space, own) for space, own in (back | {" ": "▁"}).items())]
        forms.append(plain.replace(" ", "Ġ"))
        found = next((known[form] for form in forms if form in known), None)
        if found is None:
            return None
        ids.append(found)
    return ids


@torch.no_grad()
def _compared(
    model: GemmaModel, sae: Any, row: SAERow, latent: int, feature: Mapping[str, Any]
) -> list[dict[str, float]]:
    results: list[dict[str, float]] = []
    for record in feature["activations"]:
        if len(results) == EXAMPLES:
            break
        example = _example(model.tokenizer, record)
        if example is None:
            continue
        ids, stored, added = example
        place = Place(row.site, row.layer)
        x = read_places(model, torch.tensor([ids], device=model.cfg.device), [place])[place][0]
        ours = encode_latents(sae, x, [latent])[added:, 0].double().cpu()
        peak = int(stored.argmax())
        pair = torch.stack([ours, stored])[:, 1 - added :]  # without BOS
        correlation = float(torch.corrcoef(pair)[0, 1]) if pair.shape[1] > 1 else math.nan
        if not math.isfinite(correlation):
            correlation = 1.0 if torch.allclose(pair[0], pair[1], rtol=PEAK) else 0.0
        values = {"stored": float(stored[peak]), "ours": float(ours[peak]), "correlation": correlation}
        results.append({"latent": float(latent), **values})
    return results


def _example(tokenizer: Any, record: Any) -> tuple[list[int], torch.Tensor, int] | None:
    """Ids of an example beginning with BOS, its stored values, and whether BOS was added (1) or stored (0)."""
    tokens, values = (record.get(key) if isinstance(record, Mapping) else None for key in ("tokens", "values"))
    if not isinstance(tokens, list) or not isinstance(values, list) or len(tokens) != len(values) or len(tokens) < 2:
        return None
    ids = token_ids(tokenizer, [str(one) for one in cast("list[object]", tokens)])
    stored = torch.tensor([float(value) for value in cast("list[Any]", values)], dtype=torch.float64)
    if ids is None or not float(stored.max()) > 0:
        return None
    added = int(ids[0] != tokenizer.bos_token_id)
    return ([tokenizer.bos_token_id] if added else []) + ids, stored, added


def _sentence(row: SAERow, one: Mapping[str, float]) -> str:
    return (
        f"{row.id}: latent {int(one['latent'])} is {one['ours']:.3g} at the strongest token of a stored example, where "
        f"Neuronpedia ({row.neuronpedia}) has {one['stored']:.3g}; the correlation over the tokens is "
        f"{one['correlation']:.2f}."
    )

"""Explanations of latents by a language model, and scores of how well they predict where the latents fire.

The methods follow Bills et al. (Language models can explain neurons in language models, 2023) and EleutherAI's delphi
(Automatically interpreting millions of features in large language models, arXiv 2410.13928). The prompts are this
package's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gemma_scope_tl.counts import checked_count
from gemma_scope_tl.evals.metrics import Bootstrap
from gemma_scope_tl.interp.client import Answerer, Prompt
from gemma_scope_tl.interp.examples import Example, Examples
from gemma_scope_tl.sae.arguments import as_indices

if TYPE_CHECKING:
    import pandas as pd

MARKED = 0.3
"""Tokens are marked if their activation is at least this share of the example's largest."""
INSTRUCTIONS = (
    "A unit inside a language model becomes active on some pieces of text. You are given excerpts on which it is most "
    "active; the tokens on which it is active are marked <<like this>>. Find what the marked tokens, or what leads up "
    "to them, have in common. Answer with one short phrase and nothing else: no quotation of the excerpts, no list. "
    "Begin it with EXPLANATION:"
)
HIGHEST = 10
"""The largest activation that a simulation predicts."""
DETECTION = (
    "A unit inside a language model becomes active on text that fits a description. You are given the description and "
    "some numbered excerpts. For each excerpt in turn say 1 if it holds what is described, 0 if it does not. Answer "
    "with a JSON list of as many numbers as there are excerpts, such as [1, 0, 0], and nothing else."
)
SIMULATION = (
    "A unit inside a language model becomes active on text that fits a description. You are given the description and "
    "an excerpt as a JSON list of tokens. Predict how active the unit is on each token, as an integer from 0 (not at "
    f"all) to {HIGHEST}. Most tokens are 0. Answer with a JSON list of as many integers as there are tokens, and "
    "nothing else."
)


def explain(client: Answerer, examples: Examples, latents: Iterable[int] | None = None) -> pd.DataFrame:
    """Ask a language model for an explanation of each latent that fired, given its strongest examples.

    Args:
        client: the language model.
        examples: examples of one SAE, from :func:`~gemma_scope_tl.interp.top_examples`.
        latents: indices of latents; None for all.

    Returns:
        A row per latent that fired: ``release, id, site, layer, latent, explanation``.
    """
    import pandas as pd

    chosen = as_indices(examples.latents if latents is None else latents)
    shown = {latent: examples.of(latent, "top") for latent in chosen}
    shown = {latent: found for latent, found in shown.items() if found}
    answers = client.answers([explanation_prompt(found) for found in shown.values()])
    names = examples.sae_columns
    columns = [*names, "latent", "explanation"]
    rows = [{**names, "latent": i, "explanation": parsed(answer)} for i, answer in zip(shown, answers, strict=True)]
    return pd.DataFrame(rows, columns=pd.Index(columns))


def detection_scores(
    client: Answerer,
    examples: Examples,
    explanations: Mapping[int, str],
    shown: int = 5,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Balanced accuracy of predicting from an explanation in which texts a latent fires: 0.5 is chance, 1 is perfect.

    Args:
        client: the language model.
        examples: examples of the SAE.
        explanations: explanation of each latent, by index.
        shown: number of texts in a prompt, firing and silent ones mixed in an order drawn from ``seed`` and the latent.
        confidence, resamples, seed: parameters of the confidence intervals.

    Returns:
        A row per latent: ``release, id, site, layer, latent, explanation, detection, detection_low, detection_high,
        sensitivity`` (share of firing texts that are found), ``specificity`` (share of silent texts that are rejected),
        ``detection_examples, detection_unread`` (texts without a readable answer). Scores are NaN where firing or
        silent texts are missing: a latent has no quantiles if it fires in only a few more windows than its strongest
        examples.

    Raises:
        GemmaScopeError: ``shown`` is below 1.
    """
    import pandas as pd

    shown = checked_count(shown, "shown")
    parts: list[tuple[int, list[Example]]] = []
    for latent in explanations:
        mixed = examples.of(latent, "quantile", "silent")
        np.random.default_rng([seed, latent]).shuffle(mixed)  # pyright: ignore[reportArgumentType]
        parts += [(latent, mixed[at : at + shown]) for at in range(0, len(mixed), shown)]
    prompts = [detection_prompt(explanations[latent], part) for latent, part in parts]
    said: dict[int, list[tuple[bool, bool]]] = {latent: [] for latent in explanations}
    unread = dict.fromkeys(explanations, 0)
    for (latent, part), answer in zip(parts, client.answers(prompts), strict=True):
        found = numbers(answer, len(part), 1)
        if found is None:
            unread[latent] += len(part)
        else:
            said[latent] += [(e.kind != "silent", n > 0) for e, n in zip(part, found, strict=True)]
    rows = [
        {
            **examples.sae_columns,
            "latent": latent,
            "explanation": explanation,
            **_detection(said[latent], confidence, resamples, seed),
            "detection_unread": unread[latent],
        }
        for latent, explanation in explanations.items()
    ]
    return pd.DataFrame(rows)


def _detection(pairs: Sequence[tuple[bool, bool]], confidence: float, resamples: int, seed: int) -> dict[str, float]:
    """The scores of one latent from pairs: whether it fires in a text, and whether the answer says that it does."""
    fires, said = np.asarray(pairs, bool).reshape(-1, 2).T
    right = fires == said
    sums = [torch.from_numpy(part.astype(float)) for part in (fires & right, fires, ~fires & right, ~fires)]
    totals = [float(part.sum()) for part in sums]
    low, high = Bootstrap(len(fires), resamples, confidence, seed).interval(balanced_accuracy, *sums)
    return {
        "detection": float(balanced_accuracy(*totals)),
        "detection_low": low,
        "detection_high": high,
        "sensitivity": totals[0] / totals[1] if totals[1] else np.nan,
        "specificity": totals[2] / totals[3] if totals[3] else np.nan,
        "detection_examples": len(fires),
    }


def simulation_scores(
    client: Answerer,
    examples: Examples,
    explanations: Mapping[int, str],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Correlation of simulated with true activations: 0 is chance, 1 is a perfect simulation up to scale.

    Args:
        client, examples, explanations, confidence, resamples, seed: as for :func:`detection_scores`.

    Returns:
        A row per latent: ``release, id, site, layer, latent, explanation, simulation, simulation_low, simulation_high,
        simulation_examples, simulation_unread, simulation_constant``. Scores are NaN where all predictions, or all
        activations, are equal; ``simulation_constant`` is True where the predictions are equal and the activations are
        not, which predicts no better than chance.
    """
    import pandas as pd

    parts = [(latent, one) for latent in explanations for one in examples.of(latent, "quantile", "silent")]
    answers = client.answers([simulation_prompt(explanations[latent], one) for latent, one in parts])
    sums: dict[int, list[list[float]]] = {latent: [] for latent in explanations}
    unread = dict.fromkeys(explanations, 0)
    for (latent, one), answer in zip(parts, answers, strict=True):
        found = numbers(answer, len(one.tokens), HIGHEST)
        if found is None:
            unread[latent] += 1
            continue
        x, y = np.asarray(found), one.values.astype(np.float64)
        sums[latent].append([float(s) for s in (len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y)])
    rows: list[dict[str, Any]] = []
    for latent, explanation in explanations.items():
        table = torch.tensor(sums[latent], dtype=torch.float64).reshape(-1, 6)
        bounds = Bootstrap(len(table), resamples, confidence, seed).interval(correlation, *table.T)
        n, x, y, xx, yy, _ = table.sum(0).tolist()
        rows.append(
            {
                **examples.sae_columns,
                "latent": latent,
                "explanation": explanation,
                "simulation": float(correlation(*table.sum(0).numpy())),
                "simulation_low": bounds[0],
                "simulation_high": bounds[1],
                "simulation_examples": len(table),
                "simulation_unread": unread[latent],
                "simulation_constant": n * xx <= x * x and n * yy > y * y,
            }
        )
    return pd.DataFrame(rows)


def explanation_prompt(examples: Sequence[Example]) -> Prompt:
    """The prompt that asks for an explanation of a latent."""
    listed = [f"Excerpt {number}: {marked(example)!r}" for number, example in enumerate(examples, 1)]
    return Prompt(INSTRUCTIONS, "\n".join(listed))


def marked(example: Example) -> str:
    """The example's text with each run of active tokens between ``<<`` and ``>>``."""
    limit = MARKED * example.activation
    parts: list[str] = []
    inside = False
    for token, value in zip(example.tokens, example.values.tolist(), strict=True):
        active = value > 0 and value >= limit
        if active != inside:
            parts.append("<<" if active else ">>")
            inside = active
        parts.append(token)
    return "".join(parts) + (">>" if inside else "")


def parsed(answer: str) -> str:
    """The explanation in an answer: what follows the last ``EXPLANATION:``, or all of it, on one line."""
    text = re.split(r"explanation\s*:", answer, flags=re.IGNORECASE)[-1]
    return " ".join(text.split()).strip("*\"' ")


def detection_prompt(explanation: str, examples: Sequence[Example]) -> Prompt:
    """The prompt that asks whether texts fit an explanation."""
    listed = [f"Excerpt {number}: {example.text!r}" for number, example in enumerate(examples, 1)]
    return Prompt(DETECTION, "\n".join([f"Description: {explanation}", *listed]))


def simulation_prompt(explanation: str, example: Example) -> Prompt:
    """The prompt that asks how active the latent is on each token of a text."""
    tokens = json.dumps(list(example.tokens), ensure_ascii=False)
    return Prompt(SIMULATION, f"Description: {explanation}\nTokens ({len(example.tokens)}): {tokens}")


def numbers(answer: str, count: int, highest: int) -> list[float] | None:
    """The last JSON list of ``count`` numbers from 0 to ``highest`` in an answer, or None.

    >>> numbers("The answer: [1, 0, true]", 3, 1)
    [1.0, 0.0, 1.0]
    >>> numbers("[1, 0]", 3, 1) is None
    True
    """
    for text in reversed(re.findall(r"\[[^\[\]]*\]", answer)):
        try:
            found: Any = json.loads(text)
            values = [float(value) for value in found]
        except (ValueError, TypeError):
            continue
        if len(values) == count and all(0 <= value <= highest for value in values):
            return values
    return None


def balanced_accuracy(found: Any, firing: Any, left: Any, silent: Any) -> Any:
    """The mean of sensitivity and specificity, from counts; NaN if there are no firing or no silent texts."""
    with np.errstate(all="ignore"):
        return (np.divide(found, firing) + np.divide(left, silent)) / 2


def correlation(n: Any, x: Any, y: Any, xx: Any, yy: Any, xy: Any) -> Any:
    """Pearson's correlation from sums over tokens; NaN if one variable is constant."""
    with np.errstate(all="ignore"):
        spread = (n * xx - x * x) * (n * yy - y * y)
        return np.where(spread > 0, (n * xy - x * y) / np.sqrt(np.maximum(spread, 0)), np.nan)

"""Explanations of latents by a language model that is shown where they fire most.

After Bills et al. (Language models can explain neurons in language models, 2023) and EleutherAI's delphi (Automatically
interpreting millions of features in large language models, arXiv 2410.13928); the words of the prompts are our own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.inputs import as_indices
from gemma_scope_tl.interp.client import Answerer, Prompt
from gemma_scope_tl.interp.examples import Example, Examples

if TYPE_CHECKING:
    import pandas as pd

MARKED = 0.3
"""Tokens with this part of an example's largest activation or more are marked."""
INSTRUCTIONS = (
    "A unit inside a language model becomes active on some pieces of text. You are given excerpts on which it is most "
    "active; the tokens on which it is active are marked <<like this>>. Find what the marked tokens, or what leads up "
    "to them, have in common. Answer with one short phrase and nothing else: no quotation of the excerpts, no list. "
    "Begin it with EXPLANATION:"
)


def explain(client: Answerer, examples: Examples, latents: Iterable[int] | None = None) -> pd.DataFrame:
    """Ask for an explanation of each latent that fired, shown its strongest examples.

    Args:
        client: answers the prompts.
        examples: of one SAE, from :func:`~gemma_scope_tl.interp.top_examples`.
        latents: which ones; None for all.

    Returns:
        A row per latent that fired: ``release, id, site, layer, latent, explanation``.
    """
    import pandas as pd

    chosen = as_indices(examples.latents if latents is None else latents)
    shown = {latent: examples.of(latent, "top") for latent in chosen}
    shown = {latent: found for latent, found in shown.items() if found}
    answers = client.answers([explanation_prompt(found) for found in shown.values()])
    names = subject_columns(examples)
    columns = [*names, "latent", "explanation"]
    rows = [{**names, "latent": i, "explanation": parsed(answer)} for i, answer in zip(shown, answers, strict=True)]
    return pd.DataFrame(rows, columns=pd.Index(columns))


def explanation_prompt(examples: Sequence[Example]) -> Prompt:
    """What is asked about a latent."""
    listed = [f"Excerpt {number}: {marked(example)!r}" for number, example in enumerate(examples, 1)]
    return Prompt(INSTRUCTIONS, "\n".join(listed))


def marked(example: Example) -> str:
    """The example's text with the active tokens marked; neighbours share their marks."""
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


def subject_columns(examples: Examples) -> dict[str, Any]:
    """What says which SAE a row is about."""
    subject = examples.subject
    place = subject.place
    return {"release": subject.release, "id": subject.id, "site": place.site, "layer": place.layer}

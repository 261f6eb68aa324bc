"""The metrics of SAEs on texts of different kinds (section 4.6)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.evals.suite import evaluate
from gemma_scope_tl.text.batch import Text, TokenBatch
from gemma_scope_tl.text.documents import read_texts
from gemma_scope_tl.text.rows import given_rows

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel

PILE = "ArmelR/the-pile-splitted"
"""A version of the Pile with a configuration for each subset, so that each can be streamed by itself."""
PILE_SUBSETS: Mapping[str, str] = {
    "wikipedia_en": "Wikipedia (en)",
    "europarl": "EuroParl",
    "openwebtext2": "OpenWebText2",
    "arxiv": "ArXiv",
    "freelaw": "FreeLaw",
    "hackernews": "HackerNews",
    "dm_mathematics": "DM Mathematics",
    "github": "Github",
}
"""The paper's subsets, and their names in the data set."""


def by_domain(
    model: GemmaModel,
    saes: Any,
    domains: Mapping[str, Text],
    rows: int | None = None,
    context: int = 256,
    **options: Any,
) -> pd.DataFrame:
    """The metrics on each domain of a text by itself (section 4.6); FVU uses the mean of the domain.

    Args:
        model, saes: as :func:`~gemma_scope_tl.evals.suite.evaluate` takes them.
        domains: texts or token ids of each domain, as :func:`labelled_texts` and :func:`pile_texts` return them. Texts
            are read one by one, only as many as are needed.
        rows: maximum number of rows of each domain. Intervals are comparable if all domains have this number.
        context: number of tokens in a row.
        options: other arguments of ``evaluate``.

    Returns:
        A row per domain and SAE: ``domain``, then the columns of ``evaluate``.

    Raises:
        GemmaScopeError: there are no domains, or a domain has less text than one row.
    """
    import pandas as pd

    if not domains:
        raise GemmaScopeError("No domain was given.")
    packed = {name: _tokens(model, name, data, rows, context) for name, data in domains.items()}
    frames: list[pd.DataFrame] = []
    for name, tokens in packed.items():
        table = evaluate(model, saes, tokens, by_position=False, **options)
        table.insert(0, "domain", name)
        frames.append(table)
    return pd.concat(frames, ignore_index=True)


def labelled_texts(
    source: str | PathLike[str] | None = None, column: str = "text", label: str = "domain", split: str = "train"
) -> dict[str, list[str]]:
    """All texts of a file or data set by label, in the order of first appearance.

    Args:
        source, split: as for :func:`~gemma_scope_tl.text.documents.read_texts`; None for the bundled held-out text.
        column: name of the column with the text.
        label: name of the column with the kind of text.

    Raises:
        UnknownNameError: a column does not exist.
    """
    found: dict[str, list[str]] = {}
    for name, text in zip(read_texts(source, label, split), read_texts(source, column, split), strict=True):
        found.setdefault(name, []).append(text)
    return found


def pile_texts(
    names: Iterable[str] = tuple(PILE_SUBSETS), source: str = PILE, column: str = "text", split: str = "test"
) -> dict[str, Iterator[str]]:
    """Subsets of the Pile, which are streamed while they are read.

    Args:
        names: keys of :data:`PILE_SUBSETS`.
        source: a data set, or a folder, with the subsets as configurations.
        column, split: the column and the split with the text.

    Raises:
        UnknownNameError: a name is not in the table.
    """
    chosen = list(names)
    for name in chosen:
        if name not in PILE_SUBSETS:
            raise unknown_name("subset of the Pile", name, PILE_SUBSETS)
    return {name: read_texts(f"{source}:{PILE_SUBSETS[name]}", column, split) for name in chosen}


def _tokens(model: GemmaModel, name: str, data: Text, rows: int | None, context: int) -> TokenBatch:
    try:
        return given_rows(model, data, context, limit=rows)
    except GemmaScopeError as error:
        raise GemmaScopeError(f"Domain {name!r}: {error}") from error

"""The keywords that all ways of splicing share: one error term under two names, and none that is swallowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from gemma_scope_tl.attached import SpliceOptions
from gemma_scope_tl.errors import KeywordError, unknown_keyword

OPTIONS = ("error_term", "use_error_term", "exclude_special_tokens", "positions", "chain")
OWN = ("saes", "reset_saes_end", *OPTIONS)


def one_error_term(function: str, error_term: bool | None, use_error_term: bool | None) -> bool | None:
    """The one option that has two names, SAELens's being ``use_error_term``.

    Raises:
        KeywordError: a ``TypeError``, when both are given and differ.
    """
    if error_term is not None and use_error_term is not None and bool(error_term) != bool(use_error_term):
        raise KeywordError(
            f"{function}() got error_term={error_term!r} and use_error_term={use_error_term!r}, which are two names of "
            "one option: give one."
        )
    return use_error_term if error_term is None else error_term


def refuse_unknown(function: str, unknown: Mapping[str, Any], others: Iterable[str]) -> None:
    """Raise :class:`UnknownKeywordError` for what is left over; ``others`` are keywords besides :data:`OPTIONS`."""
    for name in unknown:
        raise unknown_keyword(function, name, (*others, *OPTIONS))


def taken_options(function: str, keywords: dict[str, Any]) -> SpliceOptions:
    """The options of a splice, taken out of ``keywords``.

    Raises:
        KeywordError: as :func:`one_error_term`; for a keyword that is one of these but for a letter. Others are for
            the pass to judge.
    """
    for name in keywords.keys() - {"position_ids"}:  # Hugging Face's, and near to one of these
        if name not in OPTIONS and difflib.get_close_matches(name, OWN, n=1, cutoff=0.8):
            raise unknown_keyword(function, name, OWN)
    given = {name: keywords.pop(name) for name in OPTIONS if name in keywords}
    term = one_error_term(function, given.pop("error_term", None), given.pop("use_error_term", None))
    return SpliceOptions(term, **given)

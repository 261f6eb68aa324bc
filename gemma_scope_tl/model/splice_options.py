"""The options of a splice: the keywords that ``splice`` and the methods of a model share, and their checked values."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict, TypeVar

from gemma_scope_tl.counts import checked_flag
from gemma_scope_tl.errors import KeywordError, SpliceError, unknown_keyword
from gemma_scope_tl.model.positions import Positions
from gemma_scope_tl.sae.choices import checked_positions
from gemma_scope_tl.text.tokens import ExcludeTokens, excluded_choice


class SpliceKeywords(TypedDict, total=False):
    """The keywords of a splice, all of them optional.

    The first four may also follow the SAEs by position, in this order, as in SAELens.

    Attributes:
        error_term: whether to add the reconstruction error, so that the pass does not change until a latent is edited.
            None keeps the setting of the SAE.
        exclude_special_tokens: whether to skip BOS, EOS and padding (True, the default), or the token ids to skip.
        positions: the only positions to splice, counted in the text (:mod:`gemma_scope_tl.model.positions`) with
            padding and in every step of generation. None for all.
        chain: whether to read the output of an SAE that already writes there, and write after it, under hook names
            such as ``<hook>.1.hook_sae_acts_post``.
        use_error_term: SAELens's name for ``error_term``.
    """

    error_term: bool | None
    exclude_special_tokens: ExcludeTokens
    positions: Positions
    chain: bool
    use_error_term: bool | None


OPTIONS = tuple(SpliceKeywords.__annotations__)
_OF_METHODS = ("saes", "reset_saes_end", *OPTIONS)


@dataclass(frozen=True)
class SpliceOptions:
    """The checked values of :class:`SpliceKeywords`, with the defaults.

    Raises:
        SpliceError: for invalid positions or an invalid ``exclude_special_tokens``, and for an ``error_term`` or a
            ``chain`` that is no bool.
    """

    error_term: bool | None = None
    exclude_special_tokens: ExcludeTokens = True
    positions: Positions = None
    chain: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "positions", checked_positions(self.positions))
        error_term = checked_flag(self.error_term, "error_term", unset=True, error=SpliceError)
        object.__setattr__(self, "error_term", error_term)
        object.__setattr__(self, "chain", checked_flag(self.chain, "chain", error=SpliceError))
        choice = excluded_choice(self.exclude_special_tokens)  # an iterator is consumed once, for all SAEs
        object.__setattr__(self, "exclude_special_tokens", choice)

    @classmethod
    def of(
        cls,
        function: str,
        keywords: Mapping[str, Any],
        by_position: tuple[Any, ...] = (),
        others: tuple[str, ...] = (),
    ) -> SpliceOptions:
        """The options of a call that accepts no other keywords.

        Args:
            function: name of the function, for errors.
            keywords: options given by name.
            by_position: options given by position after the SAEs.
            others: further keywords of the function, for hints.

        Raises:
            UnknownKeywordError: a ``TypeError``, for another keyword.
            KeywordError: a ``TypeError``, for different values under the two names of the error term.
            TypeError: for too many values, or a value that is given twice.
        """
        for name in keywords:
            if name not in OPTIONS:
                raise unknown_keyword(function, name, (*others, *OPTIONS))
        if len(by_position) >= len(OPTIONS):
            most = len(OPTIONS) - 1
            raise TypeError(f"{function}() takes {most} options by position at most; given: {len(by_position)}.")
        given = dict(zip(OPTIONS, by_position, strict=False))
        if twice := given.keys() & keywords.keys():
            raise TypeError(f"{function}() got two values for {sorted(twice)[0]!r}.")
        given |= keywords
        first, second = (
            checked_flag(given.pop(name, None), name, unset=True, error=SpliceError)
            for name in ("error_term", "use_error_term")
        )
        if first is not None and second is not None and first != second:
            raise KeywordError(
                f"{function}() got error_term={first!r} and use_error_term={second!r}, which are two names of one "
                "option: give one."
            )
        return cls(second if first is None else first, **given)

    @classmethod
    def taken_from(cls, keywords: dict[str, Any], function: str) -> SpliceOptions:
        """Remove the options from ``keywords`` of a call whose other keywords belong to a forward pass.

        Raises:
            UnknownKeywordError: for a keyword that resembles an option. The pass checks all others.
            KeywordError: as :meth:`of`.
        """
        for name in keywords.keys() - {"position_ids"}:  # a keyword of Hugging Face that resembles "positions"
            if name not in OPTIONS and difflib.get_close_matches(name, _OF_METHODS, n=1, cutoff=0.8):
                raise unknown_keyword(function, name, _OF_METHODS)
        return cls.of(function, {name: keywords.pop(name) for name in OPTIONS if name in keywords})


F = TypeVar("F", bound=Callable[..., Any])


def shows_options(function: F) -> F:
    """Name the options of a splice in the run-time signature of ``function``, for ``help`` and notebooks.

    The options replace ``*by_position`` and ``**options``. Type checkers read :class:`SpliceKeywords` instead.
    """
    signature = inspect.signature(function)
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    own = [parameter for parameter in signature.parameters.values() if parameter.kind not in variable]
    options = [
        inspect.Parameter(
            field.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=field.default, annotation=field.type
        )
        for field in fields(SpliceOptions)
    ]
    second_name = inspect.Parameter(
        "use_error_term", inspect.Parameter.KEYWORD_ONLY, default=None, annotation="bool | None"
    )
    function.__signature__ = signature.replace(parameters=[*own, *options, second_name])  # type: ignore[attr-defined]
    return function

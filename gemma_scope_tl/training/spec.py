"""The description of one SAE to train: its place, its width and its recipe."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.registry.widths import width_label
from gemma_scope_tl.sites import Place, parse_place, target_of
from gemma_scope_tl.training.recipe import Recipe

LATER = ("skip", "init_from")
"""Fields that plain data has only where they differ from their defaults, so that it is the same as before them."""

MARKS = ("site", "layer", "width", "affine")
"""What ``init_from`` may have in braces: ``{affine}`` is ``_affine`` for skip transcoders and empty for others."""


def marks_of(text: str) -> list[str]:
    """The marks of an ``init_from``, in order. Attributes, items, conversions and formats are refused.

    >>> marks_of("runs/{site}/layer_{layer}")
    ['site', 'layer']

    Raises:
        GemmaScopeError: something else than a mark is in braces.
    """
    known = f"its marks are {', '.join(f'{{{mark}}}' for mark in MARKS)}"
    try:
        fields = [field for field in string.Formatter().parse(text) if field[1] is not None]
    except ValueError as error:
        raise GemmaScopeError(f"init_from {text!r}: {error}; {known}.") from None
    for _, name, format_spec, conversion in fields:
        if name is not None and name.isidentifier() and name not in MARKS:
            raise unknown_name("mark of init_from", name, MARKS, f"In {text!r}, {known}.")
        if name not in MARKS or format_spec or conversion:
            tail = f"{'!' + conversion if conversion else ''}{':' + format_spec if format_spec else ''}"
            raise GemmaScopeError(f"init_from {text!r}: {{{name}{tail}}} is not a mark; {known}.")
    return [str(name) for _, name, _, _ in fields]


@dataclass(frozen=True)
class SAESpec:
    """One SAE to train.

    Attributes:
        name: name of the SAE, unique in a suite, such as ``"res/layer_3/width_1k/target_l0_12"``.
        place: the place that the SAE reads; transcoders reconstruct ``target_of(place)``.
        d_sae: number of latents.
        recipe: hyper-parameters. SAEs of one place share the batch size.
        seed: seed of the initial weights.
        target_l0: the wanted L0. With the linear penalty, lambda is steered towards it. With the quadratic penalty it
            is ``L0*``, and required. None keeps lambda fixed.
        skip: whether a transcoder has a linear path from its input to its output around the latents, which is trained
            along.
        init_from: where the initial weights are read from, as a configuration's grid names it; empty for those of the
            recipe.

    Raises:
        GemmaScopeError: a value is out of range.
    """

    name: str
    place: Place
    d_sae: int
    recipe: Recipe
    seed: int
    target_l0: float | None = None
    skip: bool = False
    init_from: str = ""

    def __post_init__(self) -> None:
        if not self.name:
            raise GemmaScopeError("An SAE needs a name.")
        if self.d_sae < 1 or self.seed < 0:
            raise GemmaScopeError(f"{self.name}: d_sae must be 1 or more and seed 0 or more.")
        if self.target_l0 is not None and not (0.0 < self.target_l0 < math.inf):
            raise GemmaScopeError(f"{self.name}: target_l0 must be greater than 0, not {self.target_l0}.")
        if self.recipe.l0_penalty == "quadratic" and self.target_l0 is None:
            raise GemmaScopeError(f"{self.name}: the quadratic penalty needs a target_l0.")
        if self.skip and not self.is_transcoder:
            raise GemmaScopeError(
                f"{self.name}: only a transcoder has a skip path. With one, an SAE would copy {self.place.key}."
            )
        self.recipe.prefixes_of(self.d_sae)

    @property
    def start(self) -> str:
        """``init_from`` with its marks replaced by what the SAE has.

        Raises:
            GemmaScopeError: something else than a mark is in braces.
        """
        marks_of(self.init_from)
        layer = "" if self.place.layer is None else str(self.place.layer)
        values = (self.place.site, layer, width_label(self.d_sae), "_affine" if self.skip else "")
        return self.init_from.format(**dict(zip(MARKS, values, strict=True)))

    @property
    def starts(self) -> tuple[str]:
        """:attr:`start`, as coders over several layers have one for each layer."""
        return (self.start,)

    @property
    def folder(self) -> str:
        """The folder of a release that holds the SAE's, below the release's own."""
        return self.place.site

    @property
    def release_head(self) -> str:
        """What the SAE's path in a release begins with; its L0 follows."""
        return f"{self.place.key}/width_{width_label(self.d_sae)}/average_l0_"

    @property
    def where(self) -> dict[str, Any]:
        """What a row of metrics says of the SAE, beside its name."""
        return {"site": self.place.site, "layer": self.place.layer, "d_sae": self.d_sae}

    @property
    def is_transcoder(self) -> bool:
        """Whether the SAE reconstructs a tensor other than its input."""
        return target_of(self.place) != self.place

    def to_json(self) -> dict[str, Any]:
        """The spec as plain data, which :meth:`from_json` reads."""
        data = asdict(self) | {"place": self.place.key}
        return {key: value for key, value in data.items() if value or key not in LATER}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SAESpec:
        """Make a spec from what :meth:`to_json` returned.

        Raises:
            UnknownNameError: a key is not the name of a field.
            GemmaScopeError: a key is missing, or a value is invalid.
        """
        names = [field.name for field in fields(cls)]
        for key in data:
            if key not in names:
                raise unknown_name("key of an SAE", key, names)
        missing = [name for name in names if name not in data and name not in ("target_l0", *LATER)]
        if missing:
            raise GemmaScopeError(f"An SAE's description lacks {', '.join(missing)}.")
        read = {"place": parse_place(str(data["place"])), "recipe": Recipe.from_json(data["recipe"])}
        values: dict[str, Any] = {**data, **read}
        return cls(**values)


def check_one_place(specs: Sequence[SAESpec]) -> None:
    """Check that SAEs can be stepped together.

    Raises:
        GemmaScopeError: there are no SAEs, two have one name, or they have several places or batch sizes.
    """
    if not specs:
        raise GemmaScopeError("A place needs at least one SAE.")
    names = [spec.name for spec in specs]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise GemmaScopeError(f"Names must be unique; twice: {', '.join(double)}.")
    places = sorted({spec.place.key for spec in specs})
    if len(places) > 1:
        raise GemmaScopeError(f"SAEs that are stepped together read one place, not {', '.join(places)}.")
    sizes = sorted({spec.recipe.batch_size for spec in specs})
    if len(sizes) > 1:
        raise GemmaScopeError(f"SAEs of {places[0]} share a batch, so one batch_size, not {sizes}.")

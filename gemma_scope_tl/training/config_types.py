"""The types of a configuration's values, with their checks, and the recipe that presets and values describe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal, cast

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, StrictBool, Tag

from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError, unknown_name
from gemma_scope_tl.files import checked_path
from gemma_scope_tl.registry.widths import parse_width
from gemma_scope_tl.sites import LAYERED_SITES, get_site
from gemma_scope_tl.training.config_file import ValueAt, device_name, number
from gemma_scope_tl.training.recipe import FAST, GEMMA_SCOPE_2, PAPER, Recipe, fast
from gemma_scope_tl.training.spec import marks_of

PRESETS: Mapping[str, Recipe] = {"paper": PAPER, "fast": FAST, "gemma_scope_2": GEMMA_SCOPE_2}
WIDEST = 1 << 30
"""The largest width, a thousand times that of the widest released SAE. Larger numbers are taken for mistakes."""


def merged_recipe(values: Mapping[str, Any], d_in: int | None = None, **sae: Any) -> Recipe:
    """The recipe that ``preset`` (by default the paper's) and further values describe.

    Args:
        values: values of a recipe, as in a configuration.
        d_in: the width of the activations, for the preset ``fast``, which depends on it.
        sae: what else :func:`~gemma_scope_tl.training.recipe.fast` depends on: ``d_sae``, ``target_l0``, ``steps``.

    Raises:
        GemmaScopeError: the preset or a key is unknown, or a value is out of range.
    """
    rest = dict(values)
    preset = rest.pop("preset", "paper")
    if not isinstance(preset, str) or preset not in PRESETS:
        raise unknown_name("recipe preset", preset, PRESETS)
    recipe = fast(d_in, **sae) if preset == "fast" and d_in is not None else PRESETS[preset]
    return Recipe.from_json({**asdict(recipe), **rest})


def _width(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    try:
        return parse_width(str(value))
    except GemmaScopeError as error:
        raise ValueError(str(error)) from None


def _site(value: object) -> object:
    if str(value) in LAYERED_SITES:
        return str(value)
    try:
        return get_site(str(value)).name
    except UnknownNameError as error:
        message = str(error)
        raise ValueError(f"{message} Coders over several layers are {' and '.join(LAYERED_SITES)}.") from None


def _path(value: str) -> str:
    try:
        return str(checked_path(value))
    except GemmaScopeError as error:
        raise ValueError(str(error)) from None


def _recipe(value: object) -> object:
    """Check the values of a recipe by themselves; other values are merged into them later."""
    if not isinstance(value, Mapping):
        raise ValueError("a recipe is a mapping, such as {preset: fast, batch_size: 1024}")
    given = {str(key): _recipe_value(str(key), item) for key, item in cast("Mapping[object, object]", value).items()}
    try:
        merged_recipe(given)
    except GemmaScopeError as error:
        raise ValueError(str(error)) from None
    return given


def _recipe_value(key: str, value: object) -> object:
    """Convert numbers that are written as text, also in lists."""
    if key == "preset" and not isinstance(value, str):
        raise ValueAt(key, f"should be a word, such as fast, not {value!r}")
    if not isinstance(value, (list, tuple)):
        return _number_at(key, value)
    return [_float_at(f"{key}.{i}", item) for i, item in enumerate(cast("Sequence[object]", value))]


def _number_at(key: str, value: object) -> object:
    try:
        return number(value)
    except ValueError as error:
        raise ValueAt(key, str(error)) from None


def _float_at(key: str, value: object) -> float:
    found = _number_at(key, value)
    if not isinstance(found, (int, float)):
        raise ValueAt(key, f"should be a number, not {found!r}")
    return float(found)


def _start(value: str) -> str:
    try:
        marks_of(value)
    except GemmaScopeError as error:
        raise ValueError(str(error)) from None
    return value


def _all_or_list(value: object) -> str | None:
    if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)):
        return "list"
    return "word" if value == "all" else None


def _one_or_list(value: object) -> str | None:
    if isinstance(value, list):
        return "list"
    return "word" if isinstance(value, bool) else None


Count = Annotated[int, BeforeValidator(number), Field(gt=0)]
Positive = Annotated[float, BeforeValidator(number), Field(gt=0, allow_inf_nan=False)]
Layer = Annotated[int, BeforeValidator(number), Field(ge=0)]
DeviceName = Annotated[str, BeforeValidator(device_name)]
Layers = Annotated[
    Annotated[Literal["all"], Tag("word")] | Annotated[list[Layer], Tag("list")],
    Discriminator(_all_or_list, "layers", "should be 'all' or a list, such as [1, 2]"),
]
Skip = Annotated[
    Annotated[StrictBool, Tag("word")] | Annotated[list[StrictBool], Field(min_length=1), Tag("list")],
    Discriminator(_one_or_list, "skip", "should be true, false or [false, true]"),
]
Width = Annotated[int, BeforeValidator(_width), Field(gt=0, le=WIDEST)]
SiteKey = Annotated[str, BeforeValidator(_site)]
RecipeValues = Annotated[dict[str, Any], BeforeValidator(_recipe)]
FolderPath = Annotated[str, AfterValidator(_path)]
Start = Annotated[str, Field(min_length=1), AfterValidator(_start)]
"""What ``init_from`` names."""

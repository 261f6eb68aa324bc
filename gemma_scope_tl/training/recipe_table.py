"""The recipes of the SAEs of a run as a table: those that a configuration gives, and those that a run used.

A configuration names a preset, and the preset ``fast`` follows each SAE's place, width and target L0 and the length of
its training. So the values of a run are known only per SAE: ``SuiteConfig.recipes`` has those without this adaptation.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.files import checked_path
from gemma_scope_tl.model.sizes import family_and_sizes
from gemma_scope_tl.training.checkpoint import RECIPE, SUITE_NAME, read_record
from gemma_scope_tl.training.config import SuiteConfig, TrainingStateError, load_config
from gemma_scope_tl.training.grid import groups_of

if TYPE_CHECKING:
    import pandas as pd


def planned_recipes(
    config: str | Path | Mapping[str, Any] | SuiteConfig, overrides: Sequence[str] = ()
) -> pd.DataFrame:
    """The recipe that each SAE of a configuration will be trained with.

    Args:
        config, overrides: as for :func:`~gemma_scope_tl.train_suite`.

    Returns:
        A row for each SAE, by its name: ``steps``, ``target_l0``, and the values of
        :class:`~gemma_scope_tl.training.recipe.Recipe`.

    Raises:
        TrainingStateError: the configuration has problems.
    """
    checked = load_config(config, overrides)
    family, sizes = family_and_sizes(checked.model.name)
    return _table(
        {"name": spec.name, "steps": group.steps, "target_l0": spec.target_l0, **spec.to_json()["recipe"]}
        for group in groups_of(checked, sizes.dims, family)
        for spec in group.specs
    )


def trained_recipes(folder: str | Path) -> pd.DataFrame:
    """The recipe that each SAE of a finished run was trained with, from the run's own record.

    Args:
        folder: the run's ``output``.

    Returns:
        A table as of :func:`planned_recipes`. With ``target_l0``, ``l0_coefficient`` is lambda before it was adjusted.

    Raises:
        TrainingStateError: the folder has no finished run, or one of a version that did not record recipes.
    """
    path = checked_path(folder) / SUITE_NAME
    rows: list[dict[str, Any]] = read_record(path)["saes"]
    if not all(RECIPE in row for row in rows):
        raise TrainingStateError(f"{path} was written by a version that did not record recipes: see planned_recipes.")
    return _table({**{key: row[key] for key in ("name", "steps", "target_l0")}, **row[RECIPE]} for row in rows)


def _table(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame([{key: _plain(value) for key, value in row.items()} for row in rows]).set_index("name")


def _plain(value: Any) -> Any:
    """A tuple for a list, so that values are equal to those of a recipe."""
    return tuple(value) if isinstance(value, list) else value

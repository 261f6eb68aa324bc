"""Whether 16 bits are enough (section 4.7)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.suite import evaluate

if TYPE_CHECKING:
    import pandas as pd
    import torch

COMPARED = ("l0", "fvu", "delta_loss", "loss_clean")


def by_dtype(
    load: Callable[[str], tuple[Any, Any]],
    data: Sequence[str] | torch.Tensor,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    **options: Any,
) -> pd.DataFrame:
    """The metrics with model and SAEs both in each dtype (section 4.7). One dtype is in memory at a time.

    Args:
        load: from a dtype's name to the model and the SAEs (the same ones, in the same order) in that dtype.
        data: texts or token ids.
        dtypes: the first is what the others are compared with.
        options: of :func:`~gemma_scope_tl.evals.suite.evaluate`.

    Returns:
        A row per dtype and SAE: ``dtype``, the columns of ``evaluate``, and ``l0_change``, ``fvu_change``,
        ``delta_loss_change`` and ``loss_clean_change``: the difference from the first dtype.

    Raises:
        GemmaScopeError: without a dtype, or when two dtypes have other SAEs.
    """
    import pandas as pd

    if not dtypes:
        raise GemmaScopeError("No dtype was given.")
    frames: list[pd.DataFrame] = []
    for dtype in dtypes:
        model, saes = load(dtype)
        table = evaluate(model, saes, data, by_position=False, **options)
        del model, saes
        table.insert(0, "dtype", dtype)
        first = frames[0] if frames else table
        names = ["release", "id", "site", "layer", "d_sae"]
        if not table[names].equals(first[names]):
            raise GemmaScopeError(f"The SAEs in {dtype} are not those in {dtypes[0]}, or are in another order.")
        for metric in COMPARED:
            table[f"{metric}_change"] = table[metric] - first[metric]
        frames.append(table)
    return pd.concat(frames, ignore_index=True)

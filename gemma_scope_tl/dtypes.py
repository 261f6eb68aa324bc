"""Floating dtypes by name, one spelling for the whole package."""

from __future__ import annotations

import torch

from gemma_scope_tl.errors import unknown_name

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """``"float32"``, ``"bfloat16"``, ``"float16"``, their short forms (``"bf16"``), or a torch dtype.

    Raises:
        UnknownNameError: for anything else.
    """
    if isinstance(dtype, torch.dtype):
        if dtype in DTYPES.values():
            return dtype
        raise unknown_name("dtype", dtype, DTYPES)
    name = dtype.removeprefix("torch.")
    try:
        return DTYPES[_SHORT.get(name, name)]
    except KeyError:
        raise unknown_name("dtype", dtype, [*DTYPES, *_SHORT]) from None

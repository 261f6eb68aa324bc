"""Floating dtypes and devices by name, one spelling for the whole package."""

from __future__ import annotations

from typing import Any

import torch

from gemma_scope_tl.errors import DeviceError, unknown_name

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
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) else None  # pyright: ignore[reportUnnecessaryIsInstance]
    found = DTYPES.get(_SHORT.get(name, name)) if name is not None else None
    if found is None:
        raise unknown_name("dtype", dtype, [*DTYPES, *_SHORT])
    return found


def available_devices() -> list[str]:
    """The devices that tensors can be on here: ``"cpu"``, and every accelerator (``"cuda:0"``, ``"mps"``)."""
    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return ["cpu"]
    return ["cpu", *(f"{kind.type}:{index}" for index in range(torch.accelerator.device_count()))]


def parse_device(device: str | int | torch.device | None) -> torch.device:
    """A device that exists here, checked before anything is read or computed.

    Args:
        device: ``"cpu"``, ``"cuda"`` (the current one), ``"cuda:1"``, ``"mps"``, a number as torch counts
            accelerators, or a torch device; None stands for CUDA where there is one, else for the CPU. ``"meta"``
            (shapes without values) passes.

    Raises:
        DeviceError: naming the devices that are available, for a device that does not exist, here or at all.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if isinstance(device, bool):
            raise TypeError
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        raise _no_device(device, "no device of torch") from None
    if (parsed.index or 0) >= _count(parsed):
        raise _no_device(device, "not available here")
    return torch.device("cpu") if parsed.type == "cpu" else parsed  # tensors call "cpu:0" just "cpu"


def _count(device: torch.device) -> int:
    """How many devices of this kind there are."""
    if device.type in ("cpu", "meta"):
        return 1
    try:
        module: Any = torch.get_device_module(device)
        return int(module.device_count()) if module.is_available() else 0
    except (RuntimeError, AttributeError):  # this build of torch does not know the kind
        return 0


def _no_device(device: object, why: str) -> DeviceError:
    return DeviceError(f"Device {str(device)!r} is {why}. Available: {', '.join(available_devices())}.")

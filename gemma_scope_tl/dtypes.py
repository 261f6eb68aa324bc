"""Lookup of floating dtypes and devices by name, with one spelling in the whole package.

The names are known without torch, which is imported only when a dtype or a device is looked up: the command line
checks names first, and importing torch takes seconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gemma_scope_tl.errors import DeviceError, unknown_name

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16", "float64")
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}


def parse_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The torch dtype of a name: ``"float32"``, ``"bfloat16"``, ``"float16"``, or a short form such as ``"bf16"``.

    Raises:
        UnknownNameError: for anything else.
    """
    import torch

    named = isinstance(dtype, (str, torch.dtype))  # pyright: ignore[reportUnnecessaryIsInstance]
    name = str(dtype).removeprefix("torch.") if named else ""
    full = SHORT_DTYPES.get(name, name)
    if full not in DTYPES:
        raise unknown_name("dtype", dtype, [*DTYPES, *SHORT_DTYPES])
    return getattr(torch, full)


def available_devices() -> list[str]:
    """The devices that tensors can be on here: ``"cpu"``, and every accelerator (``"cuda:0"``, ``"mps"``)."""
    import torch

    kind = torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return ["cpu"]
    return ["cpu", *(f"{kind.type}:{index}" for index in range(torch.accelerator.device_count()))]


def parse_device(device: str | int | torch.device | None) -> torch.device:
    """The torch device for a name or number, checked to exist on this machine.

    Args:
        device: ``"cpu"``, ``"cuda"`` (the current one), ``"cuda:1"``, ``"mps"``, a number as torch counts
            accelerators, or a torch device. None means CUDA if it is available and the CPU otherwise. ``"meta"``
            (shapes without values) is accepted.

    Raises:
        DeviceError: for a device that is unknown or not on this machine; names the available devices.
    """
    import torch

    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if isinstance(device, bool):
            raise TypeError
        parsed = torch.device(device)
    except (RuntimeError, TypeError):
        raise _no_device(device, "not a torch device") from None
    if (parsed.index or 0) >= _count(parsed):
        raise _no_device(device, "not available here")
    return torch.device("cpu") if parsed.type == "cpu" else parsed  # a tensor on "cpu:0" reports "cpu"


def _count(device: torch.device) -> int:
    """Number of devices of this kind."""
    if device.type in ("cpu", "meta"):
        return 1
    import torch

    try:
        module: Any = torch.get_device_module(device)
        return int(module.device_count()) if module.is_available() else 0
    except (RuntimeError, AttributeError):  # this build of torch lacks the kind of device
        return 0


def _no_device(device: object, why: str) -> DeviceError:
    return DeviceError(f"Device {str(device)!r} is {why}. Available: {', '.join(available_devices())}.")

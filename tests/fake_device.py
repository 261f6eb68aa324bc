"""A second device on a machine that has none: tensors that say they are elsewhere, and mind whom they meet.

A tensor "on" the device holds its numbers on the CPU, and computes only with its like: an operation on tensors of both
kinds raises as it would between a processor and a GPU, but for numbers (tensors of no dimensions).
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("ipu", 0)  # a type that torch knows and starts nothing for


MOVES = (torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten.to)


class Elsewhere(torch.Tensor):
    """A tensor on the device."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, held.size(), strides=held.stride(), dtype=held.dtype, device="meta", requires_grad=held.requires_grad
        )
        made.held = held.detach()
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Elsewhere({self.held!r})"

    def __deepcopy__(self, memo: Any) -> Any:
        made = type(self)(self.held.clone())
        return torch.nn.Parameter(made, self.requires_grad) if isinstance(self, torch.nn.Parameter) else made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})


def tree_map(change: Callable[[Any], Any], value: Any) -> Any:
    """As torch's own, for tuples, lists and dicts alone: it runs several times in every operation."""
    kind = type(value)
    if kind is tuple or kind is list:
        return kind([tree_map(change, one) for one in value])
    return {key: tree_map(change, one) for key, one in value.items()} if kind is dict else change(value)


def leaves(value: Any) -> list[Any]:
    found: list[Any] = []
    tree_map(found.append, value)
    return found


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation, on the device if it belongs there."""
    given = leaves((args, kwargs))
    flat = [one for one in given if isinstance(one, torch.Tensor)]
    there = [one for one in flat if isinstance(one, Elsewhere)]
    wanted = next((one for one in given if isinstance(one, torch.device)), None)
    if there and func.overloadpacket not in MOVES:
        here = [one for one in flat if not isinstance(one, Elsewhere) and one.ndim]
        indices = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
        if here and not (indices and isinstance(args[0], Elsewhere)):  # CUDA takes indices from the CPU too
            raise RuntimeError(f"Expected all tensors to be on the same device, but found {DEVICE} and cpu: {func}")
    if wanted is not None and wanted.type == "meta" and (there or not flat):
        wanted = DEVICE  # where torch itself believes these tensors to be
    to_there = bool(there)
    if wanted is not None:
        to_there = wanted.type == DEVICE.type
        args, kwargs = tree_map(_on_cpu, (args, kwargs))
    kwargs.pop("pin_memory", None)
    out = func(*tree_map(_held, args), **tree_map(_held, kwargs))
    if func._schema.is_mutable and not wanted:  # what was written into is given back itself
        named = dict(zip((one.name for one in func._schema.arguments), args, strict=False)) | kwargs
        written = [named[one.name] for one in func._schema.arguments if one.alias_info and one.alias_info.is_write]
        return written[0] if len(written) == 1 else tuple(written)
    return tree_map(_there if to_there else lambda one: one, out)


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _with_number(value: Any) -> Any:
    """``"ipu"`` is ``"ipu:0"``, as ``"cuda"`` is ``"cuda:0"``."""
    return DEVICE if isinstance(value, (str, torch.device)) and str(value) == DEVICE.type else value


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Elsewhere) else value


def _there(value: Any) -> Any:
    plain = isinstance(value, torch.Tensor) and not isinstance(value, Elsewhere)
    return Elsewhere(value) if plain else value


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, dict(kwargs or {}))


def _index(value: Any) -> Any:
    """Indices as tensors on the device: left to torch, they would go where it believes the indexed tensor to be."""
    return _there(torch.tensor(value)) if isinstance(value, list) else _there(value)


class _Functions(TorchFunctionMode):
    """What never reaches the other mode: ``torch.tensor`` and ``torch.as_tensor`` make a tensor and then move it, and
    lists in indices become tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is not torch.device:
            args, kwargs = tree_map(_with_number, (args, kwargs))
        device = kwargs.get("device")
        if func in (torch.tensor, torch.as_tensor) and device is not None and torch.device(device) == DEVICE:
            given = args[0]
            made = given if isinstance(given, torch.Tensor) else func(*args, **{**kwargs, "device": "cpu"})
            return made.to(DEVICE, dtype=kwargs.get("dtype"))
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Elsewhere):
            given = args[1] if isinstance(args[1], tuple) else (args[1],)
            args = (args[0], tuple(map(_index, given)), *args[2:])
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
            args = (args[0], args[1].device, args[1].dtype, *args[2:])
        if func is torch.Tensor.tolist:
            return _held(args[0]).tolist()
        return func(*args, **kwargs)


@contextmanager
def fake_device() -> Generator[torch.device]:
    """Within the block the device exists."""
    with _Functions(), _Mode():
        yield DEVICE

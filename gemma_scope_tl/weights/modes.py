"""Making tensors that are the same whatever mode the caller of a function is in."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def ordinary_tensors() -> Generator[None]:
    """Within the context, and in functions decorated with it, tensors are made as outside of all modes.

    A tensor made under ``torch.inference_mode()`` could neither be filled by another thread nor be trained later;
    ``with torch.device(...)`` and ``torch.set_default_device`` would move what is made without a device, and
    ``torch.autocast`` would round the products that fold biases. Nothing is recorded for autograd.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch.get_default_device().type != "cpu":  # such a context costs every call in it some microseconds
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def float32_by_default() -> Generator[None]:
    """Within the context, ``torch.get_default_dtype()`` is float32, whatever the caller set.

    For other libraries' code, which makes tensors without a dtype; the default is the whole process's, so it is touched
    only where it is another.
    """
    before = torch.get_default_dtype()
    if before == torch.float32:
        yield
        return
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@ordinary_tensors()
def make_ordinary(module: torch.nn.Module) -> None:
    """Replace, in place, the parameters and buffers of ``module`` that were made under ``torch.inference_mode()``.

    They could be used in no pass that records gradients. Those that are shared, as tied embeddings are, stay shared.
    """
    made: dict[int, torch.Tensor] = {}
    for each in module.modules():
        parameters = list(each.named_parameters(recurse=False, remove_duplicate=False))
        for name, tensor in [*parameters, *each.named_buffers(recurse=False, remove_duplicate=False)]:
            if not tensor.is_inference():
                continue
            if id(tensor) not in made:
                copy = tensor.detach().clone()
                is_parameter = isinstance(tensor, torch.nn.Parameter)
                made[id(tensor)] = torch.nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
            setattr(each, name, made[id(tensor)])


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch, or the system, had no room for a tensor."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = str(error)  # for a processor's memory torch has no class of its own
    return isinstance(error, RuntimeError) and ("allocate memory" in said or "out of memory" in said)

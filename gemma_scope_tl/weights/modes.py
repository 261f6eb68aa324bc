"""Creation of tensors independently of the PyTorch modes that the caller has set."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def ordinary_tensors() -> Generator[None]:
    """Create tensors as outside of all modes, in a context or a decorated function.

    A tensor made under ``torch.inference_mode()`` could neither be filled by another thread nor be trained later.
    ``with torch.device(...)`` and ``torch.set_default_device`` would move tensors that are made without a device, and
    ``torch.autocast`` would round the products that fold biases. Autograd records nothing.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        if torch.get_default_device().type != "cpu":  # each call within this context takes some microseconds more
            stack.enter_context(torch.device("cpu"))
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def float32_by_default() -> Generator[None]:
    """Set the default dtype of torch to float32 within the context.

    Code of other libraries needs this, because it makes tensors without a dtype. The default applies to the whole
    process, so it is changed only if it is not float32.
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

    Such tensors cannot be used in a pass that records gradients. Shared ones, such as tied embeddings, stay shared.
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
    """Whether an error means that torch or the system lacks memory for a tensor."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = str(error)  # torch has no class for a lack of CPU memory
    return isinstance(error, RuntimeError) and ("allocate memory" in said or "out of memory" in said)

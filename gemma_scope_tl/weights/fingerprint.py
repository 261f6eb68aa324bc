"""Fingerprints of weights, which identify the model or SAE behind measurements and stored activations.

There are two strengths, because existing file formats contain both. New formats should use :func:`fingerprint`.
"""

from __future__ import annotations

import hashlib

import torch

_SAMPLE = 1024  # entries of each tensor that are hashed directly
_SPARSE_SAMPLE = 64


def fingerprint(module: torch.nn.Module) -> str:
    """A hash of a module's parameters and buffers: names, dtypes, shapes, a sample of entries, and sums of all bits.

    The bits of the entries are summed as integers, by row, so the sums are exact and every entry counts. The speed is
    that of memory. The hash distinguishes weights that differ by training, editing or rounding. It does not detect
    deliberate forgery.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bits(tensor.detach()))
    return digest.hexdigest()


def sampled_fingerprint(module: torch.nn.Module) -> str:
    """A hash of about 64 entries of each parameter, which stores of activations contain.

    It distinguishes checkpoints of a training run, but not weights of which a few entries were edited. Use
    :func:`fingerprint` in new code.
    """
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        flat = parameter.detach().reshape(-1)
        some = flat[:: max(1, flat.numel() // _SPARSE_SAMPLE)][:_SPARSE_SAMPLE].to("cpu", torch.float64)
        digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
        digest.update(some.numpy().tobytes())
    return digest.hexdigest()[:32]


@torch.no_grad()
def _bits(tensor: torch.Tensor) -> bytes:
    if tensor.is_sparse or not tensor.numel():
        return repr(tensor).encode()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    by_row = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(1, -1)
    if by_row.stride(1) != 1:
        by_row = by_row.T if by_row.stride(0) == 1 else by_row.contiguous()
    bits = by_row.view(whole)
    sums = torch.cat([part.sum(1, dtype=torch.int64) for part in bits.split(4096)])
    stride = max(1, tensor.numel() // _SAMPLE)
    sample = bits.reshape(-1)[::stride] if bits.is_contiguous() else bits[:, :8].reshape(-1)
    return b"".join(part.contiguous().cpu().numpy().tobytes() for part in (sums, sample))

"""Fingerprints of weights, which identify the model or SAE behind measurements and stored activations.

There are two strengths, because existing file formats contain both. New formats should use :func:`fingerprint`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

CHUNK = 1 << 24
"""Bytes that one thread hashes at a time."""
_SPARSE_SAMPLE = 64


def fingerprint(module: torch.nn.Module) -> str:
    """A hash of a module's parameters and buffers: names, dtypes, shapes, and all bytes in the order of the indices.

    It depends on every entry and its position, and on neither device nor strides. Each of PyTorch's threads hashes
    about 2 GB in a second; weights on a GPU are copied to the host in parts of 16 MiB.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    workers = torch.get_num_threads()
    digest = hashlib.sha256()
    with ThreadPoolExecutor(workers, "fingerprint") as pool:
        for name, tensor in sorted(tensors.items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            parts = _parts(tensor.detach())
            for part in pool.map(_sha256, parts) if workers > 1 else map(_sha256, parts):
                digest.update(part)
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


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Views of a tensor, as many rows in each as a thread hashes at a time. Their cut depends on the shape alone."""
    dense = tensor if tensor.layout == torch.strided else tensor.to_dense()
    rows = dense.reshape(1) if dense.ndim == 0 else dense
    if not rows.numel():
        return iter(())
    row_bytes = rows[0].numel() * rows.element_size()
    return iter(rows.split(max(1, CHUNK // row_bytes)))


def _sha256(part: torch.Tensor) -> bytes:
    """The hash of the entries in the order of their indices. It lets other threads run meanwhile."""
    entries = part.resolve_conj().resolve_neg().contiguous().cpu()
    return hashlib.sha256(entries.reshape(-1).view(torch.uint8).numpy().data).digest()

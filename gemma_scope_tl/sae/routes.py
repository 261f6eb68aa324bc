"""Whether an SAE goes through the sparse kernels or through dense products.

Both give the same latents, and outputs that differ by rounding. The choice depends on shapes, dtypes, devices and, for
given activations, on their density; no time is measured at run time, so that repeated runs give identical bits.

The kernels are custom nodes of autograd, which PyTorch's transforms cannot look into. Where one of these is active
(``torch.compile``, ``torch.func``, forward-mode differentiation, autocast, the capture of a CUDA graph), on devices
other than processors and CUDA, and for subclasses of tensors, an SAE that is called goes through dense products.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from gemma_scope_tl.sae import sparse_ops as ops

# Multiply-adds of the decoder's product from which the kernels are faster on a processor; before, the start of their
# operations takes longer. Decoding 16 tokens of 256 x 4096 took 1.2 ms dense and 0.7 ms sparse in one thread, 64 tokens
# of 128 x 1024 0.3 and 0.7 ms.
SPARSE_FROM = 1 << 24
# With few tokens, most of a backward pass is writing the gradient of every weight, which the sparse sums do latent by
# latent: 1.3 times the dense time with 16 tokens of 2304 x 16384, 0.8 with 64 tokens, 0.63 with 64 of 256 x 4096.
GRADIENT_TOKENS = 64
# As SPARSE_FROM, on a GPU, by the bytes of a value: where an H100's times of both ways cross, if they are linear
# between the measured 512 and 8,192 tokens of 2304 x 16384 (``gpu_crossovers`` in ``benchmarks/sparse.py``). The choice
# itself has not run on a GPU.
GPU_SPARSE_FROM = {2: 4.0e10, 4: 2.9e9}
SAMPLED_ROWS = 32


def kernels_apply(*tensors: Tensor) -> bool:
    """Whether the sparse kernels can take these tensors, which are the input and the weights, at this moment."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():  # pyright: ignore[reportPrivateImportUsage]
        return False
    if torch._C._are_functorch_transforms_active():  # pyright: ignore[reportPrivateUsage]  # there is no public function
        return False
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return all(map(_is_plain, tensors))


def dense_is_faster(x: Tensor, dtype: torch.dtype, d_sae: int, d_out: int, tracked: bool) -> bool:
    """Whether dense products are faster than the kernels for the tokens of ``x [..., d]``.

    Args:
        x: input or latents, of which the shape and the device count.
        dtype: the dtype of the SAE.
        d_sae, d_out: the sizes of the decoder.
        tracked: whether a backward pass may follow.
    """
    tokens = x.numel() // max(1, x.shape[-1])
    if x.is_cuda:
        fits = tokens * d_sae * dtype.itemsize <= ops.GPU_BLOCK_BYTES  # memory never holds more of the latents
        return fits and gpu_prefers_dense(dtype, tokens * d_sae * d_out)
    return tokens * d_sae * d_out < SPARSE_FROM or (tracked and tokens < GRADIENT_TOKENS)


def gpu_prefers_dense(dtype: torch.dtype, multiply_adds: int) -> bool:
    """Whether dense products are faster on a GPU when the decoder's product takes so many multiply-adds."""
    limit = GPU_SPARSE_FROM[2 if dtype.itemsize == 2 else 4]
    if dtype == torch.float32 and _tf32():
        limit = GPU_SPARSE_FROM[2] / 2  # TF32 has half the rate of 16 bits; this is not measured
    return multiply_adds < limit


def _tf32() -> bool:
    """Whether float32 products run in TF32. Since PyTorch 2.9 the older getters raise after the newer setters."""
    matmul: Any = torch.backends.cuda.matmul
    if hasattr(torch.backends, "fp32_precision"):
        return matmul.fp32_precision == "tf32"
    return bool(matmul.allow_tf32)


def called_sparsely(sae: Any, x: Tensor) -> bool:
    """Whether ``sae(x)`` goes through the kernels."""
    weights = [sae.W_enc, sae.b_enc, sae.threshold, sae.W_dec, sae.b_dec]
    if dense_is_faster(x, sae.dtype, *sae.W_dec.shape, tracked=_tracked(x, *weights)):
        return False
    return _callable_on(x) and kernels_apply(x, *weights)


def decoded_sparsely(acts: Tensor, w_dec: Tensor, b_dec: Tensor) -> bool:
    """Whether dense latents ``acts [..., d_sae]`` go through the kernels: if a sample of their rows is sparse."""
    d_sae, d_out = w_dec.shape
    if acts.shape[-1:] != (d_sae,) or dense_is_faster(acts, acts.dtype, d_sae, d_out, _tracked(acts, w_dec, b_dec)):
        return False
    if not (_callable_on(acts) and kernels_apply(acts, w_dec, b_dec)):
        return False
    rows = acts.detach().reshape(-1, d_sae)
    step = max(1, -(-rows.shape[0] // SAMPLED_ROWS))
    sample = rows[step // 2 :: step]
    return int(torch.count_nonzero(sample)) <= ops.DENSE_ROWS * sample.numel()


def _callable_on(x: Tensor) -> bool:
    kind = x.device.type
    return kind in ("cpu", "cuda") and not torch.is_autocast_enabled(kind)


def _is_plain(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return plain and unpack_dual(tensor).tangent is None


def _tracked(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)

"""What the sparse JumpReLU takes: memory, imports; and its Triton kernels in the interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

# Growth of the peak resident memory in bytes, over a small forward pass: MKL keeps buffers of its own. The mark is set
# back to the present size before each measurement, so that nothing earlier can hide a peak.
PEAK = """
import sys, torch
from gemma_scope_tl.sae.sparse import reconstruct
torch.set_num_threads(1)
n, d, s = 512, 256, 131072
g = torch.Generator().manual_seed(0)
latent_major = sys.argv[1] == "latent-major"
enc = torch.randn((s, d) if latent_major else (d, s), generator=g).div_(d**0.5)
dec = torch.randn(s, d, generator=g)
w = [enc.T if latent_major else enc, torch.zeros(s), torch.full((s,), 3.3), dec, torch.zeros(d)]
x = torch.randn(n, d, generator=g)
x[0] *= 20  # like BOS: half of its latents are active
x.requires_grad_(sys.argv[2] == "backward")
def peak():
    with open("/proc/self/status") as status:
        return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
reconstruct(torch.randn(64, d), *w)
with open("/proc/self/clear_refs", "w") as mark:
    mark.write("5")
before = peak()
out, acts = reconstruct(x, *w)
if x.requires_grad:
    out.sum().backward()
print(acts.latents.numel(), acts.offsets[1].item(), peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: reads the peak from /proc")
@pytest.mark.parametrize(
    ("layout", "what"), [("row-major", "forward"), ("row-major", "backward"), ("latent-major", "backward")]
)
def test_peak_memory_at_131k_latents(layout: str, what: str) -> None:
    """512 tokens, one like BOS: far below the 268 MB of the pre-activations and the 134 MB of a copy of a matrix."""
    out = subprocess.run([sys.executable, "-c", PEAK, layout, what], capture_output=True, text=True, check=True)
    nnz, bos, peak = map(int, out.stdout.split())
    assert nnz > 60 * 512
    assert bos > 40_000
    assert 1 << 20 < peak < 96 << 20, "a few blocks of 8 and 16 MiB, and 16 bytes for each active latent"


@pytest.mark.slow
def test_triton_is_not_imported_for_cpu_tensors() -> None:
    code = (
        "import sys\nfrom torch import ones\nfrom gemma_scope_tl.sae.sparse import reconstruct\n"
        "reconstruct(ones(2, 3), ones(3, 4), ones(4), ones(4), ones(4, 3), ones(3))\n"
        "print('gemma_scope_tl.sae.sparse_triton' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


# Kernels against dense NumPy formulas and the CPU's compaction, at sizes that no tile divides.
KERNELS = """
import numpy as np, torch
from gemma_scope_tl.sae import sparse_ops as ops, sparse_triton as kernels
torch.manual_seed(0)
n, d, s = 6, 200, 1500
for dtype, rtol in ((torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
    pre, limit = torch.randn(n, s).to(dtype), torch.rand(s) + 2
    pre[1], pre[2, 5], pre[3] = -torch.inf, torch.nan, 5.0
    found = kernels.compact(pre, limit)
    token, latent = np.nonzero(~(pre.double().numpy() <= limit.double().numpy()))
    np.testing.assert_array_equal(found[1].numpy(), latent)
    np.testing.assert_array_equal(found[0].diff().numpy(), np.bincount(token, minlength=n))
    np.testing.assert_array_equal(found[2].double().numpy(), pre.double().numpy()[token, latent])
    for ours, theirs in zip(kernels.compact(pre * (pre > 2), None), ops.compact(pre * (pre > 2), None)):
        assert torch.equal(ours.nan_to_num(), theirs.nan_to_num())
    offsets, latents, _ = found
    values, matrix, left = (torch.randn(*shape).to(dtype) for shape in ((len(latents),), (s, d), (n, d)))
    dense = np.zeros((n, s))
    dense[token, latent] = values.double().numpy()
    exact = dense @ matrix.double().numpy()
    ours = kernels.row_sums(offsets, latents, values, matrix).double().numpy()
    np.testing.assert_allclose(ours, exact, rtol=rtol, atol=rtol * np.abs(exact).max())
    exact = (left.double().numpy() @ matrix.double().numpy().T)[token, latent]
    ours = kernels.sampled(offsets, latents, left, matrix).double().numpy()
    np.testing.assert_allclose(ours, exact, rtol=rtol, atol=rtol * np.abs(exact).max())
    none = torch.zeros(n + 1, dtype=torch.int64)
    assert not kernels.row_sums(none, latents[:0], values[:0], matrix).any()
    assert kernels.sampled(none, latents[:0], left, matrix).shape == (0,)
# The whole function through these kernels: its choice of kernels is made to take them for CPU tensors.
from gemma_scope_tl.sae.sparse import reconstruct
args = [torch.randn(*shape, dtype=torch.float64) for shape in ((5, 12), (12, 90), (90,), (90,), (90, 12), (12,))]
args[3] = args[3].abs() + 4
for t in args:
    t.requires_grad_()
results = []
for chosen in (ops._triton, lambda tensor: kernels):
    ops._triton = chosen
    out, acts = reconstruct(*args, bandwidth=0.5)
    results.append([out, acts.to_dense(), *torch.autograd.grad(out.square().sum(), args)])
for ours, theirs in zip(*results):
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-10)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="pip install triton (Linux, x86_64)")
def test_triton_kernels_in_the_interpreter() -> None:
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    out = subprocess.run([sys.executable, "-c", KERNELS], capture_output=True, text=True, env=env)
    assert out.stdout.strip() == "equal", out.stderr

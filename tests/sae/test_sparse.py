"""Sparse encoding and decoding against the dense formula in NumPy and stock SAELens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sae import sparse_ops as ops
from gemma_scope_tl.sae.sparse import SparseActs, compact, decode_sparse, encode_sparse, reconstruct

D_IN, D_SAE, D_OUT = 24, 203, 17  # 203 is no multiple of 8: the block's last columns and the plain nonzero are used
# Sums of some 200 terms of size 1 are off by about sqrt(200) u; ten times that, for float64, float32 and bfloat16.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def weights(dtype: torch.dtype = torch.float64, threshold: float = 1.5, d_sae: int = D_SAE) -> list[torch.Tensor]:
    """W_enc, b_enc, threshold, W_dec, b_dec; pre-activations have unit variance."""
    rng = np.random.default_rng(0)
    shapes = (D_IN, d_sae), (d_sae,), (d_sae,), (d_sae, D_OUT), (D_OUT,)
    made = [torch.tensor(rng.normal(size=shape)) for shape in shapes]
    made[0], made[1] = made[0] / D_IN**0.5, made[1] * 0.1
    made[2] = threshold + 0.1 * made[2].abs()
    wide = torch.promote_types(dtype, torch.float32)
    return [w.to(wide if i == 2 else dtype) for i, w in enumerate(made)]


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, D_IN, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def dense(x: torch.Tensor, w: list[torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Output and latents by the formula, in NumPy and float64."""
    x_, w_enc, b_enc, theta, w_dec, b_dec = (t.double().numpy() for t in (x, *w))
    pre = x_ @ w_enc + b_enc
    acts = np.where(pre <= theta, 0.0, pre)
    return acts @ w_dec + b_dec, acts


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (1, 1, 3), (), (0,), (2, 0)])
def test_is_the_dense_formula(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, w = inputs(*shape, dtype=dtype), weights(dtype)
    out, acts = reconstruct(x, *w)
    expected, latents = dense(x, w)
    assert out.dtype == acts.values.dtype == dtype
    assert acts.shape == (*shape, D_SAE)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=TOLERANCE[dtype] * 10)
    np.testing.assert_allclose(acts.to_dense().numpy(), latents, rtol=0, atol=TOLERANCE[dtype])


def test_is_stock_saelens() -> None:
    w = weights(torch.float32)
    w[3], w[4] = torch.randn(D_SAE, D_IN), torch.randn(D_IN)
    stock = JumpReLUSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=False))
    for name, value in zip(("W_enc", "b_enc", "threshold", "W_dec", "b_dec"), w, strict=True):
        getattr(stock, name).data = value
    x = inputs(3, 40, dtype=torch.float32)
    out, acts = reconstruct(x, *w)
    with torch.no_grad():
        assert torch.equal(acts.to_dense() != 0, stock.encode(x) != 0)
        torch.testing.assert_close(acts.to_dense(), stock.encode(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(out, stock(x), rtol=1e-5, atol=1e-5)


@given(
    st.integers(0, 9),
    st.integers(1, 70),
    st.floats(-3, 4),
    st.integers(1, 40),
    st.sampled_from([ops.BLOCK_TOKENS, 1, 3]),
)
@settings(max_examples=100, deadline=None)
def test_any_shape_density_and_blocks(n: int, d_sae: int, threshold: float, width: int, tokens: int) -> None:
    """Blocks of a few latents and tokens, all or no latents active, sparse and dense products."""
    x, w = inputs(n), weights(threshold=threshold, d_sae=d_sae)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "BLOCK_BYTES", width * 8 * max(1, min(n, tokens)))
        patch.setattr(ops, "BLOCK_TOKENS", tokens)
        patch.setattr(ops, "DENSE_BYTES", 8 * 3 * d_sae)
        out, acts = reconstruct(x, *w)
        again = compact(x @ w[0] + w[1], w[2])
    expected, latents = dense(x, w)
    np.testing.assert_allclose(out.numpy(), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(acts.to_dense().numpy(), latents, rtol=0, atol=1e-13)
    assert torch.equal(acts.latents, again.latents)
    assert torch.equal(acts.offsets, again.offsets)
    token, latent = np.nonzero(latents)
    assert acts.latents.tolist() == latent.tolist(), "ascending within a token"
    assert acts.tokens().tolist() == token.tolist()


@pytest.mark.parametrize("above", [-1.0, 2.0])
def test_both_sides_of_the_crossover_agree(above: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = inputs(11), weights()
    for name in ("DENSE_ROWS", "DENSE_IN_ORDER", "DENSE_COLUMNS", "DENSE_LATENTS"):
        monkeypatch.setattr(ops, name, above)
    np.testing.assert_allclose(reconstruct(x, *w)[0].numpy(), dense(x, w)[0], rtol=0, atol=1e-12)


def test_empty_rows_and_a_full_one() -> None:
    x, w = inputs(5), weights(threshold=8.0)
    out, acts = reconstruct(x, *w)
    assert acts.latents.numel() == 0
    assert acts.l0 == acts.density == 0.0
    assert torch.equal(out, w[4].expand(5, D_OUT))
    w[2] = torch.full((D_SAE,), -1e9, dtype=torch.float64)
    x[:2], x[3:] = 0.0, 0.0
    w[1] = torch.full((D_SAE,), -1e10, dtype=torch.float64)
    w[0] = torch.full((D_IN, D_SAE), 1e11, dtype=torch.float64)
    x[2] = 1.0
    acts = encode_sparse(x, *w[:3])
    assert acts.offsets.tolist() == [0, 0, 0, D_SAE, D_SAE, D_SAE], "like BOS: one token activates everything"
    assert acts.latents.tolist() == list(range(D_SAE))


def test_nan_is_kept_and_stays_in_its_token() -> None:
    x, w = inputs(4, dtype=torch.float32), weights(torch.float32)
    x[1, 3] = torch.nan
    out, acts = reconstruct(x, *w)
    assert acts.to_dense()[1].isnan().all()
    assert out.isnan().any(1).tolist() == [False, True, False, False]
    assert SparseActs.from_dense(acts.to_dense()).latents.tolist() == acts.latents.tolist()


@pytest.mark.parametrize("threads", [0, 1 << 10], ids=["torch", "numpy"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_true_bytes_are_found_in_order(threads: int, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "NUMPY_THREADS", threads)
    whole = torch.rand(5_000, generator=torch.Generator().manual_seed(0)) < share
    for first, size in ((0, 5_000), (8, 64), (3, 64), (1, 203), (0, 0)):
        mask = whole[first : first + size]
        assert ops.nonzero(mask).tolist() == [i for i, on in enumerate(mask.tolist()) if on]


@pytest.mark.parametrize("below", [1 << 15, (1 << 15) + 1])
def test_equal_numbers_stay_in_order(below: int) -> None:
    """On both sides of the largest 16-bit number, with more entries than PyTorch's radix sort begins at."""
    numbers = torch.randint(below, (40_000,), generator=torch.Generator().manual_seed(0))
    numbers[::7] = below - 1
    expected = np.argsort(numbers.numpy(), kind="stable")
    np.testing.assert_array_equal(ops.stable_order(numbers, below).numpy(), expected)


def test_a_pre_activation_at_its_threshold_is_off() -> None:
    pre, theta = torch.tensor([[1.0, 1.5, 0.5, -2.0]]), torch.tensor([1.0, 1.0, 0.5, -3.0])
    assert compact(pre, theta).latents.tolist() == [1, 3]


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Answers in the SAE's dtype, within its rounding of the float64 formula on the same weights and gates."""
    if not native:
        monkeypatch.setattr(ops, "native_half", lambda dtype: False)
        monkeypatch.setattr(ops, "BLOCK_BYTES", 4 * D_IN * 30)
    x, w = inputs(2, 9, dtype=dtype), weights(dtype)
    out, acts = reconstruct(x.float(), *w)
    assert out.dtype == acts.values.dtype == dtype
    places = acts.to_dense() != 0
    pre = (x.double() @ w[0].double() + w[1].double()).numpy()
    eps = torch.finfo(dtype).eps
    np.testing.assert_allclose(acts.to_dense().double().numpy()[places], pre[places], rtol=eps)
    surely_on = pre > w[2].double().numpy() * (1 + 2 * eps)
    assert (places.numpy() | ~surely_on).all()
    exact = acts.to_dense().double().numpy() @ w[3].double().numpy() + w[4].double().numpy()
    np.testing.assert_allclose(out.double().numpy(), exact, rtol=eps, atol=16 * eps)


def test_bfloat16_is_compared_with_the_threshold_in_float32() -> None:
    pre = torch.tensor([[1.0, 1.0]], dtype=torch.bfloat16)
    assert compact(pre, torch.tensor([0.999, 1.001])).latents.tolist() == [0], "both round to 1 in bfloat16"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_is_gated_as_in_float32(dtype: torch.dtype) -> None:
    """All 65,536 of them, NaN and infinities too, against thresholds at, below, between and above such values."""
    pre = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    at = pre[pre.isfinite()].float()[::997]
    theta = torch.cat([at, at.nextafter(at - 1), at.nextafter(at + 1), at * 1.0007, torch.tensor([1e38, -1e38, 3.1])])
    acts = compact(pre[:, None].expand(-1, len(theta)), theta)
    expected = ~(pre.float()[:, None] <= theta)
    assert torch.equal(acts.offsets.diff(), expected.sum(1))
    assert torch.equal(acts.latents, expected.nonzero()[:, 1])


@pytest.mark.parametrize("layout", ["latent-major", "strided", "unaligned", "mapped"])
def test_any_layout_of_the_weights(layout: str, tmp_path: Path) -> None:
    x, w = inputs(6, dtype=torch.float32).requires_grad_(), weights(torch.float32)
    plain, _ = reconstruct(x, *w)
    other = [_laid_out(t, layout, tmp_path / f"{i}") for i, t in enumerate(w)]
    out, _ = reconstruct(x, *other)
    torch.testing.assert_close(out, plain, rtol=0, atol=1e-5)
    first, second = (torch.autograd.grad(o.square().sum(), x)[0] for o in (plain, out))
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-4)


def _laid_out(t: torch.Tensor, layout: str, path: Path) -> torch.Tensor:
    if layout == "latent-major":
        return t.T.contiguous().T if t.ndim == 2 else t
    if layout == "strided":
        big = torch.zeros([2 * n for n in t.shape])
        view = big[tuple(slice(None, None, 2) for _ in t.shape)]
        return view.copy_(t)
    raw = t.numpy().tobytes()
    if layout == "unaligned":
        buffer: Any = bytearray(b"\0" + raw)
    else:
        path.write_bytes(b"\0" + raw)
        buffer = np.memmap(path, dtype=np.uint8, mode="c")
    array = np.ndarray(tuple(t.shape), np.float32, buffer, offset=1)
    assert array.ctypes.data % 4
    return torch.from_numpy(array)


def test_dense_and_sparse_round_trip() -> None:
    acts = torch.zeros(2, 3, D_SAE)
    acts[0, 1, 4], acts[1, 2, 0], acts[1, 2, 100] = 1.0, -2.0, torch.inf
    sparse = SparseActs.from_dense(acts)
    assert (sparse.latents.tolist(), sparse.values.tolist()) == ([4, 0, 100], [1.0, -2.0, torch.inf])
    assert sparse.tokens().tolist() == [1, 5, 5]
    assert sparse.l0 == 0.5
    assert torch.equal(sparse.to_dense(), acts)


def test_repeats_are_equal_to_the_bit() -> None:
    x, w = inputs(300, dtype=torch.float32), [t.requires_grad_() for t in weights(torch.float32)]
    leaves = [x.requires_grad_(), *w]

    def once() -> list[torch.Tensor]:
        out, _ = reconstruct(*leaves, bandwidth=0.1)  # type: ignore[arg-type]
        return [out, *torch.autograd.grad(out.square().sum(), leaves)]

    first = once()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, once(), strict=True))


def test_errors_name_the_shapes() -> None:
    w = weights()
    with pytest.raises(GemmaScopeError, match=r"x must be \[..., 24\].*\[4, 23\]"):
        encode_sparse(torch.zeros(4, 23), *w[:3])
    with pytest.raises(GemmaScopeError, match="positive"):
        encode_sparse(inputs(1), *w[:3], bandwidth=0.0)
    with pytest.raises(GemmaScopeError, match=r"acts must be \[..., 203\]"):
        decode_sparse(torch.zeros(4, 5), w[3], w[4])
    with pytest.raises(GemmaScopeError, match="one value for each"):
        encode_sparse(inputs(3), *w[:3]).with_values(torch.zeros(1))

"""Gradients of the sparse JumpReLU: finite differences, the dense formula under autograd, and ste.py."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from gemma_scope_tl.sae import sparse_ops as ops
from gemma_scope_tl.sae.sparse import SparseActs, decode_sparse, encode_sparse, reconstruct
from gemma_scope_tl.sae.ste import jumprelu

D_IN, D_SAE, D_OUT, N = 6, 40, 5, 9
NAMES = ("x", "W_enc", "b_enc", "threshold", "W_dec", "b_dec")
BANDWIDTH = 0.4


def leaves(dtype: torch.dtype = torch.float64, threshold: float = 1.0) -> list[Tensor]:
    """x, W_enc, b_enc, threshold, W_dec, b_dec, all wanting gradients."""
    g = torch.Generator().manual_seed(3)
    shapes = (N, D_IN), (D_IN, D_SAE), (D_SAE,), (D_SAE,), (D_SAE, D_OUT), (D_OUT,)
    made = [torch.randn(*shape, generator=g, dtype=torch.float64) for shape in shapes]
    made[1] /= D_IN**0.5
    made[3] = threshold + 0.1 * made[3].abs()
    wide = torch.promote_types(dtype, torch.float32)
    return [t.to(wide if i == 3 else dtype).requires_grad_() for i, t in enumerate(made)]


def dense(x: Tensor, w_enc: Tensor, b_enc: Tensor, threshold: Tensor, w_dec: Tensor, b_dec: Tensor) -> Tensor:
    return jumprelu(x @ w_enc + b_enc, threshold, BANDWIDTH).to(w_dec.dtype) @ w_dec + b_dec


@pytest.fixture(params=["sparse", "in order", "dense", "latent-major"])
def route(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sparse sums only, of a matrix that fits the cache or not; dense products only, in chunks of two tokens; and W_enc
    with contiguous columns."""
    for name in ("DENSE_ROWS", "DENSE_IN_ORDER", "DENSE_COLUMNS", "DENSE_LATENTS"):
        monkeypatch.setattr(ops, name, -1.0 if request.param == "dense" else 2.0)
    monkeypatch.setattr(ops, "DENSE_BYTES", 2 * 8 * D_SAE)
    monkeypatch.setattr(ops, "CACHED_BYTES", 0 if request.param == "in order" else 1 << 40)
    return request.param


def _by_route(made: list[Tensor], route: str) -> list[Tensor]:
    if route == "latent-major":
        made[1] = made[1].detach().T.contiguous().T.requires_grad_()
    return made


def test_gradcheck(route: str) -> None:
    """Finite differences with steps of 1e-6: no pre-activation may be that near to its threshold."""
    x, w_enc, b_enc, threshold, w_dec, b_dec = _by_route(leaves(), route)
    assert ((x @ w_enc + b_enc - threshold).abs() > 1e-4).all()
    fixed = threshold.detach()

    def function(*args: Tensor) -> Tensor:
        return reconstruct(args[0], args[1], args[2], fixed, args[3], args[4])[0]

    assert torch.autograd.gradcheck(function, (x, w_enc, b_enc, w_dec, b_dec), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("threshold", [1.0, 9.0, -9.0], ids=["some", "none", "all"])
def test_all_gradients_are_those_of_the_dense_formula(route: str, threshold: float) -> None:
    made = _by_route(leaves(threshold=threshold), route)
    expected = torch.autograd.grad(dense(*made).square().sum(), made)
    out, acts = reconstruct(*made, bandwidth=BANDWIDTH)
    actual = torch.autograd.grad(out.square().sum(), made, allow_unused=False)
    if threshold == 1.0:
        assert (acts.values == 0).any(), "the case has latents just below their threshold"
        assert expected[3].abs().max() > 0.1
    for name, a, e in zip(NAMES, actual, expected, strict=True):
        scale = e.abs().max().item() + 1
        torch.testing.assert_close(a, e, rtol=0, atol=1e-13 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_gradients_in_lower_precision(dtype: torch.dtype, tolerance: float) -> None:
    """Relative to each gradient's largest entry; a few roundings of the dtype, on the same gates."""
    made = leaves(dtype)
    wide = [t.detach().double().requires_grad_() for t in made]
    out, acts = reconstruct(*made, bandwidth=BANDWIDTH)
    actual = torch.autograd.grad(out.sum(), made)
    on = (acts.to_dense() != 0).double()
    pre = wide[0] @ wide[1] + wide[2]
    if dtype == torch.float32:
        assert torch.equal(on, (pre > wide[3]).double())
    expected = torch.autograd.grad(((pre * on) @ wide[4] + wide[5]).sum(), [wide[i] for i in (0, 1, 2, 4, 5)])
    for i, e in zip((0, 1, 2, 4, 5), expected, strict=True):
        assert actual[i].dtype == made[i].dtype
        torch.testing.assert_close(actual[i].double(), e, rtol=0, atol=tolerance * e.abs().max().item())
    assert actual[3].dtype == torch.float32


@pytest.mark.parametrize("wanted", [c for k in (1, 2) for c in itertools.combinations(range(6), k)])
def test_only_what_is_asked_for(wanted: tuple[int, ...]) -> None:
    made = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(leaves())]
    expected = torch.autograd.grad(dense(*made).sum(), [made[i] for i in wanted])
    out, _ = reconstruct(*made, bandwidth=BANDWIDTH)
    out.sum().backward()
    for i, t in enumerate(made):
        assert (t.grad is not None) == (i in wanted)
    for i, e in zip(wanted, expected, strict=True):
        torch.testing.assert_close(made[i].grad, e, rtol=0, atol=1e-12)


def test_the_input_gradient_computes_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    x, *w = [t.detach() for t in leaves()]

    def refuse(*args: object) -> Tensor:
        raise AssertionError("a gradient of frozen weights was computed")

    monkeypatch.setattr(ops, "latent_sums", refuse)
    monkeypatch.setattr(ops, "bias_sums", refuse)
    reconstruct(x.requires_grad_(), *w)[0].sum().backward()
    assert x.grad is not None


def test_without_a_bandwidth_the_threshold_has_no_gradient() -> None:
    made = leaves()
    out, acts = reconstruct(*made)
    assert (acts.values != 0).all(), "no explicit zeros either"
    gradient, other = torch.autograd.grad(out.sum(), (made[3], made[0]), allow_unused=True)
    assert gradient is None
    assert other is not None


def test_edited_sparse_values() -> None:
    """A hook on the values: scaled and clamped active latents, and the gradient of each."""
    x, w_enc, b_enc, threshold, w_dec, b_dec = leaves()
    acts = encode_sparse(x, w_enc, b_enc, threshold.detach())
    edited = acts.with_values((acts.values * 3).clamp(max=4.0))
    actual = torch.autograd.grad(decode_sparse(edited, w_dec, b_dec).square().sum(), (x, acts.values))
    pre = x @ w_enc + b_enc
    f = pre * (pre > threshold)
    expected = torch.autograd.grad(((f * 3).clamp(max=4.0) @ w_dec + b_dec).square().sum(), (x, f))
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(actual[1], expected[1].view(-1)[acts.tokens() * D_SAE + acts.latents])


def test_edited_dense_activations() -> None:
    """A hook on the dense tensor switches a latent on everywhere; off latents have gradients too."""
    x, w_enc, b_enc, threshold, w_dec, b_dec = leaves()
    inputs = (x, w_enc, b_enc, w_dec, b_dec)

    def steered(f: Tensor) -> Tensor:
        return torch.cat([f[:, :7], f[:, 7:8] * 0 + 5.0, f[:, 8:] * 2], dim=1)

    f = encode_sparse(x, w_enc, b_enc, threshold.detach()).to_dense()
    actual = torch.autograd.grad(decode_sparse(steered(f), w_dec, b_dec).square().sum(), (*inputs, f))
    pre = x @ w_enc + b_enc
    g = pre * (pre > threshold)
    expected = torch.autograd.grad((steered(g) @ w_dec + b_dec).square().sum(), (*inputs, g))
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-10)
    assert (actual[-1][f == 0] != 0).any()


def test_from_dense_carries_gradients_at_its_places() -> None:
    _, _, _, _, w_dec, b_dec = leaves()
    f = torch.zeros(3, D_SAE, dtype=torch.float64)
    f[0, 3], f[2, 9] = 1.0, -2.0
    f.requires_grad_()
    decode_sparse(SparseActs.from_dense(f), w_dec.detach(), b_dec.detach()).sum().backward()
    expected = (f != 0) * w_dec.detach().sum(1)
    torch.testing.assert_close(f.grad, expected)


def test_batch_dimensions_and_a_cast_input() -> None:
    made = [t.detach().float() for t in leaves()]
    x = made[0].double().view(3, 3, D_IN).requires_grad_()
    out, _ = reconstruct(x, *made[1:])
    out.square().sum().backward()
    flat = made[0].clone().requires_grad_()
    reconstruct(flat, *made[1:])[0].square().sum().backward()
    assert x.grad is not None
    assert flat.grad is not None
    assert x.grad.dtype == torch.float64
    assert torch.equal(x.grad.view(N, D_IN).float(), flat.grad)

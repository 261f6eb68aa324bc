"""Sums over the planes of a layered coder's decoder, against dense products of NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from gemma_scope_tl.sae.planes import as_rows, written_planes
from gemma_scope_tl.sae.sparse import SparseActs

M, COUNT, D = 40, 3, 12
LAYOUTS = ["causal planes", "all planes", "planes outermost", "backwards"]


def decoder(layout: str) -> torch.Tensor:
    torch.manual_seed(0)
    match layout:
        case "causal planes":
            return torch.randn(M, COUNT, D, dtype=torch.float64)
        case "all planes":  # of a mapped file
            return torch.randn(M, COUNT + 2, D, dtype=torch.float64)[:, 2:]
        case "planes outermost":
            return torch.randn(COUNT, M, D, dtype=torch.float64).transpose(0, 1)
        case _:
            return torch.randn(M, D, COUNT, dtype=torch.float64).transpose(1, 2)


def latents(density: float) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 5, M, dtype=torch.float64) * (torch.rand(2, 5, M) < density)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("density", [0.02, 0.5, 0.0])
@pytest.mark.parametrize(("first", "last"), [(0, None), (1, 2), (2, 3), (1, None)])
def test_sums_and_gradients(layout: str, density: float, first: int, last: int | None) -> None:
    weight, dense = decoder(layout), latents(density)
    wanted = np.einsum("bti,ipd->pbtd", dense.numpy(), weight.numpy()[:, first:last])
    sparse = SparseActs.from_dense(dense)
    values = sparse.values.clone().requires_grad_()
    tracked = dense.clone().requires_grad_()
    for acts in (sparse.with_values(values), tracked, dense):
        out = written_planes(acts, weight, first, last)
        assert out.shape == wanted.shape
        np.testing.assert_allclose(out.detach().numpy(), wanted, atol=1e-12)  # sums of up to 40 terms of about 1
    g = torch.randn(wanted.shape, dtype=torch.float64)
    grad = np.einsum("pbtd,ipd->bti", g.numpy(), weight.numpy()[:, first:last])
    written_planes(tracked, weight, first, last).backward(g)
    assert tracked.grad is not None
    np.testing.assert_allclose(tracked.grad.numpy(), grad, atol=1e-12)
    if values.numel():
        written_planes(sparse.with_values(values), weight, first, last).backward(g)
        assert values.grad is not None
        np.testing.assert_allclose(values.grad.numpy(), grad[dense.numpy() != 0], atol=1e-12)


def test_no_plane_is_copied() -> None:
    """PyTorch's sum over rows copies a matrix that is not contiguous."""
    weight = decoder("all planes")
    for chosen in (weight, weight[:, 1:2]):
        rows, step = as_rows(chosen)
        assert rows is not None
        assert rows.is_contiguous()
        assert rows.data_ptr() == chosen.data_ptr()
        assert torch.equal(rows[7 * step], chosen[7, 0])


def test_gradients_of_weights_and_transforms() -> None:
    weight, dense = decoder("all planes").requires_grad_(), latents(0.1)
    reference = weight.detach().clone().requires_grad_()
    for acts in (dense, SparseActs.from_dense(dense)):
        weight.grad = reference.grad = None
        out: Any = written_planes(acts, weight)
        out.square().sum().backward()
        torch.einsum("bti,ipd->pbtd", dense, reference).square().sum().backward()
        assert weight.grad is not None
        assert reference.grad is not None
        torch.testing.assert_close(weight.grad, reference.grad, rtol=1e-12, atol=1e-12)
    frozen = weight.detach()
    mapped = torch.func.vmap(lambda acts: written_planes(acts, frozen), out_dims=1)(dense)
    torch.testing.assert_close(mapped, written_planes(dense, frozen), rtol=1e-12, atol=1e-12)

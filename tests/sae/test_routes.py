"""Calls of an SAE, ``sae(x)`` and ``sae.decode(acts)``, through the sparse kernels: the same as through dense products.

Without gradients and hooks, up to eight tokens have a pass of their own (``few_tokens.py``). Tests that would take it
also run with that pass off, so that the same small inputs reach the general one.
The dense way is the formula in NumPy and float64, stock SAELens, and this package's own calls with the kernels off.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from sae_lens import JumpReLUSAE as StockSAE
from sae_lens import JumpReLUSAEConfig
from torch import Tensor

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.sae import few_tokens, hooked_pass, routes
from gemma_scope_tl.sae import sparse_ops as ops
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE

D_IN, D_SAE, D_OUT, HEADS = 24, 200, 20, 4
NAMES = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
# As tests/sae/test_sparse.py: rounding of sums of 200 terms of size 1, ten times the typical error.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}


def arrays(d_out: int = D_IN, seed: int = 0) -> dict[str, Tensor]:
    """About 2 % of the latents are active on inputs of unit variance."""
    rng = np.random.default_rng(seed)
    made = {
        "W_enc": rng.normal(size=(D_IN, D_SAE)) / D_IN**0.5,
        "b_enc": 0.1 * rng.normal(size=D_SAE),
        "threshold": 2.0 + 0.1 * np.abs(rng.normal(size=D_SAE)),
        "W_dec": rng.normal(size=(D_SAE, d_out)),
        "b_dec": rng.normal(size=d_out),
    }
    return {name: torch.tensor(value) for name, value in made.items()}


def make(kind: str = "res", dtype: torch.dtype = torch.float64) -> Any:
    values = arrays(D_OUT if kind in ("transcoder", "skip") else D_IN)
    if kind == "skip":
        values["W_skip"] = torch.randn(D_OUT, D_IN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return JumpReLUSAE.from_arrays(values, site="transcoder" if kind == "skip" else kind, layer=0, dtype=dtype)


def inputs(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@contextmanager
def kernels(on: bool) -> Generator[list[str]]:
    """Calls of any size through the kernels, or none. The result gets the name of each encoding or compaction in them.

    A pass of a few tokens counts as an encoding, by the name of its function.
    """
    used: list[str] = []

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            used.append(function.__name__)
            return function(*args)

        return run

    with (
        patch.object(routes, "SPARSE_FROM", 0 if on else 1 << 60),
        patch.object(routes, "GRADIENT_TOKENS", 0),
        patch.multiple(ops, encode=counted(ops.encode), compact=counted(ops.compact)),
        patch.object(hooked_pass, "reconstruct_few", counted(few_tokens.reconstruct_few)),
    ):
        yield used


@pytest.fixture(params=[few_tokens.MOST, 0], ids=["few", "many"])
def most(request: pytest.FixtureRequest) -> Generator[int]:
    """Number of tokens up to which the pass of a few tokens is taken: as it is, and never."""
    with patch.object(few_tokens, "MOST", request.param):
        yield request.param


def both(function: Callable[[], Any]) -> tuple[Any, Any]:
    """A result through the kernels and through dense products. The kernels must be used."""
    with kernels(True) as used:
        ours = function()
    assert used, "the dense products were taken"
    with kernels(False) as used:
        theirs = function()
    assert not used
    return ours, theirs


def close(actual: Any, expected: Any, dtype: torch.dtype = torch.float64) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=10 * TOLERANCE[dtype], equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(), (7,), (2, 5), (1, 1, 3)])
def test_a_call_is_the_formula(dtype: torch.dtype, shape: tuple[int, ...], most: int) -> None:
    sae, x = make(dtype=dtype), inputs(*shape, D_IN, dtype=dtype)
    w_enc, b_enc, theta, w_dec, b_dec = (getattr(sae, name).detach().double().numpy() for name in NAMES)
    pre = x.double().numpy() @ w_enc + b_enc
    acts = np.where(pre <= theta, 0.0, pre)
    with torch.no_grad(), kernels(True) as used:
        out, decoded = sae(x), sae.decode(torch.tensor(acts))
    assert used == ["reconstruct_few" if math.prod(shape) <= most else "encode", "compact"]
    assert out.dtype == dtype
    for found in (out, decoded):
        np.testing.assert_allclose(found.numpy(), acts @ w_dec + b_dec, rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize("error_term", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_a_call_is_stock_saelens(error_term: bool, grad: bool) -> None:
    """Outputs, and gradients of the input and all weights; SAELens's error term passes no gradient."""
    ours = make()
    stock = StockSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE, dtype="float64", apply_b_dec_to_input=False))
    for name in NAMES:
        getattr(stock, name).data = getattr(ours, name).detach().clone()
    results: list[Any] = []
    with torch.set_grad_enabled(grad):
        for sae in (ours, stock):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                sae.use_error_term = error_term
            x = inputs(3, 4, D_IN).requires_grad_(grad)
            with kernels(True) as used:
                out = sae(x)
            assert bool(used) == (sae is ours)
            weights = [getattr(sae, name) for name in NAMES if name != "threshold"]
            results.append([out, *(torch.autograd.grad(out.square().sum(), [x, *weights]) if grad else ())])
    close(*results)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("kind", ["res", "att", "transcoder", "skip"])
@pytest.mark.parametrize("n", [12, 8])
def test_every_kind_and_dtype_is_its_dense_call(kind: str, dtype: torch.dtype, n: int) -> None:
    """Latents switch alike, because both ways round the same numbers; outputs differ by their sums' rounding."""
    sae = make(kind, dtype)
    x = inputs(2, n // 2, *((HEADS, D_IN // HEADS) if kind == "att" else (D_IN,)), dtype=dtype)
    with torch.no_grad():
        out, dense = both(lambda: sae(x))
        acts = sae.encode(x)
        decoded, dense_decoded = both(lambda: sae.decode(acts))
    assert out.dtype == dtype
    assert out.shape == (*x.shape[:-1], D_OUT if kind in ("transcoder", "skip") else x.shape[-1])
    close(out, dense, dtype)
    close(decoded, dense_decoded, dtype)
    if kind != "skip":
        assert torch.equal(out, decoded), "one sum over the same entries"


@pytest.mark.parametrize("kind", ["res", "att", "transcoder", "skip"])
def test_gradients_are_those_of_the_dense_call(kind: str) -> None:
    sae = make(kind)
    x = inputs(9, HEADS, D_IN // HEADS) if kind == "att" else inputs(9, D_IN)
    x.requires_grad_()
    acts = make(kind).encode(x.detach()).detach().requires_grad_()
    weights = [p for name, p in sae.named_parameters() if name != "threshold"]

    def called() -> Any:
        return torch.autograd.grad(sae(x).square().sum(), [x, *weights])

    def decoded() -> Any:
        return torch.autograd.grad(sae.decode(acts).square().sum(), [acts, sae.W_dec, sae.b_dec])

    def in_two_steps() -> Any:
        return torch.autograd.grad(sae.decode(sae.encode(x)).square().sum(), [x, *weights], allow_unused=True)

    for function in (called, decoded, in_two_steps):
        close(*both(function))
    assert (both(decoded)[0][0][acts == 0] != 0).any(), "inactive latents have gradients too"


def test_the_threshold_has_no_gradient_and_frozen_weights_none() -> None:
    sae = make()
    with kernels(True):
        sae(inputs(5, D_IN)).sum().backward()
        assert sae.threshold.grad is None
        assert sae.W_enc.grad is not None
        assert not sae.requires_grad_(False)(inputs(5, D_IN)).requires_grad


def test_second_derivatives_are_those_of_the_dense_call() -> None:
    """The gradient of the gradient's norm, of the input and every weight, which pass through each other's nodes."""
    sae, x = make(), inputs(5, D_IN).requires_grad_()
    acts = sae.encode(x.detach()).detach().requires_grad_()
    weights = [sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec]

    def norms(out: Tensor, over: list[Tensor]) -> Any:
        first = torch.autograd.grad(out.pow(3).sum(), over, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), over)  # type: ignore[arg-type]

    for function in (
        lambda: norms(sae(x), [x, *weights]),
        lambda: norms(sae(x), [x]),
        lambda: norms(sae.decode(acts), [acts, *weights[2:]]),
    ):
        for ours, theirs in zip(*both(function), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * float(theirs.abs().max()))
    with kernels(True):
        assert torch.autograd.gradgradcheck(sae, (x[:2].detach().requires_grad_(),))


def test_hooks_see_and_change_what_they_do_in_the_dense_call(most: int) -> None:
    """Only a hook on the output, which is behind the pass, leaves a few tokens their own."""
    sae, x = make("skip"), inputs(3, D_IN)
    points = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons", "hook_sae_output")

    def cached() -> Any:
        out, cache = make("res").run_with_cache(x)
        return [out, *(cache[name] for name in points)]

    def in_place(value: Tensor, hook: Any) -> None:
        value.data.mul_(0.5)

    with torch.no_grad():
        close(*both(cached))
        for name in points[1:]:
            for change in (lambda value, hook: value * 2 + 0.01, in_place):
                call = lambda name=name, change=change: sae.run_with_hooks(x, fwd_hooks=[(name, change)])  # noqa: E731
                close(*both(call))
                with kernels(True) as used:
                    call()
                assert ("reconstruct_few" in used) == (name == "hook_sae_output" and most > 0)
    edited = [("hook_sae_input", lambda value, hook: value + 1)]
    with kernels(True):
        skipped = sae.run_with_hooks(x, fwd_hooks=edited)
    close(skipped, sae.run_with_hooks(x, fwd_hooks=edited))  # small, so dense: the skip path reads the unedited input


@pytest.mark.usefixtures("most")
def test_the_error_term_is_clean_of_edits() -> None:
    sae, x = make(), inputs(4, D_IN)
    with pytest.warns(DeprecationWarning, match="use_error_term"):
        sae.use_error_term = True
    off = [("hook_sae_acts_post", lambda acts, hook: acts * 0)]
    with torch.no_grad():
        for point in ("hook_sae_output", "hook_sae_error"):  # these leave a few tokens their own pass
            close(*both(lambda point=point: sae.run_with_hooks(x, fwd_hooks=[(point, off[0][1])])))
        edited = both(lambda: sae.run_with_hooks(x, fwd_hooks=off))
        close(*edited)
        close(both(lambda: sae(x))[0], x)
        sae.use_error_term = False
        close(edited[0], x - sae(x) + sae.b_dec)  # the error is that of the pass without the edit


def test_transforms_take_the_dense_products() -> None:
    """Their results are those of the plain call, and the kernels, which they cannot look into, are not used."""
    sae, x = make(), inputs(6, D_IN)
    plain, leaf = sae(x).detach(), x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(sae(leaf).sum(), leaf)
    weights = {name: p.detach() for name, p in sae.named_parameters()}
    with kernels(True) as used:
        close(torch.func.vmap(sae)(x).detach(), plain)
        close(torch.func.grad(lambda x: sae(x).sum())(x), gradient)
        close(torch.func.jvp(sae, (x,), (torch.ones_like(x),))[0].detach(), plain)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            tangent = torch.autograd.forward_ad.unpack_dual(sae(dual)).tangent
        assert tangent is not None
        close(tangent.sum().detach(), gradient.sum())
        assert not used
        close(torch.func.functional_call(sae, weights, (x,)), plain)
        assert used, "weights that are given for one call are ordinary tensors"
        del used[:]
        narrow = make(dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            acts = narrow.encode(x)
            pre = (x.float() @ narrow.W_enc + narrow.b_enc).float()
            assert torch.equal(acts, torch.where(pre <= narrow.threshold, 0.0, pre)), "a product of 16 bits"
            expected = acts @ narrow.W_dec + narrow.b_dec
            assert torch.equal(narrow.decode(acts), expected)
            assert torch.equal(narrow(x), expected.to(x.dtype))
        assert not used


@pytest.mark.slow
def test_compiled_calls_are_the_plain_ones() -> None:
    sae, x = make(), inputs(6, D_IN)
    plain = sae(x).detach()
    with kernels(True) as used:
        for function in (sae.forward, lambda x: sae.decode(sae.encode(x))):
            close(torch.compile(function, backend="eager")(x).detach(), plain)
        assert not used


def test_subclasses_with_steps_of_their_own_keep_them() -> None:
    class Halved(JumpReLUSAE):
        def decode(self, feature_acts: Tensor, like: Tensor | None = None) -> Tensor:
            return super().decode(feature_acts, like) / 2

    sae, x = make(), inputs(4, D_IN)
    half = Halved(sae.cfg)
    half.load_state_dict(sae.state_dict())
    with kernels(True), torch.no_grad():
        close(half(x) * 2, sae(x))
        sae.encode = lambda x: torch.zeros(len(x), D_SAE, dtype=torch.float64)
        close(sae(x), sae.b_dec.expand(4, -1))


@pytest.mark.parametrize("value", [-3.0, float("nan"), float("inf"), -float("inf")])
def test_any_latents_are_decoded(value: float) -> None:
    """A NaN or an infinity stays in its token, and is what the dense product makes of it."""
    sae, acts = make(), torch.zeros(5, D_SAE, dtype=torch.float64)
    acts[1, 7], acts[1, 9], acts[3, 0] = value, 2.0, 1.5
    with torch.no_grad():
        out, dense = both(lambda: sae.decode(acts))
    close(out, dense)
    assert out[[0, 2, 3, 4]].isfinite().all()


@pytest.mark.usefixtures("most")
def test_nan_inputs_give_nan_outputs_in_their_token() -> None:
    sae, x = make(), inputs(4, D_IN)
    x[1, 3], x[2, 0] = float("nan"), float("inf")
    with torch.no_grad():
        close(*both(lambda: sae(x)))
        with kernels(True):
            assert sae(x).isnan().any(1).tolist()[:2] == [False, True]


def test_empty_batches_and_other_arguments() -> None:
    sae = make(dtype=torch.float32)
    with kernels(True), torch.no_grad():
        assert sae(torch.zeros(0, D_IN)).shape == sae.decode(torch.zeros(0, D_SAE)).shape == (0, D_IN)
        assert sae(torch.zeros(2, 0, D_IN)).shape == (2, 0, D_IN)
        some = torch.zeros(3, D_SAE)
        some[0, 5] = 1.0
        close(sae.decode(some.to_sparse()), sae.decode(some), torch.float32)
        close(sae.decode(some.long()), sae.decode(some), torch.float32)
        close(sae.decode(some.T.contiguous().T), sae.decode(some), torch.float32)
        with pytest.raises(SpliceError, match=f"the given tensor is .3, {D_SAE + 1}"):
            sae.decode(torch.zeros(3, D_SAE + 1))


def test_dense_latents_go_through_the_dense_product() -> None:
    """By a sample of the rows; and if the sample was empty but the rest is not, the dense product still takes over."""
    sae, acts = make(), inputs(routes.SAMPLED_ROWS * 3, D_SAE)
    with kernels(True) as used, torch.no_grad():
        dense = sae.decode(acts)
        assert not used
        assert torch.equal(dense, acts @ sae.W_dec + sae.b_dec)
        acts[1::3] = 0.0  # the rows of the sample
        close(sae.decode(acts), acts @ sae.W_dec + sae.b_dec)
        assert used


@pytest.mark.parametrize("kind", ["res", "skip"])
@pytest.mark.usefixtures("most")
def test_a_dense_splice_is_the_sparse_one(kind: str) -> None:
    """What a splice does with few tokens on a GPU, here on the processor."""
    sae, x = make(kind), inputs(5, D_IN)
    with torch.no_grad():
        with kernels(True) as used:
            ours = hooked_pass.hooked_pass(sae, x, need_clean=True)
        assert used
        with patch.object(hooked_pass, "kernels_apply", lambda *_: False), kernels(True) as used:
            dense = hooked_pass.hooked_pass(sae, x, need_clean=True)
            assert not used
    close([dense.out, dense.clean], [ours.out, ours.clean])

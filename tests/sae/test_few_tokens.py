"""The pass of a few tokens against the one of many, and against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_scope_tl.sae import few_tokens
from gemma_scope_tl.sae.few_tokens import MOST, is_few, reconstruct_few
from gemma_scope_tl.sae.hooked_pass import hooked_pass
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sae.sparse import reconstruct

NAMES = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")


def weights(theta: float, dtype: torch.dtype = torch.float32, latent_major: bool = False) -> list[torch.Tensor]:
    """Weights of 512 latents whose pre-activations are of order one."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    enc = (normal(512, 48) / 48**0.5).to(dtype)
    enc = enc.T if latent_major else enc.T.contiguous()
    wide = torch.promote_types(dtype, torch.float32)
    b = (0.1 * normal(512)).to(dtype), torch.full((512,), theta, dtype=wide)
    return [enc, *b, (normal(512, 40) / 40**0.5).to(dtype), normal(40).to(dtype)]


@pytest.mark.parametrize("latent_major", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, MOST])
@torch.no_grad()
def test_few_tokens_are_those_of_many_to_the_bit(n: int, dtype: torch.dtype, latent_major: bool) -> None:
    """At 2 % of the latents, where both take the sparse sums."""
    w = weights(2.2, dtype, latent_major)
    x = torch.randn(1, n, 48, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert is_few(x, 48)
    wanted, acts = reconstruct(x, *w)
    assert 0 < acts.density < 0.04
    found = reconstruct_few(x, *w)
    assert found.dtype == dtype and found.shape == (1, n, 40)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("theta", [-10.0, 0.0, 1.0, 100.0])
@torch.no_grad()
def test_any_density_against_float64(theta: float) -> None:
    """From all latents to none. Sums of up to 512 terms of order one, in float32: 512 * 6e-8 at most."""
    w, x = weights(theta), torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    enc, b_enc, limit, dec, b_dec = (one.double() for one in w)
    pre = x.double() @ enc + b_enc
    wanted = torch.where(pre > limit, pre, 0.0) @ dec + b_dec
    for some in (x, x[:1], x[0]):
        found, exact = reconstruct_few(some, *w), wanted[: len(some)] if some.ndim > 1 else wanted[0]
        torch.testing.assert_close(found.double(), exact, rtol=0, atol=3e-5)


@torch.no_grad()
def test_nan_stays_and_other_tokens_stay_free_of_it() -> None:
    w, x = weights(1.0), torch.randn(2, 48, generator=torch.Generator().manual_seed(1))
    x[0, 0] = torch.nan
    found = reconstruct_few(x, *w)
    assert found[0].isnan().all() and found[1].isfinite().all()


class Products(TorchDispatchMode):
    """Lists the products with a matrix of the decoder's shape, which would read all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.of_decoder = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm):
            self.of_decoder += any(isinstance(one, torch.Tensor) and one.shape[-2:] == (512, 40) for one in args)
        return func(*args, **(kwargs or {}))


def test_a_splice_takes_it_for_few_tokens_without_gradients_and_hooks() -> None:
    w = weights(0.5)  # a third of the latents: many tokens take the dense product
    sae = JumpReLUSAE.from_arrays(dict(zip(NAMES, w, strict=True)), site="transcoder", layer=0).requires_grad_(False)
    x = torch.randn(1, 40, 48, generator=torch.Generator().manual_seed(1))
    with Products() as seen, torch.no_grad():
        many = hooked_pass(sae, x, need_clean=True).out
    assert seen.of_decoder
    with Products() as seen, torch.no_grad():
        one = hooked_pass(sae, x[:, :1], need_clean=True)
    assert not seen.of_decoder and torch.equal(one.out, one.clean)
    torch.testing.assert_close(one.out, many[:, :1], rtol=0, atol=3e-5)

    shown: list[torch.Tensor] = []
    sae.hook_sae_acts_post.add_hook(lambda value, hook: shown.append(value))
    with torch.no_grad():
        hooked = hooked_pass(sae, x[:, :1], need_clean=False).out
    sae.hook_sae_acts_post.remove_hooks()
    assert shown[0].shape == (1, 1, 512)
    torch.testing.assert_close(hooked, one.out, rtol=0, atol=3e-5)

    leaf = x[:, :1].clone().requires_grad_()
    hooked_pass(sae, leaf, need_clean=False).out.sum().backward()
    assert leaf.grad is not None and bool(leaf.grad.abs().sum() > 0)


def directional(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    with dual_level():
        tangent = unpack_dual(function(make_dual(x, torch.ones_like(x)))).tangent
    assert tangent is not None
    return tangent


def with_autocast(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return function(x)


TRANSFORMS: dict[str, Callable[..., torch.Tensor]] = {
    "vmap": lambda f, x: torch.func.vmap(f)(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
    "forward mode": directional,
    "autocast": with_autocast,
    "compile": lambda f, x: torch.compile(f, backend="eager", fullgraph=True)(x),
    "trace": lambda f, x: torch.jit.trace(f, x, check_trace=False)(x[:1]),  # another number of tokens than it saw
}


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and compiling warns about what it looks up once
@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_splice_of_few_tokens_inside_a_transform(name: str) -> None:
    """These cannot look into the pass, or change its dtypes: the results are those of the pass of many tokens.

    Both ways then run the same operations. Vectorised and single products differ by float32's rounding of sums of 48
    and about 10 terms of order one.
    """
    w = weights(2.2)
    sae = JumpReLUSAE.from_arrays(dict(zip(NAMES, w, strict=True)), site="transcoder", layer=0).requires_grad_(False)
    x = torch.randn(3, 48, generator=torch.Generator().manual_seed(1))
    splice = lambda x: hooked_pass(sae, x, need_clean=False).out  # noqa: E731
    with torch.no_grad():
        assert is_few(x, 48)
        found = TRANSFORMS[name](splice, x)
        with patch.object(few_tokens, "MOST", 0):
            wanted = TRANSFORMS[name](splice, x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    active = x @ w[0] + w[1] > w[2]
    exact = (active * (torch.ones_like(x) @ w[0])) @ w[3]  # the derivative along ones
    if name in ("jvp", "forward mode"):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-4)
    else:
        value = (active * (x @ w[0] + w[1])) @ w[3] + w[4]
        torch.testing.assert_close(found, value[: len(found)], rtol=0, atol=3e-5)

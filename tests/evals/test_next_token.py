"""Losses and KL divergences in chunks against the model's own full logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gemma_scope_tl.evals.clean_pass import CleanPass
from gemma_scope_tl.evals.next_token import LogitHead
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import hooked, random_gemma, random_tokens, shared_model

ROUNDING = 1e-5  # float32 sums over 96 logits of up to 30


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("memory", [1, 3000, 1 << 30])
@torch.no_grad()
def test_scores_are_those_of_the_full_logits(backend: str, memory: int) -> None:
    model = shared_model("grouped", backend)
    tokens = random_tokens(model)
    final, other = (CleanPass.run(model, some, []).final for some in (tokens, tokens.flip(0)))
    head = LogitHead(model, memory)
    p, q = (model(some)[:, :-1].double().log_softmax(-1).flatten(0, 1) for some in (tokens, tokens.flip(0)))
    targets = tokens[:, 1:].flatten()
    normed, changed = (head.normed(x)[:, :-1].flatten(0, 1) for x in (final, other))
    torch.testing.assert_close(head.logits(normed).double().log_softmax(-1), p, rtol=0, atol=ROUNDING)
    losses, (with_kl, without, same) = head.score(normed, [(changed, True), (changed, False), (normed, True)], targets)
    at = targets.unsqueeze(1)
    torch.testing.assert_close(losses.double(), -p.gather(1, at).squeeze(1), rtol=0, atol=ROUNDING)
    torch.testing.assert_close(with_kl.losses.double(), -q.gather(1, at).squeeze(1), rtol=0, atol=ROUNDING)
    assert torch.equal(without.losses, with_kl.losses)
    assert without.divergences is None
    assert with_kl.divergences is not None
    assert same.divergences is not None
    kl = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(with_kl.divergences.double(), kl, rtol=1e-5, atol=ROUNDING)
    assert float(same.divergences.abs().max()) < ROUNDING


def test_chunks_keep_to_the_budget() -> None:
    model = shared_model("grouped", "bridge")
    row = 96 * 4
    assert LogitHead(model, 1).chunk == 1
    for tokens in (1, 5, 40):
        assert LogitHead(model, 4 * row * tokens).chunk == tokens


class _Head:
    """What :class:`LogitHead` reads of a model, with a matrix of any shape."""

    def __init__(self, matrix: torch.Tensor, cap: float | None, bias: torch.Tensor | None = None) -> None:
        self.ln_final = torch.nn.Identity()
        self.unembed = SimpleNamespace(W_U=matrix, b_U=bias)
        self.cfg = SimpleNamespace(output_logits_soft_cap=cap)


@pytest.mark.parametrize("layout", ["vocabulary-major", "row-major"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("cap", "bias", "scale"), [(30.0, False, 1.0), (None, True, 1.0), (None, False, 40.0), (90.0, True, 4.0)]
)
@torch.no_grad()
def test_blocks_of_the_vocabulary_sum_to_the_whole(
    layout: str, dtype: torch.dtype, cap: float | None, bias: bool, scale: float
) -> None:
    """Three blocks of columns and three chunks of tokens, the last ones incomplete, against float64 in one piece.

    Logits are up to ``5 * scale``. Their rounding in float32 is 6e-8 of that, for losses as for the terms of KL; with
    ``scale`` 40 the maximum of the row moves by hundreds from block to block.
    """
    generator = torch.Generator().manual_seed(0)
    d, vocabulary, n = 48, 2 * 1024 + 333, 1300
    matrix = torch.randn(vocabulary, d, generator=generator).mul_(scale / d**0.5).to(dtype).T
    matrix = matrix if layout == "vocabulary-major" else matrix.contiguous()
    b = torch.randn(vocabulary, generator=generator).to(dtype) if bias else None
    head = LogitHead(_Head(matrix, cap, b), 1 << 26)  # pyright: ignore[reportArgumentType]
    x = torch.randn(n, d, generator=generator).to(dtype)
    others = [(x + 0.1 * torch.randn(n, d, generator=generator).to(dtype)).to(dtype) for _ in range(2)]
    targets = torch.randint(vocabulary, (n,), generator=generator)
    assert head.block < vocabulary and head.chunk < n
    losses, scores = head.score(x, [(others[0], True), (others[1], False)], targets)

    def exact(rows: torch.Tensor) -> torch.Tensor:
        logits = rows.double() @ matrix.double() + (0 if b is None else b.double())
        return (logits if cap is None else cap * torch.tanh(logits / cap)).log_softmax(-1)

    p, q = exact(x), exact(others[0])
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5 * max(1.0, scale)
    at = targets.unsqueeze(1)
    torch.testing.assert_close(losses.double(), -p.gather(1, at).squeeze(1), rtol=0, atol=tolerance)
    torch.testing.assert_close(scores[0].losses.double(), -q.gather(1, at).squeeze(1), rtol=0, atol=tolerance)
    wanted = -exact(others[1]).gather(1, at).squeeze(1)
    torch.testing.assert_close(scores[1].losses.double(), wanted, rtol=0, atol=tolerance)
    assert scores[0].divergences is not None and scores[1].divergences is None
    kl = (p.exp() * (p - q)).sum(-1)
    torch.testing.assert_close(scores[0].divergences.double(), kl, rtol=1e-5, atol=tolerance)


@torch.no_grad()
def test_16_bit_models_have_float32_logits() -> None:
    """Against float64 on the same bfloat16 numbers; rounded to bfloat16, logits of 15 would be off by up to 0.06."""
    model = hooked(random_gemma(dtype=torch.bfloat16), "bridge")
    tokens = random_tokens(model)
    head = LogitHead(model, 1 << 20)
    normed = head.normed(CleanPass.run(model, tokens, []).final)[:, :-1].flatten(0, 1)
    assert normed.dtype == torch.bfloat16
    exact = 30 * torch.tanh(normed.double() @ head.matrix.double() / 30)
    torch.testing.assert_close(head.logits(normed).double(), exact, rtol=0, atol=1e-5)
    losses, _ = head.score(normed, [], tokens[:, 1:].flatten())
    wanted = torch.nn.functional.cross_entropy(exact, tokens[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(losses.double(), wanted, rtol=0, atol=1e-5)


@torch.no_grad()
def test_without_a_soft_cap_and_with_a_bias() -> None:
    model = shared_model("grouped", "bridge")
    head = LogitHead(model, 1 << 20)
    normed = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    head.cap, head.bias = None, torch.linspace(-1, 1, 96)
    exact = normed.double() @ head.matrix.double() + head.bias.double()
    torch.testing.assert_close(head.logits(normed).double(), exact, rtol=0, atol=ROUNDING)
    targets = torch.arange(7)
    losses, _ = head.score(normed, [], targets)
    wanted = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    torch.testing.assert_close(losses.double(), wanted, rtol=0, atol=ROUNDING)

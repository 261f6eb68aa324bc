"""A model is the same whatever mode of torch it is loaded in, and gradients can be taken of it."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import random_gemma
from tests.weights.test_modes import MODES

IDS = torch.tensor([[2, 5, 6, 7]])


@pytest.fixture(scope="module")
def plain() -> dict[str, Any]:
    return {backend: gs.load_model("bundled", backend=backend, check=False) for backend in BACKENDS}


def tensors(model: Any) -> dict[str, torch.Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def same(got: Any, wanted: Any) -> None:
    mine, theirs = tensors(got), tensors(wanted)
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        facts = (tensor.dtype, tensor.device, tensor.requires_grad, tensor.is_inference())
        assert facts == (theirs[name].dtype, theirs[name].device, theirs[name].requires_grad, False), name
        assert torch.equal(tensor, theirs[name]), name


def differentiates(model: Any, sae: Any) -> None:
    """Gradients of the weights, with modules as they are, and of latents."""
    model(IDS).square().sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "norm" in name)
    assert len(gs.attribute(model, IDS, sae, 7)) > 0


@contextmanager
def every_mode() -> Generator[None]:
    """All at once, as far as they go together; each alone is in ``tests/weights``."""
    with ExitStack() as stack:
        for name in ("inference_mode", "default float64", "autocast", "default device meta", "device meta"):
            stack.enter_context(MODES[name]())
        yield


@pytest.mark.slow
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, every_mode])
@pytest.mark.parametrize("backend", BACKENDS)
def test_loaded_in_any_mode(backend: str, mode: Any, plain: dict[str, Any]) -> None:
    sae, given = gs.load_sae("bundled", "res", 2, width="1k"), random_gemma("bundled")
    with mode():
        default = torch.get_default_dtype()
        named = gs.load_model("bundled", backend=backend)
        given = gs.load_model("bundled", hf_model=given, backend=backend, check=False)
        assert torch.get_default_dtype() == default
    for model in (named, given):
        same(model, plain[backend])
        differentiates(model, sae)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_given_that_was_made_in_inference_mode(backend: str, plain: dict[str, Any]) -> None:
    from transformers import Gemma2ForCausalLM

    with torch.inference_mode():
        made = Gemma2ForCausalLM.from_pretrained(BUNDLED_MODEL, attn_implementation="eager")
        made.to(torch.float64)  # every tensor anew
        assert next(made.parameters()).is_inference()
        model = gs.load_model("bundled", hf_model=made, backend=backend, dtype="float32")
    same(model, plain[backend])
    assert made.lm_head.weight is made.model.embed_tokens.weight  # tied as before
    differentiates(model, gs.load_sae("bundled", "res", 2, width="1k"))

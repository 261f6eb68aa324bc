"""Threads and tasks on one model: each pass is the one that was asked for, or raises."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.interventions import steer
from gemma_scope_tl.model.splicing import splice
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import random_sae, random_tokens, shared_model

NAME = "blocks.1.hook_resid_post"


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    return shared_model("narrow-heads", request.param)


def elsewhere(call: Callable[[], Any]) -> Any:
    """What a call gives in a thread that knows nothing of this one; errors too."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.no_grad()(call)).result()


WAYS: dict[str, Callable[[Any, torch.Tensor], Any]] = {
    "call": lambda model, tokens: model(tokens),
    "the model inside": lambda model, tokens: (
        model.original_model(tokens).logits if model.backend == "bridge" else model(tokens)
    ),
    "generate": lambda model, tokens: model.generate(tokens, max_new_tokens=2),
    "cache": lambda model, tokens: model.run_with_cache(tokens),
    "hooks": lambda model, tokens: model.run_with_hooks(tokens, fwd_hooks=[(NAME, lambda value, hook: None)]),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_pass_of_another_thread_raises(model: Any, way: str) -> None:
    tokens = random_tokens(model, length=6)
    sae = random_sae(model.dims, "res", 1, d_sae=64)
    edit = steer(sae, 3, 5.0)
    plain = elsewhere(lambda: model(tokens))
    with splice(model, sae), pytest.raises(SpliceError, match="another thread"):
        elsewhere(lambda: WAYS[way](model, tokens))
    with model.hooks([edit]), pytest.raises(SpliceError, match="nother thread"):
        elsewhere(lambda: WAYS[way](model, tokens))
    model.add_sae(sae)
    with pytest.raises(SpliceError, match=r"copy_context\(\)\.run"):
        elsewhere(lambda: WAYS[way](model, tokens))
    model.reset_saes()
    assert torch.equal(elsewhere(lambda: model(tokens)), plain)


def test_a_copied_context_owns_what_its_maker_owns(model: Any) -> None:
    tokens = random_tokens(model, length=6)
    sae = random_sae(model.dims, "res", 1, d_sae=64)
    with torch.no_grad(), splice(model, sae), model.hooks([steer(sae, 3, 5.0)]):
        wanted = model(tokens)
        context = contextvars.copy_context()
        got = elsewhere(lambda: context.run(model, tokens))
    assert torch.equal(got, wanted)


def test_a_thread_owns_what_it_added_in_any_context(model: Any) -> None:
    """Notebooks run every cell in a context of its own."""
    tokens, sae = random_tokens(model, length=6), random_sae(model.dims, "res", 1, d_sae=64)
    with torch.no_grad():
        plain = model(tokens)
        contextvars.Context().run(model.add_sae, sae)
        spliced = contextvars.Context().run(model, tokens)
        contextvars.Context().run(model.reset_saes)
        assert not torch.equal(spliced, plain)
        with contextvars.Context().run(lambda: model.saes(sae, reset_saes_end=False)):
            assert torch.equal(model(tokens), spliced)
        assert torch.equal(contextvars.Context().run(model, tokens), spliced)
        model.reset_saes()
        assert torch.equal(model(tokens), plain)


def test_tasks_of_one_thread_are_apart(model: Any) -> None:
    tokens, sae = random_tokens(model, length=6), random_sae(model.dims, "res", 1, d_sae=64)

    async def spliced(inside: asyncio.Event, done: asyncio.Event) -> None:
        with splice(model, sae):
            inside.set()
            await done.wait()
            model(tokens)

    async def main() -> None:
        inside, done = asyncio.Event(), asyncio.Event()
        task = asyncio.create_task(spliced(inside, done))
        await inside.wait()
        with pytest.raises(SpliceError, match="thread or task"):
            model(tokens)
        done.set()
        await task

    with torch.no_grad():
        asyncio.run(main())


def test_what_another_thread_attached_is_not_taken_away(model: Any) -> None:
    tokens, sae = random_tokens(model, length=6), random_sae(model.dims, "res", 1, d_sae=64)
    other = random_sae(model.dims, "res", 1, d_sae=64, seed=1)
    with splice(model, sae):
        for call in (model.reset_saes, lambda: model.reset_saes(NAME)):
            with pytest.raises(SpliceError, match="must be detached there"):
                elsewhere(call)
        for chain in (False, True):
            with pytest.raises(SpliceError, match="taken: another thread"):
                elsewhere(lambda chain=chain: model.add_sae(other, chain=chain))
        assert list(model.acts_to_saes.values()) == [sae]
        with torch.no_grad():
            model(tokens)
    thread = threading.Thread(target=model.add_sae, args=(sae,))
    thread.start()
    thread.join()  # and nobody else could detach it now
    model.reset_saes()
    assert not model.acts_to_saes


def test_many_threads_are_each_right_or_told(model: Any) -> None:
    """Plain, spliced, steered and cached passes at once, with no turns taken."""
    tokens = random_tokens(model, length=6)
    saes = [random_sae(model.dims, "res", 1, d_sae=64, seed=i) for i in range(2)]
    jobs: list[Callable[[], torch.Tensor]] = [
        lambda: model(tokens),
        lambda: model.run_with_saes(tokens, saes=saes[0]),
        lambda: model.run_with_saes(tokens, saes=saes[1]),
        lambda: model.run_with_hooks(tokens, fwd_hooks=[steer(saes[0], 3, 50.0)]),
        lambda: model.run_with_cache(tokens, names_filter=NAME)[1][NAME],
    ]
    with torch.no_grad():
        wanted = [job() for job in jobs]
    right, start = [0] * len(jobs), threading.Barrier(len(jobs))

    def work(number: int) -> None:
        start.wait()
        for _ in range(25):
            try:
                with torch.no_grad():
                    got = jobs[number]()
            except SpliceError:
                continue
            assert torch.equal(got, wanted[number])
            right[number] += 1

    with ThreadPoolExecutor(len(jobs)) as pool:
        for done in [pool.submit(work, number) for number in range(len(jobs))]:
            done.result()
    assert sum(right) > 0
    assert not model.acts_to_saes
    assert not any(point.fwd_hooks for point in model.hook_dict.values())
    with torch.no_grad():
        assert torch.equal(model(tokens), wanted[0])


def test_gradients_through_checkpointed_blocks(model: Any) -> None:
    """Autograd may run a hook again, in a thread of its own."""
    from torch.utils.checkpoint import checkpoint

    tokens, sae = random_tokens(model, length=6), random_sae(model.dims, "res", 1, d_sae=64)
    embeddings = torch.zeros(1, requires_grad=True)

    def run(scale: torch.Tensor) -> torch.Tensor:
        return model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda value, hook: value + scale)]).sum()

    def backward(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, embeddings)[0]

    with splice(model, sae):
        wanted = backward(run(embeddings))
        loss: Any = checkpoint(run, embeddings, use_reentrant=False)
        with ThreadPoolExecutor(1) as pool:  # stands for the thread that a device's backward pass runs in
            assert torch.allclose(pool.submit(backward, loss).result(), wanted)

"""A trainer's state as flat tensors, and back, so that a resumed run goes on to the bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gemma_scope_tl.errors import GemmaScopeError, unknown_name

if TYPE_CHECKING:
    from gemma_scope_tl.training.place import PlaceTrainer

STEPS = "steps_done"


def flat_state(trainer: PlaceTrainer) -> dict[str, Tensor]:
    """Copies on the CPU of everything that a step reads or changes."""
    found = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in _live(trainer).items()}
    for index, spec in enumerate(trainer.specs):
        steer = trainer.lambdas[index]
        values = (steer.base, steer.error, trainer.entries[index])
        found[f"{spec.name}/steering"] = torch.tensor(values, dtype=torch.float64)
    found[STEPS] = torch.tensor(trainer.steps_done)
    return found


def restore(trainer: PlaceTrainer, state: Mapping[str, Tensor]) -> None:
    """Put what :func:`flat_state` gave back in; checks all of it first.

    Raises:
        UnknownNameError: a tensor that this trainer does not have.
        GemmaScopeError: a missing tensor, another shape or dtype, or a value that is not finite.
    """
    expected = flat_shapes(trainer)
    for name in state:
        if name not in expected:
            raise unknown_name("tensor of a trainer's state", name, expected)
    missing = [name for name in expected if name not in state]
    if missing:
        raise GemmaScopeError(f"The trainer's state lacks {missing[0]} and {len(missing) - 1} others.")
    for name, (shape, dtype) in expected.items():
        value = state[name]
        if value.shape != shape or value.dtype != dtype:
            text = f"{value.dtype} {list(value.shape)}, not {dtype} {list(shape)}"
            raise GemmaScopeError(f"{name} in the trainer's state is {text}.")
        if not bool(torch.isfinite(value).all()):
            raise GemmaScopeError(f"{name} in the trainer's state has values that are not finite.")
    for name, value in _live(trainer).items():
        value.copy_(state[name])
    for index, spec in enumerate(trainer.specs):
        steer = trainer.lambdas[index]
        steer.base, steer.error, trainer.entries[index] = state[f"{spec.name}/steering"].tolist()
    trainer.steps_done = int(state[STEPS])


def flat_shapes(trainer: PlaceTrainer) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of every tensor of :func:`flat_state`, without copying any."""
    found = {name: (value.shape, value.dtype) for name, value in _live(trainer).items()}
    found |= {f"{spec.name}/steering": (torch.Size((3,)), torch.float64) for spec in trainer.specs}
    return found | {STEPS: (torch.Size(()), torch.int64)}


def _live(trainer: PlaceTrainer) -> dict[str, Tensor]:
    """The trainer's own tensors: writing to them changes it."""
    found: dict[str, Tensor] = {}
    for spec, member, window in zip(trainer.specs, trainer.members, trainer.windows, strict=True):
        parts = dict(trainer.weights.of(member.index, member.rows))
        parts |= {f"second.{name}": value for name, value in trainer.second.of(member.index, member.rows).items()}
        parts |= {"last": trainer.last[member.rows], **window.tensors()}
        found |= {f"{spec.name}/{name}": value for name, value in parts.items()}
    return found

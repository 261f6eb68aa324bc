"""What a step of a cached generation costs through spliced SAEs, counted in operations: so on every machine alike."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import random_sae, shared_model

STEPS = 4


class Operations(TorchDispatchMode):
    """Counts the operations of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def _per_step(model: Any, saes: list[Any], **options: Any) -> float:
    def operations(new: int) -> int:
        with Operations() as seen, model.saes(saes, exclude_special_tokens=False, **options):
            ids = torch.tensor([[2, 5, 6, 7]])
            model.generate(ids, max_new_tokens=new, do_sample=False, stop_at_eos=False, use_past_kv_cache=True)
        return seen.count

    return (operations(2 + STEPS) - operations(2)) / STEPS


@torch.no_grad()
def test_a_step_is_cheap_and_positions_are_resolved_once_for_all_saes() -> None:
    model = shared_model("grouped", "bridge")
    saes = [random_sae(model.dims, site, layer) for layer in range(4) for site in ("res", "mlp", "att")]
    none = _per_step(model, [])
    all_positions = _per_step(model, saes)
    assert (all_positions - none) / len(saes) <= 20  # 61 with the bookkeeping of batches
    chosen = _per_step(model, saes, positions=slice(0, None))
    assert chosen - all_positions <= 3 * len(saes) + 40  # a mask for each SAE, and 29 to find the positions of one

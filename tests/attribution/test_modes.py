"""What needs gradients gives the same numbers inside ``inference_mode`` and ``no_grad`` as outside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.attributions.gradients import ablation_effects
from gemma_scope_tl.attributions.graph import latent_edges
from gemma_scope_tl.attributions.targets import logit_difference, token_loss
from gemma_scope_tl.evals.suite import measure_suite
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import hooked, random_gemma, random_sae, random_tokens

IDS = torch.tensor([[2, 40, 41, 42, 43, 44]])
OTHER = torch.tensor([[2, 40, 41, 60, 61, 62]])
Call = Callable[[Any, list[Any]], pd.DataFrame]


def nodes_and_edges(model: Any, saes: list[Any]) -> pd.DataFrame:
    found = gs.circuit(model, IDS, saes, logit_difference(40, 50), nodes=8)
    return pd.concat([found.nodes, found.edges], axis=1)


def edges(model: Any, saes: list[Any]) -> pd.DataFrame:
    active = gs.features(model, IDS, saes[1]).query("position == 3")["latent"]
    return latent_edges(model, IDS, saes[0], saes[1], [(3, int(active.iloc[0]))])


def evaluated(model: Any, saes: list[Any]) -> pd.DataFrame:
    rows = random_tokens(model, batch=3, length=8)
    found = measure_suite(model, saes, rows, batch_size=2, uniformity=2, progress=False)
    pieces = enumerate(found.sums.pieces())
    state = {f"{number} {key}": value for number, one in pieces for key, value in one.state().items()}
    return pd.DataFrame({key: value.sum().tolist() for key, value in state.items()}, index=[0])


CALLS: dict[str, Call] = {
    "attribute": lambda model, saes: gs.attribute(model, IDS, saes, token_loss(50)),
    "integrated": lambda model, saes: gs.attribute(model, IDS, saes, 50, "integrated", counterfactual=OTHER, steps=1),
    "circuit": nodes_and_edges,
    "latent_edges": edges,
    "ablations": lambda model, saes: pd.DataFrame({"m": ablation_effects(model, IDS, saes[0], 50, [(2, 1)])}),
    "evaluate": evaluated,
    "features": lambda model, saes: gs.features(model, IDS, saes),
}


def saes_of(model: Any) -> list[Any]:
    return [random_sae(model.dims, *place, seed=i) for i, place in enumerate([("mlp", 0), ("res", 1)])]


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Any:
    return hooked(random_gemma("narrow-heads"), request.param)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_inside_any_mode(model: Any, name: str) -> None:
    saes, call = saes_of(model), CALLS[name]
    wanted = call(model, saes)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            pd.testing.assert_frame_equal(call(model, saes), wanted)
    with torch.autocast("cpu", torch.bfloat16):  # other numbers, and no failure
        assert list(call(model, saes).columns) == list(wanted.columns)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["attribute", "circuit", "evaluate"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_and_saes_moved_in_inference_mode(backend: str, name: str) -> None:
    model, call = hooked(random_gemma("narrow-heads"), backend), CALLS[name]
    saes = saes_of(model)
    wanted = call(model, saes)
    with torch.inference_mode():
        for one in (model, *saes):
            one.to(torch.float64)
            one.to(torch.float32)
        assert next(model.parameters()).is_inference()
    pd.testing.assert_frame_equal(call(model, saes), wanted)

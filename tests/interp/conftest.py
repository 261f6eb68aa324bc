"""An endpoint that answers by rule, and a latent whose meaning is known."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from tests.helpers import shared_model
from tests.interp.llm_server import Endpoint, serve


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Endpoint]:
    """A running endpoint; no key in the environment, no proxy."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with serve() as running:
        yield running


@pytest.fixture(scope="module")
def model() -> Any:
    """The bundled model."""
    return shared_model("bundled", "bridge")


@pytest.fixture(scope="module")
def tokens(model: Any) -> torch.Tensor:
    """Rows of held-out text, ``[24, 96]``."""
    from gemma_scope_tl.text.documents import read_texts
    from gemma_scope_tl.text.rows import pack_texts

    return pack_texts(model.tokenizer, read_texts(), 96, 24)


@pytest.fixture(scope="module")
def sae() -> Any:
    """A bundled SAE."""
    return gs.load_sae("bundled", "res", 2, width="1k")


@pytest.fixture(scope="module")
def planted(model: Any, tokens: torch.Tensor) -> tuple[Any, dict[int, str]]:
    """An SAE on the embedding whose first three latents fire on one token each, and these tokens as text."""
    vectors = model.W_E.detach().float()
    ids, counts = tokens.unique(return_counts=True)
    texts = {i: model.tokenizer.decode([i]) for i in ids.tolist()}
    listed = [i for i in ids[counts.argsort(descending=True)].tolist() if texts[i].strip().isalpha()]
    chosen = [i for i in listed if len(texts[i].strip()) > 2 and texts[i].startswith(" ")][:3]
    unit = torch.nn.functional.normalize(vectors, dim=1)
    scale = vectors.shape[1] ** 0.5
    scores = scale * vectors @ unit[chosen].T
    own = scores[chosen, range(3)]
    scores[chosen, range(3)] = -torch.inf
    assert (scores.amax(0) < own).all()
    arrays = {
        "W_enc": unit[chosen].T.contiguous(),
        "W_dec": unit[chosen].contiguous(),
        "b_enc": torch.zeros(3),
        "b_dec": torch.zeros(vectors.shape[1]),
        "threshold": (own + scores.amax(0)) / 2,
    }
    sae = gs.JumpReLUSAE.from_arrays(arrays, site="embedding", layer=None)
    return sae, {number: texts[i].strip() for number, i in enumerate(chosen)}

"""What takes an SAE of one layer and cannot take a crosscoder or a CLT says so, for the object and for its row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError
from gemma_scope_tl.interp.examples import top_examples
from gemma_scope_tl.registry import resolve
from gemma_scope_tl.release.export import export_suite
from gemma_scope_tl.sae.access import locate
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.verification.sample import candidates
from tests.helpers import hooked, random_gemma, random_layered
from tests.layered_files import KINDS

TEXT = "a word"
REFUSED: dict[str, Callable[[Any, LayeredCoder], Any]] = {
    "features": lambda model, coder: gs.features(model, TEXT, coder),
    "features, among others": lambda model, coder: gs.features(model, TEXT, [coder]),
    "feature_page": lambda model, coder: gs.feature_page(model, coder, 0),
    "top_tokens": lambda model, coder: gs.top_tokens(model, coder, 0),  # pyright: ignore[reportArgumentType]
    "attribute": lambda model, coder: gs.attribute(model, TEXT, coder, "b"),
    "circuit": lambda model, coder: gs.circuit(model, TEXT, [coder], "b"),
    "top_examples": lambda model, coder: top_examples(model, coder, TEXT),
    "export_suite": lambda model, coder: export_suite([coder], "nowhere", gs.About("mit")),
    "locate": lambda model, coder: locate(coder),  # pyright: ignore[reportArgumentType]
}
SAYS = "several layers"


@pytest.fixture(scope="module")
def model() -> Any:
    return hooked(random_gemma("narrow-heads"), "bridge")


@pytest.mark.parametrize("name", REFUSED)
def test_functions_that_take_saes_of_one_layer(name: str, model: Any) -> None:
    with pytest.raises(GemmaScopeError, match=SAYS):
        REFUSED[name](model, random_layered(model.dims, "crosscoder", (0, 1)))


def test_rows_where_one_layer_is_needed() -> None:
    row = resolve("gemma-scope-2-1b-pt-clt", "width_262k_l0_big")
    with pytest.raises(UnknownNameError, match=SAYS):
        gs.load_suite("gemma-3-1b", "clt", width="262k", l0="big", affine=True)
    with pytest.raises(GemmaScopeError, match="takes coders of one layer; only clts, which span several"):
        candidates("gemma-3-1b", releases=[row.release])
    kept, _ = candidates("gemma-3-1b", widths=["262k"])
    assert {one.layers for one in kept} == {None}
    name = "gemma_scope_tl/gemma-scope-2-1b-pt-clt"
    assert not {name, row.release} & set(gs.register_with_sae_lens())


def test_wrong_layers_and_missing_inputs() -> None:
    arrays = KINDS["clt-affine"].arrays()
    given = [[torch.tensor(one[name]) for one in arrays] for name in ("w_enc", "b_enc", "threshold", "w_dec", "b_dec")]
    given[3] = [planes[:, k:] for k, planes in enumerate(given[3])]
    skips = [torch.tensor(one["affine_skip_connection"]) for one in arrays]
    coder = LayeredCoder("clt", range(4), *given, W_skip=skips)  # pyright: ignore
    inputs = [torch.ones(2, 24)] * 4
    acts = coder.encode(inputs)
    for call, said in (
        (lambda: coder.decode(acts), "give the input"),
        (lambda: coder.decode(acts[:2], inputs), "takes latents of its 4 layers"),
        (lambda: coder.written_by(3, acts[3], 1), "j <= k < 4"),
        (lambda: coder.decode_at(-1, acts, inputs[0]), "j <= k < 4"),
        (lambda: coder(inputs[:2]), "a tensor for each; given: 2"),
        (lambda: LayeredCoder("clt", (0, 1.5, 2, 3), *given), "ascend from 0"),  # pyright: ignore
        (lambda: LayeredCoder("clt", (0,), [], [], [], [], []), "takes a list of tensors"),
    ):
        with pytest.raises(SpliceError, match=said):
            call()

"""Attaching, masking and detaching layered coders; their numbers are compared in ``tests/parity``."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import SpliceError, UnknownNameError
from gemma_scope_tl.model.plain import relative_difference
from gemma_scope_tl.sae import layered_pass
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.sites import BACKENDS, ModelDims
from tests.helpers import hooked, random_gemma, random_layered, random_sae, random_tokens, shared_model, state_of

on_backends = pytest.mark.parametrize("backend", BACKENDS)
ROUNDING = 1e-5


@pytest.fixture(params=BACKENDS)
def model(request: Any) -> Any:
    return shared_model("gemma3", request.param)


def test_one_splice_has_the_names_of_single_layer_coders(model: Any) -> None:
    coder, tokens = random_layered(model.dims, "clt", (1, 3)), random_tokens(model, length=6)
    _, cache = model.run_with_cache_with_saes(tokens, saes=coder)
    points = ("input", "acts_pre", "acts_post", "recons", "output")
    for layer in coder.layers:
        for base in (f"blocks.{layer}.hook_mlp_out", f"blocks.{layer}.ln2_post.hook_out"):
            for point in points:
                assert f"{base}.hook_sae_{point}" in cache
    assert cache["blocks.3.hook_mlp_out.hook_sae_acts_post"].shape == (2, 6, 96)
    assert model.get_sae_hook_name(coder, layer=3) == "blocks.3.hook_mlp_out.hook_sae_acts_post"
    with pytest.raises(SpliceError, match="layer="):
        model.get_sae_hook_name(coder)
    _, cache = model.run_with_cache_with_saes(tokens, saes=coder, error_term=True)
    assert "blocks.1.hook_mlp_out.hook_sae_error" in cache
    assert not model.acts_to_saes


def test_a_coder_is_attached_in_all_layers_or_in_none(model: Any) -> None:
    before, dims = state_of(model), model.dims
    coder = random_layered(dims, "clt", (1, 2, 3))
    with gs.splice(model, coder):
        for other in (
            random_layered(dims, "clt", (0, 2)),
            random_sae(dims, "mlp", 3),
            random_sae(dims, "transcoder", 1),
        ):
            with pytest.raises(SpliceError, match="is taken"), gs.splice(model, other):
                pass
        with pytest.raises(SpliceError, match="attached already"):
            model.add_sae(coder)
        with (
            pytest.raises(SpliceError, match="chain"),
            gs.splice(model, random_layered(dims, "clt", (3, 4)), chain=True),
        ):
            pass
        assert len(model.acts_to_saes) == 3
    with pytest.raises(SpliceError, match="is taken"), gs.splice(model, [random_sae(dims, "mlp", 3), coder]):
        pass
    assert state_of(model) == before


def test_a_coder_of_another_model_raises_before_it_is_attached(model: Any, monkeypatch: Any) -> None:
    before, wide = state_of(model), ModelDims(7, 128, 4, 32)
    narrow = random_layered(model.dims, "clt", (0,))
    arrays = list(narrow.W_enc), list(narrow.b_enc), list(narrow.threshold)
    cases = [
        (random_layered(wide, "clt", (0, 1)), "reads 128 dimensions"),
        (random_layered(model.dims, "crosscoder", (1, 7)), "no layer 7"),
        (LayeredCoder("clt", (0,), *arrays, [torch.zeros(96, 1, 32)], [torch.zeros(32)]), "writes 32 dim"),
        (random_layered(model.dims, "crosscoder", (0, 1), model_name="gemma-3-1b"), "gemma-3-1b"),
        (random_layered(model.dims, "crosscoder", (0, 1), model_name="gemma-2-2b"), "gemma-2-2b"),
    ]
    monkeypatch.setattr(model, "model_id", "gemma-3-270m")
    for coder, message in cases:
        with pytest.raises(SpliceError, match=message):
            model.add_sae(coder)
    assert state_of(model) == before


def test_other_functions_say_that_they_take_no_layered_coder(model: Any) -> None:
    coder: Any = random_layered(model.dims, "clt", (1, 3))
    for call in (lambda: gs.top_tokens(model, coder, 3), lambda: gs.features(model, "text", [coder])):
        with pytest.raises(SpliceError, match=r"several layers.*attribution_graph"):
            call()


def test_a_call_needs_a_tensor_of_every_layer(model: Any) -> None:
    coder: Any = random_layered(model.dims, "clt", (1, 3))
    x = torch.randn(1, 5, model.dims.d_model)
    for call in (coder, coder.encode, coder.decode):
        with pytest.raises(SpliceError, match=r"2 layers \(1, 3\), a tensor for each; given: 1"):
            call(x)
    with pytest.raises(SpliceError, match="skip connections: give the inputs"):
        random_layered(model.dims, "clt", (1, 3), skip=True).decode(coder.encode([x, x]))
    assert all(torch.equal(a, b) for a, b in zip(coder([x, x]), coder.decode(coder.encode([x, x])), strict=True))


@on_backends
def test_one_layers_name_detaches_the_whole_coder(backend: str) -> None:
    model = shared_model("gemma3", backend)
    before, tokens = state_of(model), random_tokens(model, length=6)
    first, second = random_layered(model.dims, "clt", (1, 3)), random_layered(model.dims, "crosscoder", (0, 3), seed=1)
    clean = model(tokens)
    model.add_sae(first)
    alone = model(tokens)
    model.add_sae(second)
    both = model(tokens)
    model.reset_saes("blocks.3.mlp.hook_in")
    assert set(model.acts_to_saes) == {"blocks.0.hook_resid_post", "blocks.3.hook_resid_post"}
    model.add_sae(first)
    assert torch.equal(model(tokens), both)
    model.reset_saes("blocks.0.hook_resid_post")
    assert torch.equal(model(tokens), alone)
    with pytest.raises(UnknownNameError):
        model.reset_saes("blocks.0.hook_resid_post")
    model.reset_saes()
    assert torch.equal(model(tokens), clean)
    assert state_of(model) == before


@on_backends
def test_the_splice_survives_the_removal_of_all_hooks_and_copies(backend: str) -> None:
    model = hooked(random_gemma("gemma3"), backend)
    tokens, coder = random_tokens(model, length=6), random_layered(model.dims, "clt", (1, 3), skip=True)
    clean = model(tokens)
    model.add_sae(coder, True)
    name = model.get_sae_hook_name(coder, layer=1)
    model.add_hook(name, lambda acts, hook: acts * 0.5, is_permanent=True)
    spliced = model(tokens)
    twin = copy.deepcopy(model)
    model.reset_hooks(including_permanent=True)  # the hook is gone, the coder is not
    assert len(model.acts_to_saes) == 2
    assert relative_difference(model(tokens), clean) < ROUNDING
    assert torch.equal(twin(tokens), spliced)
    twin_coder = next(iter(twin.acts_to_saes.values()))
    assert twin_coder is not coder
    twin_coder.W_dec[0].zero_()
    assert relative_difference(model(tokens), clean) < ROUNDING
    twin.reset_saes()
    assert torch.equal(twin(tokens), clean)
    if backend == "hooked_transformer":
        again = pickle.loads(pickle.dumps(model))
        assert len(again.acts_to_saes) == 2
        assert torch.equal(again(tokens), model(tokens))
    model.reset_saes()
    assert torch.equal(model(tokens), clean)


def test_nothing_of_a_failed_pass_reaches_the_next(model: Any) -> None:
    coder, tokens = random_layered(model.dims, "crosscoder", (1, 3, 5)), random_tokens(model, length=6)

    def fail(value: Any, hook: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad(), gs.splice(model, coder, exclude_special_tokens=False):
        wanted = model(tokens)
        with pytest.raises(KeyboardInterrupt):
            model.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_resid_post", fail)])
        assert model.token_tracker.notes is None
        if model.backend == "hooked_transformer":  # passes of the bridge begin at the embedding
            with pytest.raises(SpliceError, match="start it at layer 1 or before"):
                model(torch.zeros(2, 6, model.dims.d_model), start_at_layer=3)
        assert torch.equal(model(tokens), wanted)


def test_a_pass_inside_a_hook_has_its_own_latents(model: Any) -> None:
    coder, tokens = random_layered(model.dims, "clt", (1, 3, 5)), random_tokens(model, length=6)
    other, inner = random_tokens(model, batch=3, length=9, seed=1), []
    with torch.no_grad(), gs.splice(model, coder):
        wanted, wanted_inside = model(tokens), model(other)

        def nested(value: Any, hook: Any) -> None:
            if not inner:
                inner.append(None)
                inner[0] = model(other)

        got = model.run_with_hooks(tokens, fwd_hooks=[("blocks.2.hook_resid_post", nested)])
    assert torch.equal(got, wanted)
    assert torch.equal(inner[0], wanted_inside)


@pytest.mark.filterwarnings("ignore:.*RoPE was NOT applied")
def test_passes_that_start_or_stop_inside_are_right_or_raise(model: Any) -> None:
    coder, tokens = random_layered(model.dims, "crosscoder", (1, 3)), random_tokens(model, length=6)
    layers = range(model.dims.n_layers)
    with torch.no_grad(), gs.splice(model, coder, exclude_special_tokens=False):
        logits, cache = model.run_with_cache(tokens)
        stopped = model(tokens, stop_at_layer=3)
        streams = [cache[f"blocks.{layer}.hook_resid_post"] for layer in layers]
        assert torch.equal(stopped, streams[2])
        if model.backend == "hooked_transformer":  # passes of the bridge begin at the embedding
            assert torch.equal(model(streams[0], start_at_layer=1), logits)
            assert torch.equal(model(streams[3], start_at_layer=4), logits)  # all of the coder lies before
            for start in (2, 3):
                with pytest.raises(SpliceError, match="did not run in this pass"):
                    model(streams[start - 1], start_at_layer=start)
        with pytest.raises(SpliceError, match="outside of a forward pass"):
            model.blocks[1](streams[0])


def test_positions_and_special_tokens_keep_the_models_activations(model: Any) -> None:
    tokens = random_tokens(model, length=10)
    tokens[0, :3], tokens[0, 3] = 0, 2  # padding
    for coder in (random_layered(model.dims, "clt", (1, 3)), random_layered(model.dims, "crosscoder", (1, 3))):
        names = [model.get_sae_hook_name(coder, "hook_sae_output", layer=layer) for layer in coder.layers]
        bases = [name.removesuffix(".hook_sae_output") for name in names]
        kept: dict[str, torch.Tensor] = {}

        def keep(value: Any, hook: Any, kept: dict[str, torch.Tensor] = kept) -> None:
            kept[hook.name] = value

        first = model.hooks([(base, keep) for base in bases])  # before the coder's hooks
        with torch.no_grad(), first, gs.splice(model, coder, positions=[2, 5]):
            _, cache = model.run_with_cache(tokens)
        chosen = torch.zeros(2, 10, dtype=torch.bool)
        chosen[0, [5, 8]] = chosen[1, [2, 5]] = True
        for name, before in zip(names, kept.values(), strict=True):
            same = (cache[name] == before).all(-1)
            assert torch.equal(same, ~chosen)


def test_together_with_saes_and_in_a_chain(model: Any) -> None:
    tokens, dims = random_tokens(model, length=6), model.dims
    coder, cross = random_layered(dims, "clt", (1, 3)), random_layered(dims, "crosscoder", (0, 3), seed=1)
    saes = [random_sae(dims, "res", 1), random_sae(dims, "att", 2), random_sae(dims, "mlp", 4)]
    with torch.no_grad():
        clean = model(tokens)
        both = model.run_with_saes(tokens, saes=[coder, cross, *saes], error_term=True)
        assert relative_difference(both, clean) < ROUNDING
        after = random_sae(dims, "res", 3, seed=2)
        with gs.splice(model, cross), gs.splice(model, after, chain=True):
            assert "blocks.3.hook_resid_post.1" in model.acts_to_saes
            got, cache = model.run_with_cache(tokens)
        read = cache["blocks.3.hook_resid_post.1.hook_sae_input"]
        assert torch.equal(read, cache["blocks.3.hook_resid_post.hook_sae_output"])
        assert relative_difference(got, clean) > 1e-2


@pytest.mark.parametrize("kind", ["clt", "crosscoder"])
@pytest.mark.parametrize("error_term", [False, True])
def test_large_batches_keep_latents_in_place_of_sums(kind: str, error_term: bool, monkeypatch: Any) -> None:
    model = shared_model("gemma3", "bridge")
    tokens, coder = random_tokens(model, length=6), random_layered(model.dims, kind, (1, 3, 4), skip=kind == "clt")
    hooks = [(model.get_sae_hook_name(coder, layer=3), lambda acts, hook: acts * 0.5)]

    def run() -> torch.Tensor:
        return model.run_with_hooks_with_saes(tokens, saes=coder, error_term=error_term, fwd_hooks=hooks)

    with torch.no_grad():
        summed = run()
        monkeypatch.setattr(layered_pass, "SUMS_BYTES", 0)
        assert relative_difference(run(), summed) < ROUNDING


def test_threads() -> None:
    models = [shared_model("gemma3", backend) for backend in BACKENDS]
    coder, tokens = random_layered(models[0].dims, "clt", range(7)), random_tokens(models[0], length=8)
    with torch.no_grad():
        wanted = [model.run_with_saes(tokens, saes=coder) for model in models]
    found: list[Any] = []

    def run(model: Any) -> None:
        with torch.no_grad():
            found.extend((models.index(model), model.run_with_saes(tokens, saes=coder)) for _ in range(5))

    threads = [threading.Thread(target=run, args=(model,)) for model in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 10
    assert all(torch.equal(one, wanted[number]) for number, one in found)  # one coder in two models at a time

    def foreign() -> None:
        with pytest.raises(SpliceError, match="layered coder was attached"):
            models[0](tokens)
        found.append("raised")

    with gs.splice(models[0], coder):
        thread = threading.Thread(target=foreign)
        thread.start()
        thread.join()
    assert found[-1] == "raised"


def test_half_precision_and_inference_mode(model: Any) -> None:
    coder, tokens = random_layered(model.dims, "clt", range(7)), random_tokens(model, length=8)
    with torch.no_grad():
        wanted = model.run_with_saes(tokens, saes=coder)
    with torch.inference_mode():
        assert torch.equal(model.run_with_saes(tokens, saes=coder), wanted)
    graded = model.run_with_saes(tokens, saes=coder, error_term=True)
    assert graded.requires_grad
    double = random_layered(model.dims, "clt", range(7)).double()
    with torch.no_grad():
        assert relative_difference(model.run_with_saes(tokens, saes=double), wanted) < 2e-5

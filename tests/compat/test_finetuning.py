"""Training an SAE inside a model, as in SAELens: gradients against the dense formula's, steps against stock."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from sae_lens import HookedSAETransformer
from sae_lens.saes.jumprelu_sae import JumpReLUSAE as StockJumpReLU

import gemma_scope_tl as gs
from gemma_scope_tl.files import file_sha256
from gemma_scope_tl.model.plain import relative_difference
from gemma_scope_tl.sae import sparse_ops as ops
from gemma_scope_tl.sae.access import locate
from gemma_scope_tl.sae.hooked_pass import hooked_pass
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sae.sparse import encode_sparse
from gemma_scope_tl.sites import BACKENDS, flatten_heads, unflatten_heads
from tests.helpers import hooked, random_gemma, random_sae, random_tokens

CASES = {
    "res": ("res", 0, False),
    "att": ("att", 1, False),
    "mlp": ("mlp", 0, False),
    "embedding": ("embedding", None, False),
    "transcoder": ("transcoder", 0, False),
    "skip": ("transcoder", 1, True),
}
TRAINED = ("W_enc", "W_dec", "b_enc", "b_dec", "W_skip")


@pytest.fixture(scope="module", params=BACKENDS)
def model(request: Any) -> Any:
    return hooked(random_gemma("narrow-heads", dtype=torch.float64), request.param)


def gradients(sae: Any) -> dict[str, torch.Tensor]:
    found = {name: p.grad for name, p in sae.named_parameters() if p.grad is not None}
    sae.zero_grad()
    return found


def dense_hooks(sae: Any, kept: torch.Tensor, error_term: bool) -> list[tuple[str, Any]]:
    """The SAE written out with PyTorch's own products, as hooks on its site; ``kept`` where the model's value stays."""
    (site, layer), taken = locate(sae), {}

    def read(value: torch.Tensor, hook: Any) -> None:
        taken["x"] = value

    def write(value: torch.Tensor, hook: Any) -> torch.Tensor:
        x, y = flatten_heads(taken.get("x", value)), flatten_heads(value)
        pre = x @ sae.W_enc + sae.b_enc
        out = torch.where(pre > sae.threshold, pre, 0.0) @ sae.W_dec + sae.b_dec
        out = out if not hasattr(sae, "W_skip") else out + x @ sae.W_skip.T
        out = out + (y - out).detach() if error_term else out
        return unflatten_heads(torch.where(kept[..., None], y, out), value)

    hooks = [(site.hook_name(layer, "hooked_transformer"), read)] if site.is_transcoder else []
    return [*hooks, (site.hook_name_out(layer, "hooked_transformer"), write)]


@pytest.mark.slow
@pytest.mark.parametrize("error_term", [False, True], ids=["plain", "error"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_the_weights_are_those_of_the_dense_formula(model: Any, case: str, error_term: bool) -> None:
    """With BOS and padding left alone, at all positions and at some."""
    site, layer, skip = CASES[case]
    sae = random_sae(model.dims, site, layer, skip=skip).double().requires_grad_(True)
    tokens = random_tokens(model, length=8)
    tokens[1, 4] = 1  # an EOS in the middle
    special, chosen = tokens <= 2, torch.zeros(8, dtype=torch.bool)
    chosen[[2, 4]] = True
    for positions, kept in ((None, special), ([2, 4], special | ~chosen)):
        with gs.splice(model, sae, error_term=error_term, positions=positions):
            model(tokens).square().mean().backward()
        got = gradients(sae)
        model.run_with_hooks(tokens, fwd_hooks=dense_hooks(sae, kept, error_term)).square().mean().backward()
        wanted = gradients(sae)
        assert set(got) == set(wanted) == {name for name in TRAINED if hasattr(sae, name)}  # no gradient of thresholds
        for name in got:
            assert wanted[name].norm() > 0
            # Hugging Face's norms are float32 in a float64 model too: a last bit may round to float32's next.
            assert relative_difference(got[name], wanted[name]) < 1e-6, name


@pytest.mark.parametrize("point", ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"])
@pytest.mark.parametrize("edit", [False, True], ids=["looks", "edits"])
def test_gradients_pass_hooks_as_in_sae_lens(model: Any, point: str, edit: bool) -> None:
    sae = random_sae(model.dims, "res", 0).double().requires_grad_(True)
    stock = StockJumpReLU(sae.cfg)
    stock.load_state_dict(sae.state_dict())
    x = torch.randn(3, 5, model.dims.d_model, generator=torch.Generator().manual_seed(0)).double()
    found: list[dict[str, torch.Tensor]] = []
    for one in (sae, stock):
        one.hook_dict[point].add_hook(lambda value, hook: value * 0.5 if edit else None)
        out = hooked_pass(one, x, need_clean=False).out if one is sae else one(x)
        out.square().sum().backward()
        found.append(gradients(one))
    assert set(found[0]) == set(found[1])
    for name, wanted in found[1].items():
        assert relative_difference(found[0][name], wanted) < 1e-12, name
    plain = sae(x)  # encode and decode, dense
    plain.square().sum().backward()
    for name, got in gradients(sae).items():
        assert relative_difference(got, found[1][name]) < 1e-12, name


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("site", ["res", "att"])
def test_adam_moves_what_it_moves_in_sae_lens(backend: str, site: str) -> None:
    """The lines that a SAELens user writes, on the default setting of both; the model's parameters want gradients."""
    ours, twin = hooked(random_gemma(), backend), hooked(random_gemma(), "hooked_transformer")
    stock = HookedSAETransformer(twin.cfg)
    stock.load_state_dict(twin.state_dict(), strict=False)
    sae = JumpReLUSAE.from_arrays(random_sae(ours.dims, site, 1).state_dict(), site=site, layer=1)
    peer = StockJumpReLU(copy.deepcopy(sae.cfg))
    peer.load_state_dict(sae.state_dict())
    before = copy.deepcopy(sae)
    tokens = random_tokens(ours, length=8)
    for model, one, options in ((ours, sae, {"exclude_special_tokens": False}), (stock, peer, {})):
        optimizer = torch.optim.Adam(one.parameters(), lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model.run_with_saes(tokens, saes=[one], return_type="loss", **options).backward()
            optimizer.step()
    for name, parameter in sae.named_parameters():
        moved = (parameter - getattr(before, name)).detach()
        assert bool(moved.any()) == (name != "threshold"), name
        # Adam divides by the gradient's size: where that is about float32's rounding, so is the direction's error.
        assert relative_difference(parameter.detach(), getattr(peer, name).detach()) < 1e-3, name


@pytest.mark.parametrize("layout", ["gemma-scope", "sae-lens"])
def test_training_never_reaches_the_file_that_weights_are_mapped_from(tmp_path: Path, layout: Any) -> None:
    gs.save_sae(gs.load_sae("bundled", "res", 2, width="1k"), tmp_path, format=layout)
    files = {path: file_sha256(path) for path in tmp_path.iterdir()}
    for path in files:
        path.chmod(0o444)  # what nobody writes into may be mapped
    sae, other = (gs.JumpReLUSAE.from_folder(tmp_path, site="res", layer=2) for _ in range(2))
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path) in maps.read_text()
    before = sae.W_dec.detach().clone()
    optimizer = torch.optim.SGD(sae.parameters(), lr=0.1)
    sae(torch.randn(4, sae.cfg.d_in)).square().sum().backward()
    optimizer.step()
    sae.fold_W_dec_norm()
    assert not torch.equal(sae.W_dec, before)
    assert torch.equal(other.W_dec, before)
    assert torch.equal(gs.JumpReLUSAE.from_folder(tmp_path).W_dec, before)
    assert {path: file_sha256(path) for path in tmp_path.iterdir()} == files


def test_inference_and_attribution_pay_nothing_for_trainable_weights(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept for backward is what a frozen SAE keeps, and entries; only ``backward()`` makes matrices."""
    sae = random_sae(model.dims, "res", 0, d_sae=1024).double().requires_grad_(True)
    x = torch.randn(2, 64, model.dims.d_model, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
    with torch.no_grad():
        assert not hooked_pass(sae, x, need_clean=True).out.requires_grad
        entries = encode_sparse(x, sae.W_enc, sae.b_enc, sae.threshold).latents.numel()
    kept = {}
    for trainable in (False, True):
        sae.requires_grad_(trainable)
        sizes: dict[int, int] = {}

        def pack(t: torch.Tensor, sizes: dict[int, int] = sizes) -> torch.Tensor:
            sizes[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = hooked_pass(sae, x, need_clean=True).out
        kept[trainable] = sum(sizes.values())
    assert kept[True] - kept[False] <= x.numel() + sae.cfg.d_sae + entries
    with monkeypatch.context() as patch:
        patch.setattr(ops, "latent_sums", None)  # what makes the gradient of a matrix
        (gradient,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, gradient)
    assert all(p.grad is not None for name, p in sae.named_parameters() if name != "threshold")


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_an_sae_that_was_loaded_without_gradients_can_be_trained(mode: Any) -> None:
    with mode():
        sae = gs.load_sae("bundled", "res", 2, width="1k")
    sae(torch.randn(4, sae.cfg.d_in)).square().sum().backward()
    assert sae.W_enc.grad is not None
    assert sae.W_dec.grad is not None


def test_frozen_saes_leave_no_graph_and_get_no_gradient(model: Any) -> None:
    sae, tokens = random_sae(model.dims, "res", 0).double(), random_tokens(model, length=6)
    assert not any(p.requires_grad for p in sae.parameters())
    model.run_with_saes(tokens, saes=[sae]).sum().backward()
    assert all(p.grad is None for p in sae.parameters())


@pytest.mark.parametrize("on", ["activations", "features"])
@pytest.mark.parametrize("edit", ["clamp", "scale", "ablate"])
def test_gradients_reach_the_weights_through_edits(model: Any, edit: str, on: Any) -> None:
    """``x + sum_i (g_i(f_i) - f_i) W_dec[i]``, and with the SAE spliced in ``f_i`` itself, by autograd."""
    sae = random_sae(model.dims, "res", 0).double().requires_grad_(True)
    tokens, some, name = random_tokens(model, length=6), [3, 70, 71], "blocks.0.hook_resid_post"
    number = {"clamp": 1.5, "scale": 0.25, "ablate": 0.0}[edit]
    arguments = () if edit == "ablate" else (number,)
    hook = getattr(gs, edit)(sae, some, *arguments, on=on)
    special = (tokens <= 2)[..., None]

    def dense(x: torch.Tensor, hook: Any) -> torch.Tensor:
        pre = x @ sae.W_enc + sae.b_enc
        acts = torch.where(pre > sae.threshold, pre, 0.0)
        new = torch.full_like(acts, number) if edit == "clamp" else number * acts
        if on == "activations":
            return torch.where(special, x, x + (new - acts)[..., some] @ sae.W_dec[some])
        chosen = torch.zeros(acts.shape[-1], dtype=torch.bool)
        chosen[some] = True
        return torch.where(special, x, torch.where(chosen, new, acts) @ sae.W_dec + sae.b_dec)

    with model.saes([sae]) if on == "features" else nullcontext():
        model.run_with_hooks(tokens, fwd_hooks=[hook]).square().mean().backward()
    got = gradients(sae)
    model.run_with_hooks(tokens, fwd_hooks=[(name, dense)]).square().mean().backward()
    wanted = gradients(sae)
    assert set(got) == set(wanted) >= {"W_dec"}
    for key in got:
        assert relative_difference(got[key], wanted[key]) < 1e-6, key


STEERED = [("activation", "activations"), ("norm", "activations"), ("mean_norm", "activations")]
STEERED += [("activation", "features"), ("mean_norm", "features")]


@pytest.mark.parametrize(("unit", "on"), STEERED)
def test_gradients_reach_the_weights_through_steering(model: Any, unit: Any, on: Any) -> None:
    """``x + sum_i a_i W_dec[i]``, or ``f_i + a_i``, in units of norms over the row's length, by autograd."""
    sae = random_sae(model.dims, "res", 0).double()
    with torch.no_grad():
        sae.W_dec *= 1.5  # lengths that are not one
    some, numbers, mean = [3, 70], torch.tensor([2.0, -0.5], dtype=torch.float64), 7.0
    given = {"mean_norm": mean} if unit == "mean_norm" else {}
    with torch.no_grad():
        hook = gs.steer(sae, some, numbers, unit=unit, on=on, **given)  # made of frozen weights, without gradients
    sae.requires_grad_(True)
    tokens, name = random_tokens(model, length=6), "blocks.0.hook_resid_post"
    special = (tokens <= 2)[..., None]

    def dense(x: torch.Tensor, hook: Any) -> torch.Tensor:
        rows = sae.W_dec[some]
        a = numbers if unit == "activation" else numbers / rows.norm(dim=-1)
        a = a * mean if unit == "mean_norm" else a * x.norm(dim=-1, keepdim=True) if unit == "norm" else a
        if on == "activations":
            return torch.where(special, x, x + a @ rows)
        pre = x @ sae.W_enc + sae.b_enc
        acts = torch.where(pre > sae.threshold, pre, 0.0)
        acts = acts + torch.zeros_like(acts).index_add(-1, torch.tensor(some), a.expand(*x.shape[:-1], -1))
        return torch.where(special, x, acts @ sae.W_dec + sae.b_dec)

    def run(hooks: Any, spliced: bool) -> dict[str, torch.Tensor]:
        with model.saes([sae]) if spliced else nullcontext():
            model.run_with_hooks(tokens, fwd_hooks=hooks).square().mean().backward()
        return gradients(sae)

    got, wanted = run([hook], on == "features"), run([(name, dense)], False)
    assert set(got) == set(wanted) >= {"W_dec"}
    for key in got:  # lengths are taken in float32
        assert relative_difference(got[key], wanted[key]) < 1e-6, key


def test_steering_follows_the_weights_and_leaves_no_graph(model: Any) -> None:
    """The same hook before and after a step, with gradients and without, in a copy of the model and in a pickle."""
    sae = random_sae(model.dims, "res", 0).double().requires_grad_(True)
    tokens, hook = random_tokens(model, length=6), gs.steer(sae, 3, 2.0)
    with torch.inference_mode():
        before = model.run_with_hooks(tokens, fwd_hooks=[hook])
    model.run_with_hooks(tokens, fwd_hooks=[hook]).square().mean().backward()
    with model.hooks(fwd_hooks=[hook]):
        twin = copy.deepcopy(model)
        assert torch.equal(twin(tokens), model(tokens))
    with torch.no_grad():
        sae.W_dec -= sae.W_dec.grad + 1
        after = model.run_with_hooks(tokens, fwd_hooks=[hook])
        assert not torch.equal(after, before)
        assert torch.equal(after, model.run_with_hooks(tokens, fwd_hooks=[gs.steer(sae, 3, 2.0)]))
        assert torch.equal(twin(tokens), before)  # the copy has the weights of its time
    frozen = gs.steer(sae.requires_grad_(False), [3, 4], 2.0, unit="norm")
    for _ in range(2):
        logits = model.run_with_hooks(tokens, fwd_hooks=[frozen])
    assert frozen[1].vector_on(tokens.device) is frozen[1].vector_on(tokens.device)  # made once
    logits.sum().backward() if logits.requires_grad else None
    assert not frozen[1].vector.requires_grad


def test_functions_of_this_package_leave_trainable_saes_as_they_are() -> None:
    """Results are those of frozen SAEs, without a graph, without a gradient, without a warning."""
    model = hooked(random_gemma("narrow-heads"), "bridge")
    tokens, text = random_tokens(model, length=8), "And God said, Let there be light"
    results: list[list[Any]] = []
    for trainable in (False, True):
        saes = [random_sae(model.dims, "res", i, d_sae=64).requires_grad_(trainable) for i in (0, 1)]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Converting a tensor with requires_grad")
            results.append(
                [
                    gs.features(model, tokens, saes),
                    gs.attribute(model, text, saes, lambda logits: logits[0, -1, 40]),
                    gs.circuit(model, text, saes, lambda logits: logits[0, -1, 40], nodes=4).nodes,
                    gs.top_tokens(model, saes[0], [1, 2]),
                    gs.evaluate(model, saes, tokens, context=8, progress=False, resamples=20),
                ]
            )
        assert all(p.grad is None and p.requires_grad == trainable for sae in saes for p in sae.parameters())
    for frozen, free in zip(*results, strict=True):
        pd.testing.assert_frame_equal(frozen, free)

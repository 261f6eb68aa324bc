"""The error term: what an unedited pass gives, what a hook costs, which edits are seen, and the gradients."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gemma_scope_tl.model.plain import relative_difference
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import hooked, random_gemma, random_sae, random_tokens

PLACES = [("res", 1), ("mlp", 2), ("att", 0), ("embedding", None), ("transcoder", 3)]
POINTS = ["hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"]


@pytest.fixture(params=BACKENDS, scope="module")
def model(request: pytest.FixtureRequest) -> Any:
    made = hooked(random_gemma(), request.param)
    for parameter in made.parameters():
        parameter.requires_grad_(False)
    return made


def _at_site(model: Any, sae: Any, hooks: Any = (), **options: Any) -> torch.Tensor:
    """What flows on from the site that ``sae`` writes."""
    write, seen = model.get_sae_hook_name(sae).removesuffix(".hook_sae_acts_post"), []
    with model.saes([sae], **options), model.hooks([*hooks, (write, lambda value, hook: seen.append(value))]):
        model(random_tokens(model))
    return seen[0]


class EncoderProducts(TorchDispatchMode):
    """Counts the rows times ``W_enc``, in whole passes over the tokens (blocks add up)."""

    def __init__(self, sae: Any, tokens: torch.Tensor) -> None:
        super().__init__()
        self.inner, self.outer, self.whole = sae.W_enc.shape[0], sae.W_enc.shape[1], sae.W_enc.shape[1] * tokens.numel()
        self.entries = 0

    @property
    def passes(self) -> float:
        return self.entries / self.whole

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        if func.overloadpacket in (aten.mm, aten.addmm, aten.bmm, aten.matmul):  # matmul stays whole in inference mode
            right = args[2] if func.overloadpacket is aten.addmm else args[1]
            if tuple(right.shape[-2:]) == (self.inner, self.outer):
                self.entries += out.numel()
        return out


def _read(value: torch.Tensor, hook: Any) -> None:
    value.sum()


def _halve(value: torch.Tensor, hook: Any) -> torch.Tensor:
    return value * 0.5


def _in_place(value: torch.Tensor, hook: Any) -> None:
    value.mul_(0.5)


def _through_a_view(value: torch.Tensor, hook: Any) -> None:
    value.flatten()[:] *= 0.5


def _behind_autograd(value: torch.Tensor, hook: Any) -> None:
    value.data.mul_(0.5)


def _in_numpy(value: torch.Tensor, hook: Any) -> None:
    array = value.numpy()
    array *= 0.5


def _passes(model: Any, sae: Any, hooks: list[tuple[str, Any]]) -> float:
    tokens = random_tokens(model)
    name = model.get_sae_hook_name(sae)
    pairs = [(name.replace("hook_sae_acts_post", point), fn) for point, fn in hooks]
    with model.saes([sae], use_error_term=True), model.hooks(pairs), EncoderProducts(sae, tokens) as count:
        model(tokens)
    return count.passes


COSTS: list[tuple[str, list[tuple[str, Any]], int]] = [
    ("no hook", [], 1),
    *[(f"read {point}", [(point, _read)], 1) for point in (*POINTS, "hook_sae_error", "hook_sae_output")],
    ("read all", [(point, _read) for point in POINTS], 1),
    ("edit the input", [("hook_sae_input", _halve)], 2),
    ("edit pre-activations", [("hook_sae_acts_pre", _halve)], 1),
    ("edit activations", [("hook_sae_acts_post", _halve)], 1),
    ("edit activations in place", [("hook_sae_acts_post", _in_place)], 1),
    ("edit the reconstruction", [("hook_sae_recons", _halve)], 1),
    ("read pre-activations, edit activations", [("hook_sae_acts_pre", _read), ("hook_sae_acts_post", _halve)], 1),
]


@pytest.mark.parametrize(("hooks", "wanted"), [case[1:] for case in COSTS], ids=[case[0] for case in COSTS])
def test_how_often_the_encoder_multiplies(model: Any, hooks: Any, wanted: int) -> None:
    """Once, whatever looks on; the clean reconstruction needs the encoder again only for another input."""
    sae = random_sae(model.dims, "res", 1, d_sae=200)  # 200 is no width of the model's own
    for guard in (torch.no_grad(), torch.enable_grad()):
        with guard:
            assert _passes(model, sae, hooks) == wanted


def test_a_cache_costs_no_second_product(model: Any) -> None:
    sae, tokens = random_sae(model.dims, "res", 1, d_sae=200), random_tokens(model)
    for guard in (torch.no_grad(), torch.inference_mode()):
        with guard, model.saes([sae], use_error_term=True), EncoderProducts(sae, tokens) as count:
            model.run_with_cache(tokens)
        assert count.passes == 1


@pytest.mark.parametrize(("site", "layer"), PLACES)
def test_unedited_passes_are_the_models_own(model: Any, site: str, layer: int | None) -> None:
    """``x_hat + (y - x_hat)`` rounds twice: each rounding is half an ulp of the larger of ``y`` and the error."""
    sae, tokens = random_sae(model.dims, site, layer), random_tokens(model)
    write = model.get_sae_hook_name(sae).removesuffix(".hook_sae_acts_post")
    with torch.no_grad():
        logits, cache = model.run_with_cache(tokens, names_filter=write)
        y = cache[write]
        recons = _at_site(model, sae, use_error_term=False)
        got = _at_site(model, sae, use_error_term=True)
        bound = 2**-23 * (y.abs() + 2 * (y - recons).abs())  # two half ulps, at most
        assert bool(((got - y).abs() <= bound).all())
        assert relative_difference(y, recons) > 1e-2  # the SAE alone would change much
        spliced = model.run_with_saes(tokens, saes=[sae], use_error_term=True)
    assert relative_difference(spliced, logits) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_unedited_passes_of_a_bfloat16_model(backend: str, subtests: pytest.Subtests) -> None:
    model = hooked(random_gemma(dtype=torch.bfloat16), backend)
    tokens = random_tokens(model)
    for (site, layer), dtype in product(PLACES, (torch.float32, torch.bfloat16)):
        with subtests.test(site=site, dtype=dtype):
            sae = random_sae(model.dims, site, layer).to(dtype)
            write = model.get_sae_hook_name(sae).removesuffix(".hook_sae_acts_post")
            with torch.no_grad():
                y = model.run_with_cache(tokens, names_filter=write)[1][write].double()
                recons = _at_site(model, sae, use_error_term=False).double()
                got = _at_site(model, sae, use_error_term=True).double()
            off = (got - y).abs()
            if dtype == torch.float32:  # the error is float32; rounding y to bfloat16 gives y: off by 2**-16 at most
                assert bool((off <= 2**-16 * (y.abs() + (y - recons).abs())).all())
                assert (got == y).double().mean() > 0.99
            else:  # two roundings to bfloat16, of the error and of the sum, and one in the reconstruction
                assert bool((off <= 2**-8 * (y.abs() + 3 * (y - recons).abs() + recons.abs())).all())


EDITS: list[Callable[..., Any]] = [_in_place, _through_a_view, _behind_autograd, _in_numpy]


@pytest.mark.slow
@pytest.mark.parametrize("point", [*POINTS, "hook_sae_error", "hook_sae_output"])
@pytest.mark.parametrize("error_term", [True, False], ids=["error", "no-error"])
def test_writes_count_like_returned_tensors(
    model: Any, point: str, error_term: bool, subtests: pytest.Subtests
) -> None:
    """Also behind autograd's back, and in inference mode, where tensors have no version."""
    sae = random_sae(model.dims, "res", 1)
    name = model.get_sae_hook_name(sae).replace("hook_sae_acts_post", point)
    with torch.no_grad():
        wanted = _at_site(model, sae, [(name, _halve)], use_error_term=error_term)
        untouched = _at_site(model, sae, use_error_term=error_term)
    for edit in EDITS:
        with subtests.test(edit=edit.__name__):
            with torch.no_grad():
                got = _at_site(model, sae, [(name, edit)], use_error_term=error_term)
            with torch.inference_mode():
                inference = _at_site(model, sae, [(name, edit)], use_error_term=error_term)
            assert torch.equal(got, wanted)
            assert torch.equal(inference, wanted)
            assert torch.equal(got, untouched) == (point == "hook_sae_error" and not error_term)


def test_edits_against_the_formula(model: Any) -> None:
    """With ``E`` an edit: ``E(x_hat) + y - x_hat``, in float64 and written out."""
    sae, tokens = random_sae(model.dims, "res", 1).double(), random_tokens(model)
    write = "blocks.1.hook_resid_post"
    with torch.no_grad():
        y = model.run_with_cache(tokens, names_filter=write)[1][write].double()

    def decoded(acts: torch.Tensor) -> torch.Tensor:
        return acts @ sae.W_dec + sae.b_dec

    def gated(pre: torch.Tensor) -> torch.Tensor:
        return pre * (pre > sae.threshold)

    pre = y @ sae.W_enc + sae.b_enc
    clean = decoded(gated(pre))
    formulas = {
        "hook_sae_input": decoded(gated(0.5 * y @ sae.W_enc + sae.b_enc)),
        "hook_sae_acts_pre": decoded(gated(0.5 * pre)),
        "hook_sae_acts_post": decoded(0.5 * gated(pre)),
        "hook_sae_recons": 0.5 * clean,
    }
    for point, edited in formulas.items():
        for edit in (_halve, _in_place):
            with torch.no_grad():
                got = _at_site(model, sae, [(f"{write}.{point}", edit)], use_error_term=True)
            wanted = torch.where((tokens <= 2)[..., None], y, edited + y - clean)
            assert relative_difference(got, wanted) < 1e-7  # the site is float32
            assert relative_difference(clean, edited) > 1e-2


@pytest.mark.parametrize("point", [None, "hook_sae_acts_pre", "hook_sae_acts_post"])
@pytest.mark.parametrize("error_term", [True, False], ids=["error", "no-error"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_the_dense_formula(backend: str, error_term: bool, point: str | None) -> None:
    """Of the activations, as ``retain_grad`` in a hook gives them, and of the SAE's input, through a whole model."""
    model = hooked(random_gemma("narrow-heads", dtype=torch.float64), backend)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    sae, tokens, write = random_sae(model.dims, "res", 0).double(), random_tokens(model), "blocks.0.hook_resid_post"
    special = (tokens <= 2)[..., None]
    leaves: list[torch.Tensor] = []
    kept: dict[str, torch.Tensor] = {}

    def leaf(value: torch.Tensor, hook: Any) -> torch.Tensor:
        leaves.append(value.detach().clone().requires_grad_())
        return leaves[-1] * 1

    def keep(value: torch.Tensor, hook: Any) -> None:
        value.retain_grad()
        kept[hook.name.split(".")[-1]] = value

    def dense(value: torch.Tensor, hook: Any) -> torch.Tensor:
        pre = value @ sae.W_enc + sae.b_enc
        pre.retain_grad()
        acts = torch.where(pre > sae.threshold, pre, 0.0)
        acts.retain_grad()
        kept["dense hook_sae_acts_pre"], kept["dense hook_sae_acts_post"] = pre, acts
        out = acts @ sae.W_dec + sae.b_dec
        out = out + (value - out).detach() if error_term else out
        return torch.where(special, value, out)

    with model.hooks([(write, leaf)]), model.saes([sae], use_error_term=error_term):
        hooks = [(f"{write}.{point}", keep)] if point else []
        model.run_with_hooks(tokens, fwd_hooks=hooks).square().mean().backward()
    with model.hooks([(write, leaf), (write, dense)]):
        model(tokens).square().mean().backward()
    got, wanted = (_grad(one) for one in leaves)
    # Hugging Face's norms are float32 in a float64 model too: where the two sums of the error term differ in float64's
    # last bit, which depends on the processor, a value there may round to float32's next.
    tolerance = 1e-6 if backend == "bridge" and error_term else 1e-10
    assert relative_difference(got, wanted) < tolerance
    assert wanted.norm() > 0
    if point:
        assert relative_difference(_grad(kept[point]), _grad(kept[f"dense {point}"])) < tolerance
        inactive = kept["dense hook_sae_acts_post"] == 0
        assert relative_difference(_grad(kept[point])[inactive], _grad(kept[f"dense {point}"])[inactive]) < tolerance
    assert all(parameter.grad is None for parameter in sae.parameters())


def _grad(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad

"""What can be done with a SAELens SAE can be done with ours, with the same result: pairs of equal weights."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sae_lens
import torch
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from sae_lens.saes import jumprelu_sae, transcoder
from sae_lens.saes.sae import SAEMetadata

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError, WeightsError
from gemma_scope_tl.interop.training_sae import GemmaScopeTrainingSAE, GemmaScopeTrainingSAEConfig
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE, JumpReLUSkipTranscoder, JumpReLUTranscoder

D_IN, D_SAE = 24, 64
CLASSES = {
    "jumprelu": (jumprelu_sae.JumpReLUSAE, jumprelu_sae.JumpReLUSAEConfig, JumpReLUSAE),
    "transcoder": (transcoder.JumpReLUTranscoder, transcoder.JumpReLUTranscoderConfig, JumpReLUTranscoder),
    "skip": (transcoder.JumpReLUSkipTranscoder, transcoder.JumpReLUSkipTranscoderConfig, JumpReLUSkipTranscoder),
}
HOOKS = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}


def pair(kind: str = "jumprelu", hook_z: bool = False) -> tuple[Any, Any]:
    """SAELens's SAE and ours, of the same random weights; a third of the latents fire."""
    stock_class, config_class, our_class = CLASSES[kind]
    generator = torch.Generator().manual_seed(0)
    hooks = {"hook_name": "blocks.1.attn.hook_z" if hook_z else "blocks.1.hook_resid_post"}
    options: dict[str, Any] = {"d_in": D_IN, "d_sae": D_SAE, "apply_b_dec_to_input": False}
    if kind == "jumprelu":
        options["reshape_activations"] = "hook_z" if hook_z else "none"
    else:
        options["d_out"], hooks = D_IN, HOOKS
    metadata = {"model_name": "gemma-2-2b", "prepend_bos": True, "context_size": 128, **hooks}
    stock = stock_class(config_class(**options, metadata=SAEMetadata(**metadata)))
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * D_IN**-0.5)
            if name == "threshold":
                parameter.abs_().add_(0.3)
    ours = our_class(copy.deepcopy(stock.cfg))
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def inputs(hook_z: bool = False) -> torch.Tensor:
    x = torch.randn(3, 5, D_IN, generator=torch.Generator().manual_seed(1))
    return x.unflatten(-1, (4, 6)) if hook_z else x


def same_parameters(one: Any, other: Any) -> None:
    ours = dict(other.named_parameters())
    for name, parameter in one.named_parameters():
        assert torch.equal(ours.pop(name), parameter), name
        assert getattr(other, name).requires_grad == parameter.requires_grad
    assert not ours


KINDS = ["jumprelu", "transcoder", "skip"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_public_name_and_argument_of_sae_lens_is_there(kind: str) -> None:
    stock, ours = pair(kind)
    public = {name for name in dir(stock) if not name.startswith("_")}
    missing = {name for name in public if not hasattr(ours, name)}
    assert not missing
    for name in public:
        theirs, mine = getattr(stock, name), getattr(ours, name)
        if not callable(theirs) or isinstance(theirs, torch.nn.Module) or name in ("activation_fn",):
            continue
        assert callable(mine), name
        wanted = list(inspect.signature(theirs).parameters.values())
        given = inspect.signature(mine).parameters
        anything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in given.values())
        for place, parameter in enumerate(wanted):
            if parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
                continue
            assert parameter.name in given or anything, f"{name}({parameter.name}=)"
            if parameter.kind is not inspect.Parameter.KEYWORD_ONLY and not anything:
                assert list(given)[place] == parameter.name, f"{name}: the place of {parameter.name}"


@pytest.mark.parametrize(
    ("kind", "hook_z"), [("jumprelu", False), ("jumprelu", True), ("transcoder", False), ("skip", False)]
)
def test_encode_decode_forward(kind: str, hook_z: bool) -> None:
    stock, ours = pair(kind, hook_z)
    x = inputs(hook_z)
    acts = stock.encode(x)
    assert 0.1 < float((acts > 0).float().mean()) < 0.6
    assert torch.equal(ours.encode(x), acts)
    assert torch.equal(ours.decode(acts), stock.decode(acts))
    torch.testing.assert_close(ours(x), stock(x), rtol=0, atol=1e-6)  # the skip path is added in another order
    if kind != "jumprelu":
        for got, wanted in zip(ours.forward_with_activations(x), stock.forward_with_activations(x), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    for name in ("hook_z_reshaping_mode", "d_head", "dtype", "device", "use_error_term"):
        assert getattr(ours, name) == getattr(stock, name), name
    assert ours.cfg.to_dict() == stock.cfg.to_dict()
    assert ours.get_name() == stock.get_name()


@pytest.mark.parametrize("hook_z", [False, True])
def test_the_error_term_and_hooks_of_an_sae_by_itself(hook_z: bool) -> None:
    x = inputs(hook_z)
    results = []
    for sae in pair(hook_z=hook_z):
        with pytest.warns(DeprecationWarning, match="use_error_term"):
            sae.use_error_term = True
        out, cache = sae.run_with_cache(x)
        edited = sae.run_with_hooks(x, fwd_hooks=[("hook_sae_acts_post", lambda value, hook: 2 * value)])
        seen: list[torch.Tensor] = []
        sae.run_with_hooks(
            x, fwd_hooks=[(lambda name: name == "hook_sae_error", lambda v, hook, to=seen: to.append(v))]
        )
        results.append((out, dict(cache), edited, seen[0]))
    (out, cache, edited, error), (our_out, our_cache, our_edited, our_error) = results
    torch.testing.assert_close(our_out, out, rtol=0, atol=1e-6)
    torch.testing.assert_close(our_edited, edited, rtol=0, atol=1e-6)
    torch.testing.assert_close(our_error, error, rtol=0, atol=1e-6)
    assert set(our_cache) == set(cache)
    for name, value in cache.items():
        torch.testing.assert_close(our_cache[name], value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_folding(kind: str) -> None:
    g = torch.Generator().manual_seed(2)
    matrix = torch.eye(D_IN) + 0.1 * torch.randn(D_IN, D_IN, generator=g)
    folds: list[Callable[[Any], Any]] = [
        lambda s: s.fold_W_dec_norm(),
        lambda s: s.fold_and_get_W_dec_norm(),
        lambda s: s.fold_activation_norm_scaling_factor(1.7),
    ]
    if kind == "jumprelu":
        folds.append(lambda s: s.fold_activation_whitening(torch.ones(D_IN), matrix, matrix.inverse()))
    for fold in folds:
        stock, ours = pair(kind)
        for one in (stock, ours):
            fold(one)
        same_parameters(stock, ours)
        assert ours.cfg.normalize_activations == stock.cfg.normalize_activations
    assert torch.equal(ours.get_W_dec_norm(), stock.get_W_dec_norm())


@pytest.mark.parametrize(
    "move",
    [
        lambda s: s.to("cpu", torch.float64),
        lambda s: s.to(dtype=torch.float64),
        lambda s: s.to(torch.float64),
        lambda s: s.to(torch.zeros(1, dtype=torch.float64)),
        lambda s: s.to(device="cpu"),
        lambda s: s.to("meta"),
        lambda s: s.to(torch.device("meta"), dtype=torch.float64),
        lambda s: copy.deepcopy(s),
        lambda s: s.eval().train(),
    ],
)
@pytest.mark.parametrize("kind", ["jumprelu", "skip"])
def test_moves_and_copies_leave_the_same_object(kind: str, move: Callable[[Any], Any]) -> None:
    stock, ours = (move(one) for one in pair(kind))
    assert (ours.dtype, ours.device, ours.training) == (stock.dtype, stock.device, stock.training)
    assert ours.cfg.to_dict() == stock.cfg.to_dict()
    if ours.device.type != "meta":
        same_parameters(stock, ours)
        x = inputs().to(stock.dtype)  # for another dtype ours answers in that, and casts for W_skip too
        torch.testing.assert_close(ours(x), stock(x), rtol=0, atol=1e-6)


def test_sixteen_bits_keep_the_threshold() -> None:
    """The difference: SAELens rounds thresholds with the rest."""
    stock, ours = (one.to(torch.bfloat16) for one in pair())
    assert (stock.threshold.dtype, ours.threshold.dtype) == (torch.bfloat16, torch.float32)
    assert (ours.dtype, ours.cfg.dtype) == (stock.dtype, stock.cfg.dtype)
    assert torch.equal(ours.W_enc, stock.W_enc)


def test_copies_are_independent_and_pickles_hold_all() -> None:
    """SAELens's SAEs cannot be pickled; ours come back with site, layer and metadata."""
    sae = gs.load_sae("bundled", "res", 2, width="1k")
    x = torch.randn(4, sae.cfg.d_in, generator=torch.Generator().manual_seed(0))
    for twin in (copy.deepcopy(sae), pickle.loads(pickle.dumps(sae)), copy.deepcopy(copy.deepcopy(sae))):
        assert torch.equal(twin(x), sae(x))
        assert (twin.site, twin.layer, twin.row) == (sae.site, sae.layer, sae.row)
        assert twin.cfg.metadata == sae.cfg.metadata
        assert [p.requires_grad for p in twin.parameters()] == [p.requires_grad for p in sae.parameters()]
        before = sae.W_dec.detach().clone()
        twin.fold_activation_norm_scaling_factor(2.0)
        twin.add_hook("hook_sae_acts_post", lambda value, hook: 0 * value)
        assert torch.equal(sae.W_dec, before)
        assert not sae.hook_sae_acts_post.fwd_hooks


def test_the_deprecated_tuple_and_from_dict() -> None:
    for kind in KINDS:
        for sae in pair(kind):
            with pytest.warns(DeprecationWarning):
                assert sae[0] is sae and sae[1] == sae.cfg.to_dict() and sae[2] is None and len(sae) == 3
            with pytest.warns(DeprecationWarning):
                assert next(iter(sae)) is sae
            made = type(sae).from_dict(sae.cfg.to_dict())
            assert type(made) is type(sae)
            assert made.cfg.to_dict() == sae.cfg.to_dict()


def test_what_is_refused_says_what_to_do() -> None:
    """``apply_b_dec_to_input=True`` is SAELens's default for SAEs that are made; no released Gemma Scope SAE has it."""
    config = jumprelu_sae.JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE)
    assert config.apply_b_dec_to_input
    with pytest.raises(GemmaScopeError, match="fold both into the weights"):
        JumpReLUSAE(config)
    with pytest.raises(UnknownNameError, match="standard"):
        JumpReLUSAE.get_sae_class_for_architecture("standard")


# -- loading and saving ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_what_either_saves_the_other_loads(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    stock, ours = pair(kind)
    stock.to(dtype).save_model(tmp_path / "stock")
    ours.to(dtype).save_model(tmp_path / "ours")
    gs.save_sae(ours, tmp_path / "folder", format="sae-lens")
    for folder in ("stock", "ours", "folder"):
        theirs = type(stock).load_from_disk(tmp_path / folder)
        mine = JumpReLUSAE.load_from_disk(tmp_path / folder)
        assert type(mine) is type(ours)
        assert theirs.dtype == mine.dtype == mine.W_enc.dtype == dtype
        assert mine.cfg.dtype == theirs.cfg.dtype
        for name, parameter in theirs.named_parameters():
            assert torch.equal(getattr(mine, name).to(parameter.dtype), parameter), name
        assert JumpReLUSAE.load_from_disk(tmp_path / folder, dtype="float32").dtype == torch.float32
        folded = JumpReLUSAE.load_from_disk(tmp_path / folder, fold_W_dec_norm=True)
        torch.testing.assert_close(folded.get_W_dec_norm(), torch.ones(D_SAE, dtype=dtype), rtol=0.02, atol=0)


def test_the_dtype_of_an_npz(tmp_path: Path) -> None:
    for name in ("float32", "float16", "float64"):
        gs.save_sae(pair()[1].to(getattr(torch, name)), tmp_path / name)
        assert JumpReLUSAE.load_from_disk(tmp_path / name).dtype == getattr(torch, name)


@pytest.mark.parametrize("given", [None, "bfloat16"])
def test_converters_from_disk(tmp_path: Path, given: str | None) -> None:
    stock = pair()[0]
    stock.save_model(tmp_path)

    def doubled(path: Any, device: str, cfg_overrides: dict[str, Any] | None) -> Any:
        cfg, state = loaders.sae_lens_disk_loader(path, device, cfg_overrides)
        return cfg, {name: 2 * value for name, value in state.items()}

    theirs = sae_lens.SAE.load_from_disk(tmp_path, dtype=given, converter=doubled, fold_W_dec_norm=True)
    mine = JumpReLUSAE.load_from_disk(tmp_path, dtype=given, converter=doubled, fold_W_dec_norm=True)
    assert (mine.site, mine.layer, mine.dtype) == ("res", 1, theirs.dtype)
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(getattr(mine, name).to(parameter.dtype), parameter)


def test_a_bias_on_the_input_is_folded_and_scaled_activations_are_refused(tmp_path: Path) -> None:
    config = jumprelu_sae.JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE)
    stock = jumprelu_sae.JumpReLUSAE(config)
    with torch.no_grad():
        stock.b_dec.normal_(generator=torch.Generator().manual_seed(0))
    stock.save_model(tmp_path)
    for mine in (
        JumpReLUSAE.load_from_disk(tmp_path),
        JumpReLUSAE.load_from_disk(tmp_path, converter=loaders.sae_lens_disk_loader),
    ):
        torch.testing.assert_close(mine(inputs()), stock(inputs()), rtol=0, atol=1e-5)
    written = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**written, "normalize_activations": "layer_norm"}))
    for options in ({}, {"converter": loaders.sae_lens_disk_loader}):
        with pytest.raises(GemmaScopeError, match="layer_norm"):
            JumpReLUSAE.load_from_disk(tmp_path, **options)


def test_a_training_checkpoint_says_how_to_make_an_sae_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    cfg = GemmaScopeTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, normalize_activations="expected_average_only_in")
    GemmaScopeTrainingSAE(cfg).save_model(tmp_path / "checkpoint")
    for load in (sae_lens.SAE.load_from_disk, JumpReLUSAE.load_from_disk, JumpReLUSAE.from_folder):
        with pytest.raises(GemmaScopeError, match=r"training checkpoint.*TrainingSAE.load_from_disk") as caught:
            load(tmp_path / "checkpoint")
        assert load == sae_lens.SAE.load_from_disk or isinstance(caught.value, WeightsError)
    training = sae_lens.TrainingSAE.load_from_disk(tmp_path / "checkpoint")
    assert isinstance(training, GemmaScopeTrainingSAE)
    training.fold_activation_norm_scaling_factor(0.5)
    training.save_inference_model(tmp_path / "sae")
    x = inputs()
    stock, ours = sae_lens.SAE.load_from_disk(tmp_path / "sae"), JumpReLUSAE.load_from_disk(tmp_path / "sae")
    assert torch.equal(ours(x), stock(x))
    torch.testing.assert_close(ours(x), training(x), rtol=0, atol=1e-5)


# -- releases ----------------------------------------------------------------------------------------------------------

RELEASES = {
    "res": ("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71", 2304),
    "canonical": ("gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical", 2304),
    "mlp": ("gemma-scope-2b-pt-mlp-canonical", "layer_3/width_16k/canonical", 2304),
    "att": ("gemma-scope-2b-pt-att-canonical", "layer_5/width_16k/canonical", 2048),
    "embedding": ("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", 2304),
    "transcoder": ("gemma-scope-2b-pt-transcoders", "layer_0/width_16k/average_l0_76", 2304),
}


@pytest.fixture(params=RELEASES)
def released(request: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str, Any]:
    """A release and an id that both know, and SAELens's loader for them, made to read a small random file."""
    release, id_, d_in = RELEASES[request.param]
    rng = np.random.default_rng(0)
    shapes = {"W_enc": (d_in, D_SAE), "W_dec": (D_SAE, d_in), "b_enc": D_SAE, "b_dec": d_in, "threshold": D_SAE}
    arrays: Any = {name: rng.random(shape).astype(np.float32) for name, shape in shapes.items()}
    np.savez(tmp_path / "params.npz", **arrays)
    monkeypatch.setattr(loaders, "hf_hub_download", lambda **_: str(tmp_path / "params.npz"))
    loader = getattr(loaders, f"gemma_2_{'transcoder' if request.param == 'transcoder' else 'sae'}_huggingface_loader")
    return release, id_, partial(small, loader)


def small(loader: Any, cfg_overrides: dict[str, Any], **kwargs: Any) -> Any:
    return loader(cfg_overrides={**cfg_overrides, "d_sae": D_SAE}, **kwargs)


@pytest.mark.slow
def test_from_pretrained_takes_what_sae_lens_takes(released: tuple[str, str, Any]) -> None:
    release, id_, loader = released
    options: dict[str, Any] = {"device": "cpu", "dtype": "float32", "force_download": False, "converter": loader}
    theirs, cfg, _ = sae_lens.SAE.from_pretrained_with_cfg_and_sparsity(release, id_, **options)
    mine, our_cfg, sparsity = JumpReLUSAE.from_pretrained_with_cfg_and_sparsity(release, id_, **options)
    same_parameters(theirs, mine)
    assert sparsity is None
    plain = {name: value for name, value in cfg.items() if name not in ("metadata", "device")}
    assert {name: our_cfg[name] for name in plain} == plain
    wanted, metadata = theirs.cfg.metadata, mine.cfg.metadata
    for name, value in wanted.items():
        if value is not None:
            assert metadata[name] == value, name
    for name in loaders.LLM_METADATA_KEYS:  # what stock objects may be asked for
        assert wanted[name] is None or metadata[name] == wanted[name], name
    # more than SAELens says
    assert metadata.hook_layer == mine.layer == mine.row.layer
    assert mine.get_name() == theirs.get_name()
    folded = JumpReLUSAE.from_pretrained(release, id_, **options, fold_W_dec_norm=True)
    same_parameters(sae_lens.SAE.from_pretrained(release, id_, **options, fold_W_dec_norm=True), folded)


def test_positional_arguments_and_repositories(released: tuple[str, str, Any]) -> None:
    release, id_, loader = released
    entry = get_pretrained_saes_directory()[release]
    by_name = JumpReLUSAE.from_pretrained(release, id_, "cpu", "bf16", False, loader)
    by_repo = JumpReLUSAE.from_pretrained(entry.repo_id, entry.saes_map[id_], dtype="bfloat16", converter=loader)
    same_parameters(by_name, by_repo)
    assert (by_repo.site, by_repo.layer, by_repo.dtype) == (by_name.site, by_name.layer, torch.bfloat16)
    with pytest.raises(UnknownNameError):
        JumpReLUSAE.from_pretrained(release, "no such id", converter=loader)


def test_a_converter_of_another_architecture_is_refused() -> None:
    def standard(**_: Any) -> Any:
        return {"architecture": "standard", "d_in": D_IN, "d_sae": D_SAE, "metadata": {}}, {}, None

    with pytest.raises(UnknownNameError, match="JumpReLU architecture"):
        JumpReLUSAE.from_pretrained("someone/repo", "folder", converter=standard)
    with pytest.raises(GemmaScopeError, match="configuration"):
        JumpReLUSAE.from_pretrained(
            "someone/repo", "folder", converter=lambda **_: ({"architecture": "nonsense"}, {}, None)
        )


def test_the_bundled_sae_folds_too() -> None:
    row = gs.load_sae("bundled", "res", 2, width="1k").row
    folded = JumpReLUSAE.from_pretrained(row.release, row.id, fold_W_dec_norm=True)
    torch.testing.assert_close(folded.get_W_dec_norm(), torch.ones(folded.cfg.d_sae))

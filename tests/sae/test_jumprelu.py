"""The SAE object: its maths, dtypes, layouts, copies, and how it is made."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import sae_lens
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_scope_tl.errors import GemmaScopeError, SpliceError, UnknownNameError, WeightsError
from gemma_scope_tl.families import families, forget_family, register_family
from gemma_scope_tl.registry.schema import SAERow
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE, JumpReLUSkipTranscoder, JumpReLUTranscoder
from gemma_scope_tl.sae.loading import load_sae
from gemma_scope_tl.sae.save import save_sae
from gemma_scope_tl.sae.units import embedding_scale, fold_b_dec, scale_embedding
from gemma_scope_tl.sites import ModelDims, get_site

D_IN, D_SAE, HEADS = 16, 64, 4
DIMS = ModelDims(n_layers=4, d_model=D_IN, n_heads=HEADS, d_head=4)


def arrays(d_in: int = D_IN, d_sae: int = D_SAE, d_out: int | None = None, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    d_out = d_out or d_in
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_enc": d_sae, "b_dec": d_out, "threshold": d_sae}
    made = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return {**made, "threshold": np.abs(made["threshold"])}


def make(site: str | None = "res", layer: int | None = 3, **kwargs: Any) -> Any:
    return JumpReLUSAE.from_arrays(arrays(), model="gemma-2-2b", site=site, layer=layer, **kwargs)


def write(folder: Path, values: dict[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **(values or arrays()))
    return folder


def x(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_is_a_sae_lens_sae() -> None:
    sae = make()
    assert isinstance(sae, sae_lens.SAE)
    assert isinstance(sae, JumpReLUSAE)
    assert not sae.is_transcoder
    assert all(p.requires_grad for p in sae.parameters())  # as SAELens's
    assert not sae.training
    assert (sae.site, sae.layer, sae.model_name, sae.row) == ("res", 3, "gemma-2-2b", None)


def test_equations() -> None:
    a, inputs = arrays(), x(5, D_IN)
    pre = inputs.numpy() @ a["W_enc"] + a["b_enc"]
    acts = pre * (pre > a["threshold"])
    sae = make()
    np.testing.assert_allclose(sae.encode(inputs).detach().numpy(), acts, atol=1e-5)
    np.testing.assert_allclose(sae(inputs).detach().numpy(), acts @ a["W_dec"] + a["b_dec"], atol=1e-4)


def test_a_pre_activation_at_its_threshold_is_off() -> None:
    eye = np.eye(2, dtype=np.float32)
    zeros = np.zeros(2, np.float32)
    parts = {"W_enc": eye, "W_dec": eye, "b_enc": zeros, "b_dec": zeros, "threshold": zeros + 0.5}
    sae = JumpReLUSAE.from_arrays(parts)
    above = float(np.nextafter(np.float32(0.5), np.float32(1)))
    assert sae.encode(torch.tensor([[0.5, above], [-1.0, 0.4]])).tolist() == [[0.0, above], [0.0, 0.0]]


def test_nan_is_not_hidden() -> None:
    bad = x(2, D_IN)
    bad[0, 0] = float("nan")
    acts = make().encode(bad)
    assert acts[0].isnan().all()
    assert acts[1].isfinite().all()


def test_gradients_reach_the_input_through_active_latents() -> None:
    sae, inputs = make(), x(3, D_IN).requires_grad_()
    acts = sae.encode(inputs)
    acts.sum().backward()
    expected = (acts.detach() > 0).float() @ sae.W_enc.T
    torch.testing.assert_close(inputs.grad, expected)


@pytest.mark.parametrize("name", ["bfloat16", "bf16", "float16", "fp16", torch.bfloat16, "torch.float16", "fp64"])
def test_dtypes_keep_thresholds_wide(name: Any) -> None:
    sae = make(dtype=name)
    assert sae.W_enc.dtype == sae.dtype != torch.float32
    assert sae.threshold.dtype == (torch.float64 if name == "fp64" else torch.float32)
    np.testing.assert_array_equal(sae.threshold.detach().float().numpy(), arrays()["threshold"])


@pytest.mark.parametrize("sae_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cast_in_and_out(sae_dtype: str, x_dtype: torch.dtype) -> None:
    sae, inputs = make(dtype=sae_dtype), x(2, D_IN).to(x_dtype)
    assert sae.encode(inputs).dtype == sae.decode(sae.encode(inputs)).dtype == sae.dtype
    assert sae(inputs).dtype == x_dtype


def test_bfloat16_compares_with_the_unrounded_threshold() -> None:
    """1.001 rounds to 1.0 in bfloat16; a pre-activation of 1.0 is below it, 1.0078125 above."""
    one = np.ones((1, 1), np.float32)
    parts = {"W_enc": one, "W_dec": one, "b_enc": np.zeros(1, np.float32), "b_dec": np.zeros(1, np.float32)}
    sae = JumpReLUSAE.from_arrays({**parts, "threshold": np.array([1.001], np.float32)}, dtype="bfloat16")
    assert sae.encode(torch.tensor([[1.0], [1.0078125]])).tolist() == [[0.0], [1.0078125]]


@pytest.mark.parametrize(
    "change", [lambda s: s.to(torch.bfloat16), lambda s: s.bfloat16(), lambda s: s.to(x(1).bfloat16())]
)
def test_conversions_keep_thresholds_and_the_record(change: Any) -> None:
    sae = change(make())
    np.testing.assert_array_equal(sae.threshold.detach().numpy(), arrays()["threshold"])
    assert sae.dtype == sae.W_enc.dtype == torch.bfloat16
    assert sae.cfg.dtype == "bfloat16"
    assert sae.float().threshold.dtype == torch.float32


def test_unknown_dtype_and_values_too_large_for_float16() -> None:
    with pytest.raises(UnknownNameError, match="float32"):
        make(dtype="int8")
    values = arrays()
    values["b_dec"][0] = 1e6
    with pytest.raises(WeightsError, match="b_dec too large for float16"):
        JumpReLUSAE.from_arrays(values, dtype="float16")


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from(["heads", "flat", "other", "reshape"]), max_size=5))
def test_att_layouts_in_any_order(history: list[str]) -> None:
    """Whatever was called before, heads apart give heads apart and flat gives flat."""
    sae = make("att")
    inputs = {"heads": x(2, 3, HEADS, 4), "flat": x(2, 3, D_IN), "other": x(1, 2, 2, 8)}
    for step in history:
        if step == "reshape":
            sae.turn_off_forward_pass_hook_z_reshaping()
            sae.turn_on_forward_pass_hook_z_reshaping()
        else:
            sae.encode(inputs[step])
    for given_ in inputs.values():
        out = sae(given_)
        assert out.shape == given_.shape == sae.decode(sae.encode(given_)).shape
        torch.testing.assert_close(out.reshape(-1, D_IN), sae(given_.reshape(-1, D_IN)))
        assert sae.decode(sae.encode(inputs["heads"]), like=inputs["flat"]).shape == (2, 3, D_IN)


def test_decode_comes_first() -> None:
    assert make("att").decode(x(2, D_SAE)).shape == (2, D_IN)


@pytest.mark.parametrize(("site", "shape"), [("res", (2, HEADS, 4)), ("att", (2, 5, 4)), ("res", (2, D_IN + 1))])
def test_other_widths_are_refused(site: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(SpliceError, match=r"reads \[\.\.\., 16\]"):
        make(site)(x(*shape))


@pytest.mark.parametrize("site", ["res", "att"])
def test_pickle_and_deepcopy(site: str) -> None:
    sae = make(site)
    sae.row = a_row()
    inputs = x(2, 3, HEADS, 4) if site == "att" else x(2, D_IN)
    expected = sae(inputs)
    for twin in (pickle.loads(pickle.dumps(sae)), copy.deepcopy(sae)):
        assert torch.equal(twin(inputs), expected)
        assert (twin.site, twin.layer, twin.row, twin.cfg) == (sae.site, sae.layer, sae.row, sae.cfg)
        twin.W_enc.data.zero_()
    assert torch.equal(sae(inputs), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_term_restores_the_input(dtype: torch.dtype) -> None:
    sae, inputs = make(), x(4, D_IN).to(dtype)
    with pytest.warns(DeprecationWarning, match="use_error_term"):
        sae.use_error_term = True
    torch.testing.assert_close(sae(inputs), inputs, atol=1e-5, rtol=0)


def test_hooks_see_latents() -> None:
    sae = make()
    _, cache = sae.run_with_cache(x(2, D_IN))
    assert {"hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons"} <= set(cache)
    out = sae.run_with_hooks(x(2, D_IN), fwd_hooks=[("hook_sae_acts_post", lambda acts, hook: acts * 0)])
    torch.testing.assert_close(out, sae.b_dec.expand(2, -1))


@pytest.mark.parametrize(
    ("site", "hook", "reshape"),
    [
        ("res", "blocks.3.hook_resid_post", "none"),
        ("mlp", "blocks.3.hook_mlp_out", "none"),
        ("att", "blocks.3.attn.hook_z", "hook_z"),
        ("embedding", "hook_embed", "none"),
        ("transcoder", "blocks.3.ln2.hook_normalized", "none"),
    ],
)
def test_config_is_what_sae_lens_users_have(site: str, hook: str, reshape: str) -> None:
    sae = make(site)
    meta = sae.cfg.metadata
    assert (meta.hook_name, sae.cfg.reshape_activations) == (hook, reshape)
    assert (meta.prepend_bos, meta.context_size, meta.hook_head_index) == (True, 1024, None)
    assert (sae.cfg.apply_b_dec_to_input, sae.cfg.normalize_activations) == (False, "none")
    assert meta.hook_name_out == ("blocks.3.hook_mlp_out" if site == "transcoder" else None)
    assert isinstance(sae, JumpReLUTranscoder) == sae.is_transcoder == (site == "transcoder")
    assert sae.layer == (None if site == "embedding" else 3)


def test_transcoders_have_their_own_output() -> None:
    sae = JumpReLUTranscoder.from_arrays(arrays(d_out=6), site="transcoder", layer=0)
    assert sae(x(2, D_IN).bfloat16()).shape == (2, 6)
    assert sae.skip(x(2, D_IN)) is None
    with pytest.warns(DeprecationWarning, match="use_error_term"):
        sae.use_error_term = True
    with pytest.raises(SpliceError, match="splice it"):
        sae(x(2, D_IN))
    with pytest.raises(GemmaScopeError, match="is a JumpReLUSAE, not a JumpReLUTranscoder"):
        JumpReLUTranscoder.from_arrays(arrays(), site="res", layer=0)


def test_skip_transcoders() -> None:
    values = {**arrays(d_out=6), "W_skip": np.arange(96, dtype=np.float32).reshape(6, D_IN)}
    sae, inputs = JumpReLUSAE.from_arrays(values, site="transcoder", layer=0), x(2, D_IN)
    assert isinstance(sae, JumpReLUSkipTranscoder)
    linear = inputs @ torch.from_numpy(values["W_skip"]).T
    torch.testing.assert_close(sae.skip(inputs), linear)
    torch.testing.assert_close(sae(inputs), sae.decode(sae.encode(inputs)) + linear)
    torch.testing.assert_close(sae.forward_with_activations(inputs)[0], sae(inputs))
    assert torch.equal(pickle.loads(pickle.dumps(sae))(inputs), sae(inputs))


@pytest.mark.parametrize("d_model", [16, 48, 3584])
def test_embedding_scaling_derivation(d_model: int) -> None:
    """In float64: same latents on the scaled embedding, and the reconstruction scaled as a whole, b_dec included."""
    raw = {name: torch.from_numpy(a).double() for name, a in arrays(d_model, 32).items()}
    scale = embedding_scale(d_model)
    table = JumpReLUSAE.from_arrays(raw, dtype="fp64")
    scaled = JumpReLUSAE.from_arrays(scale_embedding(raw), site="embedding", dtype="fp64")
    rows = x(7, d_model).double()
    torch.testing.assert_close(scaled.encode(rows * scale), table.encode(rows))
    torch.testing.assert_close(scaled(rows * scale), table(rows) * scale)
    back = scale_embedding(scale_embedding(raw), inverse=True)
    for name, array in raw.items():
        torch.testing.assert_close(back[name], array, rtol=1e-15, atol=0)
    assert torch.equal(back["b_enc"], raw["b_enc"])
    assert torch.equal(back["threshold"], raw["threshold"])


def test_fold_b_dec_derivation() -> None:
    raw = {name: torch.from_numpy(a).double() for name, a in arrays().items()}
    folded = JumpReLUSAE.from_arrays(fold_b_dec(raw), dtype="fp64")
    inputs = x(5, D_IN).double()
    expected = torch.relu((inputs - raw["b_dec"]) @ raw["W_enc"] + raw["b_enc"])
    torch.testing.assert_close(folded.encode(inputs), expected * (expected > raw["threshold"]))


def a_row(**fields: Any) -> SAERow:
    base: dict[str, Any] = {
        "release": "r",
        "id": "layer_3/width_64/average_l0_9",
        "model": "gemma-2-2b",
        "site": "res",
        "layer": 3,
        "width": "64",
        "d_sae": D_SAE,
        "d_in": D_IN,
        "l0": 9.0,
        "repo": "nobody/nothing",
        "path": "layer_3/width_64/average_l0_9",
        "neuronpedia": "gemma-2-2b/3-res",
    }
    return SAERow(**{**base, **fields})


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A registry in which every name leads to a row in a local folder."""

    def local(site: str) -> SAERow:
        layer = None if site == "embedding" else 3
        return a_row(site=site, layer=layer).model_copy(update={"repo": str(tmp_path)})

    monkeypatch.setattr("gemma_scope_tl.registry.catalog.resolve", lambda release, id: local(release))

    def find(model: str, site: str, layer: Any, width: Any, l0: Any, **chosen: Any) -> Any:
        assert set(chosen.values()) <= {None}
        return local(site)

    monkeypatch.setattr("gemma_scope_tl.registry.catalog.find", find)
    write(tmp_path / "layer_3/width_64/average_l0_9")
    return tmp_path


@pytest.mark.parametrize("site", ["res", "mlp", "att", "embedding", "transcoder"])
def test_from_pretrained_and_load_sae(registry: Path, site: str) -> None:
    sae = JumpReLUSAE.from_pretrained(site, "any", dtype="bf16")
    assert (sae.site, sae.row.site, sae.model_name) == (site, site, "gemma-2-2b")
    meta = sae.cfg.metadata
    assert (meta.release, meta.width, meta.l0, meta.neuronpedia_id) == ("r", "64", 9.0, "gemma-2-2b/3-res")
    again = load_sae("gemma-2-2b", site, 3, "64")
    scale = embedding_scale(D_IN) if site == "embedding" else 1.0
    np.testing.assert_array_equal(again.W_dec.detach().numpy(), arrays()["W_dec"] * scale)
    np.testing.assert_array_equal(again.b_dec.detach().numpy(), arrays()["b_dec"] * scale)
    assert JumpReLUSAE.from_pretrained_with_cfg_and_sparsity(site, "any")[1]["d_in"] == D_IN


def test_transcoders_may_write_another_width(tmp_path: Path) -> None:
    write(tmp_path / "layer_3/width_64/average_l0_9", arrays(d_out=10))
    row = a_row(site="transcoder", d_out=10).model_copy(update={"repo": str(tmp_path)})
    sae = JumpReLUSAE.from_row(row)
    assert (sae.cfg.d_in, sae.cfg.d_out) == (D_IN, 10) and sae(x(2, D_IN)).shape == (2, 10)
    with pytest.raises(WeightsError, match=r"d_out 10, should be 16 according to the registry"):
        JumpReLUSAE.from_row(row.model_copy(update={"d_out": None}))


def test_hooks_and_units_are_those_of_the_rows_family(tmp_path: Path) -> None:
    table = replace(get_site("embedding"), hooked_transformer="hook_table")
    toy = replace(families()[0], name="toy", model_types=("toy",), sites={"embedding": table}, sizes={})
    register_family(replace(toy, embedding_scale=lambda d_model: 3.0))
    try:
        write(tmp_path / "layer_3/width_64/average_l0_9")
        row = a_row(site="embedding", layer=None, family="toy").model_copy(update={"repo": str(tmp_path)})
        sae = JumpReLUSAE.from_row(row)
        assert sae.cfg.metadata.hook_name == "hook_table"
        np.testing.assert_array_equal(sae.W_dec.detach().numpy(), arrays()["W_dec"] * np.float32(3))
        folder = save_sae(JumpReLUSAE.from_folder(save_sae(sae, tmp_path / "a", "sae-lens")), tmp_path / "b")
        np.testing.assert_allclose(np.load(folder / "params.npz")["W_dec"], arrays()["W_dec"], rtol=1e-6)
        model = SimpleNamespace(family=families()[-1], cfg=DIMS)
        given = JumpReLUSAE.from_arrays(arrays(), model=model, site="embedding")
        assert given.cfg.metadata.hook_name == "hook_table"
    finally:
        forget_family("toy")


def test_files_are_checked_against_the_row(registry: Path) -> None:
    write(registry / "layer_3/width_64/average_l0_9", arrays(d_sae=32))
    with pytest.raises(WeightsError, match=r"d_sae 32, should be 64 according to the registry \(r/layer_3"):
        JumpReLUSAE.from_pretrained("res", "any")


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: reads /proc")
def test_float32_on_the_cpu_is_mapped(tmp_path: Path) -> None:
    folder = write(tmp_path).resolve()
    (folder / "params.npz").chmod(0o444)
    sae = JumpReLUSAE.from_folder(folder)
    maps = [m.split()[0] for m in Path("/proc/self/maps").read_text().splitlines() if m.endswith("params.npz")]
    spans = [tuple(int(end, 16) for end in m.split("-")) for m in maps]
    assert all(any(low <= p.data_ptr() < high for low, high in spans) for p in (sae.W_enc, sae.W_dec))


def test_from_folder_without_a_site_then_with_a_model(tmp_path: Path) -> None:
    folder = write(tmp_path)
    sae = JumpReLUSAE.from_folder(folder)
    assert (sae.site, sae.layer, sae.model_name, sae.cfg.metadata.hook_name) == (None, None, None, None)
    assert sae(x(2, D_IN)).shape == (2, D_IN)
    cfg = SimpleNamespace(n_layers=4, d_model=D_IN, n_heads=2, d_head=16, model_name="tiny")
    model = SimpleNamespace(cfg=cfg)
    assert JumpReLUSAE.from_folder(folder / "params.npz", model=model, site="mlp", layer=3).model_name == "tiny"
    with pytest.raises(WeightsError, match=r"d_in 16, should be 32; d_out .* the model"):
        JumpReLUSAE.from_folder(folder, model=model, site="att", layer=3)
    with pytest.raises(WeightsError, match=r"layers are 0\.\.3"):
        JumpReLUSAE.from_folder(folder, model=model, site="res", layer=4)
    with pytest.raises(SpliceError, match="give layer="):
        JumpReLUSAE.from_folder(folder, site="res")


def test_a_copy_of_a_model_is_of_the_same_family(tmp_path: Path) -> None:
    cfg = SimpleNamespace(n_layers=4, d_model=D_IN, n_heads=2, d_head=16, model_name="tiny")
    family = families()[0]
    known, copied = (
        JumpReLUSAE.from_folder(write(tmp_path), model=SimpleNamespace(cfg=cfg, family=one), site="res", layer=1)
        for one in (family, copy.deepcopy(family))
    )
    assert copied.cfg.to_dict() == known.cfg.to_dict()
    assert "family" not in known.cfg.metadata  # the model's name says it


def test_folders_that_hold_nothing_or_too_much(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="has neither params"):
        JumpReLUSAE.from_folder(tmp_path)
    with pytest.raises(WeightsError, match="does not exist"):
        JumpReLUSAE.from_folder(tmp_path / "nope")
    write(tmp_path)
    (tmp_path / "sae_weights.safetensors").write_bytes(b"x")
    with pytest.raises(WeightsError, match="several layouts"):
        JumpReLUSAE.from_folder(tmp_path)


def test_unfolded_configs_are_refused() -> None:
    cfg = copy.deepcopy(make().cfg)
    cfg.apply_b_dec_to_input = True
    with pytest.raises(GemmaScopeError, match="fold both"):
        JumpReLUSAE(cfg)
    cfg.apply_b_dec_to_input, cfg.normalize_activations = False, "layer_norm"
    with pytest.raises(GemmaScopeError, match="fold both"):
        JumpReLUSAE(cfg)


def test_importing_the_packages_is_light() -> None:
    code = (
        "import sys, gemma_scope_tl, gemma_scope_tl.sae, gemma_scope_tl.weights.stamp, gemma_scope_tl.weights.fetch; "
        "heavy = {'torch', 'sae_lens', 'transformer_lens', 'huggingface_hub'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_encoding_only_some_latents(tmp_path: Path) -> None:
    """Columns of one product, in the order asked for; hooks, which expect all latents, are not passed."""
    sae = JumpReLUSAE.from_folder(write(tmp_path))
    chosen = [5, 0, sae.cfg.d_sae - 1]
    full = sae.encode(x(7, D_IN))
    sae.hook_sae_acts_post.add_hook(lambda acts, hook: acts * 0)
    some = sae.encode(x(7, D_IN), latents=chosen)
    torch.testing.assert_close(some, full[:, chosen], rtol=1e-6, atol=1e-6)  # the order of a sum of D_IN products
    assert torch.equal(some == 0, full[:, chosen] == 0)
    assert torch.equal(sae.encode(x(7, D_IN), latents=torch.tensor(chosen)), some)
    with pytest.raises(SpliceError, match=f"No latent {sae.cfg.d_sae}"):
        sae.encode(x(7, D_IN), latents=[sae.cfg.d_sae])

"""Every kind of single-layer file of Gemma Scope 2: ours against the equations, and against stock SAELens.

Tolerances: sums of at most 512 float32 products of size about 1 differ from those in float64 by less than 1e-5. No
pre-activation of the inputs is so near to its threshold that rounding switches a latent (asserted by the equality of
the active sets).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sae_lens
import torch
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.jumprelu_sae import JumpReLUSAE as StockSAE
from sae_lens.saes.transcoder import JumpReLUSkipTranscoder as StockSkip
from sae_lens.saes.transcoder import JumpReLUTranscoder as StockTranscoder

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError, WeightsError
from gemma_scope_tl.sae import routes
from gemma_scope_tl.sae.access import decode_with_skip
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE, JumpReLUSkipTranscoder, JumpReLUTranscoder
from gemma_scope_tl.sae.save import save_sae
from gemma_scope_tl.sites import ModelDims
from tests.coder_files import HEADS, KINDS, LAYER, WIDTH, Coder, D, inputs

ATOL = 2e-5
NAMES = {
    "w_enc": "W_enc",
    "w_dec": "W_dec",
    "b_enc": "b_enc",
    "b_dec": "b_dec",
    "threshold": "threshold",
    "affine_skip_connection": "W_skip",
}
CLASSES = {"res": JumpReLUSAE, "att": JumpReLUSAE, "mlp": JumpReLUSAE, "transcoder": JumpReLUTranscoder}
STOCK = {"transcoder": StockTranscoder, "affine": StockSkip}


def close(ours: torch.Tensor, wanted: np.ndarray, atol: float = ATOL) -> None:
    np.testing.assert_allclose(ours.detach().double().numpy(), wanted, rtol=0, atol=atol)


def expected_of(kind: str, name: str, array: np.ndarray) -> np.ndarray:
    return array.T if name == "affine_skip_connection" else array


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_folder(kind: str, tmp_path: Path) -> None:
    """Values to the bit, the place and the model from ``config.json``, and the class that suits the kind."""
    made = KINDS[kind]
    sae = JumpReLUSAE.from_folder(made.write(tmp_path))
    assert type(sae) is (JumpReLUSkipTranscoder if made.affine else CLASSES[made.site])
    assert (sae.site, sae.layer, sae.model_name) == (made.site, LAYER, "gemma-3-1b")
    assert sae.cfg.metadata.l0 == 60
    arrays = made.arrays()
    assert set(sae.state_dict()) == {NAMES[name] for name in arrays}
    for name, array in arrays.items():
        np.testing.assert_array_equal(sae.state_dict()[NAMES[name]].numpy(), expected_of(kind, name, array))


# few tokens, many (the sparse kernels), and many without gradients; the last three cover each route of a call
@pytest.mark.parametrize("tokens", [1, 5, 64, 3000])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_every_path_is_the_equations(kind: str, tokens: int, grad: bool, tmp_path: Path) -> None:
    made = KINDS[kind]
    sae, coder = JumpReLUSAE.from_folder(made.write(tmp_path)), Coder(made.arrays())
    x = inputs(made, tokens)
    f = coder.encode(x)
    with torch.set_grad_enabled(grad):
        given = torch.from_numpy(x)
        acts = sae.encode(given)
        assert np.array_equal(acts.detach().numpy() != 0, f != 0) and 0.02 < (f != 0).mean() < 0.3
        close(acts, f)
        close(sae.encode(given, latents=[5, 0, WIDTH - 1]), f[:, [5, 0, WIDTH - 1]])
        close(sae.decode(acts), coder.decode(f))
        close(sae(given), coder.forward(x))
        close(decode_with_skip(sae, acts, given), coder.forward(x))
        close(sae(given[None])[0], coder.forward(x))
        if made.site == "transcoder":
            out, again = sae.forward_with_activations(given)
            close(out, coder.forward(x))
            close(again, f)


def test_the_sparse_route_is_among_them() -> None:
    """3,000 tokens go through the kernels, and 64 do not."""
    sizes = (torch.float32, WIDTH, D, False)
    assert routes.dense_is_faster(torch.zeros(64, D), *sizes)
    assert not routes.dense_is_faster(torch.zeros(3000, D), *sizes)


@pytest.mark.parametrize("tokens", [3, 3000])
@pytest.mark.parametrize("kind", ["transcoder", "affine"])
def test_gradients_are_the_equations(kind: str, tokens: int, tmp_path: Path) -> None:
    """Of the input and of every array; the sums are of 3,000 terms of size 1, so 1e-3 is 2e-5 of the largest."""
    made = KINDS[kind]
    sae, coder = JumpReLUSAE.from_folder(made.write(tmp_path)), Coder(made.arrays())
    x, weights = inputs(made, tokens), np.random.default_rng(3).standard_normal((tokens, D)).astype(np.float32)
    wanted = coder.gradients(x, weights)
    for call in (sae, lambda given: decode_with_skip(sae, sae.encode(given), given)):
        sae.zero_grad()
        given = torch.from_numpy(x).requires_grad_()
        (call(given) * torch.from_numpy(weights)).sum().backward()
        assert given.grad is not None
        close(given.grad, wanted["x"], 1e-4)
        for name in NAMES:
            if name in wanted:
                close(getattr(sae, NAMES[name]).grad, expected_of(kind, name, wanted[name]), 1e-3)


@pytest.mark.parametrize("hook", ["hook_sae_acts_post", "hook_sae_input", "hook_sae_recons"])
def test_hooks_see_the_latents_of_a_skip_transcoder(hook: str, tmp_path: Path) -> None:
    """A hook that reads changes nothing, and one that removes all latents leaves ``b_dec + x S``."""
    made = KINDS["affine"]
    sae, coder = JumpReLUSAE.from_folder(made.write(tmp_path)), Coder(made.arrays())
    x = inputs(made, 3000)
    seen: list[torch.Tensor] = []
    with sae.hooks(fwd_hooks=[(hook, lambda tensor, hook: seen.append(tensor))]):
        close(sae(torch.from_numpy(x)), coder.forward(x))
    assert len(seen) == 1
    if hook == "hook_sae_acts_post":
        close(seen[0], coder.encode(x))
        with sae.hooks(fwd_hooks=[(hook, lambda tensor, hook: torch.zeros_like(tensor))]):
            skipped = x.astype(np.float64) @ coder.wide["affine_skip_connection"]
            close(sae(torch.from_numpy(x)), coder.wide["b_dec"] + skipped)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_conversion_of_the_dtype(kind: str, dtype: str, tmp_path: Path) -> None:
    """Each value is rounded once, and the thresholds stay as they are."""
    made, kept = KINDS[kind], getattr(torch, dtype)
    sae = JumpReLUSAE.from_folder(made.write(tmp_path), dtype=dtype)
    for name, array in made.arrays().items():
        tensor = torch.from_numpy(expected_of(kind, name, array).copy())
        wanted = tensor if name == "threshold" else tensor.to(kept)
        assert torch.equal(sae.state_dict()[NAMES[name]], wanted)
    x = torch.from_numpy(inputs(made, 4)).to(kept)
    assert sae(x).dtype == kept and sae(x).shape == (4, made.d_out)


def load_stock(folder: Path, repo: str, monkeypatch: pytest.MonkeyPatch, name: str) -> Any:
    """Stock SAELens's object of a local folder, its requests to the Hub answered from there."""
    root = folder.parents[len(Path(name).parts) - 1]

    def download(repo_id: str, filename: str, subfolder: str | None = None, force_download: bool = False) -> str:
        return str(root / (subfolder or "") / filename)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        raw = (root / filename).read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        return {key: entry["shape"] for key, entry in header.items() if key != "__metadata__"}

    monkeypatch.setattr(loaders, "hf_hub_download", download)
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", shapes)
    with pytest.warns(UserWarning, match="registered in the official"):
        return sae_lens.SAE.from_pretrained(repo, name, converter=loaders.gemma_3_sae_huggingface_loader)


@pytest.mark.parametrize("kind", KINDS)
def test_stock_sae_lens_on_the_same_tensor(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = KINDS[kind]
    folder = made.write(tmp_path)
    ours, theirs = (
        JumpReLUSAE.from_folder(folder),
        load_stock(folder, "google/gemma-scope-2-1b-pt", monkeypatch, made.path),
    )
    assert {name: tensor.shape for name, tensor in ours.state_dict().items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }
    x = torch.from_numpy(inputs(made, 50))
    close(ours.encode(x), theirs.encode(x).detach().double().numpy())
    close(ours(x), theirs(x).detach().double().numpy())
    if kind in STOCK:
        assert theirs.cfg.metadata.hook_name.endswith("hook_mlp_in")  # another tensor than the file's
    # what stock SAELens saves of it is read with the right place
    theirs.save_model(tmp_path / "stock")
    back = JumpReLUSAE.from_folder(tmp_path / "stock")
    assert (type(back), back.site, back.layer) == (type(ours), ours.site, ours.layer)
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
    assert back.cfg.metadata.hook_name == ours.cfg.metadata.hook_name


@pytest.mark.parametrize("kind", KINDS)
def test_sae_lens_format_both_ways(kind: str, tmp_path: Path) -> None:
    """Saved by us and read by stock SAELens, which saves it again for us: the same bits and outputs."""
    made = KINDS[kind]
    ours = JumpReLUSAE.from_folder(made.write(tmp_path))
    save_sae(ours, tmp_path / "ours", "sae-lens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "ours")
    assert type(theirs) is STOCK.get(kind, StockSAE)
    x = inputs(made, 50)
    heads = torch.from_numpy(x).unflatten(-1, (-1, 10)) if kind == "att" else torch.from_numpy(x)
    close(theirs(heads).flatten(1), Coder(made.arrays()).forward(x))
    theirs.save_model(tmp_path / "again")
    back = JumpReLUSAE.from_folder(tmp_path / "again")
    assert (type(back), back.site, back.layer, back.model_name) == (type(ours), made.site, LAYER, "gemma-3-1b")
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
    close(back(torch.from_numpy(x)), Coder(made.arrays()).forward(x))


def test_a_saved_transcoder_names_the_hook_behind_the_gain(tmp_path: Path) -> None:
    """HookedTransformer has no hook with the gain; its ``ln2.hook_normalized`` would be read without a word."""
    ours = JumpReLUSAE.from_folder(KINDS["affine"].write(tmp_path))
    metadata = ours.cfg.metadata
    assert (metadata.hook_name, metadata.hook_name_out) == ("blocks.13.ln2.hook_out", "blocks.13.ln2_post.hook_out")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_written_as_released(kind: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is read back to the bit, by us and by stock SAELens, and says what the released file says."""
    made = KINDS[kind]
    ours = JumpReLUSAE.from_folder(made.write(tmp_path), dtype=dtype)
    save_sae(ours, tmp_path / "out" / made.path, "gemma_scope_2")
    folder = tmp_path / "out" / made.path
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "params.safetensors"]
    said = json.loads((folder / "config.json").read_text())
    assert {**said, "model_name": None} == {**made.config, "model_name": None}
    assert said["model_name"] in ("google/gemma-3-1b", "google/gemma-3-1b-pt")
    back = JumpReLUSAE.from_folder(folder, dtype=dtype)
    assert type(back) is type(ours) and (back.site, back.layer, back.model_name) == (made.site, LAYER, "gemma-3-1b")
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in ours.state_dict().items())
    theirs = load_stock(folder, "google/gemma-scope-2-1b-pt", monkeypatch, made.path)
    assert all(torch.equal(theirs.state_dict()[name], tensor.float()) for name, tensor in ours.state_dict().items())


def test_a_file_that_is_written_can_be_mapped(tmp_path: Path) -> None:
    made = KINDS["affine"]
    first = save_sae(JumpReLUSAE.from_folder(made.write(tmp_path)), tmp_path / "1", "gemma_scope_2")
    again = save_sae(JumpReLUSAE.from_folder(first), tmp_path / "2", "gemma_scope_2")
    raw = (first / "params.safetensors").read_bytes()
    assert (8 + int.from_bytes(raw[:8], "little")) % 64 == 0
    assert raw == (again / "params.safetensors").read_bytes()


def test_layouts_that_cannot_hold_an_sae(tmp_path: Path) -> None:
    arrays = {NAMES[name]: array for name, array in KINDS["transcoder"].arrays().items()}
    with pytest.raises(GemmaScopeError, match="No module of Gemma 2 takes or returns the tensor of site 'transcoder'"):
        save_sae(JumpReLUSAE.from_arrays(arrays, "gemma-2-2b", "transcoder", 3), tmp_path, "gemma_scope_2")
    with pytest.raises(GemmaScopeError, match="in which units an embedding SAE is"):
        save_sae(JumpReLUSAE.from_arrays(arrays, "gemma-2-2b", "embedding"), tmp_path, "gemma_scope_2")
    assert not list(tmp_path.iterdir())


def test_without_a_config_the_user_says_the_place(tmp_path: Path) -> None:
    folder = KINDS["affine"].write(tmp_path)
    (folder / "config.json").unlink()
    plain = JumpReLUSAE.from_folder(folder)
    assert (plain.site, plain.layer, type(plain)) == (None, None, JumpReLUSkipTranscoder)
    sae = JumpReLUSAE.from_folder(folder, "google/gemma-3-1b-pt", "transcoder", 4)
    assert (sae.site, sae.layer, sae.cfg.metadata.hook_name) == ("transcoder", 4, "blocks.4.ln2.hook_out")
    with pytest.raises(WeightsError, match="has a skip connection, which an SAE"):
        gs.JumpReLUTranscoder.from_folder(folder, "gemma-3-1b", "res", 4)


def test_the_sizes_of_a_model_are_compared(tmp_path: Path) -> None:
    folder = KINDS["att"].write(tmp_path)
    dims = ModelDims(26, D, 4, HEADS // 4)
    assert JumpReLUSAE.from_folder(folder, model=dims.__dict__).site == "att"
    with pytest.raises(WeightsError, match="d_in 40, should be 80; d_out 40, should be 80 according to the model"):
        JumpReLUSAE.from_folder(folder, model=ModelDims(26, D, 8, HEADS // 4).__dict__)

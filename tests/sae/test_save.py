"""What is written is read back to the bit, by this package and by SAELens alone, and never half written."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sae_lens
import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE as StockSAE
from sae_lens.saes.jumprelu_sae import JumpReLUSAEConfig
from safetensors import SafetensorError

from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError, WeightsError, WriteError
from gemma_scope_tl.interop.training_sae import GemmaScopeTrainingSAE, GemmaScopeTrainingSAEConfig
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sae.save import save_sae
from gemma_scope_tl.weights.npz import inspect_npz

D_IN, D_SAE = 16, 64
FORMATS = ["gemma-scope", "sae-lens"]
SITES = ["res", "mlp", "att", "transcoder"]


def arrays(skip: bool = False, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D_IN, D_SAE), "W_dec": (D_SAE, D_IN), "b_enc": D_SAE, "b_dec": D_IN, "threshold": D_SAE}
    made = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    made["threshold"] = np.abs(made["threshold"])
    return {**made, "W_skip": rng.normal(size=(D_IN, D_IN)).astype(np.float32)} if skip else made


def make(site: str | None = "res", dtype: str = "float32", skip: bool = False) -> Any:
    return JumpReLUSAE.from_arrays(arrays(skip), model="gemma-2-2b", site=site, layer=3, dtype=dtype)


def same(a: Any, b: Any) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("compress", [False, True])
def test_round_trip_to_the_bit(tmp_path: Path, dtype: str, site: str, format: Any, compress: bool) -> None:
    sae = make(site, dtype)
    assert save_sae(sae, tmp_path / "new" / "folder", format, compress) == tmp_path / "new" / "folder"
    where: dict[str, Any] = {"site": site, "layer": 3} if format == "gemma-scope" else {}
    back = JumpReLUSAE.from_folder(tmp_path / "new" / "folder", dtype=dtype, **where)
    assert same(sae, back)
    assert type(back) is type(sae)
    assert (back.site, back.layer) == (site, 3)


@pytest.mark.parametrize("format", FORMATS)
def test_round_trip_of_skip_transcoders(tmp_path: Path, format: Any) -> None:
    sae = make("transcoder", skip=True)
    assert same(sae, JumpReLUSAE.from_folder(save_sae(sae, tmp_path, format), site="transcoder", layer=3))


def test_round_trip_of_the_embedding(tmp_path: Path) -> None:
    """The npz is in the units of the table's rows, sqrt(16) = 4 apart: exact, as powers of two are."""
    sae = make("embedding")
    save_sae(sae, tmp_path / "npz", "gemma-scope")
    with np.load(tmp_path / "npz" / "params.npz") as saved:
        np.testing.assert_array_equal(saved["b_dec"] * 4, arrays()["b_dec"])
        np.testing.assert_array_equal(saved["W_enc"] / 4, arrays()["W_enc"])
    assert same(sae, JumpReLUSAE.from_folder(tmp_path / "npz", site="embedding"))
    assert same(sae, JumpReLUSAE.from_folder(save_sae(sae, tmp_path / "sl", "sae-lens")))


def test_npz_is_aligned_deterministic_and_plain(tmp_path: Path) -> None:
    first = (save_sae(make(), tmp_path / "a") / "params.npz").read_bytes()
    assert first == (save_sae(make(), tmp_path / "b") / "params.npz").read_bytes()
    for member in inspect_npz(tmp_path / "a" / "params.npz").values():
        assert member.mappable
        assert (member.start + member.header_size) % 64 == 0
    with np.load(tmp_path / "a" / "params.npz", allow_pickle=False) as saved:
        assert all(np.array_equal(saved[name], array) for name, array in arrays().items())
    with zipfile.ZipFile(tmp_path / "a" / "params.npz") as archive:
        assert archive.testzip() is None


def run_alone(code: str, *args: Path) -> str:
    guard = "\nassert not any(m.startswith('gemma_scope') for m in __import__('sys').modules)"
    command = [sys.executable, "-W", "ignore", "-c", code + guard, *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=args[0])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_sae_lens_alone_reads_what_we_write(tmp_path: Path) -> None:
    """One process that never imports this package loads, runs and saves again every kind."""
    kinds = {site: make(site) for site in [*SITES, "embedding"]} | {"skip": make("transcoder", skip=True)}
    inputs = torch.randn(2, 3, D_IN, generator=torch.Generator().manual_seed(0))
    for name, sae in kinds.items():
        save_sae(sae, tmp_path / name, "sae-lens")
    torch_in = tmp_path / "in.npy"
    np.save(torch_in, inputs.numpy())
    run_alone(
        "import sys, pathlib, numpy as np, torch, sae_lens\n"
        "root = pathlib.Path(sys.argv[1]); x = torch.from_numpy(np.load(root / 'in.npy'))\n"
        "for name in sys.argv[2:]:\n"
        "    folder = root / pathlib.Path(name).name; sae = sae_lens.SAE.load_from_disk(folder)\n"
        "    assert type(sae).__module__.startswith('sae_lens.')\n"
        "    out = sae(x.unflatten(-1, (4, 4)) if folder.name == 'att' else x)\n"
        "    np.save(folder / 'out.npy', out.detach().reshape(x.shape).numpy()); sae.save_model(folder / 'again')\n",
        tmp_path,
        *(tmp_path / name for name in kinds),
    )
    for name, sae in kinds.items():
        np.testing.assert_array_equal(np.load(tmp_path / name / "out.npy"), sae(inputs).detach().numpy())
        again = JumpReLUSAE.from_folder(tmp_path / name / "again")
        assert same(again, sae)
        assert (again.site, again.layer) == (sae.site, sae.layer)


@pytest.mark.parametrize(
    ("site", "word", "skip"),
    [
        ("res", "jumprelu", False),
        ("transcoder", "jumprelu_transcoder", False),
        ("transcoder", "jumprelu_skip_transcoder", True),
    ],
)
def test_architecture_words_are_sae_lens_own(tmp_path: Path, site: str, word: str, skip: bool) -> None:
    cfg = json.loads((save_sae(make(site, skip=skip), tmp_path, "sae-lens") / "cfg.json").read_text())
    assert (cfg["architecture"], cfg["device"], cfg["metadata"]["site"]) == (word, "cpu", site)


def stock(folder: Path, **cfg: Any) -> Any:
    sae = StockSAE(JumpReLUSAEConfig(d_in=D_IN, d_sae=D_SAE, **cfg))
    sae.load_state_dict({name: torch.from_numpy(a) for name, a in arrays().items()})
    sae.cfg.metadata.hook_name = "blocks.5.hook_mlp_out"
    sae.save_model(folder)
    return sae


@pytest.mark.parametrize("subtracts", [False, True])
def test_what_sae_lens_saves_is_read(tmp_path: Path, subtracts: bool) -> None:
    theirs = stock(tmp_path, apply_b_dec_to_input=subtracts)
    ours = JumpReLUSAE.load_from_disk(tmp_path)
    inputs = torch.randn(50, D_IN, generator=torch.Generator().manual_seed(0))
    assert (ours.site, ours.layer, ours.cfg.apply_b_dec_to_input) == ("mlp", 5, False)
    torch.testing.assert_close(ours(inputs), theirs(inputs).detach(), atol=1e-4 if subtracts else 0, rtol=0)
    save_sae(theirs, tmp_path / "release", "gemma-scope")  # stock objects can be written too
    torch.testing.assert_close(JumpReLUSAE.from_folder(tmp_path / "release")(inputs), ours(inputs))


def test_configs_that_cannot_be_honoured(tmp_path: Path) -> None:
    stock(tmp_path, normalize_activations="layer_norm")
    with pytest.raises(WeightsError, match=r"cfg\.json normalises activations \(layer_norm\)"):
        JumpReLUSAE.from_folder(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text()) | {"normalize_activations": "none"}
    for change, message in (
        ({"architecture": "topk"}, "not the configuration of a JumpReLU SAE"),
        ({"d_in": 17}, "d_in 16, should be 17"),
        ({"architecture": 3}, "not the configuration"),
    ):
        (tmp_path / "cfg.json").write_text(json.dumps(cfg | change))
        with pytest.raises(WeightsError, match=message):
            JumpReLUSAE.from_folder(tmp_path)
    for text, message in (
        ("[]", "not a JSON object"),
        ("{", "is not JSON"),
        ("", "is empty"),
        ("<html>", "is not JSON"),
    ):
        (tmp_path / "cfg.json").write_text(text)
        with pytest.raises(WeightsError, match=message):
            JumpReLUSAE.from_folder(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(WeightsError, match="describes an SAE, not a transcoder"):
        JumpReLUSAE.from_folder(tmp_path, site="transcoder", layer=0)


@pytest.mark.parametrize("format", FORMATS)
def test_a_failed_write_leaves_the_old_files(tmp_path: Path, format: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sae(make(), tmp_path, format)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def broken(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("gemma_scope_tl.files.sync_to_disk", broken)
    with pytest.raises(OSError, match="the disk is full"):
        save_sae(make("mlp"), tmp_path, format)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_arrays_that_share_memory(tmp_path: Path) -> None:
    zeros = np.zeros(D_SAE, np.float32)
    sae = JumpReLUSAE.from_arrays({**arrays(), "b_enc": zeros, "threshold": zeros})
    assert same(sae, JumpReLUSAE.from_folder(save_sae(sae, tmp_path, "sae-lens")))


def test_saving_over_the_file_that_is_mapped(tmp_path: Path) -> None:
    save_sae(make(), tmp_path)
    (tmp_path / "params.npz").chmod(0o444)
    mapped = JumpReLUSAE.from_folder(tmp_path)
    mapped.W_dec.data.mul_(2)
    save_sae(mapped, tmp_path)
    assert same(mapped, JumpReLUSAE.from_folder(tmp_path))


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="gemma-scope"):
        save_sae(make(), tmp_path, "npz")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="architecture 'standard'"):
        save_sae(sae_lens.StandardSAE(sae_lens.StandardSAEConfig(D_IN, D_SAE)), tmp_path)
    with pytest.raises(GemmaScopeError, match="fold the normalisation into its weights"):
        save_sae(StockSAE(JumpReLUSAEConfig(D_IN, D_SAE, normalize_activations="layer_norm")), tmp_path)
    sick = make()
    sick.b_dec.data[0] = float("nan")
    with pytest.raises(WeightsError, match="b_dec that are not finite"):
        save_sae(sick, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["save_model", "save_inference_model"])
def test_sae_lens_methods_write_whole_files_or_none(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files are those of stock SAELens's own methods, to the bit; on a full disk the old ones stay."""
    trained = GemmaScopeTrainingSAE(GemmaScopeTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE))
    saes = [make("res", "bfloat16"), make("transcoder", skip=True), trained] if method == "save_model" else [trained]
    for number, sae in enumerate(saes):
        ours, theirs = tmp_path / f"ours {number}", tmp_path / f"theirs {number}"
        files = getattr(sae, method)(ours / "new")
        stock_files = getattr(sae_lens.TrainingSAE if sae is trained else sae_lens.SAE, method)(sae, theirs)
        assert [file.name for file in files] == [file.name for file in stock_files]
        assert [file.read_bytes() for file in files] == [file.read_bytes() for file in stock_files]
        with torch.no_grad():
            sae.b_dec += 1
        with monkeypatch.context() as patch:

            def full(*_: object) -> None:
                raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

            patch.setattr("safetensors.torch.save_file", full)
            with pytest.raises(WriteError, match="the disk is full"):
                getattr(sae, method)(ours / "new")
        assert [file.read_bytes() for file in files] == [file.read_bytes() for file in stock_files]
        assert {file.name for file in (ours / "new").iterdir()} == {file.name for file in files}

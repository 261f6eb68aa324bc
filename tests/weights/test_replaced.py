"""A loaded SAE is what was loaded, whatever happens to its file: overwritten, cut short, replaced, removed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import gemma_scope_tl as gs
from gemma_scope_tl.registry.schema import SAERow
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sae.loading import load_row
from gemma_scope_tl.weights.load import may_map
from tests.hub.conftest import hub  # noqa: F401  # pyright: ignore[reportUnusedImport]

D_IN, D_SAE = 64, 1024


def _arrays(seed: int, d_sae: int = D_SAE) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D_IN, d_sae), "W_dec": (d_sae, D_IN), "b_enc": d_sae, "b_dec": D_IN, "threshold": d_sae}
    made = {name: rng.standard_normal(size=shape, dtype=np.float32) for name, shape in shapes.items()}
    return {**made, "threshold": np.abs(made["threshold"])}


def _overwrite(path: Path) -> None:
    if path.suffix == ".npz":
        np.savez(path, **_arrays(1))
    else:
        save_file({name: torch.from_numpy(array) for name, array in _arrays(1).items()}, path)


def _copy_over(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"\0" * path.stat().st_size)
    shutil.copyfile(other, path)


def _save_again(path: Path) -> None:
    layout: Any = "gemma-scope" if path.suffix == ".npz" else "sae-lens"
    gs.save_sae(JumpReLUSAE.from_arrays(_arrays(1)), path.parent, format=layout)


REPLACED: dict[str, Callable[[Path], None]] = {
    "written over": _overwrite,
    "cut short": lambda path: os.truncate(path, 0),
    "opened for writing": lambda path: path.open("wb").close(),
    "copied over": _copy_over,
    "saved again": _save_again,
    "renamed onto": lambda path: path.with_name("new").rename(path),
    "removed": Path.unlink,
}


def _survives(sae: Any, seed: int = 0) -> bool:
    """Compare in a child, which a torn map would kill."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            wanted = _arrays(seed)
            same = [np.array_equal(getattr(sae, name).detach().numpy(), wanted[name]) for name in wanted]
            status = 0 if all(same) else 1
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["gemma-scope", "sae-lens"])
@pytest.mark.parametrize("how", REPLACED)
def test_a_file_in_a_folder(how: str, layout: Any, tmp_path: Path) -> None:
    folder = gs.save_sae(JumpReLUSAE.from_arrays(_arrays(0)), tmp_path, format=layout)
    path = next(file for file in folder.iterdir() if file.suffix in (".npz", ".safetensors"))
    (folder / "new").write_bytes(b"short")
    for _ in range(2):  # checked, then known
        sae = JumpReLUSAE.from_folder(folder)
    REPLACED[how](path)
    assert _survives(sae)


@pytest.mark.parametrize("how", ["saved again", "renamed onto", "removed"])
def test_a_file_that_is_mapped(how: str, tmp_path: Path) -> None:
    """What does not write into the file leaves a map its content."""
    np.savez(tmp_path / "params.npz", **_arrays(0))
    (tmp_path / "params.npz").chmod(0o444)
    (tmp_path / "new").write_bytes(b"short")
    assert may_map(tmp_path / "params.npz")
    sae = JumpReLUSAE.from_folder(tmp_path)
    REPLACED[how](tmp_path / "params.npz")
    assert _survives(sae)
    if how == "saved again":
        assert _survives(JumpReLUSAE.from_folder(tmp_path), seed=1)


def test_saving_over_the_file_that_the_sae_is_mapped_from(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", **_arrays(0))
    (tmp_path / "params.npz").chmod(0o444)
    sae = JumpReLUSAE.from_folder(tmp_path)
    gs.save_sae(sae, tmp_path)
    assert _survives(sae) and _survives(JumpReLUSAE.from_folder(tmp_path))


def test_what_may_be_mapped(tmp_path: Path) -> None:
    blob = tmp_path / "models--a--b" / "blobs" / "1234"
    link = tmp_path / "models--a--b" / "snapshots" / "5678" / "x" / "params.npz"
    plain = tmp_path / "models--c--d" / "snapshots" / "5678" / "params.npz"  # a disk without symbolic links
    for file in (blob, plain, link.with_name("local")):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"x")
    link.symlink_to(os.path.relpath(blob, link.parent))
    mine = tmp_path / "params.npz"
    mine.write_bytes(b"x")
    assert may_map(link) and may_map(plain) and not may_map(mine)
    mine.chmod(0o444)
    assert may_map(mine)
    (tmp_path / "link").symlink_to(plain)
    assert not may_map(tmp_path / "link") and may_map(gs.registry.locate.BUNDLED_SAES / "README.md")


def test_downloaded_again_while_it_is_in_use(hub: Any, tmp_path: Path) -> None:  # noqa: F811
    """The Hub's client renames: the file that is mapped stays as it was, and the next load has the new one."""
    saes = [JumpReLUSAE.from_arrays(_arrays(seed)) for seed in (0, 1)]
    files = [gs.save_sae(sae, tmp_path / str(i)) / "params.npz" for i, sae in enumerate(saes)]
    repo = hub.repo("me/saes")
    path = "layer_1/width_1k/average_l0_7/params.npz"
    loaded: list[Any] = []
    for file in files:
        repo.commit({path: file.read_bytes()})
        loaded.append(_load(path, force=True))
    assert [_survives(sae, seed) for seed, sae in enumerate(loaded)] == [True, True]


def _load(path: str, force: bool) -> Any:
    sizes = {"width": "1k", "d_sae": D_SAE, "d_in": D_IN, "l0": 7.0}
    where = {"id": "i", "site": "res", "layer": 1, "path": path.rpartition("/")[0]}
    row = SAERow.model_validate({"release": "r", "repo": "me/saes", "model": "m", **where, **sizes})
    return load_row(row, force_download=force)

"""Faults of the machine under every function that writes: a full disk, no home, names that no file can have."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.cli.options import write_table
from gemma_scope_tl.errors import GemmaScopeError, WriteError
from gemma_scope_tl.interp.client import AnswerLog
from gemma_scope_tl.text.pack import pack_tokens
from gemma_scope_tl.viz.figures import new_figure, save_figure
from gemma_scope_tl.viz.latent_page import FeaturePage
from tests.training.planted import PlantedSource, tiny_config

MIT = gs.About("mit")
TEXTS = ["The river runs past the old mill and on to the sea, where the boats lie in the harbour."] * 20


class Disk:
    """A disk of a few kB, whose size can be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, kilobytes: int, option: str = "remount") -> bool:
        options = ",".join(filter(None, (option, f"size={kilobytes}k")))
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(self.folder)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    @property
    def files(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    made = Disk(tmp_path / "disk")
    made.folder.mkdir()
    if not made.resize(16, ""):
        pytest.skip("no disk can be mounted")
    yield made
    subprocess.run(["umount", "--lazy", str(made.folder)], check=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return gs.load_model("bundled")


@pytest.fixture(scope="module")
def sae() -> Any:
    return gs.load_sae("bundled", "res", 2, width="1k")


@pytest.fixture(scope="module")
def page(model: Any, sae: Any) -> FeaturePage:
    return gs.feature_page(model, sae, 3, TEXTS, rows=2, context=32)


def test_training_says_what_was_full_and_goes_on(disk: Disk, tmp_path: Path) -> None:
    """A disk that is full at the start, at a checkpoint, at the release; with more room each time, the same bits."""
    config = tiny_config(disk.folder / "run")

    def train() -> Any:
        return gs.train_suite(config, source=PlantedSource, progress=False)

    for size, why in (
        (4, "metrics.jsonl cannot"),
        (1_200, "step 10 could not .* step 5 is kept"),
        (3_000, "step 10 is kept"),
    ):
        disk.resize(size)
        with warnings.catch_warnings(record=True) as caught, pytest.raises(GemmaScopeError) as raised:
            train()
        assert re.search(why, str(raised.value)) and "the disk is full" in str(raised.value)
        assert "start the same run again" in str(raised.value)
        noted = [str(one.message) for one in caught if "times of this run are not recorded" in str(one.message)]
        assert len(noted) == (size == 4)
        assert not [name for name in disk.files if "unfinished" in name]
    disk.resize(12_000)
    table = train()
    whole = tiny_config(tmp_path / "run")
    wanted = gs.train_suite(whole, source=PlantedSource, progress=False)
    assert list(table["sha256"]) == list(wanted["sha256"])


def test_a_release_that_does_not_fit_leaves_the_run_as_it_was(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(disk.folder / "run", checkpoint_every=100)
    disk.resize(12_000)
    from gemma_scope_tl.training import suite

    real = suite.write_release

    def filled(*args: Any) -> Any:
        used = sum(path.stat().st_blocks * 512 for path in disk.folder.rglob("*"))
        disk.resize(used // 1024 + 130)
        return real(*args)

    monkeypatch.setattr(suite, "write_release", filled)
    with pytest.raises(WriteError, match="params.npz cannot be written: the disk is full"):
        gs.train_suite(config, source=PlantedSource, progress=False)
    assert not (disk.folder / "run" / ".release").exists() and "run/suite.json" not in disk.files
    monkeypatch.setattr(suite, "write_release", real)
    disk.resize(12_000)
    assert len(gs.train_suite(config, source=PlantedSource, progress=False)) == 5


def test_everything_that_is_saved(disk: Disk, sae: Any, page: FeaturePage) -> None:
    folder, figure, table = disk.folder, new_figure(1)[0], gs.list_saes()
    disk.resize(4)
    writes: dict[str, Callable[[], Any]] = {
        "params.npz": lambda: gs.save_sae(sae, folder / "a"),
        "sae_weights.safetensors": lambda: gs.save_sae(sae, folder / "b", format="sae-lens"),
        "average_l0_16/params.npz": lambda: gs.export_suite(sae, folder / "c", MIT, progress=False),
        "p.html": lambda: page.save(folder / "p.html"),
        "f.png": lambda: save_figure(figure, folder / "f.png"),
        "t.csv": lambda: write_table(table, folder / "t.csv"),
        "t.json": lambda: write_table(table, folder / "t.json"),
        "t.parquet": lambda: write_table(table, folder / "t.parquet"),
        "answers": lambda: AnswerLog(folder / "answers").add("key", "model", "x" * 50_000),
    }
    for name, write in writes.items():
        with pytest.raises(WriteError, match=f"{name} cannot be written: the disk is full"):
            write()
        (folder / "answers").unlink(missing_ok=True)
        assert not disk.files, name


def test_packing_tokens(disk: Disk, model: Any) -> None:
    with pytest.raises(WriteError, match="cannot be written: the disk is full.*pack again"):
        pack_tokens(TEXTS * 50, model.tokenizer, 32, disk.folder / "rows", progress=False)
    disk.resize(12_000)
    rows = pack_tokens(TEXTS * 50, model.tokenizer, 32, disk.folder / "rows", progress=False)
    rows.verify()


def test_measuring_and_reading_go_on_without_a_cache(
    disk: Disk, model: Any, sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was asked for is there; only what would have been kept is not."""
    options: dict[str, Any] = {"context": 32, "progress": False}
    wanted = gs.evaluate(model, sae, TEXTS, **options)
    disk.resize(4)
    with pytest.warns(UserWarning, match="not kept in the cache: .* the disk is full"):
        found = gs.evaluate(model, sae, TEXTS, cache=disk.folder / "cache", **options)
    assert found.drop(columns="seconds", errors="ignore").equals(wanted.drop(columns="seconds", errors="ignore"))
    monkeypatch.setenv("GEMMA_SCOPE_TL_CACHE", str(disk.folder / "home"))
    chosen = sae.row.release, sae.row.id, [7, 3]
    with pytest.warns(UserWarning, match="without a copy by rows: .* the disk is full"):
        latents = gs.load_latents(*chosen, cache_rows=True)
    assert latents.W_enc is not None and torch.equal(latents.W_enc, sae.W_enc[:, [7, 3]])


NO_HOME = """
import os, pwd
def nobody(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
try:
    os.setresuid(12345, 0, 0)  # an unknown user, who can still read the source tree
except PermissionError:
    pwd.getpwuid = nobody
assert "HOME" not in os.environ
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=DeprecationWarning)
import gemma_scope_tl as gs
from gemma_scope_tl.registry.locate import user_folder
from gemma_scope_tl.weights.stamp import cache_folder
sae = gs.load_sae("bundled", "res", 2, width="1k")
assert user_folder() is None and cache_folder() is None and len(gs.list_saes())
gs.save_sae(sae, "saved")
assert (gs.JumpReLUSAE.from_folder("saved").W_dec == sae.W_dec).all()
warnings.simplefilter("ignore")
gs.load_latents(sae.row.release, sae.row.id, [1], cache_rows=True)
model = gs.load_model("bundled", check=False)
assert len(gs.features(model, "The river", sae))
from gemma_scope_tl import diagnose
diagnose._disk()
try:
    gs.register_release("~/mine.yaml")
except gs.errors.GemmaScopeError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_user_without_a_home(tmp_path: Path) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(Path(gs.__file__).parents[1]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", NO_HOME], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert (
        "~/mine.yaml is in a home folder, and no home folder is known: give the absolute path, or set HOME."
        in done.stdout
    )
    assert [path.name for path in tmp_path.iterdir() if path.name != "~"] == ["saved"]  # the Hub's client makes a ~


def test_odd_names(tmp_path: Path, sae: Any) -> None:
    for number, name in enumerate(["a" * 250, "日本é", "a b", "'\"*?", "x/y", "-x", "a\nb"]):
        saved = gs.save_sae(sae, tmp_path / "in" / name)
        assert torch.equal(gs.JumpReLUSAE.from_folder(saved).W_dec, sae.W_dec)
        (out,) = gs.export_suite(sae, tmp_path / str(number) / name, MIT, name="fine", progress=False)
        assert len(gs.registry.read_release(out / "fine.yaml").rows) == 1
    (out,) = gs.export_suite(sae, tmp_path / "x.yaml", MIT, progress=False)
    assert (out / "x.yaml.yaml").is_file()


@pytest.mark.parametrize("name", ["a" * 300, "a\0b", "/".join(["a" * 200] * 30)], ids=["long", "nul", "deep"])
def test_names_that_no_folder_has(name: str, tmp_path: Path, sae: Any) -> None:
    place = f"{tmp_path}/{name}"
    attempts: list[Callable[[], Any]] = [
        lambda: gs.save_sae(sae, place),
        lambda: gs.JumpReLUSAE.from_folder(place),
        lambda: gs.export_suite(sae, place, MIT, name="fine", progress=False),
        lambda: gs.train_suite(tiny_config(Path(place)), source=PlantedSource, progress=False),
        lambda: gs.register_release(place),
    ]
    for attempt in attempts:
        with pytest.raises(GemmaScopeError):
            attempt()


@pytest.mark.parametrize("name", ["日本é", "a b", "-x", "", "a/b", "a" * 201, ".."])
def test_a_release_that_cannot_be_called_so_is_refused_before_anything_is_written(
    name: str, tmp_path: Path, sae: Any
) -> None:
    with pytest.raises(GemmaScopeError, match="A release's name has at most"):
        gs.export_suite(sae, tmp_path / "out" / ("- " if not name else "x"), MIT, name=name, progress=False)
    assert not list(tmp_path.iterdir())
    with pytest.raises(GemmaScopeError, match="is not a path"):
        gs.save_sae(sae, "")

"""Releases from outside the package: how they are found, whose names win (nobody's), and what they cannot reach."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import gemma_scope_tl as gs
from gemma_scope_tl.errors import RegistryError, UnknownNameError, WeightsError
from gemma_scope_tl.registry import clear_cache, locate, read_release, releases, resolve
from gemma_scope_tl.registry.listing import select_rows
from gemma_scope_tl.registry.locate import EXTRA_FOLDERS_VARIABLE, files_of_entry_point, inside, user_folder
from gemma_scope_tl.registry.schema import SAERow, parse_release
from gemma_scope_tl.weights.fetch import bundled_root, fetch

ROW = "{id: %s, site: res, layer: 0, width: 1k, d_sae: 1024, d_in: 64, l0: 50, path: %s%s}"
ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, name: str = "mine", repo: str = "bundled", rows: str = "", more: str = "") -> Path:
    """A registry file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.yaml"
    head = f"release: {name}\n{more}repo: {repo}\nmodel: tiny\nlicense: MIT\ndescription: d\nsaes:\n"
    path.write_text(head + (rows or f"  - {ROW % ('a', 'a', '')}\n"))
    return path


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No registered files, no user's own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(EXTRA_FOLDERS_VARIABLE, raising=False)
    monkeypatch.setattr(locate, "_registered", {})
    clear_cache()
    yield
    clear_cache()


# --- register_release


def test_a_file_is_registered_once_however_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "x")
    with pytest.raises(UnknownNameError, match="Unknown release 'mine'"):
        resolve("mine", "a")
    assert gs.register_release(path) == "mine"
    monkeypatch.chdir(tmp_path / "x")
    assert gs.register_release("mine.yaml") == "mine" and releases().count("mine") == 1
    assert resolve("mine", "a").model == "tiny"
    write(tmp_path / "x", rows=f"  - {ROW % ('b', 'b', '')}\n")
    assert gs.register_release(path) == "mine" and resolve("mine", "b").id == "b"  # a changed file is read again
    monkeypatch.setenv(EXTRA_FOLDERS_VARIABLE, str(tmp_path / "x"))  # and one that is found in two ways counts once
    assert releases().count("mine") == 1


def test_a_broken_file_is_not_registered(tmp_path: Path) -> None:
    path = write(tmp_path, rows="  - {id: a}\n")
    with pytest.raises(RegistryError, match="a: site: is missing"):
        gs.register_release(path)
    with pytest.raises(RegistryError, match="cannot be read"):
        gs.register_release(tmp_path / "none.yaml")
    assert "mine" not in releases()


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("bundled-res", ""),
        ("gemma-scope-2b-pt-res-canonical", ""),
        ("mine", "canonical_release: gemma-scope-2b-pt-res\n"),
        ("mine", "canonical_release: bundled-res\n"),
    ],
)
def test_no_name_can_be_shadowed(tmp_path: Path, name: str, more: str) -> None:
    path = write(tmp_path, name=name, more=more)
    before = releases(canonical=True)
    with pytest.raises(RegistryError) as caught:
        gs.register_release(path)
    assert str(path) in str(caught.value) and "pretrained_yaml" in str(caught.value) and "claim" in str(caught.value)
    assert releases(canonical=True) == before  # the package goes on working


def test_every_clash_is_named_at_once(tmp_path: Path) -> None:
    path = write(tmp_path, name="bundled-att", more="canonical_release: bundled-res\n")
    with pytest.raises(RegistryError, match=r"'bundled-att'.*'bundled-res'|'bundled-res'.*'bundled-att'"):
        gs.register_release(path)


def test_ids_that_repeat_are_named_with_their_rows(tmp_path: Path) -> None:
    rows = "".join(f"  - {ROW % (id_, id_, '')}\n" for id_ in ("a", "b", "a", "a"))
    with pytest.raises(RegistryError, match="a: id: rows 1, 3 and 4 have this id"):
        gs.register_release(write(tmp_path, rows=rows))


# --- folders


def test_the_users_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert user_folder() == tmp_path / "config" / "gemma_scope_tl" / "registry"
    assert "mine" not in releases()  # it need not exist
    write(user_folder())
    assert resolve("mine", "a").release == "mine"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CONFIG_HOME", value)
        assert user_folder() == tmp_path / "home" / ".config" / "gemma_scope_tl" / "registry"


# --- packages


def package(site: Path, value: str, name: str = "their-saes") -> None:
    """An installed distribution with an entry point, as pip would leave it."""
    info = site / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{locate.ENTRY_POINT_GROUP}]\nsaes = {value}\n")


def test_packages_offer_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "their_saes"
    write(module, "theirs")
    write(module / "more", "others")
    (module / "__init__.py").write_text("raise RuntimeError('a module without an attribute is not run')")
    (tmp_path / "their_paths.py").write_text(
        "from pathlib import Path\nhere = Path(__file__).parent / 'their_saes'\n"
        "class Both:\n    places = [here / 'theirs.yaml', str(here / 'more')]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for value, wanted in [
        ("their_saes", ["theirs"]),
        ("their_paths:here", ["theirs"]),
        ("their_paths:Both.places", ["theirs", "others"]),
    ]:
        found = files_of_entry_point(EntryPoint("saes", value, locate.ENTRY_POINT_GROUP))
        assert [path.stem for path in found] == wanted
    package(tmp_path, "their_saes")
    clear_cache()
    assert resolve("theirs", "a").model == "tiny"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("nothing_there_at_all", "no module"),
        ("json:nothing", "no attribute"),
        ("math:pi", "a path"),
        ("json", r"\*\.yaml"),
        ("json:__name__", "not an absolute path"),
    ],
)
def test_a_broken_entry_point_names_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: str, why: str
) -> None:
    package(tmp_path, value)
    monkeypatch.syspath_prepend(tmp_path)
    clear_cache()
    with pytest.raises(RegistryError, match=f"The package their-saes provides registry files as '{value}'.*{why}"):
        releases()


def test_installed_packages_are_looked_up_without_importing_them(tmp_path: Path) -> None:
    write(tmp_path / "their_saes", "theirs")
    (tmp_path / "their_saes" / "__init__.py").write_text("import torch")
    package(tmp_path, "their_saes")
    code = (
        "import sys, gemma_scope_tl as gs; print(gs.registry.resolve('theirs', 'a').id,"
        "[m for m in ('torch', 'pandas', 'huggingface_hub', 'their_saes', 'typer') if m in sys.modules])"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.strip() == "a []", done.stderr


# --- local repositories and what they cannot reach


def bundled_row() -> SAERow:
    """Any one of 1,024 latents."""
    return select_rows("bundled", site="res", layer=0, width="1k")[0]


def local_release(folder: Path, repo: str) -> Path:
    """A registry file beside a copy of a bundled SAE."""
    shutil.copytree(bundled_root() / bundled_row().path, folder / "saes" / "deep" / "a")
    row = (ROW % ("a", "deep/a", "")).replace("d_in: 64", "d_in: 128")
    return write(folder, repo=repo, rows=f"  - {row}\n")


def test_a_folder_beside_the_file_is_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = local_release(tmp_path / "x", "./saes")
    assert gs.register_release(path) == "mine"
    monkeypatch.chdir("/")
    row = resolve("mine", "a")
    assert row.repo == str(tmp_path / "x" / "saes") and fetch(row).parent.name == "a"
    sae = gs.JumpReLUSAE.from_pretrained("mine", "a")
    theirs = gs.JumpReLUSAE.from_pretrained("bundled-res", bundled_row().id)
    assert (sae.W_dec == theirs.W_dec).all()
    shutil.move(tmp_path / "x", tmp_path / "y")  # both move together
    assert fetch(read_release(tmp_path / "y" / "mine.yaml").rows[0]).is_file()


def test_an_absolute_folder_is_a_repository(tmp_path: Path) -> None:
    path = local_release(tmp_path / "x y", str(tmp_path / "x y" / "saes"))
    assert fetch(read_release(path).rows[0]).is_file()
    with pytest.raises(RegistryError, match="not read from a file"):
        _ = parse_release({**read_release(path).model_dump(), "repo": "./saes"}, "x").rows


@pytest.mark.parametrize(
    "repo", ["../saes", "./../saes", "/a/../b", "..", "a/..", "~/saes", "./a//b", "a/b/c", "a", ""]
)
def test_repositories_that_are_none(tmp_path: Path, repo: str) -> None:
    with pytest.raises(RegistryError, match="repo: .*is not a repository"):
        read_release(write(tmp_path, repo=f"'{repo}'"))


@pytest.mark.parametrize("path", ["../secret", "a/../../secret", "/etc", "./a", "a//b", "C:\\\\x", "a/\\0"])
def test_paths_that_leave_the_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret").mkdir()
    with pytest.raises(RegistryError, match=r"path: .*is not a relative path"):
        read_release(write(tmp_path / "x", repo=".", rows=f"  - {ROW % ('a', chr(34) + path + chr(34), '')}\n"))


@pytest.mark.parametrize("link", ["folder", "file", "parent", "loop"])
def test_symbolic_links_that_leave_the_folder(tmp_path: Path, link: str) -> None:
    path = local_release(tmp_path / "x", "./saes")
    outside, target = tmp_path / "outside", tmp_path / "x" / "saes" / "deep" / "a"
    shutil.copytree(target, outside / "a")
    if link == "file":
        (target / "params.npz").unlink()
        (target / "params.npz").symlink_to(outside / "a" / "params.npz")
    elif link == "loop":
        shutil.rmtree(target)
        target.symlink_to(target)
    else:
        place = target if link == "folder" else target.parent
        shutil.rmtree(place)
        place.symlink_to(outside / "a" if link == "folder" else outside)
    with pytest.raises((RegistryError, WeightsError), match="leads out of|cannot be resolved|does not exist"):
        fetch(read_release(path).rows[0])


def test_links_within_the_folder_are_followed(tmp_path: Path) -> None:
    path = local_release(tmp_path / "x", "./saes")
    place = tmp_path / "x" / "saes" / "deep"
    (place / "a").rename(place / "real")
    (place / "a").symlink_to("real")
    (tmp_path / "link.yaml").symlink_to(path)
    assert fetch(read_release(path).rows[0]).is_file()
    assert inside(tmp_path, "x/mine.yaml") == path
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.yaml").symlink_to(path)  # a link to the file: the folder beside the file itself
    assert fetch(read_release(tmp_path / "elsewhere" / "mine.yaml").rows[0]).is_file()


# --- a release, a file or a folder where a model is asked for


@pytest.fixture
def exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of two SAEs as ``export_suite`` writes it, not registered; forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locate, "_registered", dict(locate._registered))
    suite = gs.load_suite("bundled", "mlp", layers=[1, 2], width="1k")
    (repo,) = gs.export_suite(suite, "my-out", gs.About("mit", description="Two SAEs."), progress=False)
    yield repo
    clear_cache()


def test_all_saes_of_a_registered_release(exported: Path) -> None:
    """Its name is no model's, which is said; ``release=`` chooses it among those of the model."""
    gs.register_release(exported / "my-out.yaml")
    for call in (lambda: gs.load_suite("my-out", "mlp"), lambda: gs.load_sae("my-out", "mlp", 1)):
        with pytest.raises(UnknownNameError, match=r"is a release, of SAEs of bundled: .*release='my-out'.*from_pretr"):
            call()
    mine = gs.load_suite("bundled", "mlp", width="1k", l0="closest:16", release="my-out")
    assert list(mine) == [("mlp", 1), ("mlp", 2)] and mine.rows["mlp", 2].release == "my-out"
    with pytest.raises(RegistryError, match="2 SAEs fit: .* Say which with release="):
        gs.load_sae("bundled", "mlp", 1, "1k", l0=16)
    sae = gs.load_sae("bundled", "mlp", 1, "1k", l0=16, release="my-out")
    assert sae.row == mine.rows["mlp", 1]
    with pytest.raises(UnknownNameError, match="Unknown release 'my-in'. Nearest: .*my-out"):
        gs.load_suite("bundled", "mlp", width="1k", release="my-in")


def test_a_folder_or_file_in_place_of_a_model(exported: Path) -> None:
    for given in ("my-out", "./my-out", "my-out/my-out.yaml"):
        with pytest.raises(UnknownNameError, match=r"register_release\('my-out/my-out.yaml'\)"):
            gs.load_suite(given, "mlp")
    (exported / "my-out.yaml").rename("elsewhere.yaml")
    for given in ("my-out", "my-out/layer_1/width_1k/average_l0_16"):
        with pytest.raises(UnknownNameError, match="This is a folder: JumpReLUSAE.from_folder.*export_suite"):
            gs.load_sae(given, "mlp", 1)
    Path("empty").mkdir()
    with pytest.raises(UnknownNameError, match=r"Unknown model 'empty'. Nearest: [^:]*$"):
        gs.load_sae("empty", "mlp", 1)


def test_the_default_width_is_said_to_be_one() -> None:
    for call in (lambda: gs.load_sae("bundled", "res", 2), lambda: gs.load_suite("bundled", "res")):
        with pytest.raises(UnknownNameError, match="Nearest: 1k, 256. '16k' is the default: give one of these as wid"):
            call()
    for given in ("16k", "4k"):
        with pytest.raises(
            UnknownNameError, match=f"Unknown width of bundled at res layer 2 '{given}'. Nearest: 1k, 256.$"
        ):
            gs.load_sae("bundled", "res", 2, given)

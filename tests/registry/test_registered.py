"""Registered files that are deleted, broken or removed afterwards: all other releases stay usable."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

import gemma_scope_tl as gs
from gemma_scope_tl.errors import RegistryError, UnknownNameError
from gemma_scope_tl.registry import clear_cache, locate, releases, resolve
from tests.registry.test_outside import ROW, write


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No registered files, no user's own."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv(locate.EXTRA_FOLDERS_VARIABLE, raising=False)
    monkeypatch.setattr(locate, "_registered", {})
    clear_cache()
    yield
    clear_cache()


def _spoil(path: Path, how: str) -> None:
    if how == "deleted":
        path.unlink()
    elif how == "not YAML":
        path.write_text("release: [")
    else:  # a header that can be read, above rows that cannot
        write(path.parent, path.stem, rows="  - {id: a}\n")


@pytest.mark.parametrize("how", ["deleted", "not YAML", "broken row"])
def test_a_file_that_cannot_be_used_any_more_is_left_out_with_one_warning(tmp_path: Path, how: str) -> None:
    path = write(tmp_path / "a", "first")
    gs.register_release(path)
    _spoil(path, how)
    with pytest.warns(UserWarning, match=f"A registered release is left out: .*unregister_release. {path} ") as caught:
        assert gs.register_release(write(tmp_path / "b", "second")) == "second"
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        clear_cache()
        assert "first" not in releases() and {"second", "bundled-res"} <= set(releases())
        assert gs.load_sae("bundled", "res", 1, "1k").layer == 1
        assert set(gs.list_saes(model="tiny")["release"]) == {"second"}
        with pytest.raises(UnknownNameError, match="Unknown release 'first'"):
            resolve("first", "a")
        write(tmp_path / "a", "first", rows=f"  - {ROW % ('c', 'c', '')}\n")
        assert gs.register_release(path) == "first" and resolve("first", "c").id == "c"
    _spoil(path, how)
    clear_cache()
    with pytest.warns(UserWarning, match="left out"):  # it was there in between
        releases()


def test_a_broken_file_that_is_registered_again_says_why(tmp_path: Path) -> None:
    path = write(tmp_path, "first")
    gs.register_release(path)
    path.write_text("release: [")
    with pytest.raises(RegistryError, match=str(path)):
        gs.register_release(path)


def test_a_release_is_unregistered_by_its_name_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "first")
    monkeypatch.chdir(tmp_path)
    for given in ("first", path, str(path), Path("first.yaml")):
        gs.register_release(path)
        assert "first" in releases()
        gs.unregister_release(given)
        assert "first" not in releases()
    gs.register_release(path)
    path.unlink()
    gs.unregister_release("first")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        clear_cache()
        assert "first" not in releases()


def test_what_was_not_registered_cannot_be_unregistered(tmp_path: Path) -> None:
    gs.register_release(write(tmp_path, "first"))
    with pytest.raises(UnknownNameError, match="Unknown registered release 'frist'. Nearest: first"):
        gs.unregister_release("frist")
    with pytest.raises(UnknownNameError, match=r"It comes from .*bundled-res\.yaml, and not from register_release"):
        gs.unregister_release("bundled-res")

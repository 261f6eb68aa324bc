"""Hostile and careless YAML: refused with the line, before it can blow up."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gemma_scope_tl.errors import RegistryError
from gemma_scope_tl.registry import plain_yaml, read_release
from gemma_scope_tl.registry.locate import builtin_folder
from gemma_scope_tl.registry.plain_yaml import MAX_BYTES, MAX_DEPTH, load_yaml, read_text

LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))

REFUSED = {
    LAUGHS: r"line 2, has the alias \*a",
    "a: 1\nb: {c: 1,\n c: 2}": r"line 3, has the key 'c' again \(first in line 2\)",
    "a: 1\nb: 2\n'a': 3": "line 3, has the key 'a' again",
    "[" * 3_000_000: "nest",
    "- " * (MAX_DEPTH + 2): "nested more than",
    "{a: " * 900 + "}" * 900: "nested more than",
    "a: !!python/object/apply:os.system ['true']": "tag",
    "a: !!binary aGk=": "tag",
    "!!set {a, b}": "tag",
    "<<: {a: 1}": "merges",
    "[1]: 2": "collection as a key",
    "? {a: 1}\n: 2": "collection as a key",
    "a: 1\n---\nb: 2": "line 3, has a second document",
    "a: " + "9" * 5000: "not a int",
    "a: 1" + ":59" * 5000: "not a int",
    "a: !!int x": "not a int",
    "a: \x00": "not YAML",
    "a: [": "not YAML",
}


@pytest.mark.parametrize("text", REFUSED, ids=[text[:20] for text in REFUSED])
@pytest.mark.parametrize("loader", ["C", "Python"])
def test_what_is_refused(text: str, loader: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if loader == "Python":
        monkeypatch.setattr(plain_yaml, "_LOADER", yaml.SafeLoader)
    with pytest.raises(RegistryError, match=f"(?s)^my.yaml.*{REFUSED[text]}"):
        load_yaml(text, "my.yaml")


def test_the_registry_reads_as_pyyaml_reads_it() -> None:
    files = sorted(builtin_folder().glob("*.yaml"))
    assert len(files) > 9
    for path in files:
        text = path.read_text()
        assert load_yaml(text, "x") == yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)), path.name


SCALARS = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=12)


@given(
    st.recursive(
        SCALARS,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
        max_leaves=12,
    )
)
def test_what_pyyaml_writes_is_read_as_it_reads_it(data: object) -> None:
    class NoAliases(yaml.SafeDumper):
        def ignore_aliases(self, data: object) -> bool:
            return True

    text = yaml.dump(data, Dumper=NoAliases, allow_unicode=True)
    assert load_yaml(text, "x") == yaml.load(text, yaml.CSafeLoader)


def test_scalars() -> None:
    text = "a: ~\nb: yes\nc: 0x1f\nd: 1_000\ne: 1e5\nf: .inf\ng: 2024-01-01\nh: '1'\ni: !!str 5\n1: {}\nj: []"
    wanted = {"a": None, "b": True, "c": 31, "d": 1000, "e": "1e5", "f": math.inf, "g": "2024-01-01"}
    assert load_yaml(text, "x") == {**wanted, "h": "1", "i": "5", 1: {}, "j": []}
    assert load_yaml("", "x") is None and load_yaml("# nothing", "x") is None


def test_the_size_is_bounded_before_anything_is_parsed(tmp_path: Path) -> None:
    path = tmp_path / "huge.yaml"
    with path.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with pytest.raises(RegistryError, match=r"huge\.yaml is larger than 16,777,216 bytes"):
        read_release(path)
    assert read_text(builtin_folder() / "bundled-res.yaml").startswith("#")
    (tmp_path / "latin.yaml").write_bytes(b"release: \xe9")
    with pytest.raises(RegistryError, match="cannot be read"):
        read_release(tmp_path / "latin.yaml")
    with pytest.raises(RegistryError, match="cannot be read"):
        read_release(tmp_path)

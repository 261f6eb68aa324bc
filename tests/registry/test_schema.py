"""Registry files: what is accepted, and that every problem of a file is reported at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_scope_tl.errors import RegistryError
from gemma_scope_tl.families import families, forget_family, register_family
from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.registry import parse_width, read_release, width_label
from gemma_scope_tl.registry.render import json_schema, render_release
from gemma_scope_tl.registry.schema import SAERow, load_yaml, parse_release
from gemma_scope_tl.sites import get_site


def row(**changes: Any) -> dict[str, Any]:
    """A valid row, with changes."""
    given: dict[str, Any] = {
        "id": "layer_0/width_1k/average_l0_20",
        "site": "res",
        "layer": 0,
        "width": "1k",
        "d_sae": 1024,
        "d_in": 64,
        "l0": 20,
        "path": "layer_0/width_1k/average_l0_20",
    }
    return given | changes


def release(*rows: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A valid registry file as data, with these rows and changes."""
    given: dict[str, Any] = {
        "release": "bundled-res",
        "repo": "bundled",
        "model": "tiny-gemma-2",
        "license": "MIT",
        "description": "a few SAEs",
        "saes": list(rows) or [row()],
    }
    return given | changes


def problems(data: object) -> list[str]:
    """The listed problems of a file that must not pass."""
    with pytest.raises(RegistryError) as caught:
        parse_release(data, "my.yaml")
    first, *listed = str(caught.value).splitlines()
    assert first.startswith("my.yaml breaks the registry schema in ") and f" {len(listed)} problem" in first
    return [line.strip() for line in listed]


def test_a_valid_file_gives_rows_with_the_releases_fields() -> None:
    file = parse_release(release(row(canonical=True), row(id="b", path="b", l0=None, width=512, d_sae=512)), "x")
    first, second = file.rows
    assert (first.release, first.model, first.repo, first.l0) == ("bundled-res", "tiny-gemma-2", "bundled", 20.0)
    assert first.canonical_id == "layer_0/width_1k/canonical" and second.canonical_id is None
    assert first.weights_path == "layer_0/width_1k/average_l0_20/params.npz"
    assert SAERow.model_validate(first.model_dump()) == first
    with pytest.raises(ValueError, match="frozen"):
        first.l0 = 3.0


def test_no_more_latents_are_active_than_there_are() -> None:
    assert parse_release(release(row(l0=1024)), "x").saes[0].l0 == 1024
    (problem,) = problems(release(row(l0=5000)))
    assert problem == "layer_0/width_1k/average_l0_20: l0: 5000 latents cannot be active of 1024"


def test_all_problems_of_a_file_are_reported_at_once_with_row_and_field() -> None:
    rows = [
        row(id="a", site="ress", d_sae=1000),
        row(id="b", layer=None, path="../b", sha256="abc"),
        row(id="c", width="17k", l0=0, d_in=-1),
        row(id="c", path="/c", widht="1k"),
        {key: value for key, value in row(id="d", site="embedding", layer=2).items() if key != "path"},
        row(id="e", canonical=True),
        row(id="f", canonical=True),
        "not a row",
    ]
    found = problems(release(*rows, model="", canonical_release="bundled-res"))  # type: ignore[arg-type]
    starts = [tuple(line.split(": ")[:2]) for line in found]
    assert starts.count(("c", "id")) == 1
    for expected in [
        ("a", "site"),
        ("a", "d_sae"),
        ("b", "layer"),
        ("b", "path"),
        ("b", "sha256"),
        ("c", "width"),
        ("c", "l0"),
        ("c", "d_in"),
        ("c", "path"),
        ("c", "widht"),
        ("c", "id"),
        ("d", "layer"),
        ("d", "path"),
        ("e", "canonical"),
    ]:
        assert expected in starts, (expected, found)
    assert any(line.startswith("model: ") for line in found) and any(line.startswith("row 8: ") for line in found)
    assert any(line.startswith("canonical_release: ") for line in found)
    assert "d: path: is missing" in found
    assert any("Nearest: res" in line for line in found) and any("Nearest: width" in line for line in found)
    assert len(found) == 17, found
    assert not any("pydantic" in line or "type=" in line for line in found)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"path": "a/../../b"}, "path"),
        ({"path": "a//b"}, "path"),
        ({"path": "C:\\b"}, "path"),
        ({"path": ""}, "path"),
        ({"id": "a b"}, "id"),
        ({"layer": -1}, "layer"),
        ({"layer": "0"}, "layer"),
        ({"layer": True}, "layer"),
        ({"site": "embedding"}, "layer"),
        ({"site": None}, "site"),
        ({"width": None}, "width"),
        ({"d_sae": 2048}, "d_sae"),
        ({"width": 1024}, "d_sae"),
        ({"d_sae": 0, "width": "0"}, "width"),
        ({"l0": float("inf")}, "l0"),
        ({"l0": -3}, "l0"),
        ({"canonical": "yes"}, "canonical"),
        ({"sha256": "A" * 64}, "sha256"),
        ({"revision": ""}, "revision"),
        ({"note": ""}, "note"),
    ],
)
def test_each_rule_of_a_row(change: dict[str, Any], field: str) -> None:
    found = problems(release(row(**change)))
    assert any(f": {field}: " in line for line in found), found


def test_canonical_names_must_be_free() -> None:
    mlp = row(id="layer_0/width_1k/mlp", site="mlp", canonical=True)
    assert "share this id" in problems(release(row(canonical=True), mlp))[0]
    taken = row(id="layer_0/width_1k/canonical", l0=30)
    assert "canonical name of another row" in problems(release(row(canonical=True), taken))[0]


NOT_RELEASES: list[object] = [None, [], "text", {}, {"saes": []}, {"saes": {"a": 1}}, {"saes": [None]}, {1: 2}]


@pytest.mark.parametrize("data", [*NOT_RELEASES, {"saes": [{1: 2, "id": 3}]}])
def test_what_is_not_a_release_at_all(data: object) -> None:
    assert problems(data)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="cannot be read"):
        read_release(tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("saes: [")
    with pytest.raises(RegistryError, match=r"(?s)bad\.yaml is not YAML.*line"):
        read_release(tmp_path / "bad.yaml")
    (tmp_path / "tagged.yaml").write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(RegistryError, match="not plain YAML data"):
        read_release(tmp_path / "tagged.yaml")
    (tmp_path / "other.yaml").write_text(render_release(parse_release(release(), "x")))
    with pytest.raises(RegistryError, match=r"bundled-res\.yaml"):
        read_release(tmp_path / "other.yaml")


def test_rendered_text_reads_back_and_is_one_line_a_row() -> None:
    odd = row(id="off", path="512", width="512", d_sae=512, l0=20.5, note='a "quoted": note # π', revision="1e5")
    file = parse_release(release(row(), odd, notes=["a: b", "c"]), "x")
    text = render_release(file)
    assert parse_release(load_yaml(text, "x"), "x") == file
    assert text.startswith("# yaml-language-server: $schema=schema.json\nrelease: bundled-res\n")
    assert [line[:12] for line in text.splitlines()[-2:]] == ["  - {id: lay", '  - {id: "of']


def test_json_schema_names_every_key() -> None:
    schema = json.loads(json_schema())
    assert schema["additionalProperties"] is False
    assert set(schema["$defs"]["SAEEntry"]["required"]) == set(row())


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    write_atomically(tmp_path / "a.yaml", "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "a.yaml", "new \ud800")
    assert [p.name for p in tmp_path.iterdir()] == ["a.yaml"] and (tmp_path / "a.yaml").read_text() == "old"


@given(st.integers(1, 2**26))
def test_width_labels_and_numbers_are_inverses(d_sae: int) -> None:
    assert parse_width(width_label(d_sae)) == d_sae


@given(st.integers(10, 40))
def test_powers_of_two_have_short_labels(power: int) -> None:
    label = width_label(2**power)
    assert label[-1] in "km" and parse_width(label) == 2**power


@given(st.text(max_size=8) | st.from_regex(r"\A\d{1,6}[km]?\Z"))
def test_any_text_is_a_width_or_an_error(text: str) -> None:
    try:
        assert parse_width(text) > 0
    except RegistryError as error:
        assert repr(text) in str(error)


def test_width_labels_of_the_release() -> None:
    labels = {"512": 512, "1k": 2**10, "4k": 2**12, "16k": 2**14, "32k": 2**15, "65k": 2**16, "131k": 2**17}
    labels |= {"262k": 2**18, "524k": 2**19, "1m": 2**20}
    assert {label: parse_width(label) for label in labels} == labels
    for wrong in ("64k", "24k", "16K", "0", "", "k", "-1k", "1.5k", "016k", "\uff19k", "9" * 30 + "k"):
        with pytest.raises(RegistryError):
            parse_width(wrong)
    with pytest.raises(RegistryError):
        width_label(0)


def test_a_thousand_problems_are_counted_and_a_hundred_shown() -> None:
    with pytest.raises(RegistryError, match="in 1000 problems") as caught:
        parse_release(release(*(row(id=f"a/{i}", layer=-1) for i in range(1000))), "f")
    assert str(caught.value).endswith("and 900 more")
    assert str(caught.value).count("\n") == 101


def test_a_row_or_file_that_is_no_mapping_is_told_without_names_of_classes() -> None:
    assert problems({**release(), "saes": [1]}) == ["row 1: should be a mapping of keys, not 1"]
    assert problems([1]) == ["should be a mapping of keys, not [1]"]


def test_a_release_names_its_models_family() -> None:
    file = parse_release(release(family="gemma2", model="mine"), "x")
    assert "family: gemma2" in render_release(file) and file.rows[0].model_family.name == "gemma2"
    assert "family" not in render_release(parse_release(release(), "x"))
    assert parse_release(release(model="gemma-2-9b-it"), "x").rows[0].model_family.name == "gemma2"
    assert problems(release(family="gemma")) == ["family: Unknown model family 'gemma'. Nearest: gemma3, gemma2."]


def test_sites_are_those_of_the_family() -> None:
    site = replace(get_site("res"), name="attn_in", reads=("attn_in",), writes=("attn_in",))
    register_family(replace(families()[0], name="toy", title="Toy", model_types=("toy",), sites={"attn_in": site}))
    try:
        assert parse_release(release(row(site="attn_in"), family="toy"), "x").rows[0].model_family.title == "Toy"
        assert problems(release(family="toy")) == [
            "layer_0/width_1k/average_l0_20: site: Unknown site of Toy 'res'. Nearest: attn_in."
        ]
        assert "Unknown site of Gemma 2 'attn_in'" in problems(release(row(site="attn_in")))[0]
    finally:
        forget_family("toy")


def test_rows_may_write_another_width() -> None:
    file = parse_release(release(row(site="transcoder", d_out=32)), "x")
    assert file.rows[0].d_out == 32 and "d_in: 64, d_out: 32" in render_release(file)
    assert parse_release(release(row(d_out=64)), "x").rows[0].d_out == 64
    assert "writes what it reads, 64 values, not 32" in problems(release(row(d_out=32)))[0]

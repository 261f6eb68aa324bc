"""Rows of crosscoders and cross-layer transcoders: Google's, how they are found, and their schema."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gemma_scope_tl.errors import RegistryError, UnknownNameError
from gemma_scope_tl.registry import find, list_saes, resolve
from gemma_scope_tl.registry.listing import select_rows
from gemma_scope_tl.registry.render import render_release
from gemma_scope_tl.registry.schema import SAERow, parse_release, read_release
from gemma_scope_tl.sites import SITES, get_site, known_site

M = "gemma-3-1b"
LAYERS = {"270m": (18, (5, 9, 12, 15)), "1b": (26, (7, 13, 17, 22)), "4b": (34, (9, 17, 22, 29))}
D = {"270m": 640, "1b": 1152, "4b": 2560, "12b": 3840, "27b": 5376}
HASHES = ["a" * 64, "b" * 64]


@pytest.fixture(scope="module")
def rows() -> list[SAERow]:
    """All rows of Google's coders of several layers."""
    return select_rows(site=["crosscoder", "clt"], pattern="gemma-scope-2-*")


def release(**changed: Any) -> dict[str, Any]:
    """The content of a registry file with one row, of which fields are changed; None drops one."""
    row = {"id": "a", "site": "clt", "layer": None, "layers": [0, 1], "width": "512", "d_sae": 512, "d_in": 8}
    row |= {"l0": None, "path": "clt/a", "affine": True, "sha256s": HASHES} | changed
    head = {"release": "mine", "repo": "owner/name", "model": M, "license": "MIT", "description": "Mine."}
    return {**head, "format": "gemma_scope_2", "saes": [row]}


def refused(function: Any, *args: Any, error: type[Exception] = UnknownNameError, **kwargs: Any) -> str:
    with pytest.raises(error) as caught:
        function(*args, **kwargs)
    return str(caught.value)


def test_the_grid_of_the_report(rows: list[SAERow]) -> None:
    """Four widths and two labels of ten models' crosscoders; two, two and two skips of four models' CLTs."""
    counts = Counter(row.release.rpartition("-")[2] for row in rows)
    assert counts == {"crosscoder": 10 * 4 * 2, "clt": 4 * 2 * 2 * 2} and len({row.release for row in rows}) == 14
    for row in rows:
        size = row.model.split("-")[2]
        whole, subset = LAYERS.get(size, (0, row.layers))
        assert row.layers == (subset if row.site == "crosscoder" else tuple(range(whole)))
        assert (row.d_in, row.unverified, row.layer, row.l0) == (D[size], True, None, None)
        assert row.affine == (None if row.site == "crosscoder" else row.id.endswith("_affine"))
        assert row.path == f"{row.site}/{row.id}" and str(row.label) in row.id and f"width_{row.width}_" in row.id
        assert len(row.weights_paths) == len(row.layers or ()) and row.model_family.name == "gemma3"


def test_the_latents_that_users_have_seen(rows: list[SAERow]) -> None:
    """14,560 in each of 18 layers and 10,080 in each of 26, and 65,536 in each of four."""
    by_id = {(row.release, row.id): row for row in rows}
    for size, each, layers in (("270m", 14560, 18), ("1b", 10080, 26)):
        row = by_id[f"gemma-scope-2-{size}-pt-clt", "width_262k_l0_medium"]
        assert row.d_sae == each * layers == 262_080
    assert by_id["gemma-scope-2-270m-it-crosscoder", "layer_5_9_12_15_width_262k_l0_big"].d_sae == 4 * 65_536
    empty = by_id["gemma-scope-2-270m-it-clt", "width_262k_l0_medium_affine"]
    assert empty.note and "layer 0 is empty" in empty.note
    assert [row.id for row in rows if row.note] == [empty.id]


def test_look_ups() -> None:
    wanted = resolve("gemma-scope-2-1b-pt-clt", "width_262k_l0_medium_affine")
    for width in ("262k", 262_080, "262080"):
        assert find(M, "clt", None, width, "medium", affine=True) == wanted
    assert wanted.weights_paths[25] == "clt/width_262k_l0_medium_affine/params_layer_25.safetensors"
    assert "affine=True or affine=False" in refused(find, M, "clt", None, "262k", "medium", error=RegistryError)
    text = refused(find, M, "clt", None, "262k")
    assert "no canonical coder. L0s: an unknown number (medium), an unknown number (big)" in text
    assert "Take one by its label: l0='medium'" in text
    assert "A clt spans several layers: layer=None" in refused(find, M, "clt", 3, "262k")
    assert "'16k' is the default" in refused(find, M, "crosscoder", None)
    assert refused(find, "gemma-2-2b", "clt", None).startswith("Unknown site of gemma-2-2b 'clt'")
    assert "Nearest: crosscoder" in refused(find, M, "cross-coder", None)
    assert len(list_saes(M, layer=7)) == len(list_saes(M, layer=7, site=list(SITES)))


def test_a_kind_is_no_site() -> None:
    for kind in ("clt", "crosscoder"):
        assert known_site(kind) == kind and kind not in SITES
        assert "kind of coders that span several layers" in refused(get_site, kind)
        assert "kind of coders that span several layers" in refused(get_site, kind, "gemma3")
    with pytest.raises(RegistryError, match="a clt with a file for each layer"):
        _ = resolve("gemma-scope-2-1b-pt-clt", "width_262k_l0_big").weights_path


def test_the_table_and_the_index(rows: list[SAERow]) -> None:
    """Rows are hashable and the same from the index and from YAML, which renders to the same text again."""
    table = list_saes(release="gemma-scope-2-1b-pt-crosscoder")
    assert set(table["layers"]) == {(7, 13, 17, 22)} and table["layer"].isna().all()
    assert list_saes(release="gemma-scope-2-1b-pt-res")["layers"].isna().all()
    assert len(set(rows)) == len(rows)
    folder = Path(__file__).resolve().parents[2] / "pretrained_yaml"
    for name in ("gemma-scope-2-270m-it-clt", "gemma-scope-2-27b-pt-crosscoder"):
        path = folder / f"{name}.yaml"
        read = read_release(path)
        wanted = {row.id: row for row in rows if row.release == name}
        assert {row.id: row for row in read.rows} == wanted
        assert render_release(read) == path.read_text()


def test_rows_with_a_hash_for_each_file() -> None:
    row = parse_release(release(), "mine.yaml").rows[0]
    assert row.hashes == row.sha256s == tuple(HASHES) and row.base_site == "transcoder"
    assert parse_release(release(sha256s=None), "mine.yaml").rows[0].hashes == (None, None)
    text = render_release(parse_release(release(), "mine.yaml"))
    assert f'sha256s: ["{HASHES[0]}"' in text or f"sha256s: [{HASHES[0]}" in text


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": None}, "a clt needs its layers"),
        ({"layer": 3}, "its layer is null, and layers lists them"),
        ({"layers": [1, 0]}, "not at least two layers in ascending order"),
        ({"layers": [1]}, "not at least two layers in ascending order"),
        ({"layers": [-1, 0]}, "greater than or equal to 0"),
        ({"sha256s": HASHES[:1]}, "2 layers have as many files, but there are 1 hashes"),
        ({"sha256s": None, "sha256": HASHES[0]}, "the files of several layers have sha256s"),
        ({"site": "transcoder", "layer": 0}, "belongs to one layer: omit layers"),
        ({"site": "crosscoder"}, "only transcoders are affine"),
        ({"width": "262k", "d_sae": 200_000}, "is 262144 latents"),
        ({"layers": None, "sha256": HASHES[0]}, "a clt needs its layers"),
    ],
)
def test_rows_that_are_refused(changed: dict[str, Any], message: str) -> None:
    assert message in refused(parse_release, release(**changed), "mine.yaml", error=RegistryError)


def test_other_formats_and_families_are_refused() -> None:
    other = release() | {"format": "gemma-scope"}
    assert "only format: gemma_scope_2" in refused(parse_release, other, "mine.yaml", error=RegistryError)

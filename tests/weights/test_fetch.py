"""From a row to a file: bundled, local, Hub; and what is said when there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError, WeightsError
from gemma_scope_tl.registry.schema import SAERow
from gemma_scope_tl.weights import fetch as fetching
from gemma_scope_tl.weights.fetch import bundled_root, fetch

FOLDER = "layer_0/width_16k/average_l0_9"


def row(**fields: Any) -> SAERow:
    base: Any = {
        "release": "r",
        "id": FOLDER,
        "model": "gemma-2-2b",
        "site": "res",
        "layer": 0,
        "width": "16k",
        "d_sae": 16384,
        "d_in": 2304,
        "l0": 9.0,
        "repo": "google/gemma-scope-2b-pt-res",
        "path": FOLDER,
    }
    given: Any = {**base, "format": "gemma-scope", "revision": None, "sha256": None, **fields}
    return SAERow.model_construct(**given)


def put(root: Path, name: str = "params.npz", content: bytes = b"weights") -> Path:
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    (root / FOLDER / name).write_bytes(content)
    return root / FOLDER / name


def test_local_folder(tmp_path: Path) -> None:
    path = put(tmp_path)
    assert fetch(row(repo=str(tmp_path))) == path
    with pytest.raises(WeightsError, match=r"nope/params\.npz does not exist"):
        fetch(row(repo=str(tmp_path), path="nope"))


def test_bundled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundled_root().parts[-3:] == ("gemma_scope_tl", "bundled", "saes")
    assert bundled_root("bundled-gemma3").parts[-4:] == ("gemma_scope_tl", "bundled", "gemma3", "saes")
    with pytest.raises(UnknownNameError, match="bundled-gemma3"):
        bundled_root("bundled-gemma")
    monkeypatch.setattr(fetching, "bundled_root", lambda repo: tmp_path)
    path = put(tmp_path)
    assert fetch(row(repo="bundled")) == path


def test_sae_lens_layout_needs_both_files(tmp_path: Path) -> None:
    weights = put(tmp_path, "sae_weights.safetensors")
    with pytest.raises(WeightsError, match=r"cfg\.json does not exist"):
        fetch(row(repo=str(tmp_path), format="sae-lens"))
    put(tmp_path, "cfg.json")
    assert fetch(row(repo=str(tmp_path), format="sae-lens")) == weights


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../b"])
def test_paths_stay_inside(path: str) -> None:
    with pytest.raises(GemmaScopeError, match="leaves its repository"):
        fetch(row(path=path))


def test_hub_gets_file_and_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def download(**kwargs: Any) -> str:
        seen.update(kwargs)
        return str(put(tmp_path))

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert fetch(row(revision="abc")) == put(tmp_path)
    assert seen == {
        "repo_id": "google/gemma-scope-2b-pt-res",
        "filename": f"{FOLDER}/params.npz",
        "revision": "abc",
        "force_download": False,
    }


def http(kind: type[Exception]) -> Exception:
    return kind("x", response=httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co")))  # type: ignore


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            http(errors.GatedRepoError),
            "is gated. Accept its terms at https://huggingface.co/google/gemma-scope-2b-pt-res",
        ),
        (http(errors.RepositoryNotFoundError), "neither a local folder nor a repository on the Hub"),
        (http(errors.RevisionNotFoundError), "has no revision 'abc'"),
        (http(errors.RemoteEntryNotFoundError), "does not exist .*/tree/abc"),
        (
            errors.LocalEntryNotFoundError("x"),
            "not in the local cache .*hf download google/gemma-scope-2b-pt-res layer_0",
        ),
        (errors.OfflineModeIsEnabled("x"), "the Hub cannot be reached.*--revision abc"),
        (errors.HFValidationError("x"), "neither an existing folder nor a repository name"),
        (OSError(28, "No space left on device"), "could not be downloaded: no space left .*HF_HOME"),
    ],
)
def test_hub_errors_say_what_to_do(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def download(**_: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(WeightsError, match=message):
        fetch(row(revision="abc"))


def test_offline_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="hf download"):
        fetch(row())

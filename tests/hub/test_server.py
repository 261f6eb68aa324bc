"""The local Hub, as the stock client sees it: what is proven here, the other tests may rely on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import HfApi, HfFileSystem, errors, get_hf_file_metadata, hf_hub_url, snapshot_download

from tests.hub.faults import Fault
from tests.hub.repos import HubFile
from tests.hub.server import LocalHub

README, WEIGHTS = b"# Weights\n", bytes(range(256)) * 4
ID = "owner/suite"


@pytest.fixture
def repo(hub: LocalHub) -> str:
    made = hub.repo(ID)
    first = made.commit({"README.md": README, "layer_0/a/params.npz": WEIGHTS})
    made.tags["v1"] = first
    made.commit({"README.md": b"second", "layer_1/params.npz": WEIGHTS + b"1"}, "Second")
    made.commit({"README.md": b"work"}, "Work", branch="try/this")
    return first


def test_listing(hub: LocalHub, repo: str) -> None:
    api = HfApi(endpoint=hub.url)
    names = ["README.md", "layer_0/a/params.npz", "layer_1/params.npz"]
    assert sorted(api.list_repo_files(ID)) == names
    assert sorted(api.list_repo_files(ID, revision="v1")) == names[:2]
    info = api.model_info(ID, files_metadata=True)
    assert info.id == ID and info.sha == hub.repos["models", ID].branches["main"] and info.siblings
    sizes = {s.rfilename: (s.size, s.lfs.sha256 if s.lfs else None) for s in info.siblings}
    assert sizes["layer_0/a/params.npz"] == (1024, hashlib.sha256(WEIGHTS).hexdigest())
    assert sizes["README.md"] == (6, None)
    assert api.model_info(ID, revision="v1").sha == repo
    assert [entry.path for entry in api.list_repo_tree(ID)] == ["layer_0", "layer_1", "README.md"]
    assert [entry.path for entry in api.list_repo_tree(ID, "layer_0", recursive=True)] == ["layer_0/a", names[1]]
    assert [entry.path for entry in api.get_paths_info(ID, ["README.md", "layer_1", "no"])] == ["README.md", "layer_1"]
    refs = api.list_repo_refs(ID)
    assert {b.name for b in refs.branches} == {"main", "try/this"} and [t.target_commit for t in refs.tags] == [repo]
    assert [c.title for c in api.list_repo_commits(ID)] == ["Second", "Update"]
    assert api.file_exists(ID, "README.md") and not api.file_exists(ID, "no.md")
    assert api.repo_exists(ID) and not api.repo_exists("owner/other")


def test_metadata_and_branches(hub: LocalHub, repo: str) -> None:
    small = get_hf_file_metadata(hf_hub_url(ID, "README.md", revision="v1"))
    assert (small.commit_hash, small.size) == (repo, len(README))
    assert small.etag == hashlib.sha1(b"blob %d\0" % len(README) + README).hexdigest()  # git hash-object README.md
    large = get_hf_file_metadata(hf_hub_url(ID, "layer_0/a/params.npz"))
    assert (large.etag, large.size) == (hashlib.sha256(WEIGHTS).hexdigest(), len(WEIGHTS))
    assert large.location.startswith("http://127.0.0.2:")
    assert get_hf_file_metadata(hf_hub_url(ID, "README.md", revision="try/this")).size == 4


def test_snapshot_and_file_system(hub: LocalHub, repo: str, tmp_path: Path) -> None:
    folder = Path(snapshot_download(ID, endpoint=hub.url))
    assert (folder / "layer_1/params.npz").read_bytes() == WEIGHTS + b"1"
    fs = HfFileSystem(endpoint=hub.url, use_listings_cache=False, skip_instance_cache=True)
    assert sorted(fs.glob(f"{ID}/**/*.npz")) == [f"{ID}/layer_0/a/params.npz", f"{ID}/layer_1/params.npz"]
    with fs.open(f"{ID}/layer_0/a/params.npz", "rb") as file:
        file.seek(300)
        assert file.read(10) == WEIGHTS[300:310]
    again = hub.repo("owner/copy")
    again.commit_folder(folder)
    assert {n: f.sha256 for n, f in again.commits[again.branches["main"]].files.items()} == {
        n: f.sha256 for n, f in hub.repos["models", ID].commits[hub.repos["models", ID].branches["main"]].files.items()
    }


def test_errors_are_the_clients_own(hub: LocalHub, repo: str, token: str) -> None:
    api = HfApi(endpoint=hub.url)
    hub.repo("owner/gated", gated=True).commit({"a.npz": WEIGHTS})
    hub.repo("owner/hidden", private=True).commit({"a.npz": WEIGHTS})
    cases: list[tuple[str, str, str | None, str | bool, type[Exception]]] = [
        ("owner/gated", "a.npz", None, False, errors.GatedRepoError),
        ("owner/gated", "a.npz", None, token, errors.GatedRepoError),
        ("owner/hidden", "a.npz", None, token, errors.RepositoryNotFoundError),
        ("owner/none", "a.npz", None, False, errors.RepositoryNotFoundError),
        (ID, "a.npz", None, False, errors.RemoteEntryNotFoundError),
        (ID, "README.md", "v2", False, errors.RevisionNotFoundError),
    ]
    for id, name, revision, as_user, kind in cases:
        with pytest.raises(kind):
            api.hf_hub_download(id, name, revision=revision, token=as_user)
    hub.repos["models", "owner/hidden"].members.add(token)
    assert Path(api.hf_hub_download("owner/hidden", "a.npz", token=token)).read_bytes() == WEIGHTS


def test_faults_are_used_up_and_logged(hub: LocalHub, repo: str) -> None:
    hub.fail(f"{ID}/README*", Fault(methods=("HEAD",), status=503))
    url = hf_hub_url(ID, "README.md")
    with pytest.raises(errors.HfHubHTTPError):
        get_hf_file_metadata(url)
    get_hf_file_metadata(url)
    assert [(e.method, e.host, e.status, e.sent) for e in hub.log] == [("HEAD", "hub", 503, 0), ("HEAD", "hub", 200, 0)]


def test_a_hash_can_be_given(tmp_path: Path) -> None:
    path = tmp_path / "large.npz"
    path.write_bytes(b"x")
    assert HubFile(path, True, "0" * 64).etag == "0" * 64
    assert HubFile(path, True).etag == hashlib.sha256(b"x").hexdigest()

"""The local Hub's write side, as the stock client sees it: what is proven here, the tests of uploads may rely on."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, errors

from tests.hub.conftest import TOKEN
from tests.hub.faults import Fault
from tests.hub.server import LocalHub

ID = "owner/made"
WEIGHTS = bytes(range(256)) * 400


@pytest.fixture
def api(hub: LocalHub, token: str) -> HfApi:
    made = HfApi(endpoint=hub.url, token=token)
    made.create_repo(ID, private=True)
    return made


def test_repositories_and_branches(hub: LocalHub, api: HfApi) -> None:
    assert api.whoami()["name"] == "owner" and api.model_info(ID).private
    assert api.create_repo(ID, exist_ok=True).repo_id == ID
    with pytest.raises(errors.HfHubHTTPError, match="409"):
        api.create_repo(ID)
    first = api.list_repo_commits(ID)[0].commit_id
    api.create_branch(ID, branch="try/this")
    assert {(b.name, b.target_commit) for b in api.list_repo_refs(ID).branches} == {
        ("main", first),
        ("try/this", first),
    }
    with pytest.raises(errors.RepositoryNotFoundError):
        HfApi(endpoint=hub.url, token=False).model_info(ID)


@pytest.mark.parametrize("part_size", [None, 30_000])
def test_a_folder_as_the_client_uploads_it(hub: LocalHub, api: HfApi, tmp_path: Path, part_size: int | None) -> None:
    hub.part_size = part_size
    (tmp_path / "a").mkdir()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# Made\n")
    (tmp_path / "a" / "params.npz").write_bytes(WEIGHTS)
    done = api.upload_folder(repo_id=ID, folder_path=tmp_path, commit_message="All")
    files = hub.repos["models", ID].commits[done.oid].files
    assert {name: f.content.read(0, 1 << 20) for name, f in files.items() if name != ".gitattributes"} == {
        "README.md": (tmp_path / "README.md").read_bytes(),
        "a/params.npz": WEIGHTS,
    }
    sent = [(e.host, e.taken) for e in hub.requests("PUT")]
    assert sent == ([("cdn", len(WEIGHTS))] if part_size is None else [("cdn", 30_000)] * 3 + [("cdn", 12_400)])
    assert not any(e.authorized for e in hub.requests("PUT"))
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="b.npz", repo_id=ID)
    assert len(hub.requests("PUT")) == len(sent)  # the content is there already
    assert api.get_paths_info(ID, ["b.npz"])[0].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()  # type: ignore[union-attr]


def test_commits_are_whole_and_on_their_parent(hub: LocalHub, api: HfApi) -> None:
    first = api.model_info(ID).sha
    additions = [CommitOperationAdd("a.txt", b"a"), CommitOperationAdd("b.npz", WEIGHTS)]
    second = api.create_commit(ID, additions, commit_message="Two files", parent_commit=first).oid
    with pytest.raises(errors.HfHubHTTPError, match="412"):
        api.create_commit(ID, [CommitOperationAdd("c.txt", b"c")], commit_message="Late", parent_commit=first)
    assert api.model_info(ID).sha == second and not api.file_exists(ID, "c.txt")
    api.create_commit(ID, [CommitOperationDelete("a.txt")], commit_message="One less")
    assert [c.title for c in api.list_repo_commits(ID)] == ["One less", "Two files", "initial commit"]
    assert not api.file_exists(ID, "a.txt") and api.file_exists(ID, "b.npz")


def test_who_may_write(hub: LocalHub, api: HfApi) -> None:
    for token, status in ((False, 401), ("hf_unknown", 401), ("hf_reader", 403), ("hf_stranger", 403)):
        hub.tokens |= {"hf_reader", "hf_stranger"}
        hub.readers.add("hf_reader")
        with pytest.raises(errors.HfHubHTTPError) as caught:
            api.create_commit(ID, [CommitOperationAdd("a.txt", b"a")], commit_message="No", token=token)
        assert caught.value.response.status_code == status
    with pytest.raises(ValueError, match=r"Invalid metadata in README.md"):
        bad = CommitOperationAdd("README.md", b"---\nlicense: [\n---\n")
        api.create_commit(ID, [bad], commit_message="Bad card", token=TOKEN)
    assert len(hub.repos["models", ID].commits) == 1


@pytest.mark.usefixtures("waits")
def test_wrong_contents_and_faults(hub: LocalHub, api: HfApi) -> None:
    wrong = CommitOperationAdd("w.npz", WEIGHTS)
    wrong.upload_info.sha256 = bytes(32)
    with pytest.raises(RuntimeError, match="w.npz"):
        api.create_commit(ID, [wrong], commit_message="Not its hash")
    hub.fail(f"{ID}/lfs/*", Fault(methods=("PUT",), cut_upload=1000, times=2))
    hub.fail(f"{ID}/lfs/*", Fault(methods=("PUT",), status=429, headers={"Retry-After": "3"}))
    hub.fail(f"{ID}/commit", Fault(methods=("POST",), status=500, after=True))
    with pytest.raises(errors.HfHubHTTPError, match="500"):
        api.create_commit(ID, [CommitOperationAdd("w.npz", WEIGHTS)], commit_message="Done, but says no")
    assert [e.status for e in hub.requests("PUT")][-2:] == [429, 200]
    assert api.list_repo_commits(ID)[0].title == "Done, but says no" and api.file_exists(ID, "w.npz")

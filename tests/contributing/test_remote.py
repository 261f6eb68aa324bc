"""Drafts and checks of repositories: from the listing and from headers by range, on a local Hub."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from gemma_scope_tl.contributing.check import check_release
from gemma_scope_tl.contributing.draft import Options, draft_release, write_draft
from gemma_scope_tl.contributing.measure import measure_l0
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.registry import read_release
from tests.hub.conftest import hub  # noqa: F401
from tests.hub.repos import HubFile
from tests.hub.server import LocalHub

OPTIONS = Options(model="bundled", license="MIT", unknown_l0=True)


def draft(repo: str, folder: Path, **changes: object) -> Path:
    """A registry file drafted from a repository."""
    options = Options(**{**vars(OPTIONS), **changes})  # type: ignore[arg-type]
    return write_draft(draft_release(repo, folder, options), folder)


@pytest.mark.parametrize("layout", ["gemma-scope", "sae-lens"])
def test_a_repository_in_either_layout(
    hub: LocalHub,  # noqa: F811
    made_up: dict[str, Path],
    tmp_path: Path,
    layout: str,
) -> None:
    commit = hub.repo("me/saes").commit_folder(made_up[layout])
    path = draft("me/saes", tmp_path)
    local = draft_release(str(made_up[layout]), tmp_path, OPTIONS).release
    release = read_release(path)
    for theirs, mine in zip(local.saes, release.saes, strict=True):
        assert theirs.model_copy(update={"revision": commit}) == mine  # headers and hashes are the local files'
    report = check_release(path, remote=True)
    assert report.problems == [] and {f.check for f in report.findings if f.ok} >= {"files", "shapes", "sha256"}
    weights = [e for e in hub.requests() if e.path.endswith((".npz", ".safetensors"))]
    assert all(e.range for e in weights if e.method == "GET")
    (unasked,) = {f.text for f in check_release(path).findings if f.ok is None}
    assert unasked == "give --remote"
    (not_run,) = measure_l0(release.rows, 2)
    assert not_run.ok is False and "give --remote" in not_run.text


def test_the_weights_are_not_downloaded(hub: LocalHub, tmp_path: Path) -> None:  # noqa: F811
    shapes = {"W_enc": (256, 4096), "W_dec": (4096, 256), "b_enc": (4096,), "b_dec": (256,), "threshold": (4096,)}
    np.savez(tmp_path / "p.npz", **{name: np.zeros(shape, "f4") for name, shape in shapes.items()})
    hub.repo("me/wide").commit({"res/layer_3/width_4k/average_l0_9/params.npz": tmp_path / "p.npz"})
    path = draft("me/wide", tmp_path)
    (row,) = read_release(path).rows
    assert (row.d_in, row.d_sae, row.width, row.layer) == (256, 4096, "4k", 3)
    assert hub.bytes_sent() < 200_000 < (tmp_path / "p.npz").stat().st_size / 40


def test_everything_that_differs_on_the_hub_is_found(
    hub: LocalHub,  # noqa: F811
    made_up: dict[str, Path],
    tmp_path: Path,
) -> None:
    repo = hub.repo("me/saes")
    old = repo.commit_folder(made_up["gemma-scope"])
    path = draft("me/saes", tmp_path)
    att, emb, res30, res90 = (row.id for row in read_release(path).rows)
    files = repo.commits[old].files
    swapped = HubFile((made_up["gemma-scope"] / res90 / "params.npz").read_bytes(), lfs=False)
    new = repo.commit({f"{emb}/params.npz": None, f"{att}/params.npz": files[f"{res90}/params.npz"]})
    new = repo.commit({f"{res30}/params.npz": swapped})
    assert check_release(path, remote=True).problems == []  # the rows are pinned to the old commit
    path.write_text(path.read_text().replace(old, new))
    report = check_release(path, remote=True)
    found = {(f.check, f.row): f.text for f in report.problems}
    assert set(found) == {("files", emb), ("shapes", att), ("sha256", att)}
    assert "d_in 128, should be 96" in found["shapes", att] and "the row says" in found["sha256", att]
    assert any(f.row == res30 and f.ok is None and "not in LFS" in f.text for f in report.findings)
    path.write_text(path.read_text().replace(new, "gone"))
    assert {f.check for f in check_release(path, remote=True).problems} == {"files"}
    remarks = draft_release("me/saes", tmp_path, OPTIONS).remarks
    assert any("No sha256 for 1 files" in remark for remark in remarks)


def test_a_branch_becomes_its_commit(hub: LocalHub, made_up: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    repo = hub.repo("me/saes")
    repo.commit({"README.md": b"nothing else"})
    commit = repo.commit_folder(made_up["gemma-scope"], branch="v2")
    with pytest.raises(GemmaScopeError, match=r"has no params\.npz"):
        draft("me/saes", tmp_path)
    path = draft("me/saes", tmp_path, revision="v2")
    assert {row.revision for row in read_release(path).rows} == {commit}


def test_repositories_that_cannot_be_read(
    hub: LocalHub,  # noqa: F811
    made_up: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.repo("me/saes", private=True).commit_folder(made_up["gemma-scope"])
    for repo, revision, wanted in [
        ("me/nothing", None, "neither a local folder nor a repository"),
        ("me/saes", None, "neither a local folder nor a repository"),
        ("me/sa es", None, "me/sa es"),
    ]:
        with pytest.raises(GemmaScopeError, match=wanted):
            draft(repo, tmp_path, revision=revision)
    hub.repo("me/open").commit_folder(made_up["gemma-scope"])
    with pytest.raises(GemmaScopeError, match="has no revision 'v9'"):
        draft("me/open", tmp_path, revision="v9")
    path = draft("me/open", tmp_path)
    hub.repos.clear()
    assert len(check_release(path, remote=True).problems) == 4
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(GemmaScopeError, match="HF_HUB_OFFLINE") as caught:
        draft("me/open", tmp_path)
    assert re.search("me/open cannot be fetched", str(caught.value))


def test_a_gated_repository_says_so(hub: LocalHub, made_up: dict[str, Path], tmp_path: Path) -> None:  # noqa: F811
    hub.repo("me/gated", gated=True).commit_folder(made_up["sae-lens"])
    with pytest.raises(GemmaScopeError, match="is gated. Accept its terms"):
        draft("me/gated", tmp_path)

"""Uploads by the stock client to a local Hub: one commit, nothing twice, nothing that is not of the release."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi, constants
from sae_lens import SAE
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_CONFIG_GETTERS, NAMED_PRETRAINED_SAE_LOADERS
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

import gemma_scope_tl as gs
from gemma_scope_tl.contributing.check import check_release
from gemma_scope_tl.errors import GemmaScopeError, WeightsError
from gemma_scope_tl.files import file_sha256
from gemma_scope_tl.interop.releases import LOADER_NAME
from gemma_scope_tl.registry import locate, read_release
from gemma_scope_tl.release.upload import Upload, upload_suite, write_registry
from gemma_scope_tl.sae.loading import load_row
from tests.hub.conftest import TOKEN
from tests.hub.faults import Fault
from tests.hub.repos import Repo
from tests.hub.server import LocalHub

ID = "owner/tiny-scope"
LFS = (".npz", ".safetensors")


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No registered release and no entry in SAELens stays."""
    monkeypatch.setattr(locate, "_registered", {})
    yield
    gs.registry.clear_cache()
    get_pretrained_saes_directory.cache_clear()
    for table in (NAMED_PRETRAINED_SAE_LOADERS, NAMED_PRETRAINED_SAE_CONFIG_GETTERS):
        table.pop(LOADER_NAME, None)


def upload(folder: Path, **options: Any) -> Upload:
    return upload_suite(folder, ID, progress=False, **options)


def repo_of(hub: LocalHub) -> Repo:
    return hub.repos["models", ID]


def titles(hub: LocalHub, branch: str = "main") -> list[str]:
    """Commits of a branch, newest first."""
    repo = repo_of(hub)
    return [commit.title for commit in repo.history(repo.commits[repo.branches[branch]])]


def puts(hub: LocalHub, start: int = 0) -> list[str]:
    """The sha256 of every content sent since the log had ``start`` entries."""
    return sorted(e.path.split("/")[-1] for e in hub.log[start:] if e.method == "PUT")


def sums(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): file_sha256(p) for p in files}


@pytest.mark.slow
def test_from_export_to_loading(hub: LocalHub, token: str, folder: Path, suite: list[Any]) -> None:
    done = upload(folder)
    repo, here = repo_of(hub), sums(folder)
    assert (
        titles(hub) == ["Add tiny-scope", "initial commit"] and repo.private and done.revision == repo.branches["main"]
    )
    there = {name: f.sha256 for name, f in repo.commits[str(done.revision)].files.items() if name != ".gitattributes"}
    assert there == here and done.left_out == ()
    assert puts(hub) == sorted(sha for name, sha in here.items() if name.endswith(LFS))

    assert done.registry_file == folder.parent / "tiny-scope.yaml" and done.registry_file is not None
    assert check_release(done.registry_file, remote=True).problems == []
    rows = read_release(done.registry_file).rows
    assert {(row.repo, row.revision) for row in rows} == {(ID, done.revision)}
    assert all(row.sha256 == here[row.weights_path] for row in rows) and len(rows) == len(suite)

    gs.register_release(done.registry_file)
    assert "tiny-scope" in gs.register_with_sae_lens()
    for sae in suite:
        row = find(rows, sae)
        theirs = SAE.from_pretrained(ID, f"sae_lens/{row.path}")
        found = [
            gs.JumpReLUSAE.from_pretrained("tiny-scope", row.id),
            SAE.from_pretrained("tiny-scope", row.id),
            theirs,
        ]
        for loaded in found:
            state = loaded.state_dict()
            for name, value in sae.state_dict().items():
                assert torch.equal(state[name].reshape(value.shape), value), (row.id, name)
    again = gs.load_sae("bundled", site="att", layer=41, width="1k", l0=30)
    assert torch.equal(again.W_dec, suite[2].W_dec)


def find(rows: Any, sae: Any) -> Any:
    """The row whose file holds an SAE's own decoder."""
    for row in rows:
        if row.d_sae == sae.cfg.d_sae and row.d_in == sae.cfg.d_in and torch.equal(load_row(row).W_dec, sae.W_dec):
            return row
    raise AssertionError(f"no row for {sae.cfg.metadata}")


def test_a_dry_run_sends_nothing(hub: LocalHub, folder: Path) -> None:
    plan = upload(folder, dry_run=True)
    assert {e.method for e in hub.log} == {"GET"} and not hub.repos
    assert {f.state for f in plan.files} == {"new"} and plan.private and not plan.exists
    assert plan.revision is None and plan.registry_file is None
    assert plan.bytes_to_send == sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert {f.path: f.sha256 for f in plan.files} == sums(folder)


def test_again_and_after_a_change(hub: LocalHub, token: str, folder: Path) -> None:
    first, sent = upload(folder), len(puts(hub))
    repeated = upload(folder)
    assert repeated.revision == first.revision and len(titles(hub)) == 2 and len(puts(hub)) == sent
    assert {f.state for f in repeated.files} == {"there"} and repeated.bytes_to_send == 0
    (folder / "README.md").write_text((folder / "README.md").read_text() + "More.\n")
    changed = upload(folder, commit_message="Say more")
    assert [f.path for f in changed.files if f.state == "changed"] == ["README.md"]
    assert titles(hub)[0] == "Say more" and len(puts(hub)) == sent and changed.revision != first.revision
    assert read_release(folder.parent / "tiny-scope.yaml").saes[0].revision == changed.revision


@pytest.mark.kill
def test_killed_in_the_middle_it_goes_on(hub: LocalHub, token: str, folder: Path, tmp_path: Path) -> None:
    hub.fail("*/lfs/*", Fault(methods=("PUT",), times=3))  # three arrive
    hub.fail("*/lfs/*", Fault(methods=("PUT",), times=None, stall=60.0))
    code = f"import gemma_scope_tl as gs; gs.upload_suite({str(folder)!r}, {ID!r}, progress=False)"
    settings = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    env = {**os.environ, **settings, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    try:
        end = time.monotonic() + 90
        while len(hub.store.get(ID, {})) < 3 or len(puts(hub)) < 4:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL and titles(hub) == ["initial commit"]
    arrived, start = set(hub.store[ID]), len(hub.log)
    hub.faults.clear()
    upload(folder)
    large = {sha for name, sha in sums(folder).items() if name.endswith(LFS)}
    assert len(arrived) == 3 and puts(hub, start) == sorted(large - arrived)
    assert titles(hub) == ["Add tiny-scope", "initial commit"]


def test_training_state_stays_here(hub: LocalHub, token: str, folder: Path) -> None:
    (weights,) = list(folder.glob("att/*/*/*/params.npz"))
    strangers = [
        "checkpoints/step_9/params.npz", ".release/a/params.npz", "jobs/0/state.json", ".lock", "metrics.jsonl",
        "token", "optimizer.safetensors", "res/layer_1/width_1k/average_l0_5/params.npz", "notes.yaml", "suite.json",
        "sae_lens/stage/sae_weights.safetensors", f"{weights.parent.relative_to(folder)}/.params.npz.x1",
    ]  # fmt: skip
    for name in strangers:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(weights, folder / name)
    (folder / "linked").symlink_to(folder.parent)
    (folder / "notes.yaml").write_text("a: 1\n")
    (folder / "metrics.jsonl").write_text("{}\n")
    done = upload(folder)
    shown = {name if not name.startswith(".release/") else ".release/" for name in strangers} | {"linked/"}
    assert set(done.left_out) == shown
    files = repo_of(hub).commits[str(done.revision)].files
    assert not set(strangers) & set(files) and len(files) == len(done.files) + 1
    assert "metrics.jsonl" in repo_of(hub).commits[str(upload(folder, logs=True).revision)].files


def test_wrong_files_are_refused_before_a_byte_is_sent(hub: LocalHub, token: str, folder: Path) -> None:
    (weights,) = list(folder.glob("att/*/*/*/params.npz"))
    good = weights.read_bytes()
    with np.load(weights) as arrays:
        held = dict(arrays)
    np.savez(weights, **{**held, "b_dec": held["b_dec"] + 1})
    with pytest.raises(WeightsError, match=r"att.*has sha256"):
        upload(folder)
    (other,) = list(folder.glob("embedding/*/*/params.npz"))
    other.write_bytes(other.read_bytes()[:-9])
    with pytest.raises(GemmaScopeError, match="2 files of"):
        upload(folder, dry_run=True)
    weights.write_bytes(good)
    other.unlink()
    with pytest.raises(GemmaScopeError, match=r"has no embedding/.*gemma-scope export"):
        upload(folder)
    assert not hub.log


def test_broken_mirrors_are_refused(hub: LocalHub, token: str, folder: Path) -> None:
    (cfg,) = list(folder.glob("sae_lens/att/*/*/*/cfg.json"))
    held = cfg.read_bytes()
    cfg.unlink()
    with pytest.raises(GemmaScopeError, match=r"has no sae_lens/att/.*cfg.json"):
        upload(folder)
    cfg.write_bytes(held)
    (mirror,) = list(folder.glob("sae_lens/att/*/*/*/sae_weights.safetensors"))
    mirror.write_bytes(mirror.read_bytes()[:-9])
    with pytest.raises(WeightsError, match=r"sae_lens/att"):
        upload(folder)
    transcoder = folder / "circuit_tracer" / "width_1k" / "layer_0.safetensors"
    transcoder.parent.mkdir(parents=True)
    transcoder.write_bytes(b"no")
    with pytest.raises(GemmaScopeError, match="2 files of"):
        upload(folder)
    assert not hub.log


@pytest.mark.slow
@pytest.mark.usefixtures("waits")
@pytest.mark.parametrize(
    ("step", "fault", "text"),
    [
        ("create", Fault(status=401), r"HTTP 401\): the Hub does not accept your token"),
        ("create", Fault(status=403, message="Read only"), r"may not write there \(Read only\).*access to owner"),
        ("preupload", Fault(status=404, code="RepoNotFound"), r"HTTP 404\): it does not exist, or your token"),
        ("preupload", Fault(status=409, message="Busy"), r"HTTP 409\): it conflicts.*\(Busy\)"),
        ("commit", Fault(status=412, message="Changed"), r"HTTP 412\): main has changed since"),
        ("batch", Fault(status=413, message="Too large"), r"HTTP 413\): a file or the upload exceeds.*\(Too large\)"),
        ("preupload", Fault(status=429, headers={"Retry-After": "7"}), r"HTTP 429\): too many requests. Wait 7 s"),
        ("lfs/*", Fault(status=503), r"HTTP 503\): the Hub has an internal error"),
        ("lfs/*", Fault(status=403), r"HTTP 403\)"),
        ("lfs/*", Fault(cut_upload=1), r"connection failed or was lost"),
        ("commit", Fault(status=500), r"HTTP 500\): the Hub has an internal error"),
    ],
    ids=lambda value: value.replace("/", "-") if isinstance(value, str) and len(value) < 12 else "",
)
def test_refusals_in_our_words(
    hub: LocalHub,
    token: str,
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    step: str,
    fault: Fault,
    text: str,
) -> None:
    fault.times, fault.methods = None, ("POST", "PUT")
    hub.fail(step if step == "create" else f"{ID}/{step}", fault)
    with pytest.raises(GemmaScopeError, match=text) as caught:
        upload(folder)
    shown = f"{caught.value} {caught.value.__cause__} {caplog.text}"
    assert "run it again" in str(caught.value) and TOKEN not in shown and "Signature" not in shown
    assert not hub.repos or titles(hub) == ["initial commit"]
    assert not (folder.parent / "tiny-scope.yaml").exists()
    hub.faults.clear()
    start = len(hub.log)
    upload(folder)
    if step == "commit":
        assert puts(hub, start) == []
    assert titles(hub) == ["Add tiny-scope", "initial commit"]


def test_tokens(hub: LocalHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(GemmaScopeError, match=r"there is no token. Run `hf auth login`, or set HF_TOKEN"):
        upload(folder)
    monkeypatch.setenv("HF_TOKEN", "hf_unknownToTheHub")
    with pytest.raises(GemmaScopeError, match="does not accept your token") as caught:
        upload(folder)
    assert "hf_unknownToTheHub" not in str(caught.value)
    hub.tokens.add(TOKEN)
    hub.readers.add(TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(GemmaScopeError, match=r"may not write there"):
        upload(folder)
    assert not hub.repos


def test_no_connection(hub: LocalHub, token: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(GemmaScopeError, match=r"could not be looked up: the connection failed"):
        upload(folder)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(GemmaScopeError, match="HF_HUB_OFFLINE is set"):
        upload(folder)


def test_a_commit_whose_answer_was_lost(hub: LocalHub, token: str, folder: Path) -> None:
    hub.fail(f"{ID}/commit", Fault(methods=("POST",), status=500, after=True))
    done = upload(folder)
    assert titles(hub) == ["Add tiny-scope", "initial commit"] and done.revision == repo_of(hub).branches["main"]


def test_someone_else_commits_meanwhile(hub: LocalHub, token: str, folder: Path) -> None:
    repo = hub.repo(ID, private=True)
    repo.members.add(token)
    repo.commit({"a.txt": b"first"}, "first")
    real = type(repo).find
    seen: list[str] = []

    def slipped_in(self: Repo, revision: str) -> Any:
        found = real(self, revision)
        seen.append(revision)
        if len(seen) == 3:  # after both looks at the branch
            self.commit({"a.txt": b"theirs"}, "theirs")
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Repo, "find", slipped_in)
        with pytest.raises(GemmaScopeError, match=r"HTTP 412\): main has changed"):
            upload(folder)
    assert titles(hub) == ["theirs", "first"]
    upload(folder)
    assert titles(hub) == ["Add tiny-scope", "theirs", "first"]


@pytest.mark.usefixtures("waits")
def test_dropped_connections_and_parts(hub: LocalHub, token: str, folder: Path) -> None:
    hub.part_size = 100_000
    hub.fail("*/lfs/*", Fault(methods=("PUT",), cut_upload=5000, times=2))
    hub.fail("*/lfs/*", Fault(methods=("PUT",), status=500, times=1))
    done = upload(folder)
    there = {name: f.sha256 for name, f in repo_of(hub).commits[str(done.revision)].files.items()}
    assert there.items() >= sums(folder).items()
    assert any(e.path.startswith("/complete/") for e in hub.log)


def test_branches_and_who_sees_it(hub: LocalHub, token: str, folder: Path) -> None:
    repo = hub.repo(ID)  # public
    repo.members.add(token)
    repo.commit({"a.txt": b"first"}, "first")
    with pytest.raises(GemmaScopeError, match=r"public already.*--public"):
        upload(folder)
    done = upload(folder, private=False, branch="try/it")
    assert titles(hub, "try/it") == ["Add tiny-scope", "first"] and titles(hub) == ["first"] and not done.private
    assert check_release(str(done.registry_file), remote=True).problems == []


def test_a_file_that_changes_after_its_check(
    hub: LocalHub, token: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (weights,) = list(folder.glob("att/*/*/*/params.npz"))

    def meanwhile(self: HfApi) -> dict[str, str]:
        weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\0")
        return {}

    monkeypatch.setattr(HfApi, "whoami", meanwhile)
    with pytest.raises(GemmaScopeError, match=r"HTTP 400\).*does not match its sha256"):
        upload(folder)
    assert titles(hub) == ["initial commit"]


def test_what_the_hub_leaves_out_is_noticed(hub: LocalHub, token: str, folder: Path) -> None:
    repo = hub.repo(ID, private=True)
    repo.members.add(token)
    repo.commit({".gitignore": b"README.md"}, "first")
    with pytest.raises(GemmaScopeError, match=r"lacks README.md \(1 of .*\.gitignore"):
        upload(folder)


def test_what_is_no_release(hub: LocalHub, folder: Path, tmp_path: Path) -> None:
    for name in ("one", "a/b/c", "a b/c"):
        with pytest.raises(GemmaScopeError, match="name of a repository"):
            upload_suite(folder, name, progress=False)
    for out in (folder, folder / "res", tmp_path / "other.yaml"):
        with pytest.raises(GemmaScopeError, match="inside the folder|named like its release"):
            upload(folder, registry_out=out)
    (tmp_path / "README.md").write_text("a file")
    with pytest.raises(GemmaScopeError, match=r"cannot be written: .*README.md takes no files"):
        upload(folder, registry_out=tmp_path / "README.md" / "x")
    with pytest.raises(GemmaScopeError, match=r"uploaded as commit abc, but .* could not be written"):
        write_registry(folder / "README.md" / "x.yaml", "", "abc")
    (tmp_path / "tiny-scope.yaml").write_text((folder / "tiny-scope.yaml").read_text())
    with pytest.raises(GemmaScopeError, match="about another repository"):
        upload(folder)
    with pytest.raises(GemmaScopeError, match="is not a folder"):
        upload(tmp_path / "nothing")
    shutil.copy(folder / "tiny-scope.yaml", folder / "two.yaml")
    (folder / "two.yaml").write_text((folder / "two.yaml").read_text().replace("release: tiny-scope", "release: two"))
    with pytest.raises(GemmaScopeError, match="several registry files"):
        upload(folder)
    (folder / "two.yaml").unlink()
    text = (folder / "tiny-scope.yaml").read_text()
    (folder / "tiny-scope.yaml").write_text(text.replace('repo: "."', "repo: me/saes"))
    with pytest.raises(GemmaScopeError, match="is about me/saes, not about its own folder"):
        upload(folder)
    (folder / "tiny-scope.yaml").unlink()
    with pytest.raises(GemmaScopeError, match="holds no registry file"):
        upload(folder)
    assert not hub.log

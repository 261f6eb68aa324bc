"""``fetch`` with the stock client against a Hub that answers, and one that does not."""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants, file_download

from gemma_scope_tl.errors import WeightsError
from gemma_scope_tl.registry.schema import SAERow
from gemma_scope_tl.weights.fetch import fetch, find_local
from gemma_scope_tl.weights.hub_cache import known_sha256
from gemma_scope_tl.weights.load import load_arrays
from tests.hub.faults import Fault
from tests.hub.repos import Repo
from tests.hub.server import LocalHub
from tests.weights.test_fetch import FOLDER, row

ID = "owner/suite"
NAME = f"{FOLDER}/params.npz"
FILE = f"{ID}/{NAME}"
RNG = np.random.default_rng(0)
SHAPES = {"W_dec": (1100, 32), "W_enc": (32, 1100), "b_dec": 32, "b_enc": 1100, "threshold": 1100}
ARRAYS = {name: np.abs(RNG.standard_normal(shape)).astype(np.float32) for name, shape in SHAPES.items()}


def npz() -> bytes:
    held = io.BytesIO()
    np.savez(held, **ARRAYS)  # type: ignore[arg-type]
    return held.getvalue()


CONTENT = npz()
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def repo(hub: LocalHub) -> Repo:
    made = hub.repo(ID)
    made.commit({NAME: CONTENT})
    return made


def saved(repo: Repo, **fields: object) -> SAERow:
    return row(repo=repo.id, **fields)


def load(wanted: SAERow) -> dict[str, torch.Tensor]:
    """Fetched and checked, as an SAE's loading does it."""
    path = fetch(wanted)
    return load_arrays(path, sha256=wanted.sha256 or known_sha256(path))


def blobs() -> list[str]:
    root = Path(constants.HF_HUB_CACHE) / "models--owner--suite" / "blobs"
    return sorted(path.name for path in root.iterdir()) if root.is_dir() else []


def test_download_then_the_cache(hub: LocalHub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = repo.branches["main"]
    path = fetch(saved(repo, revision=commit, sha256=SHA256))
    assert path.read_bytes() == CONTENT
    assert [(e.method, e.host, e.status) for e in hub.log] == [("HEAD", "hub", 302), ("GET", "cdn", 200)]
    assert fetch(saved(repo, revision=commit)) == path
    assert len(hub.log) == 2  # a commit cannot change: nothing is asked
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(saved(repo, revision=commit)) == path
    with pytest.raises(WeightsError, match=r"not in the local cache.*HF_HUB_OFFLINE is set.*hf download owner/suite"):
        fetch(saved(repo, revision="0" * 40))


def test_revisions_and_force(hub: LocalHub, repo: Repo) -> None:
    first = repo.branches["main"]
    repo.tags["v1"] = first
    repo.commit({NAME: b"second"})
    assert fetch(saved(repo)).read_bytes() == b"second"
    assert fetch(saved(repo, revision="v1")).read_bytes() == CONTENT
    before = len(hub.requests("GET"))
    assert fetch(saved(repo, revision=first)).read_bytes() == CONTENT
    assert len(hub.requests("GET")) == before
    assert fetch(saved(repo, revision=first), force_download=True).read_bytes() == CONTENT
    assert len(hub.requests("GET")) == before + 1


def test_sae_lens_layout(hub: LocalHub, repo: Repo) -> None:
    repo.commit({f"{FOLDER}/cfg.json": b"{}", f"{FOLDER}/sae_weights.safetensors": b"tensors"})
    path = fetch(saved(repo, format="sae-lens"))
    assert path.read_bytes() == b"tensors" and (path.parent / "cfg.json").read_bytes() == b"{}"


def test_known_sha256(hub: LocalHub, repo: Repo, tmp_path: Path) -> None:
    repo.commit({f"{FOLDER}/cfg.json": b"{}", f"{FOLDER}/sae_weights.safetensors": b"tensors"})
    path = fetch(saved(repo, format="sae-lens"))
    assert known_sha256(path) == hashlib.sha256(b"tensors").hexdigest()
    assert known_sha256(path.parent / "cfg.json") is None  # named by its git hash
    assert known_sha256(path.resolve()) is None
    (tmp_path / "link").symlink_to(tmp_path / "cache" / ("0" * 64))
    assert known_sha256(tmp_path / "link") is None  # not into a folder of blobs


def test_find_local_asks_nobody(hub: LocalHub, repo: Repo, tmp_path: Path) -> None:
    repo.commit({f"{FOLDER}/cfg.json": b"{}", f"{FOLDER}/sae_weights.safetensors": b"tensors"})
    rows = [saved(repo), saved(repo, format="sae-lens"), saved(repo, revision=repo.branches["main"])]
    assert [find_local(each) for each in rows] == [None] * 3 and hub.log == []
    paths = [fetch(each) for each in rows]
    asked = len(hub.log)
    assert [find_local(each) for each in rows] == paths and len(hub.log) == asked
    (paths[1].parent / "cfg.json").unlink()
    assert find_local(rows[1]) is None  # half of the layout is none
    with pytest.raises(WeightsError, match=r"params\.npz does not exist"):
        find_local(row(repo=str(tmp_path)))
    with pytest.raises(WeightsError, match="neither an existing folder nor a repository name"):
        find_local(row(repo="a/b/c"))


def test_cut_download_is_resumed(
    hub: LocalHub, repo: Repo, waits: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client keeps whole chunks of 10 MB; here of 50 kB, for a small file."""
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 50_000)
    hub.fail(FILE, Fault(host="cdn", cut_after=100_000))
    assert fetch(saved(repo, sha256=SHA256)).read_bytes() == CONTENT
    gets = hub.requests("GET", "cdn")
    assert [e.range for e in gets] == [None, "bytes=100000-"]
    assert hub.bytes_sent() == len(CONTENT) and len(waits) == 1


def test_wrong_hash_is_not_kept(hub: LocalHub, repo: Repo) -> None:
    hub.fail(FILE, Fault(host="cdn", corrupt=True))
    wanted = saved(repo, sha256=SHA256)
    with pytest.raises(WeightsError, match=rf"should be {SHA256}. It was removed from the cache") as caught:
        load(wanted)
    assert not Path(str(caught.value).split(" has sha256")[0]).is_symlink() and blobs() == []
    assert fetch(wanted).read_bytes() == CONTENT  # downloaded again, and right this time
    assert blobs() == [SHA256]


def test_wrong_content_of_an_lfs_file_is_found(hub: LocalHub, repo: Repo) -> None:
    """Without a hash in the row, the Hub's own is the measure."""
    hub.fail(FILE, Fault(host="cdn", corrupt=True))
    path = fetch(saved(repo))
    wanted = known_sha256(path)
    assert wanted == SHA256
    with pytest.raises(WeightsError, match=rf"should be {SHA256}.* removed from the cache"):
        load(saved(repo))
    assert blobs() == [] and not path.is_symlink()
    assert set(load(saved(repo))) == set(ARRAYS)


def test_files_outside_the_cache_are_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "blobs" / "params.npz"
    path.parent.mkdir()
    path.write_bytes(b"mine")
    with pytest.raises(WeightsError, match="it should be 0000"):
        load_arrays(path, sha256="0" * 64)
    assert path.read_bytes() == b"mine"


def test_cache_without_links(hub: LocalHub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS_WARNING", True)
    hub.fail(FILE, Fault(host="cdn", corrupt=True))
    path = fetch(saved(repo))
    assert not path.is_symlink() and known_sha256(path) is None
    with pytest.raises(WeightsError, match="removed from the cache"):
        load(saved(repo, sha256=SHA256))
    assert not path.exists()


def test_wrong_length(hub: LocalHub, repo: Repo) -> None:
    hub.fail(FILE, Fault(host="cdn", times=None, drop=1000))
    with pytest.raises(WeightsError, match=r"params\.npz of owner/suite .* the length of the response differs"):
        fetch(saved(repo))
    assert blobs() == []


def test_disk_full(hub: LocalHub, repo: Repo, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "_chmod_and_move", full)
    with pytest.raises(WeightsError, match=r"no space left on the disk of .*cache.*HF_HOME"):
        fetch(saved(repo))


def test_no_token_for_the_storage_host(hub: LocalHub, repo: Repo, token: str) -> None:
    repo.gated = True
    repo.members.add(token)
    assert fetch(saved(repo)).read_bytes() == CONTENT
    assert [(e.host, e.authorized) for e in hub.log] == [("hub", True), ("cdn", False)]


def status(code: int, host: str = "cdn", **fields: object) -> Fault:
    methods = ("GET",) if host == "cdn" else ("HEAD", "GET")
    return Fault(times=None, methods=methods, status=code, **fields)  # type: ignore[arg-type]


ERRORS = {
    "gated": (Fault(), r"is gated. Accept its terms at http://127.0.0.1:\d+/owner/suite, then run `hf auth login`"),
    "missing file": (Fault(), r"does not exist \(it may have been renamed or deleted\). See .*/owner/suite/tree/main"),
    "missing repo": (Fault(), r"owner/none is neither a local folder nor a repository"),
    "missing revision": (Fault(), r"owner/suite has no revision 'v9'"),
    "unknown token": (Fault(), r"the Hub does not accept your token. Run `hf auth login`, or correct HF_TOKEN"),
    "forbidden": (status(403), r"was refused \(HTTP 403\). Ask for access"),
    "rate limit": (
        status(429, headers={"Retry-After": "7"}),
        r"too many requests \(HTTP 429\). Wait 7 seconds, or log",
    ),
    "rate limit at once": (status(429, "hub"), r"too many requests \(HTTP 429\). Wait some minutes, or log in"),
    "server": (status(503), r"the Hub has an internal error \(HTTP 503\). Try again later"),
    "server at once": (status(500, "hub"), r"the Hub has an internal error \(HTTP 500\)"),
    "teapot": (status(418), r"the Hub answered with HTTP 418"),
    "cut": (Fault(times=None, cut_after=0), r"connection to http://127.0.0.1:\d+ failed or was lost \(RemoteProtocol"),
    "length": (Fault(times=None, drop=1), r"length of the response differs"),
    "echo": (status(500, "hub", message="who is hf_secretOfTheTests0123456789"), r"HTTP 500"),
    "forced": (status(503, "hub"), r"HTTP 503"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ERRORS)
def test_every_error_is_clear_and_keeps_the_token(
    name: str, hub: LocalHub, repo: Repo, token: str, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    """Messages, the chain of causes as Python prints it, and all logs (the client's too, at debug level)."""
    fault, message = ERRORS[name]
    caplog.set_level(logging.DEBUG)
    hub.fail(FILE, Fault(**vars(fault)))  # a fault counts down: each test has its own
    repo.gated = name == "gated"
    wanted = {
        "missing file": saved(repo, path="layer_9"),
        "missing repo": row(repo="owner/none"),
        "missing revision": saved(repo, revision="v9"),
    }.get(name, saved(repo))
    if name == "unknown token":
        hub.tokens.clear()
    with pytest.raises(WeightsError, match=message) as caught:
        fetch(wanted, force_download=name == "forced")
    shown = "".join(traceback.format_exception(caught.value))
    assert token not in str(caught.value) and token not in shown
    ours = [record for record in caplog.records if record.name.startswith("gemma_scope_tl")]
    logged = caplog.text if name != "echo" else "".join(record.getMessage() for record in ours)
    assert token not in logged  # the HTTP library's debug log shows an answer's headers, and there a server's echo
    assert "Signature=" not in str(caught.value) and "Signature=" not in shown
    assert blobs() == []


def test_unreachable(hub: LocalHub, waits: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"  # the discard port: nobody listens
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", "http://user:secret@127.0.0.1:9")
    with pytest.raises(WeightsError, match=r"connection to http://127.0.0.1:9 failed or was lost"):
        fetch(row(repo=ID))


def test_a_passing_fault_passes(hub: LocalHub, repo: Repo, waits: list[float]) -> None:
    hub.fail(FILE, Fault(methods=("HEAD",), host="hub", status=503))
    hub.fail(FILE, Fault(host="cdn", status=429, headers={"Retry-After": "3"}))
    assert fetch(saved(repo)).read_bytes() == CONTENT
    assert 4.0 in waits  # the client waits a second longer than it is told to


def test_not_a_hub(hub: LocalHub, repo: Repo) -> None:
    repo.commit({f"{FOLDER}/params.npz": CONTENT})
    hub.fail(FILE, Fault(times=None, methods=("HEAD",), host="hub", status=200))
    with pytest.raises(
        WeightsError, match=r"http://127.0.0.1:\d+ does not respond like a Hub server. Check HF_ENDPOINT"
    ):
        fetch(saved(repo))


def test_endpoint_from_the_environment(hub: LocalHub, repo: Repo, tmp_path: Path) -> None:
    """The client reads HF_ENDPOINT at import, so it takes a process of its own."""
    code = (
        "from gemma_scope_tl.weights.fetch import fetch; from types import SimpleNamespace as N; "
        f"print(fetch(N(release='r', id='i', format='gemma-scope', path={FOLDER!r}, repo={ID!r}, revision=None, "
        f"weights_path={FOLDER + '/params.npz'!r}, "
        f"sha256={SHA256!r})))"
    )
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    ran = subprocess.run([sys.executable, "-c", code], env={**kept, **settings}, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    path = Path(ran.stdout.strip())
    assert path.is_relative_to(tmp_path / "home") and path.read_bytes() == CONTENT

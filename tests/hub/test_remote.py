"""Parts of remote files: what is asked for arrives, with few requests, and every fault is found."""

from __future__ import annotations

import hashlib
import io
import random
import traceback
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants

from gemma_scope_tl.errors import WeightsError
from gemma_scope_tl.weights.remote import LEAST, TAIL, RemoteFile
from tests.hub.big_npz import write_sparse_npz
from tests.hub.faults import Fault
from tests.hub.repos import HubFile, Repo
from tests.hub.server import LocalHub

ID, NAME = "owner/suite", "layer_0/params.npz"
FILE = f"{ID}/{NAME}"
CONTENT = random.Random(0).randbytes(400_000)


@pytest.fixture
def repo(hub: LocalHub) -> Repo:
    made = hub.repo(ID)
    made.commit({NAME: CONTENT, "small.json": b"0123456789"})
    return made


@pytest.fixture
def remote(repo: Repo) -> RemoteFile:
    return RemoteFile(ID, NAME)


def test_attributes(hub: LocalHub, repo: Repo, remote: RemoteFile) -> None:
    assert (remote.size, remote.etag) == (len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    assert remote.commit == repo.branches["main"] and remote.source == f"{NAME} of {ID} at main"
    assert (remote.requests, remote.bytes_received) == (1, 0) and [e.method for e in hub.log] == ["HEAD"]


def test_reads_are_exact_and_counted(hub: LocalHub, remote: RemoteFile) -> None:
    assert remote.read_at(1000, 2000) == CONTENT[1000:3000]
    assert remote.bytes_received == 2000
    assert remote.read_at(5000, 1) == CONTENT[5000:5001]
    assert remote.bytes_received == 2000 + LEAST
    assert remote.read_at(5100, 100) == CONTENT[5100:5200] and remote.read_at(1500, 10) == CONTENT[1500:1510]
    assert remote.requests == 3  # HEAD and two parts: the last two reads lie in them
    assert remote.read_at(len(CONTENT) - 3, 3) == CONTENT[-3:] and remote.read_at(len(CONTENT) - TAIL, 9)
    assert (remote.requests, remote.bytes_received) == (4, 2000 + LEAST + TAIL)
    across = remote.read_at(len(CONTENT) - TAIL - 10, 20)
    assert across == CONTENT[len(CONTENT) - TAIL - 10 :][:20]
    assert (remote.requests, remote.bytes_received) == (5, 2010 + LEAST + TAIL)
    assert remote.bytes_received == hub.bytes_sent() and remote.requests == len(hub.log)
    assert [e.range for e in hub.requests("GET")][:2] == ["bytes=1000-2999", "bytes=5000-5511"]


def test_across_the_tail_at_once(repo: Repo, remote: RemoteFile) -> None:
    assert remote.read_at(100, len(CONTENT) - 100) == CONTENT[100:]
    assert remote.read_at(len(CONTENT) - 5, 5) == CONTENT[-5:]
    assert (remote.requests, remote.bytes_received) == (2, len(CONTENT) - 100)


@pytest.mark.parametrize(("offset", "length"), [(-1, 2), (0, -1), (399_999, 2), (400_001, 0), (0, 400_001)])
def test_parts_that_do_not_exist(remote: RemoteFile, offset: int, length: int) -> None:
    for read in (lambda: remote.read_at(offset, length), lambda: remote.read_many([(0, 1), (offset, length)])):
        with pytest.raises(WeightsError, match=rf"has 400000 bytes, so it lacks {length} bytes at {offset}"):
            read()
    assert remote.requests == 1


def test_file_object(remote: RemoteFile) -> None:
    ours, theirs = io.BufferedReader(remote), io.BytesIO(CONTENT)
    steps = [(10, 0, 5), (3, 1, 700), (-70_000, 2, 10), (-5, 2, 100), (0, 2, 5), (400_100, 0, 5), (0, 0, 1)]
    for offset, whence, n in steps:
        assert ours.seek(offset, whence) == theirs.seek(offset, whence) and ours.read(n) == theirs.read(n)
        assert ours.tell() == theirs.tell()
    assert remote.readable() and remote.seekable() and not remote.writable()
    remote.seek(399_000)
    assert remote.read() == CONTENT[399_000:] and remote.read() == b"" and remote.read(3) == b""
    for offset, whence in ((-1, 0), (0, 7)):
        with pytest.raises(ValueError, match=r"seek|whence"):
            remote.seek(offset, whence)
    remote.close()
    for call in (remote.read, lambda: remote.seek(0), lambda: remote.read(1)):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_small_file_on_the_hubs_own_host(hub: LocalHub, repo: Repo) -> None:
    file = RemoteFile(ID, "small.json")
    repo.commit({"small.json": b"another one"})  # the branch moves on; we stay at the commit
    assert file.read() == b"0123456789" and file.read_at(3, 2) == b"34" and file.requests == 2
    assert {e.host for e in hub.log} == {"hub"}


def test_read_many(hub: LocalHub, remote: RemoteFile) -> None:
    near = [(1000, 10), (5095, 10), (1000, 10), (1005, 2), (0, 0)]  # gaps below 4 KiB
    far = [(100_000 + 20_000 * i, 300) for i in range(9)]
    ranges = [far[3], *near, *far[4:], *far[:3], (len(CONTENT) - 9, 9)]
    assert remote.read_many(ranges) == [CONTENT[o : o + n] for o, n in ranges]
    assert remote.requests == 1 + 1 + len(far) + 1
    assert remote.bytes_received == (5105 - 1000) + len(far) * LEAST + TAIL == hub.bytes_sent()
    assert remote.read_many([]) == [] and remote.read_many(near)[1] == CONTENT[5095:5105]
    assert remote.requests == 1 + 1 + len(far) + 1


def test_read_many_has_one_error(hub: LocalHub, remote: RemoteFile) -> None:
    hub.fail(FILE, Fault(times=1, host="cdn", shift_range=1))
    with pytest.raises(WeightsError, match="wrong part"):
        remote.read_many([(20_000 * i, 100) for i in range(12)])


def test_many_threads_share_one_tail(remote: RemoteFile) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: remote.read_at(len(CONTENT) - 100 - i, 50), range(40)))
    assert found == [CONTENT[len(CONTENT) - 100 - i :][:50] for i in range(40)]
    assert (remote.requests, remote.bytes_received) == (2, TAIL)


def test_several_ranges(remote: RemoteFile) -> None:
    ranges = [(5, 10), (399_000, 1000), (0, 0), (7, 2)]
    assert remote.read_many(ranges) == [CONTENT[o : o + n] for o, n in ranges] and remote.size == len(CONTENT)


def test_cut_part_is_resumed(hub: LocalHub, remote: RemoteFile, waits: list[float]) -> None:
    hub.fail(FILE, Fault(host="cdn", cut_after=70_000))
    assert remote.read_at(10, 200_000) == CONTENT[10:200_010]
    assert [e.range for e in hub.requests("GET")] == ["bytes=10-200009", "bytes=70010-200009"]
    assert remote.bytes_received == 200_000 == hub.bytes_sent() and waits == [0.5]


@pytest.mark.parametrize(
    ("fault", "waited"),
    [
        (Fault(status=503), [0.5]),
        (Fault(status=500, times=2), [0.5, 1.0]),
        (Fault(status=429, headers={"Retry-After": "4"}), [4.0]),
        (Fault(status=429, headers={"Retry-After": "900"}), [10.0]),
        (Fault(cut_after=0), [0.5]),
    ],
)
def test_passing_faults_are_retried(
    fault: Fault, waited: list[float], hub: LocalHub, remote: RemoteFile, waits: list[float]
) -> None:
    hub.fail(FILE, Fault(**{**vars(fault), "host": "cdn"}))
    assert remote.read_at(0, 1000) == CONTENT[:1000] and waits == waited
    assert remote.requests == len(hub.log) == 2 + len(waited)


def test_opening_is_retried(hub: LocalHub, repo: Repo, waits: list[float]) -> None:
    hub.fail(FILE, Fault(times=2, methods=("HEAD",), status=503))
    assert RemoteFile(ID, NAME).requests == 3 and waits == [0.5, 1.0]


LASTING = {
    "server": (Fault(status=503), r"could not be read after 3 tries: HTTP 503 \(the Hub has an internal error\)"),
    "rate limit": (Fault(status=429), r"3 tries: HTTP 429 \(too many requests\)\. Wait some minutes, or log in"),
    "cut": (Fault(cut_after=0), r"3 tries: the connection failed or was lost \(RemoteProtocolError\)"),
    "gone": (Fault(status=404), r"was answered with HTTP 404 to a range"),
    "ranges ignored": (Fault(ignore_range=True), r"the server ignores ranges .*Download it: `hf download owner/suite"),
    "other range": (Fault(shift_range=7), r"the wrong part: 'bytes 7-1006/400000', not 'bytes 0-999/400000'"),
    "shorter range": (Fault(drop=5), r"the wrong part: 'bytes 0-994/400000'"),
    "compressed": (Fault(headers={"Content-Encoding": "gzip"}), r"was answered compressed \(gzip\)"),
    "refused": (Fault(status=403), r"was refused twice \(HTTP 401 or 403\)"),
}


@pytest.mark.parametrize("name", LASTING)
def test_lasting_faults_are_clear(
    name: str, hub: LocalHub, repo: Repo, token: str, waits: list[float], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    fault, message = LASTING[name]
    remote = RemoteFile(ID, NAME)
    hub.fail(FILE, Fault(**{**vars(fault), "host": "cdn", "times": None}))
    with pytest.raises(WeightsError, match=rf"{NAME} of {ID} at main .*{message}") as caught:
        remote.read_at(0, 1000)
    shown = "".join(traceback.format_exception(caught.value))
    assert token not in shown and "Signature=" not in shown and token not in caplog.text
    assert all(e.authorized == (e.host == "hub") for e in hub.log)


def test_ignored_ranges_are_not_read_to_the_end(hub: LocalHub, tmp_path: Path) -> None:
    path = tmp_path / "huge.npz"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    hub.repo(ID).commit({NAME: HubFile(path, True, "0" * 64)})
    hub.fail(FILE, Fault(host="cdn", ignore_range=True))
    remote = RemoteFile(ID, NAME)
    with pytest.raises(WeightsError, match="ignores ranges"):
        remote.read_at(0, 1000)
    assert remote.bytes_received == 0
    assert hub.bytes_sent() < 1 << 26  # what the connection's buffers hold, of a terabyte


def test_file_that_changes(hub: LocalHub, repo: Repo, remote: RemoteFile) -> None:
    assert remote.read_at(0, 1000) == CONTENT[:1000]
    hub.fail(FILE, Fault(host="cdn", etag="another"))
    with pytest.raises(WeightsError, match="changed while it was being read"):
        remote.read_at(200_000, 1000)


def test_expired_address_is_renewed(hub: LocalHub, repo: Repo, remote: RemoteFile) -> None:
    assert remote.read_at(0, 1000) == CONTENT[:1000] and remote.requests == 2
    hub.expire()
    repo.commit({NAME: b"something else"})
    assert remote.read_many([(20_000 * i, 600) for i in range(5)]) == [CONTENT[20_000 * i :][:600] for i in range(5)]
    assert len(hub.requests("HEAD")) == 2  # five threads, one renewal
    hub.expire()
    hub.fail(FILE, Fault(methods=("HEAD",), etag="f" * 64))
    with pytest.raises(WeightsError, match="changed while it was being read"):
        remote.read_at(300_000, 1000)


@pytest.mark.parametrize(
    ("opened", "message"),
    [
        (("owner/none", NAME, None), "owner/none is neither a local folder nor a repository on the Hub"),
        ((ID, "no.npz", None), r"no\.npz of owner/suite does not exist"),
        ((ID, NAME, "v9"), "owner/suite has no revision 'v9'"),
        (("owner/gated", NAME, None), "is gated. Accept its terms"),
        (("a/b/c", NAME, None), "neither an existing folder nor a repository name"),
    ],
)
def test_opening_says_what_is_wrong(
    opened: tuple[str, str, str | None], message: str, hub: LocalHub, repo: Repo, waits: list[float]
) -> None:
    hub.repo("owner/gated", gated=True).commit({NAME: CONTENT})
    with pytest.raises(WeightsError, match=message):
        RemoteFile(*opened)
    assert waits == []


def test_offline(repo: Repo, remote: RemoteFile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for act in (lambda: RemoteFile(ID, NAME, "main"), lambda: remote.read_at(0, 1)):
        with pytest.raises(WeightsError, match=r"HF_HUB_OFFLINE is set.*hf download owner/suite"):
            act()


def test_token_goes_to_the_hub_only(hub: LocalHub, repo: Repo, token: str) -> None:
    repo.private = repo.gated = True
    repo.members.add(token)
    RemoteFile(ID, NAME).read_at(0, 10)
    RemoteFile(ID, "small.json").read()
    assert {(e.host, e.authorized) for e in hub.log} == {("hub", True), ("cdn", False)}


def test_a_row_out_of_19_gb(hub: LocalHub, tmp_path: Path) -> None:
    """A 1M-latent SAE: its index in one request, a decoder row in two more, 76 kB in all."""
    path, d_in, d_sae = tmp_path / "params.npz", 2304, 1 << 20
    rows = {i: np.random.default_rng(i).standard_normal(d_in, np.float32) for i in (0, 31_337, d_sae - 1)}
    write_sparse_npz(path, d_in, d_sae, rows)
    hub.repo(ID).commit({NAME: HubFile(path, True, "0" * 64)})
    remote = RemoteFile(ID, NAME)
    with zipfile.ZipFile(remote) as archive:  # type: ignore[arg-type]
        members = {info.filename: info for info in archive.infolist()}
        assert list(members) == ["W_enc.npy", "W_dec.npy", "b_enc.npy", "b_dec.npy", "threshold.npy"]
        assert (remote.requests, remote.bytes_received) == (2, TAIL)
        with archive.open(members["W_dec.npy"]) as member:
            assert np.lib.format.read_magic(member) == (1, 0)
            assert np.lib.format.read_array_header_1_0(member) == ((d_sae, d_in), False, np.dtype("<f4"))
    assert members["W_dec.npy"].file_size == 128 + 4 * d_in * d_sae > 1 << 32
    start = members["W_dec.npy"].header_offset + 30 + len("W_dec.npy") + 20 + 128
    requests, received = remote.requests, remote.bytes_received
    found = remote.read_many([(start + 4 * d_in * row, 4 * d_in) for row in rows])
    for data, wanted in zip(found, rows.values(), strict=True):
        np.testing.assert_array_equal(np.frombuffer(data, "<f4"), wanted)
    assert (remote.requests - requests, remote.bytes_received - received) == (3, 3 * 4 * d_in)
    assert remote.requests == len(hub.log) and remote.bytes_received == hub.bytes_sent() < 200_000

"""Reading one latent from a file of 19 GB on the Hub, against downloading the file.

The Hub is the local server of the tests, and the file is sparse on disk. Requests and bytes are measured, which do not
depend on the network.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from huggingface_hub import constants
from huggingface_hub.utils import close_session

from benchmarks.timing import main
from gemma_scope_tl.registry.schema import SAERow
from gemma_scope_tl.sae.partial import load_latents
from gemma_scope_tl.weights.npz import inspect_npz
from gemma_scope_tl.weights.partial import read_rows
from gemma_scope_tl.weights.remote import RemoteFile
from tests.hub.big_npz import write_sparse_npz
from tests.hub.repos import HubFile
from tests.hub.server import LocalHub

D_IN, D_SAE, LATENT = 2304, 1 << 20, 3124
REPO, FOLDER = "someone/wide", "layer_5/width_1m/average_l0_100"


def run(quick: bool = False) -> list[dict[str, Any]]:
    """A row for the decoder row alone, and one for all arrays that ``load_latents`` reads.

    Requests and bytes are the same in each run, so there is one; it takes a second, so ``quick`` changes nothing.
    """
    row = np.random.default_rng(0).standard_normal(D_IN, dtype=np.float32)
    with tempfile.TemporaryDirectory() as folder, LocalHub() as hub:
        path = Path(folder) / "params.npz"
        write_sparse_npz(path, D_IN, D_SAE, {LATENT: row})
        size = path.stat().st_size
        hub.repo(REPO).commit({f"{FOLDER}/params.npz": HubFile(path, lfs=True, sha256="0" * 64)})
        settings: dict[str, Any] = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(Path(folder) / "cache"),
        }
        with (
            mock.patch.multiple(constants, **settings),
            mock.patch.dict(os.environ, {"NO_PROXY": "127.0.0.1,127.0.0.2"}),
        ):
            close_session()
            rows = [
                _measured(hub, "one decoder row", size, lambda: _decoder_row(row)),
                _measured(hub, "one latent: decoder row, bias, threshold", size, lambda: _latent(row)),
            ]
            close_session()
    return rows


def _decoder_row(wanted: np.ndarray) -> None:
    remote = RemoteFile(REPO, f"{FOLDER}/params.npz")
    layout = inspect_npz(remote, ["W_dec"])["W_dec"]
    got = read_rows(remote, {"W_dec": (layout, [LATENT])})["W_dec"]
    np.testing.assert_array_equal(got[0].numpy(), wanted)


def _latent(wanted: np.ndarray) -> None:
    fields: Any = {"release": "wide", "id": FOLDER, "model": "gemma-2-2b", "site": "res", "layer": 5, "width": "1m"}
    sizes: Any = {"d_sae": D_SAE, "d_in": D_IN, "l0": 100.0, "repo": REPO, "path": FOLDER}
    row = SAERow.model_construct(**fields, **sizes)
    with mock.patch("gemma_scope_tl.registry.catalog.resolve", return_value=row):
        got = load_latents("wide", FOLDER, LATENT)
    np.testing.assert_array_equal(got.W_dec[0].numpy(), wanted)


def _measured(hub: LocalHub, what: str, size: int, read: Any) -> dict[str, Any]:
    requests, sent, started = len(hub.log), hub.bytes_sent(), time.perf_counter()
    read()
    seconds = time.perf_counter() - started
    requests, sent = len(hub.log) - requests, hub.bytes_sent() - sent
    return {
        "what": f"{what} of a remote 1M-wide SAE",
        "peer": "whole download",
        "ours": f"{requests} requests, {sent / 1024:.0f} KiB",
        "theirs": f"{size / 1e9:.1f} GB",
        "requests": requests,
        "bytes": sent,
        "peer_bytes": size,
        "local_s": seconds,
        "ratio": size / sent,
    }


if __name__ == "__main__":
    main("remote", run)

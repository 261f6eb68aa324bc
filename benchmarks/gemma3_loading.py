"""Loading Gemma Scope 2's files of Gemma 3 1B at true size, and what is asked of the Hub for a file in its cache.

Two kinds of files (SAEs at the residual stream, transcoders with a skip connection) in two widths, in the layout and
under the names of the release, in the page cache for both sides. The peer is stock SAELens's ``SAE.from_pretrained``,
whose requests to the Hub are answered from the folder at once.

These files are in safetensors' format, which both sides map in float32, unlike the npz files of
``benchmarks/loading.py``. SAELens does not check what it maps, so the time to an object is nearly none there, whereas
this package reads the whole file the first time, and its record of that later. Rows that end with features make both
sides read the encoder.

SAELens asks the Hub for the header of a file that is in the cache, so without a connection it raises; the row with
requests is measured on a Hub on this machine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from huggingface_hub import constants
from huggingface_hub.utils import close_session
from requests.exceptions import ConnectionError as Unreachable
from sae_lens import SAE

from benchmarks.coder_files import REPO, Coder, hub_cache, random_arrays
from benchmarks.saelens_loader import load_released_with_sae_lens
from benchmarks.timing import main, paired, spread
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sae.partial import load_latents
from gemma_scope_tl.weights.stamp import CACHE_VARIABLE
from tests.hub.repos import HubFile
from tests.hub.server import LocalHub

WIDTH, PEER = 1152, "SAELens"
LATENTS = {"16k": 16_384, "65k": 65_536}
KINDS = (("res", False), ("transcoder", True))
CHOSEN, TOKENS = [3124, 7, 12_345], 16
MEMORY = """
import sys
from pathlib import Path
from benchmarks.coder_files import Coder
from benchmarks.gemma3_loading import Files
from benchmarks.machine import peak
files, who = Files(Path(sys.argv[1]), Coder(sys.argv[2], 7, sys.argv[3], sys.argv[4] == "True")), sys.argv[5]
small = Files(Path(sys.argv[6]), files.coder)
load = {"ours": Files.ours, "peer": Files.stock}[who]
load(small, "bfloat16")  # imports and buffers, on a small file
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
before = peak()
kept = load(files, "bfloat16")
print((peak() - before) / 1024)
"""


@dataclass(frozen=True)
class Files:
    """A coder's files below the root of a repository, and how both sides load them."""

    root: Path
    coder: Coder

    def ours(self, dtype: str = "float32") -> Any:
        """Load with this package."""
        return JumpReLUSAE.from_folder(self.root / self.coder.path, dtype=dtype)

    def first(self) -> Any:
        """Load with this package, which has forgotten that it has checked the file."""
        shutil.rmtree(os.environ[CACHE_VARIABLE], ignore_errors=True)
        return self.ours()

    def stock(self, dtype: str = "float32") -> Any:
        """Load with SAELens."""
        return load_released_with_sae_lens(self.root, self.coder.release, self.coder.id, dtype)

    @property
    def file(self) -> Path:
        """The file of weights."""
        return self.root / self.coder.path / "params.safetensors"


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of each kind and width, and one of requests. ``quick`` takes the narrow files only, once."""
    runs, widths = (1, ("16k",)) if quick else (5, tuple(LATENTS))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        root, small = hub_cache(folder / "hub"), folder / "small"
        settings: dict[str, Any] = {"HF_HUB_CACHE": str(folder / "hub"), "HF_HUB_OFFLINE": True}
        with (
            mock.patch.dict(os.environ, {CACHE_VARIABLE: f"{folder}/checked"}),
            mock.patch.multiple(constants, **settings),
        ):
            for width in widths:
                for site, affine in KINDS:
                    files = Files(root, Coder(site, 7, width, affine))
                    files.coder.write(root, random_arrays(WIDTH, LATENTS[width], affine=affine))
                    rows += _object(files, runs)
                    if width == widths[-1]:
                        files.coder.write(small, random_arrays(64, 256, affine=affine))
                        rows += _wide(files, small, runs)
                    if (site, width) != (KINDS[-1][0], "16k"):  # which the row of requests takes
                        files.file.unlink()
        rows.append(_requests(Files(root, Coder("transcoder", 7, "16k", True)), folder / "cache"))
    return rows


@torch.no_grad()
def _object(files: Files, runs: int) -> list[dict[str, Any]]:
    """To an object the first time, and to an object and to features when the file was checked before."""
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    first = paired(files.first, files.stock, runs=runs)
    difference = (files.ours()(x) - files.stock()(x)).abs().max().item()
    assert difference <= 1e-3, difference  # float32 sums of some hundred rows of length 1
    again = paired(files.ours, files.stock, runs=runs)
    features = paired(lambda: files.ours().encode(x), lambda: files.stock().encode(x), runs=runs)
    what = f"{_named(files)} to object"
    return [
        _row(files, "first", f"{what}, first time, check included", first),
        _row(files, "again", f"{what}, file checked before", again),
        _row(files, "features", f"{what} and the features of {TOKENS} tokens, file checked before", features)
        | {"max_difference": difference},
    ]


def _wide(files: Files, small: Path, runs: int) -> list[dict[str, Any]]:
    """In bfloat16 with the memory it takes, and a few latents alone."""
    files.ours()  # checked before
    times = paired(lambda: files.ours("bfloat16"), lambda: files.stock("bfloat16"), runs=runs)
    given = [str(files.root), files.coder.site, files.coder.width, str(files.coder.affine)]
    memory = {who: [_child(*given, who, str(small)) for _ in range(runs)] for who in ("ours", "peer")}
    extra = spread("ours_extra_mib", memory["ours"]) | spread("peer_extra_mib", memory["peer"])

    def ours() -> list[torch.Tensor]:
        found = load_latents(files.coder.release, files.coder.id, CHOSEN, encoder=True)
        assert found.W_enc is not None
        return [found.W_dec, found.W_enc, found.b_enc, found.threshold]

    def theirs() -> list[torch.Tensor]:
        sae = files.stock()
        return [
            part.detach()
            for part in (sae.W_dec[CHOSEN], sae.W_enc[:, CHOSEN], sae.b_enc[CHOSEN], sae.threshold[CHOSEN])
        ]

    assert all(torch.equal(mine, its) for mine, its in zip(ours(), theirs(), strict=True))
    latents = paired(ours, theirs, runs=runs)
    return [
        _row(files, "bfloat16", f"{_named(files)} to bfloat16", times | extra),
        _row(files, "latents", f"{len(CHOSEN)} latents of {_named(files)}", latents),
    ]


def _named(files: Files) -> str:
    return f"1B {files.coder.title} {files.coder.width} ({files.file.stat().st_size / 1e6:.0f} MB)"


def _row(files: Files, id_: str, what: str, found: dict[str, float]) -> dict[str, Any]:
    return {"id": f"{files.coder.title}-{files.coder.width}-{id_}", "what": what, "peer": PEER, **found}


def _child(*arguments: str) -> float:
    command = [sys.executable, "-c", MEMORY, *arguments]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def _requests(files: Files, cache: Path) -> dict[str, Any]:
    """What each side asks the Hub for when the file is in the cache, and what happens without the Hub."""
    coder, hub = files.coder, LocalHub()
    sides: dict[str, Callable[[], Any]] = {
        "ours": lambda: JumpReLUSAE.from_pretrained(coder.release, coder.id),
        "peer": lambda: SAE.from_pretrained(coder.release, coder.id),
    }
    names = {f"{coder.path}/{path.name}": path for path in files.file.parent.iterdir()}
    hub.repo(REPO).commit({name: HubFile(path, lfs=path == files.file) for name, path in names.items()})
    settings: dict[str, Any] = {
        "ENDPOINT": hub.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_DISABLE_TELEMETRY": True,  # it asks the Hub things of its own, which would be counted
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(cache),
    }
    asked: dict[str, int] = {}
    local = dict.fromkeys(("NO_PROXY", "no_proxy"), "127.0.0.1,127.0.0.2")
    with mock.patch.multiple(constants, **settings), mock.patch.dict(os.environ, local):
        close_session()
        with hub:
            sides["ours"]()  # downloads the files
            for who, load in sides.items():
                before = len(hub.log)
                load()
                asked[who] = len(hub.log) - before
        close_session()
        with mock.patch.object(constants, "HF_HUB_OFFLINE", True):
            sides["ours"]()
            try:
                sides["peer"]()
            except Unreachable:
                pass
            else:
                raise AssertionError("SAELens loads a cached file without the Hub, so the words of this row are wrong")
        close_session()
    return {
        "id": "requests",
        "what": f"requests for a 1B {coder.title} {coder.width} in the Hub's cache",
        "peer": PEER,
        "ours": f"{asked['ours']}, and it loads without a connection",
        "theirs": f"{asked['peer']}, and it raises without a connection",
        "requests": asked["ours"],
        "peer_requests": asked["peer"],
        "ratio": asked["peer"] / max(asked["ours"], 1),
    }


if __name__ == "__main__":
    main("gemma3_loading", run)

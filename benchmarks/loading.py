"""Loading: files of true size to SAE objects, first features and single rows, the registry, and the command line.

The peer is stock SAELens with the same files and ids. Files are in the page cache for both sides.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.saelens_loader import load_with_sae_lens
from benchmarks.timing import paired, save
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.weights.stamp import cache_folder

D_IN = 2304
ROW = ("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")
OURS = "import gemma_scope_tl"
LIST = """
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
for name in get_pretrained_saes_directory()["gemma-scope-2b-pt-res"].saes_map: print(name)
"""
LOOK_UP = """
import time
from gemma_scope_tl.registry import resolve
started = time.perf_counter()
assert resolve(*{row!r}).l0 == 71
print(time.perf_counter() - started)
"""
PEER_LOOK_UP = """
import time
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory as directory
started = time.perf_counter()
assert directory()[{row[0]!r}].saes_map[{row[1]!r}]
print(time.perf_counter() - started)
"""
MEMORY = """
import sys
from pathlib import Path
from benchmarks.loading import load_ours
from benchmarks.saelens_loader import load_with_sae_lens
path, dtype, who = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
load = load_ours if who == "ours" else load_with_sae_lens
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
load(Path(sys.argv[4]), dtype)  # imports and buffers, on a small file
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from what is resident now
before = peak()
sae = load(path, dtype)
print((peak() - before) / 1024)
"""


def write(path: Path, d_sae: int, d_in: int = D_IN) -> Path:
    """An npz of true size, its rows of unit norm."""
    rng = np.random.default_rng(0)
    w_dec = rng.standard_normal((d_sae, d_in), dtype=np.float32)
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    vectors = {"b_enc": np.zeros(d_sae, np.float32), "b_dec": np.zeros(d_in, np.float32)}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, W_dec=w_dec, W_enc=np.ascontiguousarray(w_dec.T), **vectors, threshold=np.ones(d_sae, np.float32))
    path.chmod(0o444)  # read-only, like the files of the Hub's cache, so it may be mapped
    os.sync()  # so that writing it back does not disturb what follows
    return path


def load_ours(path: Path, dtype: str) -> Any:
    """Load the SAE of a file."""
    return JumpReLUSAE.from_folder(path, site="res", layer=20, dtype=dtype)


def run() -> list[dict[str, Any]]:
    """A row per number of the README."""
    with tempfile.TemporaryDirectory() as folder:
        small = write(Path(folder) / "small" / "params.npz", 16384, 64)
        narrow = write(Path(folder) / "16k" / "params.npz", 16384)
        rows = _narrow(narrow, small)
        narrow.unlink()
        wide = write(Path(folder) / "65k" / "params.npz", 65536)
        rows += _wide(wide, small)
    return rows + _processes()


def _narrow(path: Path, small: Path) -> list[dict[str, Any]]:
    x = torch.randn(16, D_IN, generator=torch.Generator().manual_seed(0))

    def ours_first() -> Any:
        shutil.rmtree(cache_folder() / "checked", ignore_errors=True)
        return load_ours(path, "float32")

    def stock() -> Any:
        return load_with_sae_lens(path, "float32")

    with torch.no_grad():
        first = paired(ours_first, stock, runs=5)
        again = paired(lambda: load_ours(path, "float32"), stock, runs=7)
        ours_features = load_ours(path, "float32").encode(x)
        difference = (ours_features - stock().encode(x)).abs().max().item()
        features = paired(lambda: load_ours(path, "float32").encode(x), lambda: stock().encode(x), runs=5)
    what = "2B res 16k (302 MB) to SAE object"
    return [
        {"what": f"{what}, first time, check included", "peer": "SAELens", **first},
        {"what": f"{what}, checked before", "peer": "SAELens", **again, **_memory(path, "float32", small)},
        {
            "what": f"{what} and the features of 16 tokens",
            "peer": "SAELens",
            "max_difference": difference,
            **features,
        },
    ]


def _wide(path: Path, small: Path) -> list[dict[str, Any]]:
    times = paired(lambda: load_ours(path, "bfloat16"), lambda: load_with_sae_lens(path, "bfloat16"), runs=7)
    memory = _memory(path, "bfloat16", small)
    result = 2 * 65536 * D_IN * 2 / 2**20
    shares = {"result_mib": result, "ours_peak_over_result": memory["ours_extra_mib"] / result}
    return [{"what": "2B res 65k (1.2 GB) to bfloat16", "peer": "SAELens", **times, **memory, **shares}]


def _processes() -> list[dict[str, Any]]:
    listing = ["-m", "gemma_scope_tl.cli", "list", "--release", ROW[0]]
    timed: list[tuple[str, str, Callable[[], Any], Callable[[], Any]]] = [
        (
            "import",
            "import sae_lens",
            lambda: _python("-c", "import gemma_scope_tl"),
            lambda: _python("-c", "import sae_lens"),
        ),
        ("`gemma-scope list --release`", "SAELens catalogue", lambda: _python(*listing), lambda: _python("-c", LIST)),
    ]
    rows = [
        {"what": f"{what}, as a process", "peer": peer, **paired(ours, theirs, runs=3)}
        for what, peer, ours, theirs in timed
    ]
    mine = [float(_python("-c", LOOK_UP.format(row=ROW))) for _ in range(5)]
    theirs = [float(_python("-c", PEER_LOOK_UP.format(row=ROW))) for _ in range(2)]
    best = {"ours_s": float(np.median(mine)), "peer_s": float(np.median(theirs))}
    look_up = {"what": "look up one id, first call after the import", "peer": "SAELens catalogue", **best}
    return [*rows, {**look_up, "ratio": best["peer_s"] / best["ours_s"]}]


def _memory(path: Path, dtype: str, small: Path) -> dict[str, float]:
    """The largest growth of the process, after a small file of the same kind was loaded."""
    load_ours(path, dtype)  # checked before
    code = ["-c", MEMORY, str(path), dtype]
    return {f"{who}_extra_mib": float(_python(*code, who, str(small))) for who in ("ours", "peer")}


def _python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    print(save("loading", run()))

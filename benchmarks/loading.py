"""Loading: files of true size to SAE objects and first features, the registry, and the command line.

The peer is stock SAELens with the same files and ids. Files are in the page cache for both sides. A file that this
package has checked before is mapped and not read, so a time to the object alone would compare a map with a read. The
row therefore ends with the features of a few tokens, for which both read all of the encoder; the decoder is not needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.saelens_loader import load_with_sae_lens
from benchmarks.timing import compared, main, paired, spread
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.weights.stamp import CACHE_VARIABLE

D_IN = 2304
NARROW, WIDE, QUICK_NARROW, QUICK_WIDE = 16_384, 65_536, 256, 512
RUNS, SLOW_RUNS, QUICK_RUNS = 7, 5, 2
ROW = ("gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71")
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
    arrays: dict[str, Any] = {"W_dec": w_dec, "W_enc": np.ascontiguousarray(w_dec.T), **vectors}
    np.savez(path, **arrays, threshold=np.ones(d_sae, np.float32))
    path.chmod(0o444)  # read-only, like the files of the Hub's cache, so it may be mapped
    os.sync()  # so that writing it back does not disturb what follows
    return path


def load_ours(path: Path, dtype: str) -> Any:
    """Load the SAE of a file."""
    return JumpReLUSAE.from_folder(path, site="res", layer=20, dtype=dtype)


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows for a narrow file in float32, a wide one in bfloat16, and the registry's processes."""
    runs = (QUICK_RUNS, QUICK_RUNS) if quick else (RUNS, SLOW_RUNS)
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, {CACHE_VARIABLE: f"{folder}/cache"}):
        small = write(Path(folder) / "small" / "params.npz", QUICK_NARROW if quick else NARROW, 64)
        narrow = write(Path(folder) / "narrow" / "params.npz", QUICK_NARROW if quick else NARROW)
        rows = _narrow(narrow, *runs)
        narrow.unlink()
        wide = write(Path(folder) / "wide" / "params.npz", QUICK_WIDE if quick else WIDE)
        rows += _wide(wide, small, QUICK_WIDE if quick else WIDE, *runs)
    return rows + _processes(*(1, 1) if quick else (SLOW_RUNS, SLOW_RUNS))


def _narrow(path: Path, runs: int, slow_runs: int) -> list[dict[str, Any]]:
    x = torch.randn(16, D_IN, generator=torch.Generator().manual_seed(0))

    def ours_first() -> Any:
        shutil.rmtree(os.environ[CACHE_VARIABLE], ignore_errors=True)  # what is known of checked files
        return load_ours(path, "float32")

    def stock() -> Any:
        return load_with_sae_lens(path, "float32")

    with torch.no_grad():
        first = paired(ours_first, stock, runs=slow_runs)
        difference = (load_ours(path, "float32").encode(x) - stock().encode(x)).abs().max().item()
        features = paired(lambda: load_ours(path, "float32").encode(x), lambda: stock().encode(x), runs=runs)
    what = f"2B res 16k ({path.stat().st_size / 1e6:.0f} MB) to SAE object"
    return [
        {"id": "first-16k", "what": f"{what}, first time, check included", "peer": "SAELens", **first},
        {
            "id": "features-16k",
            "what": f"{what} and the features of 16 tokens, file checked before",
            "peer": "SAELens",
            "max_difference": difference,
            **features,
        },
    ]


def _wide(path: Path, small: Path, d_sae: int, runs: int, memory_runs: int) -> list[dict[str, Any]]:
    times = paired(lambda: load_ours(path, "bfloat16"), lambda: load_with_sae_lens(path, "bfloat16"), runs=runs)
    memory = _memory(path, "bfloat16", small, memory_runs)
    result = 2 * d_sae * D_IN * 2 / 2**20
    shares = {"result_mib": result, "ours_peak_over_result": memory["ours_extra_mib"] / result}
    what = f"2B res 65k ({path.stat().st_size / 1e9:.1f} GB) to bfloat16"
    return [{"id": "bfloat16-65k", "what": what, "peer": "SAELens", **times, **memory, **shares}]


def _processes(runs: int, peer_runs: int) -> list[dict[str, Any]]:
    listing = ["-m", "gemma_scope_tl.cli", "list", "--release", ROW[0]]
    listed = paired(lambda: _python(*listing), lambda: _python("-c", LIST), runs=runs, warmup=0)
    pairs = [[float(_python("-c", code.format(row=ROW))) for code in (LOOK_UP, PEER_LOOK_UP)] for _ in range(peer_runs)]
    look_up = compared([ours for ours, _ in pairs], [theirs for _, theirs in pairs], "s")
    peer = "SAELens catalogue"
    return [
        {"id": "list", "what": "`gemma-scope list --release`, as a process", "peer": peer, **listed},
        {"id": "look-up", "what": "look up one id, first call after the import", "peer": peer, **look_up},
    ]


def _memory(path: Path, dtype: str, small: Path, runs: int) -> dict[str, float]:
    """The largest growth of the process, after a small file of the same kind was loaded."""
    load_ours(path, dtype)  # checked before
    code = ["-c", MEMORY, str(path), dtype]
    measured = {who: [float(_python(*code, who, str(small))) for _ in range(runs)] for who in ("ours", "peer")}
    return spread("ours_extra_mib", measured["ours"]) | spread("peer_extra_mib", measured["peer"])


def _python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main("loading", run)

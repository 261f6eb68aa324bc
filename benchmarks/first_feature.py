"""From the start of a process to the features of a text: imports, model, SAE, one pass. By the clock, and CPU time.

Importing this package is quick because it imports nothing; the cost comes with the first use, and so it is measured
here, where a user waits for it. The peer is the shortest program with TransformerLens and SAELens that does the same:
the same model from the same folder, the same SAE in SAELens's own format, and a pass that stops behind the SAE's layer.
Both print the number and the sum of the features, which must agree. All files are in the page cache.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import gemma_scope_tl as gs
from benchmarks.timing import compared, main

TEXT = "In the beginning God created the heaven and the earth."
LAYER, RUNS, QUICK_RUNS = 2, 7, 1
PEER = "TransformerLens's bridge and SAELens"
TOLERANCE = 1e-4  # of the sum of the features, in float32

OURS = """
import json, sys
import gemma_scope_tl as gs
text, folder, layer, _ = sys.argv[1:]
model = gs.load_model(folder)
sae = gs.load_sae("bundled", "res", int(layer), width="1k")
found = gs.features(model, text, sae)
print(json.dumps([len(found), float(found["activation"].sum())]))
"""
THEIRS = """
import json, sys
import torch
from sae_lens import SAE
from transformer_lens.model_bridge import TransformerBridge
text, folder, layer, sae_folder = sys.argv[1:]
model = TransformerBridge.boot_transformers(folder, device="cpu")
sae = SAE.load_from_disk(sae_folder)
hook = f"blocks.{layer}.hook_resid_post"
with torch.no_grad():
    _, cache = model.run_with_cache(model.to_tokens(text), names_filter=hook, stop_at_layer=int(layer) + 1)
    found = sae.encode(cache[hook])[0, 1:]  # without BOS, as gs.features
print(json.dumps([int((found > 0).sum()), float(found.sum())]))
"""


class Process(NamedTuple):
    """What a finished process cost and found."""

    wall_s: float
    cpu_s: float
    found: list[float]


def timed(code: str, *arguments: str) -> Process:
    """Run Python ``code`` in a process of its own, which prints its result as JSON in its last line.

    Raises:
        CalledProcessError: the process failed.
    """
    command = [sys.executable, "-c", code, *arguments]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as out:
        process = subprocess.Popen(command, stdout=out, stderr=errors)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, errors):
            file.seek(0)
        printed = out.read().decode()
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, command, printed, errors.read().decode())
    return Process(wall, usage.ru_utime + usage.ru_stime, json.loads(printed.splitlines()[-1]))


def run(quick: bool = False) -> list[dict[str, Any]]:
    """A row by the clock and one of CPU time."""
    folder = Path(gs.__file__).parent / "bundled" / "model"
    with tempfile.TemporaryDirectory() as scratch:
        gs.save_sae(gs.load_sae("bundled", "res", LAYER, width="1k"), scratch, format="sae-lens")
        arguments = TEXT, str(folder), str(LAYER), scratch
        pairs = [
            (timed(OURS, *arguments), timed(THEIRS, *arguments)) for _ in range(1 + (QUICK_RUNS if quick else RUNS))
        ]
    for ours, theirs in pairs:
        same = ours.found[0] == theirs.found[0] and abs(ours.found[1] / theirs.found[1] - 1) <= TOLERANCE
        assert same, f"the features differ: {ours.found} and {theirs.found}"
    kept = pairs[1:]  # the first pair reads the files
    rows: list[dict[str, Any]] = []
    for name, label, field in (("wall-clock", "by the clock", "wall_s"), ("cpu", "CPU time", "cpu_s")):
        mine, its = ([float(getattr(pair[side], field)) for pair in kept] for side in (0, 1))
        what = f"from the start of a process to the features of a text, bundled model, {label}"
        rows.append({"id": name, "what": what, "peer": PEER, **compared(mine, its, "s")})
    return rows


if __name__ == "__main__":
    main("first_feature", run)

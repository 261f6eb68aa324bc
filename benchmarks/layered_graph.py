"""Attributing a prompt of 512 tokens with a cross-layer transcoder (CLT): memory and time, and what peers take.

Two CLTs of 10,080 latents a layer are in the files of :mod:`benchmarks.layered_coders`, with random models in float32:

- of all 26 layers of Gemma 3 1B's shape, where about 100,000 latents are active. ``attribution_graph`` has a budget of
  1 GiB. The peak of the process has the model, the encoders, and the pages of the mapped files that were read;
- of 6 layers of a model of the Gemma 2 kind, which circuit-tracer runs on TransformerLens (it runs Gemma 3 on another
  library only). Both make as many latents into targets, and the strongest logit's edges have equal sums. The batch of
  circuit-tracer is the fastest of those tried: it gathers a gradient for every active latent and target of a batch.

The peers of the first CLT. circuit-tracer's reader of these files stacks all planes of all layers before it drops half
of them, so it needs more memory at once than the machine has; it is measured on the CLT of 6 layers, and what it
allocates for 26 layers follows from the shapes. SAELens's loader makes a transcoder of each layer's file, whose decoder
is summed over outputs: its latents are right, but nothing can be attributed with it. And the decoder vectors of all
active latents at once, which is what circuit-tracer gathers first, in plain PyTorch. The time is compared with as many
backward passes of the model alone as there are targets.

Rows of circuit-tracer are left out where its environment (``python -m scripts.tracer_parity`` makes it) is missing.
Each measurement is a process of its own, and the peak is that of the whole process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

import gemma_scope_tl as gs
from benchmarks.gemma3_1b import tokens_of
from benchmarks.layered_coders import (
    CLT_FOLDER,
    CUT,
    CUT_FOLDER,
    FOLDER,
    QUICK,
    QUICK_CUT,
    QUICK_CUT_FOLDER,
    QUICK_FOLDER,
    TRUE,
    CLTSizes,
    layer_files,
    loaded_coder,
    mapped_coder,
    prepare,
    prepared,
)
from benchmarks.machine import peak
from benchmarks.saelens_loader import load_clt_layer_with_sae_lens
from benchmarks.timing import child_flags, main
from gemma_scope_tl.model.read import visit_places
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.sae.sparse import encode_sparse
from gemma_scope_tl.sites import Place
from gemma_scope_tl.weights.stamp import CACHE_VARIABLE
from scripts.tracer_parity.environment import PYTHON, is_installed

BUDGET = 1 << 30
PEAK = f"budget {BUDGET >> 30} GiB, peak of the process"
TARGETS, CUT_TARGETS = 64, 32
TRACER_BATCH = 4
TRACER, STOCK = "circuit-tracer", "SAELens, latents only"
GATHERED = "plain PyTorch: the decoder vectors of all active latents"
BACKWARD = "as many backward passes of the model alone"
Found = dict[str, Any]


def _places(quick: bool, cut: bool) -> tuple[Path, CLTSizes]:
    if cut:
        return (QUICK_CUT_FOLDER, QUICK_CUT) if quick else (CUT_FOLDER, CUT)
    return (QUICK_FOLDER, QUICK) if quick else (FOLDER, TRUE)


def _attribute(model: Any, coder: LayeredCoder, sizes: CLTSizes, targets: int) -> Found:
    ids = tokens_of(sizes.model, 1, sizes.model.tokens)
    import_module("pandas")
    import_module("scipy.sparse")
    started = time.perf_counter()
    graph = gs.attribution_graph(model, ids, [coder], max_latent_nodes=targets, budget=BUDGET)
    seconds = time.perf_counter() - started
    logits = (graph.nodes["kind"] == "logit").to_numpy()
    inputs = abs(graph.weights[logits]).sum(axis=1)
    return {
        "s": seconds,
        "active": graph.settings["active_latents"],
        "targets": targets + int(logits.sum()),
        "missing": float(graph.checks["missing_share"].max()),
        "strongest": float(max(inputs)),
    }


def ours(quick: bool) -> Found:
    """Load the CLT of all layers, whose files were checked before, and attribute the prompt."""
    folder, sizes = _places(quick, False)
    model = gs.load_model(folder / "model", check=False)
    started = time.perf_counter()
    coder = loaded_coder(folder)
    loading = time.perf_counter() - started
    return {"loading_s": loading, **_attribute(model, coder, sizes, TARGETS)}


def ours_cut(quick: bool) -> Found:
    """The same for the CLT that circuit-tracer attributes, too."""
    folder, sizes = _places(quick, True)
    model = gs.load_model(folder / "model", check=False)
    return _attribute(model, mapped_coder(folder, sizes), sizes, CUT_TARGETS)


def loading(quick: bool) -> Found:
    """Load the CLT of all layers, whose files were checked before, and encode a token at each."""
    folder, sizes = _places(quick, False)
    x = torch.randn(1, sizes.model.width)
    started = time.perf_counter()
    coder = loaded_coder(folder)
    for k in range(sizes.model.layers):
        coder.encode_at(k, x)
    return {"s": time.perf_counter() - started}


def stock(quick: bool) -> Found:
    """The same with SAELens, a transcoder for each layer."""
    folder, sizes = _places(quick, False)
    x = torch.randn(1, sizes.model.width)
    paths = [f"{CLT_FOLDER}/{file.stem}" for file in layer_files(folder, sizes.model.layers)]
    started = time.perf_counter()
    kept = [load_clt_layer_with_sae_lens(folder, path) for path in paths]
    for coder in kept:
        coder.encode(x)
    return {"s": time.perf_counter() - started}


@torch.no_grad()
def gathered(quick: bool) -> Found:
    """Gather what all active latents write, as large tensors for each layer, in plain PyTorch on mapped files."""
    folder, sizes = _places(quick, False)
    model = gs.load_model(folder / "model", check=False)
    coder = mapped_coder(folder, sizes)
    ids = tokens_of(sizes.model, 1, sizes.model.tokens)
    vectors: list[torch.Tensor] = []

    def visit(place: Place, values: torch.Tensor) -> None:
        assert place.layer is not None
        k = place.layer
        acts = encode_sparse(values[0, 1:], coder.W_enc[k], coder.b_enc[k], coder.threshold[k])
        vectors.append(coder.W_dec[k][acts.latents].mul_(acts.values[:, None, None]))

    visit_places(model, ids, [Place("transcoder", layer) for layer in range(sizes.model.layers)], visit)
    return {"s": 0.0, "vectors_mib": sum(part.nbytes for part in vectors) / 2**20}


def backward(quick: bool) -> Found:
    """Seconds of one backward pass of the model from its logits to its embedding, apart from the forward pass."""
    folder, sizes = _places(quick, False)
    model = gs.load_model(folder / "model", check=False).requires_grad_(False)
    ids = tokens_of(sizes.model, 1, sizes.model.tokens)
    embedded: list[torch.Tensor] = []

    def keep(value: torch.Tensor, hook: Any) -> torch.Tensor:
        embedded.append(value.detach().requires_grad_())
        return embedded[-1]

    times: list[float] = []
    for _ in range(3):
        logits = model.run_with_hooks(ids, fwd_hooks=[("embed.hook_out", keep)])
        started = time.perf_counter()
        torch.autograd.grad(logits[0, -1].max(), embedded[-1])
        times.append(time.perf_counter() - started)
    return {"s": min(times)}


STEPS: dict[str, Callable[[bool], Found]] = {
    one.__name__: one for one in (ours, ours_cut, loading, stock, gathered, backward)
}


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows against each peer."""
    for cut in (False, True):
        _child("prepare-cut" if cut else "prepare", quick)
    found = {name: _child(name, quick) for name in STEPS}
    tracer = _tracer(quick) if is_installed() else None
    sizes, mine = _places(quick, False)[1], found["ours"]
    clt, what = _words(sizes, mine)
    loaded, stocked = found["loading"], found["stock"]
    encode, resident = f"load {clt}, files checked before, and encode", f"load {clt}, peak of the process"
    rows = [
        _row("memory", f"{what}, {PEAK}", GATHERED, "MiB", mine["mib"], found["gathered"]["mib"], mine),
        _row("time", what, BACKWARD, "s", mine["s"], mine["targets"] * found["backward"]["s"], mine),
        _row("loading", encode, STOCK, "s", loaded["s"], stocked["s"]),
        _row("loading-memory", resident, STOCK, "MiB", loaded["mib"], stocked["mib"]),
    ]
    return rows + (_tracer_rows(quick, found, tracer) if tracer else [])


def _words(sizes: CLTSizes, mine: Found) -> tuple[str, str]:
    """A CLT in words, and what is done with it."""
    clt = f"a CLT of {sizes.model.layers} layers x {sizes.latents:,} latents"
    counted = f"{mine['active']:,} active latents, {mine['targets']} targets"
    return clt, f"attribute {sizes.model.tokens} tokens with {clt}, {counted}"


def _row(
    id_: str, what: str, peer: str, unit: str, mine: float, other: float, about: Found | None = None
) -> dict[str, Any]:
    facts = {name: about[name] for name in ("active", "targets", "missing")} if about else {}
    values = {"ours_value": mine, "peer_value": other, "ratio": other / mine, "unit": unit}
    return {"id": id_, "what": what, "peer": peer, **values, **facts}


def _tracer_rows(quick: bool, found: dict[str, Found], tracer: dict[str, Found]) -> list[dict[str, Any]]:
    sizes, whole = _places(quick, True)[1], _places(quick, False)[1]
    mine, other = found["ours_cut"], tracer["attribute"]
    assert mine["active"] == other["active"], (mine, other)
    difference = abs(mine["strongest"] - max(other["logits"])) / mine["strongest"]
    assert difference < 0.05, (mine, other)  # it has no nodes of biases, and an error node holds them
    clt, what = _words(sizes, mine)
    stacked = 4 * whole.model.layers**2 * whole.latents * whole.model.width / 2**20
    words = f"load {clt} (ours: and the model, and attribute), peak of the process"
    larger = f"attribute with {_words(whole, found['ours'])[0]}, {PEAK}"
    allocated = f"{TRACER}, what its loader allocates at once"
    return [
        _row("tracer-memory", f"{what}, {PEAK}", TRACER, "MiB", mine["mib"], other["mib"], mine),
        _row("tracer-time", what, TRACER, "s", mine["s"], other["s"], mine) | {"difference": difference},
        _row("tracer-loading", words, TRACER, "MiB", mine["mib"], tracer["load"]["mib"]),
        _row("tracer-stack", larger, allocated, "MiB", found["ours"]["mib"], stacked),
    ]


def _tracer(quick: bool) -> dict[str, Found]:
    """circuit-tracer in its own environment."""
    folder, sizes = _places(quick, True)
    ids = folder / "ids.json"
    ids.write_text(json.dumps(tokens_of(sizes.model, 1, sizes.model.tokens)[0].tolist()), encoding="utf-8")
    given = [str(folder), str(sizes.model.layers)]
    steps = {"load": given, "attribute": [*given, str(ids), str(TRACER_BATCH), str(CUT_TARGETS)]}
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    found: dict[str, Found] = {}
    for step, arguments in steps.items():
        command = [str(PYTHON), "-m", "benchmarks.layered_tracer", step, *arguments]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        found[step] = json.loads(done.stdout.splitlines()[-1])
    return found


def _child(step: str, quick: bool) -> Found:
    """Run a step in a process of its own. The record of checked files lies beside them."""
    folder = _places(quick, False)[0]
    environment = {**os.environ, CACHE_VARIABLE: str(folder.with_name(f"{folder.name}-checked"))}
    command = [sys.executable, "-m", "benchmarks.layered_graph", step, *child_flags(quick)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def _prepare(quick: bool, cut: bool) -> Found:
    """Write the files if they are missing, and let this package check them once."""
    folder, sizes = _places(quick, cut)
    prepare(folder, sizes)
    if not cut:
        loaded_coder(folder)
    return prepared(folder)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in (*STEPS, "prepare", "prepare-cut"):
        name, is_quick = sys.argv[1], "--quick" in sys.argv
        result = _prepare(is_quick, name == "prepare-cut") if name.startswith("prepare") else STEPS[name](is_quick)
        print(json.dumps({**result, "mib": peak() / 1024}))
    else:
        main("layered_graph", run)

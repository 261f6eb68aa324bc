"""Memory and time of the attribution graph of a long prompt with a cross-layer transcoder of Gemma 3 1B's true width.

    python -m benchmarks.graph_memory --tokens 512 --latents 64 --budget 0.5

The model has 1B's shape, with a small vocabulary and random weights in bfloat16. The coder has its 26 layers of 10,080
latents, random encoders, and a decoder in files without blocks on the disk (16 GiB of zeros), which are mapped as a
downloaded one is. Thresholds let about eight latents of each layer fire at a token. What is measured is the memory that
the graph adds to the process, without the pages of mapped files, which the system takes back when it needs them; beside
it stands the size of the decoder rows of all active latents together, which tools that gather them first have to hold.
It prints one JSON object, and writes nothing that stays.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import gemma_scope_tl as gs
from gemma_scope_tl.sae.layered import LayeredCoder
from tests.helpers import CharTokenizerFactory

WIDTH, D_MODEL, VOCABULARY, ACTIVE = 10_080, 1152, 4096, 8
GIB = 2**30


def random_model(layers: int) -> Any:
    """A hooked model of Gemma 3 1B's shape with random weights."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256}
    sizes: Any = {"vocab_size": VOCABULARY, "hidden_size": D_MODEL, "intermediate_size": 6912, **heads}
    config = Gemma3TextConfig(num_hidden_layers=layers, sliding_window=512, max_position_embeddings=2048, **sizes)
    model: Any = Gemma3ForCausalLM(config).to(torch.bfloat16).eval()
    model.set_attn_implementation("eager")
    return gs.load_model(hf_model=model, tokenizer=CharTokenizerFactory.get())


def sparse_clt(folder: Path, layers: int) -> LayeredCoder:
    """A cross-layer transcoder of true width whose decoder is mapped from files without blocks."""
    generator = torch.Generator().manual_seed(0)
    theta = NormalDist().inv_cdf(1 - ACTIVE / WIDTH)  # inputs are normalised, so pre-activations are standard normal
    encoders = [torch.randn(D_MODEL, WIDTH, generator=generator) * D_MODEL**-0.5 for _ in range(layers)]
    decoders: list[torch.Tensor] = []
    for k in range(layers):
        shape = (WIDTH, layers - k, D_MODEL)
        path = folder / f"W_dec_{k}"
        with path.open("wb") as file:
            file.truncate(4 * shape[0] * shape[1] * shape[2])
        decoders.append(torch.from_numpy(np.memmap(path, dtype=np.float32, mode="c", shape=shape)))
    zeros = [torch.zeros(WIDTH) for _ in range(layers)]
    thresholds = [torch.full((WIDTH,), theta) for _ in range(layers)]
    biases = [torch.zeros(D_MODEL) for _ in range(layers)]
    return LayeredCoder("clt", range(layers), encoders, zeros, thresholds, decoders, biases)


class Watch:
    """The largest memory of the process, without pages of files, while the block runs."""

    def __enter__(self) -> Watch:
        self.before = self.most = anonymous()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._done.wait(0.02):
            self.most = max(self.most, anonymous())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def anonymous() -> int:
    """Bytes of the process that are no pages of files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def measured(tokens: int, latents: int, budget: float, layers: int) -> dict[str, Any]:
    """Make one graph and say what it took."""
    with tempfile.TemporaryDirectory() as folder:
        model, clt = random_model(layers), sparse_clt(Path(folder), layers)
        ids = torch.randint(3, VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(0))
        ids[0] = 2
        started = time.perf_counter()
        with Watch() as watch:
            graph = gs.attribution_graph(model, ids, clt, max_latent_nodes=latents, budget=int(budget * GIB))
        seconds = time.perf_counter() - started
    active = graph.settings["active_latents"]
    return {
        "tokens": tokens,
        "active_latents": active,
        "targets": len(graph.checks),
        "budget_gib": budget,
        "added_gib": (watch.most - watch.before) / GIB,
        "all_decoder_rows_gib": active * (layers + 1) / 2 * D_MODEL * 4 / GIB,
        "seconds": seconds,
        "missing_share": float(graph.checks["missing_share"].max()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--latents", type=int, default=64)
    parser.add_argument("--budget", type=float, default=0.5, help="GiB")
    parser.add_argument("--layers", type=int, default=26)
    given = parser.parse_args()
    print(json.dumps(measured(given.tokens, given.latents, given.budget, given.layers), indent=1))

"""Gemma 3 1B at its true shape in bfloat16, with four coders of 65k latents: what loading, a pass and so on cost.

The model and the coders are random, as no weights can be shipped; sizes, layout and dtype are those of
``google/gemma-3-1b-pt`` and of Gemma Scope 2's SAEs at the residual stream and skip transcoders in two layers. About
as many latents fire as the files' names say. They are made once, in ``build/gemma3_1b`` (5 GB), which is not timed.

Each side runs in a process of its own, for the memory: the peak of a step is counted from what was resident before it.

- *Loading*: a folder of the model to the end of a first short pass, as weights that are mapped are read only then; and
  the four files, which were not checked before. The peer is stock SAELens, with its bridge.
- *A pass* of 256 tokens through all coders: against the same pass without coders, which is the floor, in turn in one
  process; and against SAELens's bridge, in another, which splices transcoders wrongly (``benchmarks/gemma3.py``), with
  the same number of products.
- *Generation* of 32 tokens with a cache: against the model without coders. Stock SAELens is no peer: with the installed
  transformers its bridge attends to the newest token only when it uses a cache.
- *Evaluating* on 2 x 256 tokens: against as many passes of the model alone as an evaluation without shared work needs,
  three for each coder (clean, spliced, ablated). SAELens's ``run_evals`` cannot evaluate transcoders.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

import gemma_scope_tl as gs
from benchmarks.coder_files import Coder, random_arrays
from benchmarks.machine import peak
from benchmarks.saelens_loader import load_released_with_sae_lens
from benchmarks.timing import child_flags, main, ratios, spread
from gemma_scope_tl.model.read import read_places
from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from gemma_scope_tl.sites import Place
from gemma_scope_tl.weights.stamp import CACHE_VARIABLE

FOLDER = Path(__file__).parents[1] / "build" / "gemma3_1b"
SIZES_NAME, RUNS = "sizes.json", 2
KINDS = (("res", False), ("transcoder", True))
CODERS = [Coder(site, layer, "65k", affine) for layer in (7, 22) for site, affine in KINDS]
STOCK, ALONE = "SAELens's bridge", "the model without coders"
Measured = dict[str, list[dict[str, float]]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of the model, its coders and the text; those of Gemma 3 1B."""

    width: int = 1152
    inner: int = 6912
    heads: int = 4
    head: int = 256
    vocabulary: int = 262_144
    layers: int = 26
    window: int = 512
    latents: int = 65_536
    l0: int = 54
    tokens: int = 256
    rows: int = 2
    prompt: int = 16
    new_tokens: int = 32


QUICK = Sizes(64, 128, 2, 32, 2048, 26, 8, 256, 8, 24, 2, 6, 3)


def write_model(folder: Path, sizes: Sizes) -> None:
    """A folder of a random model. It is written from a model without memory, so that it is in memory once."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=1,
        head_dim=sizes.head,
        query_pre_attn_scalar=sizes.head,
        sliding_window=sizes.window,
        max_position_embeddings=32_768,
    )
    config.architectures, config.dtype = ["Gemma3ForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        model = Gemma3ForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.zeros(parameter.shape, dtype=torch.bfloat16)  # the weight of a norm is its gain less 1
        if "norm" in name
        else torch.randn(parameter.shape, generator=generator, dtype=torch.bfloat16).mul_(sizes.width**-0.5)
        for name, parameter in model.named_parameters()
        if name != "lm_head.weight"  # tied to the embedding
    }
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for file in BUNDLED_MODEL.glob("*token*"):  # for the special tokens; all ids are given
        shutil.copy(file, folder / file.name)


def tokens_of(sizes: Sizes, rows: int, length: int) -> torch.Tensor:
    """Rows of BOS and random ids."""
    ids = torch.randint(3, sizes.vocabulary, (rows, length), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 2
    return ids


@torch.no_grad()
def prepare(folder: Path, sizes: Sizes) -> None:
    """Write the model and the coders, unless they are there. Thresholds let about ``l0`` latents fire on a token."""
    done = folder / SIZES_NAME
    if done.exists() and json.loads(done.read_text(encoding="utf-8")) == asdict(sizes):
        return
    shutil.rmtree(folder, ignore_errors=True)
    write_model(folder / "model", sizes)
    model = gs.load_model(folder / "model", dtype="bfloat16", check=False)
    places = {coder: Place(coder.site, coder.layer) for coder in CODERS}
    values = read_places(model, tokens_of(sizes, 1, sizes.tokens), places.values())
    for number, coder in enumerate(CODERS):
        arrays = random_arrays(sizes.width, sizes.latents, affine=coder.affine, seed=number)
        x = values[places[coder]][0, 1:].float()
        pre = x @ arrays["w_enc"] + arrays["b_enc"]
        arrays["threshold"][:] = pre.topk(sizes.l0 + 1, dim=1).values[:, -1].mean()
        coder.write(folder / "coders", arrays)
    CODERS[-1].write(folder / "small", random_arrays(64, 256, affine=CODERS[-1].affine))
    done.write_text(json.dumps(asdict(sizes)), encoding="utf-8")


def _return_freed_memory() -> None:
    """Give what the C library keeps of freed memory back to the system, where the library is glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        gc.collect()
        trim(0)


class Meter:
    """Seconds and peak memory (MiB above what was resident before) of named steps, each possibly several times."""

    def __init__(self) -> None:
        self.found: Measured = {}

    def __call__(self, name: str, step: Callable[[], Any]) -> Any:
        """Measure one run of a step, and return its result."""
        _return_freed_memory()  # which would be taken again, so that a step would seem to need none
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak starts from what is resident now
        before, started = peak(), time.perf_counter()
        result = step()
        seconds = time.perf_counter() - started
        self.found.setdefault(name, []).append({"s": seconds, "mib": (peak() - before) / 1024})
        return result


def _tried(model: Any, sizes: Sizes) -> Any:
    """The model after a pass of as many tokens as a prompt has."""
    model(tokens_of(sizes, 1, sizes.prompt))
    return model


@torch.no_grad()
def ours(folder: Path, sizes: Sizes) -> Measured:
    """All steps of this package, and those without coders; imports and first calls come before, on small files."""
    meter = Meter()
    gs.load_model("bundled", dtype="bfloat16")
    gs.JumpReLUSAE.from_folder(folder / "small" / CODERS[-1].path, dtype="bfloat16")
    model = meter("load_model", lambda: _tried(gs.load_model(folder / "model", dtype="bfloat16"), sizes))
    paths = [folder / "coders" / coder.path for coder in CODERS]
    load = gs.JumpReLUSAE.from_folder
    saes = meter("load_coders", lambda: [load(path, dtype="bfloat16") for path in paths])
    ids, rows = tokens_of(sizes, 1, sizes.tokens), tokens_of(sizes, sizes.rows, sizes.tokens)
    prompt = ids[:, : sizes.prompt]
    how: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}

    def generate() -> torch.Tensor:
        return model.generate(prompt, max_new_tokens=sizes.new_tokens, use_past_kv_cache=True, **how)

    def generate_spliced() -> torch.Tensor:
        with model.saes(saes, exclude_special_tokens=False):
            return generate()

    model(ids)  # warms up the kernels
    for _ in range(RUNS):
        clean = meter("pass_alone", lambda: model(ids))
        spliced = meter("pass", lambda: model.run_with_saes(ids, saes=saes, exclude_special_tokens=False))
        assert spliced.isfinite().all() and not torch.equal(clean, spliced)
        meter("generate_alone", generate)
        assert meter("generate", generate_spliced).shape[1] == sizes.prompt + sizes.new_tokens
    options: dict[str, Any] = {"batch_size": sizes.rows, "ablations": ("zero",), "progress": False}
    table = meter("evaluate", lambda: gs.evaluate(model, saes, rows, **options))
    passes = 3 * len(saes)
    meter("passes_alone", lambda: [model(rows) is None for _ in range(passes)])  # the logits are not kept
    meter.found["l0"] = [{"value": float(value)} for value in table["l0"]]
    return meter.found


@torch.no_grad()
def stock(folder: Path, sizes: Sizes) -> Measured:
    """The steps that stock SAELens has, after imports and its directory of releases."""
    from sae_lens import SAETransformerBridge

    meter, name = Meter(), str(folder / "model")
    boot = SAETransformerBridge.boot_transformers
    boot(str(BUNDLED_MODEL), device="cpu", dtype=torch.bfloat16)
    load_released_with_sae_lens(folder / "small", CODERS[-1].release, CODERS[-1].id, "bfloat16")
    model = meter("load_model", lambda: _tried(boot(name, device="cpu", dtype=torch.bfloat16).eval(), sizes))
    root = folder / "coders"
    saes = meter(
        "load_coders",
        lambda: [load_released_with_sae_lens(root, coder.release, coder.id, "bfloat16") for coder in CODERS],
    )
    ids = tokens_of(sizes, 1, sizes.tokens)
    model(ids)
    for _ in range(RUNS):
        meter("pass", lambda: model.run_with_saes(ids, saes=saes))
    return meter.found


def run(quick: bool = False) -> list[dict[str, Any]]:
    """A row for each step and peer."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tiny" if quick else FOLDER
        _child("prepare", folder, scratch, quick)
        sides = {who: _child(who, folder, scratch, quick) for who in ("ours", "stock")}
    mine, theirs = sides["ours"], sides["stock"]
    sizes = QUICK if quick else Sizes()
    shape = f"{len(CODERS)} coders of {sizes.latents:,} latents"
    spliced = f"through {shape}"
    measured_l0 = {"l0": [found["value"] for found in mine["l0"]]}
    steps = [
        (
            "load-model",
            "load Gemma 3 1B from a folder, with a first short pass",
            STOCK,
            "load_model",
            theirs["load_model"],
        ),
        ("load-coders", f"load {shape}, checks included", STOCK, "load_coders", theirs["load_coders"]),
        ("pass-stock", f"pass of {sizes.tokens} tokens {spliced}", STOCK, "pass", theirs["pass"]),
        ("pass-alone", f"pass of {sizes.tokens} tokens {spliced}", ALONE, "pass", mine["pass_alone"]),
        ("generate", f"generate {sizes.new_tokens} tokens {spliced}", ALONE, "generate", mine["generate_alone"]),
        (
            "evaluate",
            f"evaluate {shape} on {sizes.rows} x {sizes.tokens} tokens",
            f"{3 * len(CODERS)} passes of the model alone",
            "evaluate",
            mine["passes_alone"],
        ),
    ]
    return [
        {"id": id_, "what": f"{what}, 1B in bfloat16", "peer": peer, **_numbers(mine[step], other), **measured_l0}
        for id_, what, peer, step, other in steps
    ]


def _numbers(mine: list[dict[str, float]], other: list[dict[str, float]]) -> dict[str, float]:
    """Seconds, ratios and memory of a row."""
    seconds = ratios([one["s"] for one in mine], [one["s"] for one in other])
    memory = {f"{who}_extra_mib": [one["mib"] for one in side] for who, side in (("ours", mine), ("peer", other))}
    return seconds | {key: value for name, values in memory.items() for key, value in spread(name, values).items()}


def _child(step: str, folder: Path, scratch: str, quick: bool) -> Measured:
    """Run a step in a process of its own, which has not checked any file yet."""
    command = [sys.executable, "-m", "benchmarks.gemma3_1b", step, str(folder), *child_flags(quick)]
    environment = {**os.environ, CACHE_VARIABLE: f"{scratch}/{step}"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in ("prepare", "ours", "stock"):
        given = {"prepare": prepare, "ours": ours, "stock": stock}[sys.argv[1]]
        print(json.dumps(given(Path(sys.argv[2]), QUICK if "--quick" in sys.argv else Sizes())))
    else:
        main("gemma3_1b", run)

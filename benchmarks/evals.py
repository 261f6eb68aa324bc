"""Evaluating a whole suite in one pass, against SAELens's ``run_evals`` called once for each SAE on the same tokens.

The model and its SAEs (res, mlp, att; four layers; two widths, three sparsities) are the bundled ones; the text is
held out and packed without EOS inside. These metrics are compared, or must differ:

- L0, FVU (1 - SAELens's explained variance) and the losses with and without SAE are equal up to rounding. With EOS
  inside rows, ``run_evals`` also counts predictions *of* EOS, which the paper masks; therefore the text has no EOS.
- The ablated loss is reported, but not compared: ``run_evals`` sets the whole site to zero, including BOS, which a
  splice does not change, so its "CE score" compares a splice with an ablation of other positions.
- KL is not compared: the mean of ``run_evals`` includes the last position of each row, which has no next token.
- This package also measures mean ablation, dead and dense latents, intervals, and metrics by position.

For the memory row each side runs in a separate process, and the peak is counted from the memory before the evaluation.
``run_evals`` holds three tensors of logits and their softmaxes, 8.4 GB each for 8 x 1024 tokens of Gemma's vocabulary;
on a machine with less than 100 GB it gets one row instead of eight, which makes the ratio a lower bound.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens import HookedSAETransformer, JumpReLUSAE, JumpReLUSAEConfig
from transformers import Gemma2Config, Gemma2ForCausalLM

import gemma_scope_tl as gs
from benchmarks.generation import random_model, share
from benchmarks.machine import memory_bytes, peak
from benchmarks.splice import random_weights
from benchmarks.timing import child_flags, compared, in_turn, main, paired, ratios
from gemma_scope_tl.evals.suite import measure_suite
from gemma_scope_tl.interop.run_evals import sae_lens_metrics
from gemma_scope_tl.model.read import read_places
from gemma_scope_tl.registry.locate import HELD_OUT_TEXT
from gemma_scope_tl.sites import Place
from gemma_scope_tl.text.rows import pack_texts

ROWS, CONTEXT, BATCH = 32, 256, 8
RUNS, MEMORY_RUNS = 3, 3
PEER = "SAELens run_evals, SAE by SAE"
NAMES: tuple[str, ...] = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
TOLERANCE, FLIP = 1e-4, 5e-4
"""How much metrics may differ, and how much more the loss of a splice may for each latent that is active on one side
only: at random weights one of tens of thousands of activations is within rounding of its threshold. It moves a loss."""
HOOKS = {"res": "blocks.{}.hook_resid_post", "mlp": "blocks.{}.hook_mlp_out", "att": "blocks.{}.attn.hook_z"}
VOCABULARY, LONG, QUICK_VOCABULARY = 256_000, 1024, 1_000


def held_out(model: Any, rows: int = ROWS) -> torch.Tensor:
    """Rows of BOS and held-out text without EOS."""
    texts = [json.loads(line)["text"] for line in HELD_OUT_TEXT.read_text(encoding="utf-8").splitlines()]
    return pack_texts(model.tokenizer, ["\n".join(texts)], CONTEXT)[:rows]


def stock_model(model: Any) -> Any:
    """SAELens's own hooked model with the weights of the given ``HookedTransformer``."""
    peer = HookedSAETransformer(model.cfg, tokenizer=model.tokenizer)
    peer.load_state_dict(model.state_dict(), strict=False)
    return peer.eval()


def stock_copy(sae: Any) -> Any:
    """SAELens's own class with the weights of one of this package's SAEs."""
    stock = JumpReLUSAE(JumpReLUSAEConfig(d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae, apply_b_dec_to_input=False))
    for name in NAMES:
        getattr(stock, name).data = getattr(sae, name).data
    stock.cfg.metadata.hook_name = HOOKS[sae.site].format(sae.layer)
    return stock.requires_grad_(False)


def evaluate_stock(peer: Any, sae: Any, tokens: torch.Tensor, batch: int) -> dict[str, float]:
    """``run_evals`` with the metrics that both sides have."""
    found = sae_lens_metrics(peer, sae, tokens, batch)
    names = {"sae_lens_loss_ablated": "loss_zero_ablated", "sae_lens_kl": "kl"}
    left_out = ("delta_loss", "sae_lens_ce_score")
    return {names.get(name, name): value for name, value in found.items() if name not in left_out}


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Time and numbers on the bundled suite and at Gemma 2 2B's width, and peak memory with its vocabulary."""
    return [*_suite(quick), _true_width(quick), _memory(quick)]


def _suite(quick: bool) -> list[dict[str, Any]]:
    runs, count, rows = (1, 2, BATCH) if quick else (RUNS, None, ROWS)
    model = gs.load_model("bundled")
    table = gs.list_saes(model="bundled", site=["res", "mlp", "att"])[:count]
    names = zip(table["release"], table["id"], strict=True)
    saes = [gs.JumpReLUSAE.from_pretrained(str(release), str(name)) for release, name in names]
    tokens = held_out(model, rows)
    peer = stock_model(gs.load_model("bundled", backend="hooked_transformer"))
    stock = [stock_copy(sae) for sae in saes]
    kept: dict[str, Any] = {}

    def ours(**options: Any) -> Any:
        return gs.evaluate(model, saes, tokens, batch_size=BATCH, progress=False, **options)

    def alike() -> None:
        kept["ours"] = ours(ablations=("zero",))

    def theirs() -> None:
        kept["theirs"] = [evaluate_stock(peer, sae, tokens, BATCH) for sae in stock]

    ours()  # warms up both: it runs every kernel of the model
    equal, its, everything = in_turn((alike, theirs, ours), runs=runs, warmup=0)
    worst = {name: _difference(kept["ours"][name], kept["theirs"], name) for name in kept["theirs"][0]}
    for name in ("l0", "fvu", "loss_clean", "loss_spliced"):
        assert worst[name] <= TOLERANCE, (name, worst[name])
    what = f"evaluate {len(saes)} SAEs on {rows} x {CONTEXT} tokens"
    explained = {
        "max_difference": worst,
        "why_not_compared": "loss_zero_ablated: BOS is ablated too there; kl: the last position counts there",
    }
    return [
        {"what": what, "peer": PEER, **ratios(equal, its), **explained},
        {"what": f"{what}, mean ablation too", "peer": PEER, **ratios(everything, its)},
    ]


@dataclass(frozen=True)
class Wide:
    """Sizes of the evaluation at true width: those of Gemma 2 2B with few layers."""

    width: int = 2304
    inner: int = 9216
    heads: int = 8
    head: int = 256
    vocabulary: int = VOCABULARY
    layers: int = 2
    latents: int = 16384
    l0: int = 70
    context: int = 256


QUICK_WIDE = Wide(64, 128, 2, 32, QUICK_VOCABULARY, 2, 512, 8, 64)


def gemma_2b(sizes: Wide, tokenizer: Any) -> tuple[Any, Any]:
    """A random Gemma 2 of 2B's width and vocabulary with few layers, on the bridge, and SAELens's model of it.

    The layers of each share one set of weights, so that both models fit a small machine.
    """
    settings: dict[str, Any] = {
        "vocab_size": sizes.vocabulary,
        "hidden_size": sizes.width,
        "intermediate_size": sizes.inner,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.heads,
        "num_key_value_heads": sizes.heads // 2,
        "head_dim": sizes.head,
        "max_position_embeddings": LONG,
        "attn_implementation": "eager",
    }
    hf_model = random_model(Gemma2Config(**settings))
    ht = gs.load_model(hf_model=hf_model, tokenizer=tokenizer, backend="hooked_transformer", check=False)
    share(ht.blocks)
    peer = HookedSAETransformer(ht.cfg, tokenizer=tokenizer)
    peer.load_state_dict(ht.state_dict(), strict=False, assign=True)
    return gs.load_model(hf_model=hf_model, tokenizer=tokenizer, check=False), peer.eval()


@torch.no_grad()
def wide_case(sizes: Wide, rows: int) -> tuple[Any, Any, Any, torch.Tensor]:
    """Both models of :func:`gemma_2b`, an SAE at the residual stream after the first layer, and tokens."""
    model, peer = gemma_2b(sizes, gs.load_model("bundled").tokenizer)
    tokens = torch.randint(3, sizes.vocabulary, (rows, sizes.context), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 2
    x = read_places(model, tokens[:1], [Place("res", 0)])[Place("res", 0)][0, 1:]
    weights = random_weights(sizes.latents, sizes.width)
    weights[2][:] = float((x @ weights[0]).topk(sizes.l0, dim=1).values[:, -1].mean())
    sae = gs.JumpReLUSAE.from_arrays(dict(zip(NAMES, weights, strict=True)), site="res", layer=0)
    return model, peer, sae, tokens


def _true_width(quick: bool) -> dict[str, Any]:
    sizes, rows, runs = (QUICK_WIDE, 2, 1) if quick else (Wide(), 2, 3)
    model, peer, sae, tokens = wide_case(sizes, rows)
    stock, kept = stock_copy(sae), dict[str, Any]()

    def ours() -> None:
        kept["ours"] = gs.evaluate(model, [sae], tokens, batch_size=rows, progress=False, ablations=("zero",))

    def theirs() -> None:
        kept["theirs"] = evaluate_stock(peer, stock, tokens, rows)

    times = paired(ours, theirs, runs=runs, warmup=1)
    worst = {name: _difference(kept["ours"][name], [kept["theirs"]], name) for name in kept["theirs"]}
    flips = abs(float(kept["ours"]["l0"].iloc[0]) - kept["theirs"]["l0"]) * float(kept["ours"]["tokens"].iloc[0])
    for name in ("l0", "fvu", "loss_clean", "loss_spliced"):
        assert worst[name] <= TOLERANCE + (FLIP * flips if name == "loss_spliced" else 0.0), (name, worst[name], flips)
    what = f"evaluate an SAE of {sizes.latents:,} latents, width {sizes.width}, {sizes.vocabulary:,} words"
    what += f", {sizes.layers} layers"
    return {
        "what": what,
        "peer": PEER,
        **times,
        "max_difference": worst,
        "tokens_per_s": rows * sizes.context / times["ours_s"],
    }


def _difference(ours: Any, theirs: list[dict[str, float]], name: str) -> float:
    """The largest difference, relative for L0 (whose values are in the tens) and absolute for other metrics."""
    pairs = [(float(a), b[name]) for a, b in zip(ours, theirs, strict=True)]
    return max(abs(a - b) / (abs(b) if name == "l0" else 1.0) for a, b in pairs)


def _memory(quick: bool) -> dict[str, Any]:
    peer_rows = 8 if memory_bytes() > 100 << 30 else 1
    runs = 1 if quick else MEMORY_RUNS
    pairs = [(_child("ours", 8, quick), _child("peer", peer_rows, quick)) for _ in range(runs)]
    return {
        "what": f"peak memory of evaluating an SAE, 8 x {LONG} tokens, {VOCABULARY:,} words",
        "peer": PEER + ("" if peer_rows == 8 else f", on {peer_rows} x {LONG} tokens"),
        **compared([ours for ours, _ in pairs], [theirs for _, theirs in pairs], "MiB"),
    }


def _child(side: str, rows: int, quick: bool) -> float:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.evals", "memory", side, str(rows), *child_flags(quick)],
        check=True,
        capture_output=True,
        text=True,
    )
    return float(done.stdout.splitlines()[-1])


def measure_memory(side: str, rows: int, vocabulary: int = VOCABULARY) -> float:
    """Peak memory of one evaluation in MiB, above the memory of the process before it; for the child processes."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": LONG,
        "attn_implementation": "eager",
    }
    tokenizer = gs.load_model("bundled").tokenizer  # for its special ids only
    backend = "bridge" if side == "ours" else "hooked_transformer"
    hf_model = Gemma2ForCausalLM(Gemma2Config(**settings)).eval()
    model = gs.load_model(hf_model=hf_model, tokenizer=tokenizer, backend=backend, check=False)
    sae = gs.JumpReLUSAE.from_arrays(dict(zip(NAMES, random_weights(1024, 64), strict=True)), site="res", layer=0)
    tokens = torch.randint(3, vocabulary, (rows, LONG), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 2
    peer = stock_model(model) if side == "peer" else None
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    if peer is None:
        measure_suite(model, sae, tokens, batch_size=rows, progress=False)
    else:
        evaluate_stock(peer, stock_copy(sae), tokens, rows)
    return (peak() - before) / 1024


if __name__ == "__main__":
    if "memory" in sys.argv:
        print(measure_memory(sys.argv[2], int(sys.argv[3]), QUICK_VOCABULARY if "--quick" in sys.argv else VOCABULARY))
    else:
        main("evals", run)

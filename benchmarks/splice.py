"""Splicing: one SAE of true size, attaching many, whole forward passes and generation, against SAELens."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from sae_lens import HookedSAETransformer
from transformers import Gemma2Config, Gemma2ForCausalLM

from benchmarks.sparse import QUICK_SIZES, SIZES, STOCK, case, stock_sae
from benchmarks.timing import compared, main, paired
from gemma_scope_tl.model.attached import AttachedSAE
from gemma_scope_tl.model.loading import load_model
from gemma_scope_tl.model.owners import Owner
from gemma_scope_tl.model.splice_options import SpliceOptions
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE
from gemma_scope_tl.sites import get_site

LAYERS, D_MODEL, HEADS, D_HEAD, WIDTH = 26, 256, 4, 64, 4096
SITES = {"res": D_MODEL, "mlp": D_MODEL, "att": HEADS * D_HEAD}
SPECIAL = [0, 1, 2]
PEER = "SAELens HookedSAETransformer"
NEW_TOKENS = 128
MEMORY_RUNS = 3
NAMES: tuple[str, ...] = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
MEMORY = """
import sys
from pathlib import Path
import torch
from benchmarks.splice import attached
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
wide, small = attached(int(sys.argv[1]), 256), attached(1024, 256)
x = torch.randn(512, 256)[None]
with torch.no_grad():
    small.replace(x, x, None)
    Path("/proc/self/clear_refs").write_text("5")
    before = peak()
    wide.replace(x, x, None)
print((peak() - before) / 1024)
"""


def attached(d_sae: int, d_in: int) -> AttachedSAE:
    """A random SAE as a splice holds it, with the error term."""
    weights = dict(zip(NAMES, random_weights(d_sae, d_in), strict=True))
    sae = JumpReLUSAE.from_arrays(weights, site="res", layer=0)
    return _attached(sae, error_term=True)


def _attached(sae: Any, error_term: bool) -> AttachedSAE:
    options = SpliceOptions(error_term=error_term, exclude_special_tokens=False)
    return AttachedSAE(sae, get_site("res"), 0, options, excluded=(), stage=0, owner=Owner(thread=True))


def random_weights(d_sae: int, d_in: int, seed: int = 0) -> list[torch.Tensor]:
    """``W_enc, b_enc, threshold, W_dec, b_dec`` of which few latents fire."""
    w_dec = torch.nn.functional.normalize(
        torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed)), dim=1
    )
    return [w_dec.T.contiguous(), torch.zeros(d_sae), torch.full((d_sae,), 2.0), w_dec, torch.zeros(d_in)]


@torch.no_grad()
def run(quick: bool = False) -> list[dict[str, Any]]:
    """One SAE, its memory, and passes through models with one and with many."""
    return [*_true_size(quick), _memory(quick), *_models(quick)]


def _true_size(quick: bool) -> list[dict[str, Any]]:
    sizes, runs = (QUICK_SIZES, 1) if quick else (SIZES, 9)
    x, weights = case(sizes=sizes)
    x = x[None]
    sae = JumpReLUSAE.from_arrays(dict(zip(NAMES, weights, strict=True)), site="res", layer=0)
    stock = stock_sae(weights)
    rows: list[dict[str, Any]] = []
    for error_term in (False, True):
        splice = _attached(sae, error_term)
        stock.use_error_term = error_term
        what = "splice one SAE" + (" with error term" if error_term else "")
        shape = f" ({sizes[0]} tokens, {sizes[1]} x {sizes[2]})"
        ours = lambda splice=splice: splice.replace(x, x, None)  # noqa: E731
        difference = (ours() - stock(x)).abs().max().item()
        product = paired(ours, lambda: x @ weights[0], runs=runs)
        rows.append({"what": what + shape, "peer": "only x @ W_enc", **product})
        rows.append(
            {"what": what, "peer": STOCK, "max_difference": difference, **paired(ours, lambda: stock(x), runs=runs)}
        )
    return rows


def _memory(quick: bool) -> dict[str, Any]:
    latents, count = (4096, 1) if quick else (131072, MEMORY_RUNS)
    command = [sys.executable, "-c", MEMORY, str(latents)]
    runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(count)]
    whole = 512 * latents * 4 / 2**20
    found = [float(done.stdout) for done in runs]
    return {
        "what": "extra memory of a splice with error term, 512 tokens, 131k latents",
        "peer": "one tensor of all pre-activations",
        **compared(found, [whole] * len(found), "MiB"),
    }


def _models(quick: bool) -> list[dict[str, Any]]:
    layers, runs = (4, 1) if quick else (LAYERS, 5)
    ours = load_model(hf_model=_model(layers))
    ht = load_model(hf_model=_model(layers), backend="hooked_transformer")
    peer = HookedSAETransformer(ht.cfg)
    peer.load_state_dict(ht.state_dict(), strict=False)
    tokens = torch.randint(3, 1024, (2, 64), generator=torch.Generator().manual_seed(1))
    everything = [_sae(site, layer) for layer in range(layers) for site in SITES]
    rows = [_attaching(ours, peer, everything, runs)]
    for saes, label in (([everything[0]], "1 SAE"), (everything, f"{len(everything)} SAEs")):
        for error_term in (False, True):
            options: dict[str, Any] = {"saes": saes, "use_error_term": error_term, "exclude_special_tokens": SPECIAL}
            mine = lambda options=options: ours.run_with_saes(tokens, **options)  # noqa: E731
            other = lambda options=options: peer.run_with_saes(tokens, **options)  # noqa: E731
            difference = (mine() - other()).abs().max().item()
            what = f"forward pass through {label}" + (" with error term" if error_term else "")
            rows.append({"what": what, "peer": PEER, "max_difference": difference, **paired(mine, other, runs=runs)})
    chosen = [sae for sae in everything if sae.site == "res"][::2][:12]  # the peer cannot exclude tokens at hook_z here
    return rows + _generation(ours, peer, chosen, tokens[:1, :16], 4 if quick else NEW_TOKENS, runs)


def _attaching(ours: Any, peer: Any, saes: list[Any], runs: int) -> dict[str, Any]:
    def enter(model: Any) -> Callable[[], None]:
        def both_ways() -> None:
            with model.saes(saes, exclude_special_tokens=SPECIAL):
                pass

        return both_ways

    what = f"attach and detach {len(saes)} SAEs, {len(saes) // len(SITES)} layers"
    return {"what": what, "peer": PEER, **paired(enter(ours), enter(peer), runs=runs)}


def _generation(
    ours: Any, peer: Any, saes: list[Any], prompt: torch.Tensor, new: int, runs: int
) -> list[dict[str, Any]]:
    def generate(model: Any, cached: bool) -> Callable[[], torch.Tensor]:
        options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}

        def run_once() -> torch.Tensor:
            with model.saes(saes, exclude_special_tokens=SPECIAL):
                return model.generate(prompt, max_new_tokens=new, use_past_kv_cache=cached, **options)

        return run_once

    mine, uncached, theirs = generate(ours, True), generate(ours, False), generate(peer, True)
    assert torch.equal(mine(), uncached())
    rows: list[dict[str, Any]] = [
        {
            "what": f"generate {new} tokens through {len(saes)} SAEs, cached",
            "peer": name,
            **paired(mine, other, runs=runs),
        }
        for name, other in (("ours, uncached", uncached), (PEER, theirs))
    ]
    return [{**row, "tokens_per_s": new / row["ours_s"]} for row in rows]


def _model(layers: int) -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "vocab_size": 1024,
        "hidden_size": D_MODEL,
        "intermediate_size": 512,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "head_dim": D_HEAD,
        "max_position_embeddings": 512,
        "attn_implementation": "eager",
    }
    return Gemma2ForCausalLM(Gemma2Config(**settings)).eval()


def _sae(site: str, layer: int) -> Any:
    weights = dict(zip(NAMES, random_weights(WIDTH, SITES[site], layer), strict=True))
    return JumpReLUSAE.from_arrays(weights, site=site, layer=layer)


if __name__ == "__main__":
    main("splice", run)

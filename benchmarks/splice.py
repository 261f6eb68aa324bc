"""Splicing: one SAE of true size, attaching many, whole forward passes and generation, against SAELens."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
from sae_lens import HookedSAETransformer
from transformers import Gemma2Config, Gemma2ForCausalLM

from benchmarks.sparse import D_IN, D_SAE, STOCK, TOKENS, case, stock_sae
from benchmarks.timing import paired, save
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
NAMES = ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
MEMORY = """
from pathlib import Path
import torch
from benchmarks.splice import attached
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
wide, small = attached(131072, 256), attached(1024, 256)
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
def run() -> list[dict[str, Any]]:
    """A row per number of the README."""
    return [*_true_size(), _memory(), *_models()]


def _true_size() -> list[dict[str, Any]]:
    x, weights = case()
    x = x[None]
    sae = JumpReLUSAE.from_arrays(dict(zip(NAMES, weights, strict=True)), site="res", layer=0)
    stock = stock_sae(weights)
    rows: list[dict[str, Any]] = []
    for error_term in (False, True):
        splice = _attached(sae, error_term)
        stock.use_error_term = error_term
        what = "splice one SAE" + (" with error term" if error_term else "")
        shape = f" ({TOKENS} tokens, {D_IN} x {D_SAE})"
        ours = lambda splice=splice: splice.replace(x, x, None)  # noqa: E731
        difference = (ours() - stock(x)).abs().max().item()
        product = paired(ours, lambda: x @ weights[0], runs=9)
        rows.append({"what": what + shape, "peer": "only x @ W_enc", **product})
        rows.append(
            {"what": what, "peer": STOCK, "max_difference": difference, **paired(ours, lambda: stock(x), runs=9)}
        )
    return rows


def _memory() -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True)
    ours, whole = float(done.stdout), 512 * 131072 * 4 / 2**20
    return {
        "what": "extra memory of a splice with error term, 512 tokens, 131k latents",
        "peer": "one tensor of all pre-activations",
        "ours": f"{ours:.0f} MiB",
        "theirs": f"{whole:.0f} MiB",
        "ratio": whole / ours,
    }


def _models() -> list[dict[str, Any]]:
    ours = load_model(hf_model=_model())
    ht = load_model(hf_model=_model(), backend="hooked_transformer")
    peer = HookedSAETransformer(ht.cfg)
    peer.load_state_dict(ht.state_dict(), strict=False)
    tokens = torch.randint(3, 1024, (2, 64), generator=torch.Generator().manual_seed(1))
    everything = [_sae(site, layer) for layer in range(LAYERS) for site in SITES]
    rows = [_attaching(ours, peer, everything)]
    for saes, label in (([everything[0]], "1 SAE"), (everything, "78 SAEs")):
        for error_term in (False, True):
            options: dict[str, Any] = {"saes": saes, "use_error_term": error_term, "exclude_special_tokens": SPECIAL}
            mine = lambda options=options: ours.run_with_saes(tokens, **options)  # noqa: E731
            other = lambda options=options: peer.run_with_saes(tokens, **options)  # noqa: E731
            difference = (mine() - other()).abs().max().item()
            what = f"forward pass through {label}" + (" with error term" if error_term else "")
            rows.append({"what": what, "peer": PEER, "max_difference": difference, **paired(mine, other, runs=5)})
    return rows + _generation(ours, peer, everything[:: len(everything) // 12][:12], tokens[:1, :16])


def _attaching(ours: Any, peer: Any, saes: list[Any]) -> dict[str, Any]:
    def enter(model: Any) -> Callable[[], None]:
        def both_ways() -> None:
            with model.saes(saes, exclude_special_tokens=SPECIAL):
                pass

        return both_ways

    return {"what": "attach and detach 78 SAEs, 26 layers", "peer": PEER, **paired(enter(ours), enter(peer), runs=7)}


def _generation(ours: Any, peer: Any, saes: list[Any], prompt: torch.Tensor) -> list[dict[str, Any]]:
    def generate(model: Any, cached: bool) -> Callable[[], torch.Tensor]:
        options: dict[str, Any] = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}

        def run_once() -> torch.Tensor:
            with model.saes(saes, exclude_special_tokens=SPECIAL):
                return model.generate(prompt, max_new_tokens=NEW_TOKENS, use_past_kv_cache=cached, **options)

        return run_once

    mine, uncached, theirs = generate(ours, True), generate(ours, False), generate(peer, True)
    assert torch.equal(mine(), uncached())
    rows = [
        {
            "what": "generate 128 tokens through 12 SAEs, cached",
            "peer": "ours, uncached",
            **paired(mine, uncached, runs=3),
        },
        {"what": "generate 128 tokens through 12 SAEs, cached", "peer": PEER, **paired(mine, theirs, runs=3)},
    ]
    return [{**row, "tokens_per_s": NEW_TOKENS / row["ours_s"]} for row in rows]


def _model() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=1024,
        hidden_size=D_MODEL,
        intermediate_size=512,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=D_HEAD,
        max_position_embeddings=512,
        attn_implementation="eager",
    )
    return Gemma2ForCausalLM(config).eval()


def _sae(site: str, layer: int) -> Any:
    weights = dict(zip(NAMES, random_weights(WIDTH, SITES[site], layer), strict=True))
    return JumpReLUSAE.from_arrays(weights, site=site, layer=layer)


if __name__ == "__main__":
    print(save("splice", run()))

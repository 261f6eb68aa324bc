"""Forward passes with SAEs attached, against SAELens's HookedSAETransformer with the same SAEs and weights."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens import HookedSAETransformer
from transformers import Gemma2Config, Gemma2ForCausalLM

from benchmarks.timing import paired, save
from gemma_scope_tl.adapters.loading import load_model
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE

LAYERS, D_MODEL, HEADS, D_HEAD, D_SAE = 26, 256, 4, 64, 4096
SITES = {"res": D_MODEL, "mlp": D_MODEL, "att": HEADS * D_HEAD}
SPECIAL = [0, 1, 2]


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
    generator = torch.Generator().manual_seed(layer)
    d_in = SITES[site]
    w_dec = torch.nn.functional.normalize(torch.randn(D_SAE, d_in, generator=generator), dim=1)
    arrays = {
        "W_enc": w_dec.T.contiguous(),
        "W_dec": w_dec,
        "b_enc": torch.zeros(D_SAE),
        "b_dec": torch.zeros(d_in),
        "threshold": torch.full((D_SAE,), 2.0),
    }
    return JumpReLUSAE.from_arrays(arrays, site=site, layer=layer)


@torch.no_grad()
def run() -> list[dict[str, Any]]:
    """One residual SAE, and all 78 of a 26-layer model, with and without the error term."""
    ours = load_model(hf_model=_model())
    ht = load_model(hf_model=_model(), backend="hooked_transformer")
    peer = HookedSAETransformer(ht.cfg)
    peer.load_state_dict(ht.state_dict(), strict=False)
    tokens = torch.randint(3, 1024, (2, 64), generator=torch.Generator().manual_seed(1))
    everything = [_sae(site, layer) for layer in range(LAYERS) for site in SITES]
    rows: list[dict[str, Any]] = []
    for saes, label in (([everything[0]], "1 SAE"), (everything, "78 SAEs")):
        for error_term in (False, True):
            mine = ours.run_with_saes(tokens, saes=saes, use_error_term=error_term, exclude_special_tokens=SPECIAL)
            other = peer.run_with_saes(tokens, saes=saes, use_error_term=error_term, exclude_special_tokens=SPECIAL)
            difference = (mine - other).abs().max().item()
            times = paired(
                lambda saes=saes, error_term=error_term: ours.run_with_saes(
                    tokens, saes=saes, use_error_term=error_term, exclude_special_tokens=SPECIAL
                ),
                lambda saes=saes, error_term=error_term: peer.run_with_saes(
                    tokens, saes=saes, use_error_term=error_term, exclude_special_tokens=SPECIAL
                ),
                runs=5,
            )
            what = f"forward pass through {label}" + (" with error term" if error_term else "")
            rows.append({"what": what, "peer": "SAELens HookedSAETransformer", "max_difference": difference, **times})
    return rows


if __name__ == "__main__":
    print(save("splice", run()))

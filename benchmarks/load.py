"""Loading a Gemma Scope file of true size (2B residual, 16k: 302 MB) against SAELens's own loader on the same file."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from sae_lens.loading import pretrained_sae_loaders

from benchmarks.timing import paired, save
from gemma_scope_tl.sae.jumprelu import JumpReLUSAE

D_IN, D_SAE = 2304, 16384


def _write(path: Path) -> None:
    rng = np.random.default_rng(0)
    w_dec = rng.standard_normal((D_SAE, D_IN), dtype=np.float32)
    w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    np.savez(
        path,
        W_enc=np.ascontiguousarray(w_dec.T),
        W_dec=w_dec,
        b_enc=np.zeros(D_SAE, np.float32),
        b_dec=np.zeros(D_IN, np.float32),
        threshold=np.ones(D_SAE, np.float32),
    )


def _stock(path: Path, dtype: str) -> Any:
    from sae_lens import JumpReLUSAE as StockSAE
    from sae_lens import JumpReLUSAEConfig

    with mock.patch.object(pretrained_sae_loaders, "hf_hub_download", return_value=str(path)):
        cfg, state, _ = pretrained_sae_loaders.gemma_2_sae_huggingface_loader(
            "google/gemma-scope-2b-pt-res", "layer_20/width_16k/average_l0_71", device="cpu"
        )
    cfg = {key: cfg[key] for key in ("d_in", "d_sae", "apply_b_dec_to_input")} | {"dtype": dtype}
    sae = StockSAE(JumpReLUSAEConfig(**cfg))
    sae.load_state_dict(state)
    return sae


def run() -> list[dict[str, Any]]:
    """A row per dtype. Ours includes the CRC of every byte and the check that all values are finite."""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.npz"
        _write(path)
        for dtype in ("float32", "bfloat16"):
            times = paired(
                lambda dtype=dtype: JumpReLUSAE.from_folder(path.parent, site="res", layer=20, dtype=dtype),
                lambda dtype=dtype: _stock(path, dtype),
                runs=5,
            )
            rows.append({"what": f"load 2B res 16k (302 MB) as {dtype}", "peer": "SAELens loader", **times})
    return rows


if __name__ == "__main__":
    print(save("load", run()))

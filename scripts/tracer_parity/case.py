"""Random models of the Gemma 2 kind with random transcoders, which circuit-tracer and this project both read.

Everything is drawn with NumPy's generator of a fixed seed, so that a committed result can be compared without the files
that it was computed from. The model has soft-caps, sliding windows shorter than the prompt, gains of all norms, grouped
heads, and heads that are together wider than the residual stream.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import Gemma2Config, Gemma2ForCausalLM

from gemma_scope_tl.registry.locate import BUNDLED_MODEL

Arrays = dict[str, np.ndarray]
TOKENIZER = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "pad_token": "<pad>",
}
"""The settings of the bundled tokenizer that the older transformers release of circuit-tracer's environment reads."""


@dataclass(frozen=True)
class Case:
    """A random model, its transcoders and a prompt.

    Attributes:
        name: names the folder of the case.
        kind: ``"transcoder"`` (Gemma Scope's files), ``"skip"`` or ``"clt"`` (Gemma Scope 2's files).
        latents: number of latents of each layer.
        thresholds: the range of thresholds; a pre-activation has unit variance.
        length: tokens of the prompt, BOS included.
        window: of the layers with sliding attention.
        layers, d_model, seed: of the model.
    """

    name: str
    kind: str
    latents: int
    thresholds: tuple[float, float]
    length: int
    window: int
    layers: int = 4
    d_model: int = 64
    seed: int = 0

    @property
    def skips(self) -> bool:
        """Whether the transcoders have skip connections."""
        return self.kind != "transcoder"

    @property
    def token_ids(self) -> list[int]:
        """The prompt: BOS and ordinary tokens of the bundled tokenizer, ``length`` of them."""
        drawn = np.random.default_rng(self.seed + 2).integers(300, 2000, self.length - 1)
        return [2, *drawn.tolist()]


CASES = {
    case.name: case
    for case in (
        Case("transcoder", "transcoder", 256, (1.0, 1.6), length=12, window=8),
        Case("skip", "skip", 256, (1.0, 1.6), length=12, window=8, seed=10),
        Case("clt", "clt", 128, (1.0, 1.6), length=10, window=6, seed=20),
        Case("small", "transcoder", 96, (0.9, 1.5), length=6, window=4, layers=3, seed=30),
        Case("small-skip", "skip", 48, (1.2, 1.8), length=6, window=4, layers=3, seed=40),
        Case("small-clt", "clt", 48, (1.2, 1.8), length=6, window=4, layers=3, seed=50),
    )
}
"""Cases by name. The graphs of the small ones are committed."""


def hf_model(case: Case) -> Any:
    """The random model of a case, ``Gemma2ForCausalLM`` in float32 with eager attention."""
    config = Gemma2Config(
        vocab_size=2048,
        hidden_size=case.d_model,
        intermediate_size=96,
        num_hidden_layers=case.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=128,
        sliding_window=case.window,
        attn_logit_softcapping=50.0,
        final_logit_softcapping=30.0,
        query_pre_attn_scalar=24,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    model: Any = Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    generator = np.random.default_rng(case.seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            drawn = generator.standard_normal(tuple(parameter.shape)) * (0.3 if "norm" in name else 0.15)
            # One library adds 1 to the norms' weights in float32, the other in the model's dtype: with weights of few
            # digits, both sums are exact.
            parameter.copy_(torch.from_numpy(np.round(drawn * 2**12) / 2**12))
    return model


def arrays(case: Case) -> list[Arrays]:
    """The arrays of each layer's transcoder, float32: ``W_enc [d, m]``, ``b_enc``, ``threshold [m]``, ``W_dec [m, d]``
    (``[m, layers, d]`` of a CLT, zeros before the own layer), ``b_dec [d]`` and, but for the plain kind, ``W_skip
    [d_in, d_out]``."""
    generator = np.random.default_rng(case.seed + 1)
    return [_layer(case, layer, generator) for layer in range(case.layers)]


def _layer(case: Case, layer: int, generator: np.random.Generator) -> Arrays:
    d, m = case.d_model, case.latents
    drawn: Arrays = {
        "W_enc": generator.standard_normal((d, m)) * d**-0.5,
        "b_enc": generator.standard_normal(m) * 0.1,
        "threshold": generator.uniform(*case.thresholds, m),
        "b_dec": generator.standard_normal(d) * 0.1,
    }
    decoder = generator.standard_normal((m, case.layers if case.kind == "clt" else 1, d)) * d**-0.5
    if case.kind == "clt":
        decoder[:, :layer] = 0.0
    drawn["W_dec"] = decoder if case.kind == "clt" else decoder[:, 0]
    if case.skips:
        drawn["W_skip"] = generator.standard_normal((d, d)) * 0.5 * d**-0.5
    return {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in drawn.items()}


def fingerprint(case: Case) -> str:
    """A sha256 over the weights of the model and the transcoders, to see that they are those of a committed result."""
    found = hashlib.sha256()
    named: Iterator[tuple[str, np.ndarray]] = (
        (name, parameter.detach().numpy()) for name, parameter in sorted(hf_model(case).named_parameters())
    )
    for name, array in [*named, *((name, one[name]) for one in arrays(case) for name in sorted(one))]:
        found.update(name.encode())
        found.update(np.round(array, 6).astype("<f4").tobytes())
    return found.hexdigest()


def write(case: Case, folder: Path) -> None:
    """Write a case for circuit-tracer: ``model/``, a file for each layer in the released formats, and ``case.json``."""
    hf_model(case).save_pretrained(folder / "model")
    shutil.copyfile(BUNDLED_MODEL / "tokenizer.json", folder / "model" / "tokenizer.json")
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(TOKENIZER), encoding="utf-8")
    for layer, drawn in enumerate(arrays(case)):
        if case.kind == "transcoder":
            np.savez(folder / f"layer_{layer}.npz", allow_pickle=False, **drawn)
        else:
            renamed = {"W_skip": "affine_skip_connection"}
            lower = {renamed.get(name, name.lower()): array for name, array in drawn.items()}
            save_file(lower, folder / f"layer_{layer}.safetensors")
    facts = {"kind": case.kind, "layers": case.layers, "token_ids": case.token_ids}
    (folder / "case.json").write_text(json.dumps(facts), encoding="utf-8")

"""A forward pass with a coder over several layers spliced in, against plain PyTorch hooks and against the products.

The model is random, of Gemma 3 1B's shape in float32, apart from a small vocabulary. The text has 512 tokens. In each
case three passes run in turn in one process:

- ours: ``model.run_with_saes`` with the coder;
- plain hooks, as users write them: dense latents, and for each output one product of a decoder plane for each earlier
  layer, on Hugging Face's own model. Only the planes that are not zero are multiplied, in place in the stacked decoder,
  which was faster than one ``einsum`` over all layers;
- the floor: the model alone, and ``x @ W_enc`` of every layer once. No exact method avoids either.

The CLT of all 26 layers does not fit in memory beside a dense peer, whose decoder takes 30 GiB there; it is mapped from
files (``benchmarks/layered_coders.py``) and compared with the floor only. The peer's CLT has the first layers of
a model of as many layers. Both sides of a case read the same arrays, so the memory of a row is what a pass takes in
addition. Latents close to their threshold fire on one side only, as the order of sums differs; the mean difference of
the logits is asserted to be rounding.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

import gemma_scope_tl as gs
from benchmarks.gemma3_1b import Meter, Sizes, tokens_of
from benchmarks.layered_coders import (
    FOLDER,
    QUICK,
    QUICK_FOLDER,
    SMALL_VOCABULARY,
    TRUE,
    calibrate,
    loaded_coder,
    prepare,
    random_coder,
    sizes_of,
    with_threshold,
)
from benchmarks.timing import child_flags, main, ratios, spread
from gemma_scope_tl.sae.layered import LayeredCoder, LayeredKind

PLAIN, FLOOR = "plain PyTorch hooks, dense latents", "the model alone, and x @ W_enc of all layers"
RUNS = 3
L0 = 80
"""Latents that fire on a token, in all layers together."""


@dataclass(frozen=True)
class Case:
    """A coder and the model that it is spliced into.

    Attributes:
        kind: of the coder.
        layers: those that it reads and writes.
        latents: of each layer.
        model: the model's sizes; ``tokens`` is the length of the text.
        l0: latents that fire on a token, in all layers together.
        mapped: whether the coder is that of :func:`~benchmarks.layered_coders.prepare`, mapped from its files.
    """

    kind: LayeredKind
    layers: tuple[int, ...]
    latents: int
    model: Sizes
    l0: int = L0
    mapped: bool = False

    @property
    def what(self) -> str:
        """The row's words."""
        name = "CLT" if self.kind == "clt" else "crosscoder"
        which = f"all {self.model.layers}" if len(self.layers) == self.model.layers else f"{len(self.layers)}"
        inside = f"in {self.model.layers} layers of width {self.model.width:,}"
        return f"pass of {self.model.tokens} tokens, {name} of {which} layers x {self.latents:,} latents, {inside}"


def _model(layers: int) -> Sizes:
    return replace(TRUE.model, layers=layers)


CASES = {
    "clt": Case("clt", tuple(range(8)), 10_080, _model(8)),
    "clt-26": Case("clt", tuple(range(26)), 10_080, _model(26), mapped=True),
    "crosscoder": Case("crosscoder", (7, 13, 17, 22), 16_384, _model(26)),
}
QUICK_CASES = {
    "clt": Case("clt", (0, 1, 2), 64, replace(QUICK.model, layers=3), 12),
    "clt-26": Case("clt", tuple(range(6)), QUICK.latents, QUICK.model, 12, mapped=True),
    "crosscoder": Case("crosscoder", (1, 3), 64, replace(QUICK.model, layers=5), 12),
}


class PlainHooks:
    """A layered coder in plain PyTorch hooks on Hugging Face's Gemma 3: dense latents, and a product for each plane.

    Args:
        model: ``Gemma3ForCausalLM``.
        coder: of which the encoders and biases are read.
        stacked: for each layer the decoder with all planes ``[latents, layers, d]``.
    """

    def __init__(self, model: Any, coder: LayeredCoder, stacked: Sequence[Tensor]) -> None:
        self.model, self.coder, self.stacked = model, coder, stacked
        self.acts: list[Tensor] = []

    def _encode(self, k: int, x: Tensor) -> None:
        if k == 0:
            self.acts.clear()
        pre = x @ self.coder.W_enc[k] + self.coder.b_enc[k]
        self.acts.append(pre * (pre > self.coder.threshold[k]))

    def _decode(self, k: int) -> Tensor:
        out = self.coder.b_dec[k]
        for j, acts in enumerate(self.acts):
            out = out + acts @ self.stacked[j][:, k]
        return out

    def __call__(self, ids: Tensor) -> Tensor:
        """Logits of ``ids`` with all outputs replaced."""
        with ExitStack() as stack:
            for k, layer in enumerate(self.coder.layers):
                for handle in self._hooks(k, self.model.model.layers[layer]):
                    stack.callback(handle.remove)
            return self.model(ids).logits

    def _hooks(self, k: int, block: Any) -> list[RemovableHandle]:
        if self.coder.kind == "clt":
            first = block.pre_feedforward_layernorm.register_forward_hook(lambda _m, _i, out: self._encode(k, out))
            second = block.post_feedforward_layernorm.register_forward_hook(lambda _m, _i, _out: self._decode(k))
            return [first, second]

        def whole(_module: nn.Module, _inputs: Any, out: Any) -> Any:
            self._encode(k, out[0] if isinstance(out, tuple) else out)
            new = self._decode(k)
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return [block.register_forward_hook(whole)]


def hf_model(sizes: Sizes) -> Any:
    """A random ``Gemma3ForCausalLM`` in float32."""
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=SMALL_VOCABULARY,
        hidden_size=sizes.width,
        intermediate_size=sizes.inner,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=1,
        head_dim=sizes.head,
        query_pre_attn_scalar=sizes.head,
        sliding_window=sizes.window,
        initializer_range=sizes.width**-0.5,
    )
    config.architectures = ["Gemma3ForCausalLM"]
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval()


@torch.no_grad()
def measure(case: Case, folder: Path, runs: int) -> dict[str, Any]:
    """Seconds and memory of the passes of a case, in turn, the L0 and the largest difference of logits."""
    ids = tokens_of(case.model, 1, case.model.tokens)
    plain: PlainHooks | None = None
    if case.mapped:
        model = gs.load_model(folder / "model", check=False)
        coder = with_threshold(loaded_coder(folder), case.l0)
    else:
        model = gs.load_model(hf_model=hf_model(case.model), check=False)
        sizes = sizes_of(ids, model, case.kind, case.layers)
        coder, stacked = random_coder(case.kind, case.layers, case.model.width, case.latents, case.l0, sizes)
        plain = PlainHooks(hf_model(case.model), coder, stacked)
    calibrate(model, coder, ids, case.l0)
    x = torch.randn(case.model.tokens, case.model.width)
    splice: dict[str, Any] = {"saes": [coder], "exclude_special_tokens": False}

    def floor() -> Tensor:
        logits = model(ids)
        for w_enc in coder.W_enc:
            torch.mm(x, w_enc)
        return logits

    passes: dict[str, Callable[[], Tensor]] = {"ours": lambda: model.run_with_saes(ids, **splice), "floor": floor}
    if plain is not None:
        passes["plain"] = lambda: plain(ids)
    meter, logits = Meter(), {name: one() for name, one in passes.items()}  # warms up
    for _ in range(runs):
        for name, one in passes.items():
            meter(name, one)
    keep = lambda name: name.endswith("hook_sae_acts_post")  # noqa: E731
    _, cache = model.run_with_cache_with_saes(ids, names_filter=keep, **splice)
    names = [model.get_sae_hook_name(coder, layer=layer) for layer in coder.layers]  # the cache has further names
    l0 = sum(int((cache[name] != 0).sum()) for name in names) / ids.numel()
    assert 0.5 * case.l0 < l0 < 2 * case.l0, l0
    return {"found": meter.found, "difference": _compared(logits), "l0": l0}


def _compared(logits: dict[str, Tensor]) -> float | None:
    """The largest difference between both sides' logits; that of half must be rounding, and the splice change them."""
    moved = (logits["ours"] - logits["floor"]).abs()
    assert logits["ours"].isfinite().all() and float(moved.median()) > 1e-2, moved.median()
    if "plain" not in logits:
        return None
    apart = (logits["ours"] - logits["plain"]).abs()
    assert float(apart.median()) < 1e-4, apart.median()
    return float(apart.max())


def run(quick: bool = False) -> list[dict[str, Any]]:
    """Rows of each case against each peer."""
    rows: list[dict[str, Any]] = []
    for name, case in (QUICK_CASES if quick else CASES).items():
        found = _child(name, quick)
        mine = found["found"]["ours"]
        for peer, words in (("plain", PLAIN), ("floor", FLOOR)):
            if peer not in found["found"]:
                continue
            rows.append(
                {
                    "id": f"{name}-{peer}",
                    "what": f"{case.what}, L0 {found['l0']:.0f}",
                    "peer": words,
                    **numbers(mine, found["found"][peer]),
                    "l0": found["l0"],
                    **({} if peer == "floor" else {"max_difference": found["difference"]}),
                }
            )
    return rows


def numbers(mine: list[dict[str, float]], other: list[dict[str, float]]) -> dict[str, float]:
    """Seconds, ratios and memory of a row from what a meter found of both sides."""
    seconds = ratios([one["s"] for one in mine], [one["s"] for one in other])
    memory = {f"{who}_extra_mib": [one["mib"] for one in side] for who, side in (("ours", mine), ("peer", other))}
    return seconds | {key: value for name, values in memory.items() for key, value in spread(name, values).items()}


def _child(name: str, quick: bool) -> dict[str, Any]:
    """Measure a case in a process of its own, for the memory."""
    command = [sys.executable, "-m", "benchmarks.layered_splice", "--case", name, *child_flags(quick)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _child_main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", choices=CASES)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(argv)
    cases, folder = (QUICK_CASES, QUICK_FOLDER) if options.quick else (CASES, FOLDER)
    case = cases[options.case]
    if case.mapped:
        prepare(folder, QUICK if options.quick else TRUE)
    print(json.dumps(measure(case, folder, 1 if options.quick else RUNS)))


if __name__ == "__main__":
    if "--case" in sys.argv:
        _child_main(sys.argv[1:])
    else:
        main("layered_splice", run)

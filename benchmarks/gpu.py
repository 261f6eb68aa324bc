"""Measurements on a GPU: the agreement with results on a processor, and the times of training and splicing.

``python -m benchmarks.gpu [OUT]`` on a machine with a GPU writes ``gpu.json``; ``--quick`` runs everything at toy sizes
on the processor, as a test. Peers are PyTorch's dense product, SAELens and Hugging Face's model in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import gemma_scope_tl as gs
from benchmarks import training_step
from benchmarks.machine import describe
from benchmarks.sparse import our_sae, stock_sae
from gemma_scope_tl.activations.harvest import Harvester
from gemma_scope_tl.sae import base
from gemma_scope_tl.sae.sparse import reconstruct
from gemma_scope_tl.sites import Place
from gemma_scope_tl.training.place import PlaceTrainer
from gemma_scope_tl.training.recipe import FAST, GEMMA_SCOPE_2, PAPER
from gemma_scope_tl.training.spec import SAESpec
from scripts.bundled.sae_suite import heldout_tokens

ROOT = Path(__file__).resolve().parents[1]


class Bench:
    """A device, and whether the sizes are toy sizes."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.device = "cpu" if quick else "cuda"

    def seconds(self, function: Callable[[], Any], runs: int = 9) -> float:
        """Median seconds of ``runs`` after two runs for warming up."""
        times: list[float] = []
        for number in range(runs + 2):
            self.wait()
            started = time.perf_counter()
            function()
            self.wait()
            if number > 1:
                times.append(time.perf_counter() - started)
        return statistics.median(times)

    def wait(self) -> None:
        """Wait until the device has finished its work."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def equal_steps(self) -> list[dict[str, Any]]:
        """Twenty steps in float64 on the device and on the processor; weights must differ only by rounding."""
        rows: list[dict[str, Any]] = []
        for name, recipe in (("paper", PAPER), ("fast", FAST), ("gemma_scope_2", GEMMA_SCOPE_2)):
            recipe = replace(recipe, batch_size=256, lr=1e-3, lr_warm_up_steps=4, l0_warm_up_steps=4)
            spec = SAESpec("a", Place("res", 0), 512, recipe, 0, target_l0=16.0)
            both = [
                PlaceTrainer(64, 64, [spec], total_steps=20, device=device, dtype=torch.float64)
                for device in ("cpu", self.device)
            ]
            generator = torch.Generator().manual_seed(1)
            for _ in range(20):
                x = torch.nn.functional.normalize(torch.randn(256, 64, generator=generator, dtype=torch.float64), dim=1)
                for trainer in both:
                    trainer.step(x.to(trainer.device))
            weights = [trainer.released(0, 1.0) for trainer in both]
            worst = max(float((weights[0][key] - weights[1][key]).abs().max()) for key in weights[0])
            rows.append({"what": f"20 steps, {name}, float64: greatest difference of a weight", "difference": worst})
        return rows

    def splice(self) -> list[dict[str, Any]]:
        """A call of an SAE against SAELens's and the bare product: float32 and bfloat16, narrow and wide.

        Each row also has the times of the kernels and of the dense products alone, between which the call chooses.
        """
        rows: list[dict[str, Any]] = []
        cases = [(tokens, 2304, 16_384) for tokens in (64, 512, 2_048, 8_192)] + [(8_192, 2304, 65_536)]
        for tokens, d_in, d_sae in [(64, 48, 256)] if self.quick else cases:
            for dtype in (torch.float32, torch.bfloat16):
                rows.append(self._splice_row(tokens, d_in, d_sae, dtype))
        return rows

    @torch.no_grad()
    def _splice_row(self, tokens: int, d_in: int, d_sae: int, dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(tokens, d_in, generator=generator).to(self.device, dtype)
        w_enc = (torch.randn(d_in, d_sae, generator=generator) / d_in**0.5).to(self.device, dtype)
        w_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=1)
        zeros = lambda n: torch.zeros(n, device=self.device, dtype=dtype)  # noqa: E731
        level = (
            float(torch.special.ndtri(torch.tensor(1.0 - 70 / d_sae, dtype=torch.float64))) if not self.quick else 1.0
        )
        threshold = torch.full((d_sae,), level, device=self.device)
        weights: list[Any] = [w_enc, zeros(d_sae), threshold, w_dec.to(self.device, dtype), zeros(d_in)]
        stock, sae = stock_sae(weights).to(self.device), our_sae(weights).to(self.device)
        found, acts = sae(x), reconstruct(x, *weights)[1]
        wide = [w.double() for w in weights]
        z = x[:64].double() @ wide[0]
        exact = (z * (z > wide[2])) @ wide[3]
        ours, peer = self.seconds(lambda: sae(x)), self.seconds(lambda: stock(x))
        sparse = self.seconds(lambda: reconstruct(x, *weights))
        with patch.multiple(base, **dict.fromkeys(("called_sparsely", "decoded_sparsely"), lambda *_: False)):
            dense = self.seconds(lambda: sae(x))
        product = self.seconds(lambda: x @ w_enc)
        scale = float(exact.abs().max())
        return {
            "what": f"sae(x), {tokens} tokens, {d_in} x {d_sae}, {str(dtype)[6:]}, L0 {acts.l0:.0f}",
            "peer": "SAELens JumpReLUSAE",
            "ours_s": ours,
            "peer_s": peer,
            "sparse_s": sparse,
            "dense_s": dense,
            "ratio": peer / ours,
            "encoder_products": ours / product,
            "error": float((found[:64].double() - exact).abs().max()) / scale,
            "peer_error": float((stock(x[:64]).double() - exact).abs().max()) / scale,
        }

    @torch.no_grad()
    def harvest(self) -> list[dict[str, Any]]:
        """All 78 sites of a model of Gemma 2 2B's shape with random weights, bfloat16, against its own forward pass."""
        sizes: dict[str, Any] = {"num_hidden_layers": 2 if self.quick else 26}
        if self.quick:
            sizes |= {
                "hidden_size": 64,
                "intermediate_size": 128,
                "vocab_size": 512,
                "num_attention_heads": 2,
                "num_key_value_heads": 1,
            }
        sizes |= {"head_dim": 256, "query_pre_attn_scalar": 256, "attn_implementation": "eager"}
        config = Gemma2Config(**sizes)
        torch.manual_seed(0)
        with torch.device(self.device):
            plain = Gemma2ForCausalLM(config).bfloat16().eval()
        tokens = torch.randint(5, config.vocab_size, (8, 64 if self.quick else 1024), device=self.device)
        forward = self.seconds(lambda: plain.model(tokens), 5)
        model = gs.load_model(hf_model=plain, check=False)
        places = [Place(site, layer) for layer in range(config.num_hidden_layers) for site in ("res", "mlp", "att")]
        harvester = Harvester(model, places)
        keep = torch.ones_like(tokens, dtype=torch.bool)
        mine = self.seconds(lambda: harvester.run(tokens, keep), 5)
        count = tokens.numel()
        return [
            {
                "what": f"activations of {len(places)} sites, random Gemma 2 2B, bfloat16, {count} tokens",
                "peer": "Hugging Face's forward pass alone",
                "ours": f"{count / mine:,.0f} tokens/s",
                "theirs": f"{count / forward:,.0f} tokens/s",
                "ratio": forward / mine,
            }
        ]

    def suite(self) -> list[dict[str, Any]]:
        """The bundled model's suite, model included, from the command's own function."""
        steps = 4 if self.quick else 60
        with tempfile.TemporaryDirectory() as folder:
            overrides = [
                f"output={folder}/run",
                "data={dataset: bundled, column: text, context: 256}",
                f"steps={steps}",
                f"device={self.device}",
                f"model.device={self.device}",
                f"source.device={self.device}",
                "source.bucket_rows=65536",
                "source.scale_rows=16384",
            ]
            started = time.perf_counter()
            table = gs.train_suite(ROOT / "configs" / "bundled.yaml", overrides=overrides, progress=False, force=True)
            seconds = time.perf_counter() - started
        rows = steps * 1024
        fvu = float(table["fvu"].median())
        return [{"what": f"{len(table)} SAEs of the bundled model, {steps} steps of 1,024 activations, all included",
                 "seconds": seconds, "activations_per_s": rows / seconds, "median_fvu": fvu}]  # fmt: skip

    def evaluated(self) -> list[dict[str, Any]]:
        """Metrics of four bundled SAEs on the device and on the processor, float32 on both."""
        tokens = heldout_tokens(limit=4 if self.quick else 64)
        columns = ["l0", "fvu", "loss_clean", "delta_loss", "loss_recovered"]
        tables = [
            gs.evaluate(
                gs.load_model("bundled", device=device),
                [
                    gs.load_sae("bundled", site, 2, width="512" if site == "transcoder" else "1k", device=device)
                    for site in ("res", "mlp", "att", "transcoder")
                ],
                tokens,
                progress=False,
            )[columns]
            for device in ("cpu", self.device)
        ]
        worst = (tables[0] - tables[1]).abs().max()
        return [{"what": f"gs.evaluate, {name}: greatest difference of four SAEs", "difference": float(worst[name]),
                 "processor": float(tables[0][name].iloc[0])} for name in columns]  # fmt: skip

    def steps(self) -> list[dict[str, Any]]:
        """One training step: :mod:`benchmarks.training_step`."""
        cases = (training_step.Shape(64, 256, 128, 8),) if self.quick else training_step.GPU_CASES
        return training_step.run(device=self.device, cases=cases)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", nargs="?", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--only", nargs="*", default=["equal_steps", "evaluated", "splice", "steps", "suite", "harvest"]
    )
    options = parser.parse_args()
    bench, found = Bench(options.quick), dict[str, Any]()
    path = options.out / "gpu.json"
    name = "cpu" if options.quick else torch.cuda.get_device_name()
    machine = {**describe(), "device": name}
    for part in options.only:
        started = time.perf_counter()
        try:
            found[part] = getattr(bench, part)()
        except Exception:  # the other parts are still measured
            found[part] = [{"failed": traceback.format_exc()}]
        print(part, f"{time.perf_counter() - started:.0f} s", json.dumps(found[part], indent=1), flush=True)
        if not options.quick:
            path.write_text(json.dumps({"machine": machine, **found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

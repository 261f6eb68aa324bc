"""``evaluate`` on layered coders, against the metrics written out in float64 on the plain Hugging Face model."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.cache import MetricsCache
from gemma_scope_tl.evals.suite import measure_suite
from gemma_scope_tl.sites import BACKENDS
from tests.helpers import decoder_of, random_gemma, random_layered, random_sae, random_tokens, shared_model
from tests.parity.test_layered_splice import by_hand, dense

LAYERS = (1, 2, 4)
SMALL: dict[str, Any] = {"progress": False, "resamples": 20, "batch_size": 2}


def rows() -> torch.Tensor:
    tokens = random_tokens(random_gemma("gemma3"), batch=3, length=14)
    tokens[0, 9:] = 0  # padding
    tokens[1, 6] = 1  # EOS
    return tokens


def read_and_written(hf: Any, tokens: torch.Tensor, coder: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    read, written = [], []
    with ExitStack() as stack, torch.no_grad():
        for layer in coder.layers:
            block = decoder_of(hf).layers[layer]
            for held, module in ((read, "pre_feedforward_layernorm"), (written, "post_feedforward_layernorm")):
                at = getattr(block, module) if coder.kind == "clt" else block

                def keep(_m: Any, _a: Any, out: Any, held: list[torch.Tensor] = held) -> None:
                    held.append((out[0] if isinstance(out, tuple) else out).clone())

                stack.callback(at.register_forward_hook(keep).remove)
        hf(tokens, attention_mask=(tokens > 0).long())
    return read, written


def ablated(hf: Any, tokens: torch.Tensor, coder: Any, values: list[torch.Tensor], counted: torch.Tensor) -> Any:
    with ExitStack() as stack, torch.no_grad():
        for layer, value in zip(coder.layers, values, strict=True):
            block = decoder_of(hf).layers[layer]

            def replace(_m: Any, _a: Any, out: Any, value: torch.Tensor = value) -> Any:
                y = out[0] if isinstance(out, tuple) else out
                new = torch.where(counted.unsqueeze(-1), value.to(y.dtype), y)
                return (new, *out[1:]) if isinstance(out, tuple) else new

            at = block.post_feedforward_layernorm if coder.kind == "clt" else block
            stack.callback(at.register_forward_hook(replace).remove)
        return hf(tokens, attention_mask=(tokens > 0).long()).logits


@pytest.mark.parametrize("kind", ["clt", "crosscoder"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_against_the_equations(kind: str, backend: str) -> None:
    hf, model, tokens = random_gemma("gemma3"), shared_model("gemma3", backend), rows()
    coder = random_layered(model.dims, kind, LAYERS, widths=(64, 96, 80), skip=kind == "clt")
    counted = tokens > 2
    scored = counted[:, :-1] & counted[:, 1:]
    read, written = read_and_written(hf, tokens, coder)

    def loss(logits: torch.Tensor) -> tuple[float, torch.Tensor]:
        logs = logits[:, :-1].double().log_softmax(-1)[scored]
        return -logs.gather(1, tokens[:, 1:][scored][:, None]).mean().item(), logs

    mask = (tokens > 0).long()
    clean, logs = loss(hf(tokens, attention_mask=mask).logits)
    spliced, logs_spliced = loss(by_hand(hf, tokens, coder, ~counted, attention_mask=mask))
    means = [y[counted].double().mean(0) for y in written]
    zero = loss(ablated(hf, tokens, coder, [torch.zeros(64)] * 3, counted))[0]
    mean = loss(ablated(hf, tokens, coder, means, counted))[0]
    active = [(x.double() @ w.double() + b.double() > t)[counted].sum(-1).double() for x, w, b, t in zip(
        read, coder.W_enc, coder.b_enc, coder.threshold, strict=True)]  # fmt: skip
    errors = [(written[k].double() - dense(coder, read[: k + 1], k))[counted].pow(2).sum().item() for k in range(3)]
    deviations = [(y[counted].double() - m).pow(2).sum().item() for y, m in zip(written, means, strict=True)]

    table = gs.evaluate(model, coder, tokens, **SMALL)
    assert list(table["site"]) == [kind] * 4
    assert table["layer"].isna().tolist() == [True, False, False, False]
    together = table.iloc[0]
    wanted = {
        "l0": sum(one.mean().item() for one in active),
        "fvu": sum(errors) / sum(deviations),
        "loss_clean": clean,
        "loss_spliced": spliced,
        "delta_loss": spliced - clean,
        "loss_zero_ablated": zero,
        "loss_mean_ablated": mean,
        "kl": (logs.exp() * (logs - logs_spliced)).sum(-1).mean().item(),
        "tokens": int(counted.sum()),
        "d_sae": 240,
    }
    for name, value in wanted.items():
        # Losses are computed in float32, on values of 1 to 30 through seven layers.
        assert math.isclose(together[name], value, rel_tol=5e-4, abs_tol=2e-5), name
    if zero > clean:
        assert math.isclose(together["loss_recovered"], (zero - spliced) / (zero - clean), rel_tol=1e-2, abs_tol=1e-3)
    assert together["l0_low"] <= together["l0"] <= together["l0_high"]
    for k in range(3):
        row = table.iloc[k + 1]
        assert row["layer"] == LAYERS[k]
        assert math.isclose(row["l0"], active[k].mean().item(), rel_tol=1e-9)
        assert math.isclose(row["fvu"], errors[k] / deviations[k], rel_tol=1e-4)
        assert math.isnan(row["delta_loss"])


def test_among_saes_and_by_position() -> None:
    model, tokens = shared_model("gemma3", "bridge"), rows()
    coder, sae = random_layered(model.dims, "clt", LAYERS), random_sae(model.dims, "res", 2)
    table = gs.evaluate(model, [sae, coder, random_sae(model.dims, "mlp", 3)], tokens, **SMALL)
    assert list(table["site"]) == ["res", "clt", "clt", "clt", "clt", "mlp"]
    alone = gs.evaluate(model, [sae], tokens, **SMALL)
    pd.testing.assert_frame_equal(table.iloc[:1], alone, check_dtype=False)
    places = gs.evaluate(model, coder, tokens, by_position=True, **SMALL)
    assert len(places) == 4 * tokens.shape[1]
    whole = places[places["layer"].isna()]
    weights = whole["tokens"]
    assert math.isclose((whole["l0"] * weights).sum() / weights.sum(), table.iloc[1]["l0"], rel_tol=1e-9)
    with pytest.raises(GemmaScopeError, match="uniformity"):
        gs.evaluate(model, [sae, coder], tokens, uniformity=2, **SMALL)


def test_positions_and_excluded_tokens() -> None:
    model, tokens = shared_model("gemma3", "bridge"), rows()
    coder = random_layered(model.dims, "crosscoder", LAYERS)
    table = gs.evaluate(model, coder, tokens, positions=slice(2, 6), **SMALL)
    assert table["tokens"].tolist() == [int((tokens[:, 2:6] > 2).sum())] * 4


def test_an_interrupted_evaluation_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: Any) -> None:
    model, tokens = shared_model("gemma3", "bridge"), rows()
    coder = random_layered(model.dims, "clt", LAYERS)
    options: dict[str, Any] = {"batch_size": 1, "progress": False, "checkpoint_every": 1}
    wanted = measure_suite(model, coder, tokens, **options).table(resamples=20)
    save, saved = MetricsCache.save, []

    def interrupted(self: MetricsCache, key: str, tensors: Any) -> None:
        save(self, key, tensors)
        saved.append(key)
        if "rows" in tensors and int(tensors["rows"]) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MetricsCache, "save", interrupted)
        measure_suite(model, coder, tokens, cache=tmp_path, **options)
    resumed = measure_suite(model, coder, tokens, cache=tmp_path, **options).table(resamples=20)
    pd.testing.assert_frame_equal(resumed, wanted, check_exact=True)

    def forbidden(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr("gemma_scope_tl.evals.layered.clean_batches", forbidden)
    pd.testing.assert_frame_equal(
        measure_suite(model, coder, tokens, cache=tmp_path, **options).table(resamples=20), wanted, check_exact=True
    )

"""evaluate() at chosen positions against a loop over single rows with hooks on the plain model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from gemma_scope_tl.errors import GemmaScopeError, SpliceError
from gemma_scope_tl.evals import run as run_module
from gemma_scope_tl.evals.suite import evaluate, measure_suite
from gemma_scope_tl.model.plain import run_reference
from gemma_scope_tl.sites import BACKENDS
from gemma_scope_tl.studies import binned_by_position
from gemma_scope_tl.text.rows import pack_texts
from tests.helpers import random_gemma, random_sae, random_tokens, shared_model
from tests.parity.test_splice import by_hand, spliced_by_hand

LENGTHS = [24, 15, 11]
CHOSEN: dict[str, tuple[Any, Callable[[int, int], bool]]] = {
    "from the fourth on": (slice(4, None), lambda at, _: at >= 4),
    "a stretch": (slice(2, 9), lambda at, _: 2 <= at < 9),
    "the last ones": (slice(-3, None), lambda at, length: at >= length - 3),
    "a list": ([3, 4, 5, -2, -1], lambda at, length: at in (3, 4, 5) or at >= length - 2),
}


def padded(model: Any, side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of several lengths with an EOS in the middle of one, padded by an ordinary id, and their mask."""
    tokens = random_tokens(model, batch=3)
    tokens[1, 6] = 1
    ids, mask = torch.full_like(tokens, 7), torch.zeros(tokens.shape, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        at = slice(0, length) if side == "right" else slice(tokens.shape[1] - length, None)
        ids[row, at], mask[row, at] = tokens[row, :length], True
    return ids, mask


def constant(sae: Any, value: torch.Tensor) -> Any:
    """An SAE that writes ``value`` whatever it reads, as an ablation does."""
    made = copy.deepcopy(sae)
    made.W_dec.data.zero_()
    made.b_dec.data.copy_(value)
    return made


class ByHand:
    """The metrics of an SAE from passes of the plain model over one row at a time, without padding."""

    def __init__(self, hf: Any, rows: list[torch.Tensor], sae: Any, chosen: Callable[[int, int], bool]) -> None:
        self.hf, self.rows, self.sae = hf, rows, sae
        self.keep = [
            torch.tensor([chosen(at, len(row)) and int(row[at]) > 2 for at in range(len(row))]) for row in rows
        ]
        taken = [run_reference(hf, row[None]) for row in rows]
        self.clean = [one.logits for one in taken]
        sites = [one.sites for one in taken]
        x = torch.cat([one[sae.site, sae.layer][0][keep] for one, keep in zip(sites, self.keep, strict=True)])
        target = ("mlp", sae.layer) if sae.site == "transcoder" else (sae.site, sae.layer)
        y = torch.cat([one[target][0][keep] for one, keep in zip(sites, self.keep, strict=True)]).double()
        acts = x.double() @ sae.W_enc.double() + sae.b_enc.double()
        self.mean = y.mean(0)
        self.numbers = {
            "tokens": len(x),
            "l0": float((acts > sae.threshold.double()).sum(-1).double().mean()),
            "fvu": float((y - by_hand(sae, x)).square().sum() / (y - self.mean).square().sum()),
            "loss_clean": self.loss(self.clean),
        }
        spliced = self.logits(sae)
        self.numbers["loss_spliced"] = self.loss(spliced)
        self.numbers["kl"] = self.divergence(spliced)
        self.numbers["loss_zero_ablated"] = self.loss(self.logits(constant(sae, torch.zeros_like(sae.b_dec))))
        self.numbers["loss_mean_ablated"] = self.loss(self.logits(constant(sae, self.mean.float())))

    def logits(self, sae: Any) -> list[torch.Tensor]:
        pairs = zip(self.rows, self.keep, strict=True)
        return [spliced_by_hand(self.hf, row[None], [sae], untouched=~keep[None]) for row, keep in pairs]

    def loss(self, logits: list[torch.Tensor]) -> float:
        return self._mean(lambda row, at: -logits[row][0, at].double().log_softmax(-1)[self.rows[row][at + 1]])

    def divergence(self, logits: list[torch.Tensor]) -> float:
        def at_one(row: int, at: int) -> torch.Tensor:
            p, q = (some[row][0, at].double().log_softmax(-1) for some in (self.clean, logits))
            return (p.exp() * (p - q)).sum()

        return self._mean(at_one)

    def _mean(self, value: Callable[[int, int], torch.Tensor]) -> float:
        pairs = [
            (row, at) for row, keep in enumerate(self.keep) for at in range(len(keep) - 1) if keep[at] and keep[at + 1]
        ]
        return float(np.mean([value(row, at).item() for row, at in pairs]))


CASES = [(config, backend, "from the fourth on") for config in ("grouped", "gemma3") for backend in BACKENDS]
CASES += [("grouped", backend, chosen) for backend in BACKENDS for chosen in list(CHOSEN)[1:]]


@pytest.mark.parametrize(("config", "backend", "chosen"), CASES)
def test_every_number_by_hand(config: str, backend: str, chosen: str) -> None:
    hf, model = random_gemma(config), shared_model(config, backend)
    positions, where = CHOSEN[chosen]
    places = [("res", 1), ("att", 0), ("transcoder", 3)]
    saes = [random_sae(model.dims, site, layer, seed=i) for i, (site, layer) in enumerate(places)]
    side = "left" if backend == "bridge" else "right"
    ids, mask = padded(model, side)
    rows = [ids[row][mask[row]] for row in range(len(LENGTHS))]
    options: dict[str, Any] = {"batch_size": 2, "progress": False, "attention_mask": mask}
    table = evaluate(model, saes, ids, positions=positions, **options)
    for sae, row in zip(saes, table.to_dict("records"), strict=True):
        wanted = ByHand(hf, rows, sae, where).numbers
        assert row["tokens"] == wanted.pop("tokens")
        for name, value in wanted.items():
            # Losses are means of a few dozen float32 values; L0 changes by a latent that lies at its threshold.
            assert row[name] == pytest.approx(value, rel=2e-3 if name == "l0" else 1e-4), (sae.site, name)
    by_mask = torch.zeros_like(mask)
    for row, length in enumerate(LENGTHS):
        for at, column in enumerate(mask[row].nonzero().flatten().tolist()):
            by_mask[row, column] = where(at, length)
    same = evaluate(model, saes, ids, positions=by_mask, **options)  # it lies over the given ids, on either side
    assert same.equals(table)


def test_positions_left_out_appear_nowhere() -> None:
    model = shared_model("grouped", "bridge")
    sae, tokens = random_sae(model.dims, "res", 1), random_tokens(model, batch=4)
    options: dict[str, Any] = {"positions": slice(4, 20), "progress": False}
    found = measure_suite(model, sae, tokens, uniformity=50, **options)
    sums = found.sums
    of_tokens = [sums.saes[0].l0, sums.saes[0].error, sums.place_of(0).deviation.value]
    of_predictions = [sums.clean.loss, sums.saes[0].loss, sums.saes[0].kl, sums.uniformity[0].value]
    for stop, means in ((20, of_tokens), (19, of_predictions)):  # the prediction at 19 is of a position left out
        for mean in means:
            assert mean.position_counts.nonzero().flatten().tolist() == list(range(4, stop))
    table = found.by_position()
    assert table["tokens"].tolist() == [0] * 4 + [4] * 16 + [0] * 4
    assert table["loss_spliced"].notna().tolist() == [4 <= at < 19 for at in range(24)]
    assert binned_by_position(model, sae, tokens, **options)["start"].tolist()[0] == 4


def test_packed_texts_count_from_each_rows_bos() -> None:
    model = shared_model("bundled", "bridge")
    sae, texts = random_sae(model.dims, "res", 1), ["And God said, Let there be light. " * 40]
    table = evaluate(model, sae, texts, context=32, positions=slice(4, None), progress=False)
    rows = int(table["sequences"][0])
    assert rows > 5
    whole = pack_texts(model.tokenizer, texts, 32)
    assert table["tokens"][0] == int((whole[:, 4:] > 2).sum())


def test_the_cache_tells_positions_apart_and_keeps_older_entries(tmp_path: Path) -> None:
    model = shared_model("grouped", "bridge")
    sae, tokens = random_sae(model.dims, "res", 1), random_tokens(model, batch=4)
    options: dict[str, Any] = {"cache": tmp_path, "progress": False, "ablations": ("zero",)}
    whole = evaluate(model, sae, tokens, **options)
    kept = {path.name for path in tmp_path.iterdir()}
    some = evaluate(model, sae, tokens, positions=slice(4, None), **options)
    assert kept < {path.name for path in tmp_path.iterdir()}
    assert some.equals(evaluate(model, sae, tokens, positions=slice(4, None), progress=False, ablations=("zero",)))
    assert not some.equals(whole)
    mask = (torch.arange(24) >= 4).expand(4, -1)
    with patch.object(run_module, "clean_batches", side_effect=AssertionError("the model ran")):
        assert evaluate(model, sae, tokens, positions=slice(4, None), **options).equals(some)
        assert evaluate(model, sae, tokens, positions=mask, **options).equals(some)  # the same tokens count
        assert evaluate(model, sae, tokens, **options).equals(whole)
        assert evaluate(model, sae, tokens, positions=slice(None), **options).equals(whole)
    ran = patch.object(run_module, "clean_batches", side_effect=AssertionError("the model ran"))
    with pytest.raises(AssertionError, match="the model ran"), ran:
        evaluate(model, sae, tokens, positions=slice(5, None), **options)


def test_nothing_to_predict_raises() -> None:
    model = shared_model("grouped", "bridge")
    sae, tokens = random_sae(model.dims, "res", 1), random_tokens(model)
    with pytest.raises(GemmaScopeError, match=r"nothing to measure.*positions="):
        evaluate(model, sae, tokens, positions=[3, 5, 9], progress=False)  # no two of them are neighbours
    with pytest.raises(SpliceError, match="No position 24: row 0 has 24 tokens"):
        evaluate(model, sae, tokens, positions=24, progress=False)

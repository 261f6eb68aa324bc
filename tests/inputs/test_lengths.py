"""One long text among short ones: results are those of separate calls, and no pass pads all texts to its length."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pandas as pd
import pytest
import torch

from gemma_scope_tl.attributions.gradients import attribute
from gemma_scope_tl.attributions.targets import logit_difference
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals import facts
from gemma_scope_tl.evals import run as run_module
from gemma_scope_tl.evals.cache import key_of
from gemma_scope_tl.evals.suite import Evaluation, evaluate, measure_suite
from gemma_scope_tl.interp.examples import top_examples
from gemma_scope_tl.interp.sampling import Sampling
from gemma_scope_tl.interventions.norms import mean_norms
from gemma_scope_tl.latents.table import features
from gemma_scope_tl.model.counted import CountedBatch
from gemma_scope_tl.sites import BACKENDS, Place
from gemma_scope_tl.studies import firing, firing_frequencies
from gemma_scope_tl.studies.transfer import norm_ratios
from gemma_scope_tl.text.batch import TokenBatch
from gemma_scope_tl.viz.latent_facts import PageText
from tests.helpers import random_sae, random_tokens, shared_model

LONG = 100
LENGTHS = [5, 9, 1, 7, 3, 1, 8, LONG, 2, 1, 6, 4, 1, 9, 5]  # four texts are BOS alone, which fill one pass
SIZE = 4
ROUNDING: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4}  # float32, passes of other shapes; values up to some hundred


def ragged(model: Any) -> list[list[int]]:
    tokens = random_tokens(model, batch=len(LENGTHS), length=LONG, seed=3).tolist()
    return [row[:length] for row, length in zip(tokens, LENGTHS, strict=True)]


@contextmanager
def narrow(model: Any) -> Generator[None]:
    """Checks that the long text is alone in its passes, and that others are as wide as their longest."""
    shapes: list[tuple[int, int]] = []
    handle = model.blocks[0].register_forward_pre_hook(
        lambda _module, args, kwargs: shapes.append((args[0] if args else next(iter(kwargs.values()))).shape[:2]),
        with_kwargs=True,
    )
    try:
        yield
    finally:
        handle.remove()
    assert {width for _, width in shapes} >= {LONG, 8}
    assert all(width <= 9 or (rows, width) == (len(LENGTHS) % SIZE, LONG) for rows, width in shapes)


@pytest.fixture(params=BACKENDS)
def model(request: pytest.FixtureRequest) -> Any:
    return shared_model("grouped", request.param)


def test_parts_hold_each_text_once_and_no_column_without_text() -> None:
    mask = torch.zeros(7, 20, dtype=torch.bool)
    for row, length in enumerate([3, 20, 0, 5, 3, 1, 5]):
        mask[row, 20 - length :] = True
    batch = CountedBatch(torch.arange(140).reshape(7, 20), mask, mask)
    found = [(rows.tolist(), columns) for rows, columns in batch.parts(2)]
    wanted = [([5, 0], 17), ([4, 3], 15), ([6, 1], 0)]  # stable among equal lengths; row 2 is padding alone
    assert found == [(rows, slice(start, 20)) for rows, start in wanted]
    assert [(rows.tolist(), columns) for rows, columns in batch.parts(2, start=4)] == found[2:]
    assert [rows.tolist() for rows, _ in batch.parts(6)] == [[0, 1, 3, 4, 5, 6]]  # one pass takes the given order
    part = batch.part(torch.tensor([4, 3]), slice(15, 20))
    assert isinstance(part, CountedBatch)
    assert torch.equal(part.ids, batch.ids[[4, 3], 15:])
    assert part.length.tolist() == [3, 5]
    assert batch.ragged
    assert not TokenBatch(batch.ids, torch.ones_like(mask)).ragged
    assert list(TokenBatch(batch.ids, torch.zeros_like(mask)).parts(2)) == []


def test_features(model: Any) -> None:
    rows, sae = ragged(model), random_sae(model.dims, "mlp", 1)
    with narrow(model):
        found = features(model, rows, sae, batch_size=SIZE)
    alone = [features(model, [row], sae).assign(sequence=number) for number, row in enumerate(rows)]
    wanted = pd.concat([one for one in alone if len(one)], ignore_index=True)
    order = ["sequence", "position", "latent"]
    tables = [one.sort_values(order).reset_index(drop=True) for one in (found, wanted)]
    pd.testing.assert_frame_equal(*tables, **ROUNDING)


def test_mean_norms(model: Any) -> None:
    rows = ragged(model)
    with narrow(model):
        found = mean_norms(model, rows, batch_size=SIZE)
    alone = [mean_norms(model, [row]) for row in rows if len(row) > 1]
    tokens = sum(one["tokens"] for one in alone)
    assert found["tokens"].equals(tokens)
    total = sum(one["mean_norm"] * one["tokens"] for one in alone)
    torch.testing.assert_close(torch.tensor(found["mean_norm"]), torch.tensor(total / tokens), rtol=1e-6, atol=0)


@pytest.mark.parametrize("method", ["gradient", "integrated"])
def test_attribute(model: Any, method: str) -> None:
    rows = ragged(model)
    saes = [random_sae(model.dims, "mlp", 1), random_sae(model.dims, "res", 2)]
    options: dict[str, Any] = {"method": method, "steps": 8, "baseline": "latents"}
    ids = [5 + number for number in range(len(rows))]  # another token for each text
    with narrow(model):
        found = attribute(model, rows, saes, logit_difference(ids, 3), batch_size=SIZE, **options)
    alone = [attribute(model, [row], saes, logit_difference(ids[n], 3), **options) for n, row in enumerate(rows)]
    wanted = pd.concat([one.assign(sequence=number) for number, one in enumerate(alone)], ignore_index=True)
    assert found["sequence"].is_monotonic_increasing
    order = ["sequence", "site", "position", "kind", "latent"]
    tables = [one.sort_values(order).reset_index(drop=True) for one in (found, wanted)]
    pd.testing.assert_frame_equal(*tables, **ROUNDING)
    assert found.attrs["metric"] == pytest.approx(sum(one.attrs["metric"] for one in alone), abs=1e-4)
    for name in ("baseline_metric", "gap") if method == "integrated" else ():
        sums = [sum(values) for values in zip(*(one.attrs[name] for one in alone), strict=True)]
        assert found.attrs[name] == pytest.approx(sums, abs=1e-4)


def test_attribute_to_a_function_of_ones_own(model: Any) -> None:
    """It gets all texts with their padding, unless a size of the passes is given."""
    rows, sae, shapes = ragged(model), random_sae(model.dims, "mlp", 1), list[tuple[int, int]]()

    def metric(logits: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(logits.shape[:2]))
        return logits[:, -1, 7].sum()

    whole = attribute(model, rows, sae, metric)
    assert shapes == [(len(rows), LONG)]
    assert whole.equals(attribute(model, rows, sae, metric, batch_size=len(rows)))
    with narrow(model):
        parts = attribute(model, rows, sae, metric, batch_size=SIZE)
    order = ["sequence", "position", "kind", "latent"]
    tables = [one.sort_values(order).reset_index(drop=True) for one in (whole, parts, attribute(model, rows, sae, 7))]
    pd.testing.assert_frame_equal(tables[0], tables[1], **ROUNDING)
    pd.testing.assert_frame_equal(tables[0], tables[2], **ROUNDING)
    with pytest.raises(GemmaScopeError, match="batch_size must be 1 or more"):
        attribute(model, rows, sae, 7, batch_size=0)
    with pytest.raises(GemmaScopeError, match="2 tokens were given for 15 sequences"):
        attribute(model, rows, sae, [7, 8])


def test_a_counterfactual_of_several_lengths(model: Any) -> None:
    rows, sae = ragged(model), random_sae(model.dims, "mlp", 1)
    others = [[row[0], *((token + 1) % 90 + 3 for token in row[1:])] for row in rows]
    found = attribute(model, rows, sae, 7, counterfactual=others, batch_size=SIZE)
    pairs = enumerate(zip(rows, others, strict=True))
    alone = [attribute(model, [row], sae, 7, counterfactual=[o]).assign(sequence=n) for n, (row, o) in pairs]
    order = ["sequence", "position", "kind", "latent"]
    tables = [one.sort_values(order).reset_index(drop=True) for one in (found, pd.concat(alone, ignore_index=True))]
    pd.testing.assert_frame_equal(*tables, **ROUNDING)


def bits(found: Evaluation) -> dict[str, torch.Tensor]:
    pieces = enumerate(found.sums.pieces())
    return {f"{number} {key}": value for number, piece in pieces for key, value in piece.state().items()}


def measured(model: Any, rows: Any, **options: Any) -> Evaluation:
    saes = [random_sae(model.dims, "mlp", 1), random_sae(model.dims, "att", 2), random_sae(model.dims, "transcoder", 3)]
    return measure_suite(model, saes, rows, **{"uniformity": 2, "batch_size": SIZE, "progress": False, **options})


def test_evaluate(model: Any) -> None:
    """By sequence in the given order and by position, as from one pass over all, and each row as alone."""
    rows = ragged(model)
    with narrow(model):
        found = measured(model, rows)
    whole = measured(model, rows, batch_size=len(rows))
    ours, theirs = bits(found), bits(whole)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], **ROUNDING, msg=name)
    pd.testing.assert_frame_equal(found.table(), whole.table(), **ROUNDING)
    pd.testing.assert_frame_equal(found.by_position(), whole.by_position(), **ROUNDING)
    assert found.by_position()["position"].max() == LONG - 1
    for number in (0, 7, 13):
        alone = measured(model, [rows[number]], uniformity=0)
        for mine, one in zip(found.sums.saes, alone.sums.saes, strict=True):
            for name in ("l0", "error", "loss", "kl"):
                a, b = getattr(mine, name), getattr(one, name)
                assert a.counts[number] == b.counts[0]
                torch.testing.assert_close(a.sums[number], b.sums[0], **ROUNDING)


class Stopped(Exception):
    pass


def test_an_interrupted_evaluation_goes_on_to_the_same_bits(model: Any, tmp_path: Path) -> None:
    rows, real = ragged(model), run_module.clean_batches
    wanted = measured(model, rows)

    def stopping(*args: Any) -> Any:
        for number, batch in enumerate(real(*args)):
            if number == 2:
                raise Stopped
            yield batch

    with patch.object(run_module, "clean_batches", stopping), pytest.raises(Stopped):
        measured(model, rows, cache=tmp_path, checkpoint_every=1)
    passes: list[list[int]] = []

    def counting(*args: Any) -> Any:
        for batch in real(*args):
            passes.append(batch.rows.tolist())
            yield batch

    with patch.object(run_module, "clean_batches", counting):
        again = measured(model, rows, cache=tmp_path, checkpoint_every=1)
    assert [row for part in passes for row in part] == sorted(range(len(rows)), key=LENGTHS.__getitem__)[2 * SIZE :]
    ours, theirs = bits(again), bits(wanted)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    with patch.object(run_module, "clean_batches", side_effect=AssertionError("the model ran")):
        measured(model, rows, cache=tmp_path, batch_size=len(rows))  # whatever the passes were


def test_checkpoints_in_the_given_order_keep_their_key_for_rows_of_one_length(model: Any) -> None:
    """Of rows of several lengths they are left alone, since their rows are not the first ones by length."""
    for rows, more in (
        ([row[:5] for row in random_tokens(model).tolist()], {}),
        (ragged(model), {"order": "by length"}),
    ):
        keys: list[str] = []
        real = run_module.Checkpoint.restore

        def restore(self: Any, keys: list[str] = keys, real: Any = real) -> int:
            keys.append(self.key)
            return real(self)

        with patch.object(run_module.Checkpoint, "restore", restore):
            found = measured(model, rows, uniformity=0, ablations=())
        pending = ["" for piece in found.sums.pieces() if not isinstance(piece, run_module.Centre)]
        assert keys == [key_of({"pending": pending, "sizes": [SIZE, run_module.MEMORY_BUDGET], **more})]


def test_counts_norms_examples_and_pages(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, sae = ragged(model), random_sae(model.dims, "mlp", 1)
    counts: list[pd.DataFrame] = []
    monkeypatch.setattr(firing, "CHECKPOINT", 1)
    monkeypatch.setattr(facts, "refuse_hooks", lambda _model: None)  # narrow() looks at the passes with a hook
    with narrow(model):
        counts.append(firing_frequencies(model, sae, rows, batch_size=SIZE, progress=False, cache=tmp_path))
    counts.append(firing_frequencies(model, sae, rows, batch_size=len(rows), progress=False))
    pd.testing.assert_frame_equal(*counts)
    place = Place("mlp", 1)
    with narrow(model):
        assert norm_ratios(model, model, rows, [place], batch_size=SIZE)[place] == 1.0
    options: dict[str, Any] = {"sampling": Sampling(top=3, window=4), "progress": False}
    with narrow(model):
        (found,) = top_examples(model, sae, rows, batch_size=SIZE, **options)
    (whole,) = top_examples(model, sae, rows, batch_size=len(rows), **options)
    assert found.tokens == whole.tokens
    one, other = ([(e.latent, e.kind, e.row, e.start, e.values.tolist()) for e in all_] for all_ in (found, whole))
    assert [example[:4] for example in one] == [example[:4] for example in other]
    for mine, theirs in zip(one, other, strict=True):
        assert mine[4] == pytest.approx(theirs[4], abs=1e-4)
    texts = [PageText(model, rows, batch_size=size) for size in (SIZE, len(rows))]
    with narrow(model):
        ours = texts[0].activations(sae)
    at = texts[0].counted
    torch.testing.assert_close(ours[at], texts[1].activations(sae)[at], **ROUNDING)


def test_the_table_of_evaluate_has_intervals_over_the_given_rows(model: Any) -> None:
    rows, sae = ragged(model), random_sae(model.dims, "mlp", 1)
    tables = [evaluate(model, sae, rows, batch_size=size, progress=False, seed=4) for size in (SIZE, len(rows))]
    pd.testing.assert_frame_equal(*tables, **ROUNDING)

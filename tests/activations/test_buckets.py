"""Buckets hold one buffer, never copied, and serve each row once in the order of seed and number."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from gemma_scope_tl.activations.buckets import Bucket, bucket_order
from gemma_scope_tl.activations.source import MeanSquares
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.sites import Place

A, B = Place("res", 0), Place("att", 1)


def values(rows: int, start: int = 0) -> dict[Place, torch.Tensor]:
    number = torch.arange(start, start + rows, dtype=torch.float32)[:, None]
    return {A: number + torch.arange(4) / 8, B: -number.expand(-1, 3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bucket_serves_every_row_once_in_the_order(dtype: torch.dtype) -> None:
    bucket = Bucket(24, {A: 4, B: 3}, dtype)
    for at in (0, 7, 14, 21):
        bucket.fill(at, {place: x[: 24 - at] for place, x in values(7, at).items()})
    bucket.shuffle(5, 3)
    taken = [bucket.take(i, 8) for i in range(3)]
    order = bucket_order(5, 3, 24)
    for place, x in values(24).items():
        served = torch.cat([batch[place] for batch in taken])
        assert served.dtype == torch.float32
        assert torch.equal(served, x[order])  # below 2**8 and in eighths: exact in bfloat16


def test_orders_are_permutations_fixed_by_seed_and_number() -> None:
    orders = {(s, n): bucket_order(s, n, 100) for s in range(4) for n in range(4)}
    assert all(torch.equal(order.sort().values, torch.arange(100)) for order in orders.values())
    assert len({tuple(order.tolist()) for order in orders.values()}) == 16
    # from NumPy's seed sequences and torch's permutation: a change would make old runs impossible to resume
    mixed = int(np.random.SeedSequence([1, 2]).generate_state(1, np.uint64)[0])
    assert torch.equal(orders[1, 2], torch.randperm(100, generator=torch.Generator().manual_seed(mixed)))


def test_rows_are_spread_evenly_over_batches() -> None:
    """Of 64 rows in a run, as many as hypergeometric chance allows land in any one batch."""
    hits = np.array([(bucket_order(0, n, 4096)[:512] < 64).sum().item() for n in range(200)])
    assert abs(hits.mean() - 8) < 4 * math.sqrt(64 / 8 * 7 / 8 / 200)


def test_the_buffer_stays_where_it_is() -> None:
    bucket = Bucket(64, {A: 4, B: 3}, torch.bfloat16)
    assert bucket.nbytes == 64 * 7 * 2
    pointers = [tensor.data_ptr() for tensor in bucket.tensors.values()]
    for number in range(3):
        bucket.fill(0, values(64, number))
        bucket.shuffle(0, number)
        batch = bucket.take(0, 16)
        batch[A].zero_()  # the batch is the caller's
        assert torch.equal(bucket.tensors[A].float(), values(64, number)[A].bfloat16().float())
    assert [tensor.data_ptr() for tensor in bucket.tensors.values()] == pointers


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: reads /proc")
def test_the_process_holds_the_buffer_once() -> None:
    """Peak memory of a process that fills, shuffles and serves 96 MiB three times: the buffer, a batch, little else."""
    code = """
import torch
from gemma_scope_tl.activations.buckets import Bucket
from gemma_scope_tl.activations.source import Place
torch.set_num_threads(1)
place = Place("res", 0)
def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
piece = {place: torch.ones(1024, 256)}
small = Bucket(2048, {place: 256})
for at in (0, 1024): small.fill(at, piece)
small.shuffle(0, 0); small.take(0, 1024)
before = peak()
bucket = Bucket(96 * 1024, {place: 256})
for number in range(3):
    for at in range(0, bucket.rows, 1024): bucket.fill(at, piece)
    bucket.shuffle(0, number)
    for i in range(bucket.rows // 1024): bucket.take(i, 1024)
print((peak() - before) / bucket.nbytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.33


def test_memory_is_used_again_only_when_no_tensor_is_on_it() -> None:
    bucket = Bucket(64, {A: 4, B: 3})
    bucket.fill(0, values(64))
    bucket.shuffle(0, 0)
    held = [bucket.take(i, 8) for i in range(8)]
    assert len({batch[A].data_ptr() for batch in held}) == 8
    view, pointer = held[0][A][2:3, 1], held[0][A].data_ptr()
    value = view.clone()
    del held
    later = [bucket.take(i, 8)[A] for i in range(8)]
    assert pointer not in {x.data_ptr() for x in later} and torch.equal(view, value)
    del later
    first = bucket.take(0, 8)[A]
    pointer = first.data_ptr()
    del first
    again = [bucket.take(1, 8)[A] for _ in range(2)]
    assert pointer in {x.data_ptr() for x in again}
    assert torch.equal(again[0], again[1])


def test_bad_input_is_refused() -> None:
    for rows, widths, dtype in ((0, {A: 4}, torch.float32), (4, {}, torch.float32), (4, {A: 4}, torch.int32)):
        with pytest.raises(GemmaScopeError, match="A bucket needs"):
            Bucket(rows, widths, dtype)
    with pytest.raises(GemmaScopeError, match="GiB"):
        Bucket(1 << 40, {A: 1 << 20})
    bucket = Bucket(8, {A: 4, B: 3})
    for at, given in (
        (0, {A: values(2)[A]}),
        (0, {A: values(2)[A], B: values(3)[B]}),
        (0, {A: values(2)[A][:, :3], B: values(2)[B]}),
        (7, values(2)),
        (-1, values(2)),
    ):
        with pytest.raises(GemmaScopeError):
            bucket.fill(at, given)
    bucket.fill(0, values(8))
    with pytest.raises(GemmaScopeError, match="Shuffle"):
        bucket.take(0, 4)
    bucket.shuffle(0, 0)
    for index, size in ((2, 4), (-1, 4), (0, 0), (0, 9)):
        with pytest.raises(GemmaScopeError, match="no batch"):
            bucket.take(index, size)
    with pytest.raises(GemmaScopeError, match="negative"):
        bucket_order(-1, 0, 4)


def test_mean_squares_do_not_depend_on_the_cuts() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9000, 33, generator=generator) * 100
    exact = sum(float(v) ** 2 for v in x[:50].flatten().double()) / 50
    some = MeanSquares(torch.float32)
    some.update({A: x[:50]})
    assert math.isclose(some.means()[A], exact, rel_tol=1e-14)
    results: set[float] = set()
    for cut in (1, 777, 4096, 9000):
        squares = MeanSquares(torch.bfloat16)
        for at in range(0, 9000, cut):
            squares.update({A: x[at : at + cut]})
        results.add(squares.means()[A])
    wanted = (x.bfloat16().double().numpy() ** 2).sum() / 9000
    assert len(results) == 1 and math.isclose(results.pop(), wanted, rel_tol=1e-13)


def test_mean_squares_refuse_what_has_none() -> None:
    with pytest.raises(GemmaScopeError, match="at least one row"):
        MeanSquares(torch.float32).means()
    with pytest.raises(GemmaScopeError, match="not finite"):
        MeanSquares(torch.float16).update({A: torch.full((2, 3), 1e5)})

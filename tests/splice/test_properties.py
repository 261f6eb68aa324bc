"""Any sequence of attaching, detaching, hooking, failing and copying leaves the model as it was, to the bit.

``SPLICE_EXAMPLES=3000 pytest -s tests/splice/test_properties.py`` tries more sequences and says how many.
"""

from __future__ import annotations

import os
import sys
from functools import cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_scope_tl.sites import BACKENDS
from tests.splice.world import POSITIONS, World

EXAMPLES = int(os.environ.get("SPLICE_EXAMPLES", "50"))  # for each backend
flag, number, where = st.booleans(), st.integers(0, 8), st.integers(0, len(POSITIONS) - 1)
target = st.integers(0, 8) | st.integers(100, 108)  # a site, or an SAE itself
kinds = st.sampled_from(["count", "count", "edit", "in place"])
ATTACH = st.tuples(st.just("attach"), number, flag, flag, where)
FORWARD = st.tuples(st.just("forward"))
OPERATIONS = st.one_of(
    ATTACH,
    ATTACH,
    FORWARD,
    FORWARD,
    st.tuples(st.just("attach_wrong"), st.integers(0, 1)),
    st.tuples(st.just("detach"), number, st.sampled_from(BACKENDS)),
    st.tuples(st.just("detach_all")),
    st.tuples(st.just("open_saes"), number, number, flag, flag, where, flag),
    st.tuples(st.just("hook"), target, kinds, st.sampled_from(["block", "permanent", "temporary"])),
    st.tuples(st.just("close"), flag),
    st.tuples(st.just("reset_hooks"), flag),
    st.tuples(st.just("gradient")),
    st.tuples(st.just("fail"), target, flag),
    st.tuples(st.just("cached"), number, flag, where, flag),
    st.tuples(st.just("generate"), flag),
    st.tuples(st.just("copied"), number, flag, flag, where),
)


@cache
def world(backend: str) -> World:
    return World(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_left_behind(backend: str) -> None:
    there = world(backend)

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES < 1000)
    @given(st.lists(OPERATIONS, min_size=1, max_size=16))
    def sequences(operations: list[tuple[object, ...]]) -> None:
        there.run(operations)

    sequences()
    counts = dict(there.done)
    sequences_run = counts.pop("sequences")
    refused = sum(count for name, count in counts.items() if "refused" in name)
    total = sum(counts.values()) - refused
    sys.stdout.write(f"\n{backend}: {sequences_run} sequences, {total} operations, {len(there.seen)} states; {counts}\n")
    assert sequences_run >= EXAMPLES * 0.5  # hypothesis may find fewer distinct ones

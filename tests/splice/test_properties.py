"""Any sequence of attaching, detaching, hooking, failing and copying leaves the model as it was, to the bit.

``SPLICE_EXAMPLES=3000 pytest -s tests/splice/test_properties.py`` tries more sequences and says how many.
"""

from __future__ import annotations

import os
import sys
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gemma_scope_tl.sites import BACKENDS
from tests.splice.world import POSITIONS, World

EXAMPLES = int(os.environ.get("SPLICE_EXAMPLES", "80"))  # for each backend
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


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_left_behind(backend: str) -> None:
    worlds = [World(backend)]
    done: Counter[str] = Counter()

    @settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=EXAMPLES < 1000
    )
    @given(st.lists(OPERATIONS, min_size=4, max_size=18))
    def sequences(operations: list[tuple[object, ...]]) -> None:
        try:
            worlds[0].run(operations)
        except BaseException:
            worlds[0] = World(backend)  # so that the next sequence is not blamed
            raise
        finally:
            done.update(worlds[0].done)
            worlds[0].done.clear()

    sequences()
    states, counts = len(worlds[0].seen), dict(done)
    sequences_run = counts.pop("sequences")
    refused = sum(count for name, count in counts.items() if "refused" in name)
    total = sum(counts.values()) - refused
    sys.stdout.write(f"\n{backend}: {sequences_run} sequences, {total} operations, {states} states; {counts}\n")
    assert sequences_run >= EXAMPLES * 0.9 and len(counts) > 15  # every operation occurs

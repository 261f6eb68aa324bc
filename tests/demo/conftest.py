from __future__ import annotations

import pytest

from gemma_scope_tl.demo.world import World, load_world


@pytest.fixture(scope="session")
def world() -> World:
    return load_world("bundled", rows=12, context=64)

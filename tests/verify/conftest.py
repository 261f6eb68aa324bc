"""One small world for all tests of the verification."""

from __future__ import annotations

import pytest

from tests.verify.world import World


@pytest.fixture(scope="session")
def small() -> World:
    """A small random model with SAEs that fit it."""
    return World.make()

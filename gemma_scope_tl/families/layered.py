"""The kinds of coders that span several layers, which are in no site table."""

from __future__ import annotations

from collections.abc import Mapping

from gemma_scope_tl.errors import UnknownNameError

LAYERED_SITES: Mapping[str, str] = {"crosscoder": "res", "clt": "transcoder"}
"""The kinds of coders that span several layers, which registry rows name in place of a site.

The value is the site whose tensors such a coder reads and writes in each of its layers.
"""


def refused_layered(name: str) -> UnknownNameError | None:
    """The error for a kind of coders that span several layers, given as a site; None for any other name."""
    if name not in LAYERED_SITES:
        return None
    return UnknownNameError(
        f"{name!r} is not a site of one layer. It is a kind of coders that span several layers, which read the "
        f"tensors of site {LAYERED_SITES[name]!r} in each of them, and which are not supported here."
    )

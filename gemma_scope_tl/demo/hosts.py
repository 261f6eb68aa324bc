"""The host names that a demo answers to, and the origins of pages that may send to it."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from gemma_scope_tl.errors import GemmaScopeError

LOCAL = ("localhost", "127.0.0.1", "[::1]")
EVERYWHERE = ("0.0.0.0", "[::]")
_ALLOWED = re.compile(r"(\*\.)?[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?|\[[0-9a-f:.]+\]", re.ASCII)
_ORIGIN = re.compile(r"https?://(\*\.)?(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:(\d+|\*))?", re.ASCII)
_HOST = re.compile(r"(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:\d+)?", re.ASCII)


@dataclass(frozen=True)
class Hosts:
    """Host names of a demo, without ports; ``*.example.org`` stands for all names below ``example.org``.

    Attributes:
        own: names of this machine for which the demo was started.
        given: names of proxies in front of the demo. Their pages may send requests to any host that the proxy names.
        addresses: whether every numeric address is accepted, as for a demo that listens on all addresses of a machine.
            DNS rebinding works with names only, so pages of other sites cannot use an address.
    """

    own: frozenset[str]
    given: frozenset[str] = frozenset()
    addresses: bool = False

    def sends(self, origin: str, host: str) -> bool:
        """Whether a page of ``origin`` may send to this ``host`` (with its port)."""
        place = urlsplit(origin)
        if place.scheme not in ("http", "https"):
            return False
        return place.netloc.lower() == host.lower() or self.is_given(place.netloc)

    def is_given(self, host: str) -> bool:
        """Whether ``host``, with or without a port, is the name of a proxy."""
        name = host_name(host)
        if name is None:
            return False
        return any(name == one or (one.startswith("*.") and name.endswith(one[1:])) for one in self.given)


def hosts_of(host: str, allowed_hosts: Iterable[str] = ()) -> Hosts:
    """The host names of a demo that listens on ``host``.

    Args:
        host: an address or name.
        allowed_hosts: other names, such as that of a proxy.

    Raises:
        GemmaScopeError: an allowed host is not a name.
    """
    given: set[str] = set()
    for name in [allowed_hosts] if isinstance(allowed_hosts, str) else allowed_hosts:
        lower = bracketed(name.strip().lower())
        if not _ALLOWED.fullmatch(lower):
            raise GemmaScopeError(
                "An allowed host is a name such as demo.example.org or *.example.org, without scheme, port and path, "
                f"not {name!r}."
            )
        given.add(lower)
    listens = bracketed(host.lower())
    everywhere = listens in EVERYWHERE
    return Hosts(
        frozenset({*LOCAL, socket.gethostname().lower() if everywhere else listens}), frozenset(given), everywhere
    )


def origins_of(given: Iterable[str]) -> tuple[str, ...]:
    """Check and return the origins of pages that may frame the demo.

    Raises:
        GemmaScopeError: a text is not an origin.
    """
    found = (given,) if isinstance(given, str) else tuple(given)
    for one in found:
        if not _ORIGIN.fullmatch(one.lower()):
            raise GemmaScopeError(f"A framing page is named by its origin, such as https://example.org, not {one!r}.")
    return found


def bracketed(host: str) -> str:
    """``host`` as in a URL, where an IPv6 address has brackets."""
    return f"[{host}]" if host.count(":") > 1 and not host.startswith("[") else host


def host_name(host: str) -> str | None:
    """The name in a ``Host`` header, in lower case and without the port; None for an invalid header."""
    match = _HOST.fullmatch(host.lower())
    return match[1] if match else None


def is_address(name: str | None) -> bool:
    """Whether a name is a numeric address."""
    try:
        ip_address((name or "").strip("[]"))
    except ValueError:
        return False
    return True

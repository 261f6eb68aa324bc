"""Serving the demo, by default to this machine only, and without requests to other hosts."""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import wraps
from html import escape
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.errors import GemmaScopeError

if TYPE_CHECKING:
    from gemma_scope_tl.demo.hosts import Hosts
    from gemma_scope_tl.demo.queue_rules import QueueRules

logger = logging.getLogger(__name__)

NOTEBOOKS = ("'self'", "http://localhost:*", "http://127.0.0.1:*", "vscode-webview:")
"""Origins of pages that may frame the demo when it is shown in a notebook."""

_BUTTONS = {
    f"button_primary_background_fill{part}": color
    for part, color in (("", "#c2410c"), ("_hover", "#9a3412"), ("_dark", "#c2410c"), ("_hover_dark", "#9a3412"))
}  # the theme's orange has too little contrast with white text
SESSIONS = 256  # number of visitors whose last reading is kept, about a megabyte each
_FIXED = {
    "share": False,
    "ssr_mode": False,
    "quiet": True,
    "footer_links": [],
    "run_history": False,
    "state_session_capacity": SESSIONS,
    "prevent_thread_lock": True,
}
CSS = """
.gradio-container { max-width: 72rem !important; margin: 0 auto !important; }
footer { display: none !important; }
/* Errors are shown as messages; the content of the page stays. */
[data-testid="status-tracker"]:has(> .error) { display: none !important; }
"""


def gradio() -> Any:
    """Import gradio with its analytics turned off.

    Raises:
        GemmaScopeError: gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if importlib.util.find_spec("gradio") is None:
        raise GemmaScopeError("The demo needs gradio: pip install 'gemma-scope-tl[demo]'")
    import gradio

    return gradio


def as_messages(function: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``function`` to show the package's errors as messages. Other errors are logged and shown without a text.

    Gradio shows messages as HTML, and errors quote the input of visitors, so the messages are escaped.
    """
    error_class = gradio().Error

    @wraps(function)
    def run(*args: Any) -> Any:
        try:
            return function(*args)
        except GemmaScopeError as error:
            raise error_class(escape(str(error), quote=False), print_exception=False) from error
        except Exception as error:
            logger.exception("the demo failed")
            words = "The demo failed; see its log."
            raise error_class(words, print_exception=False) from error

    return run


def launch(
    app: Any,
    host: str = "127.0.0.1",
    port: int | None = None,
    open_browser: bool = False,
    wait: bool = True,
    *,
    allowed_hosts: Iterable[str] = (),
    framed_by: Iterable[str] = (),
) -> str:
    """Serve an app of :func:`~gemma_scope_tl.demo.app.build_app`.

    Requests must name a host that the demo was started for: ``localhost``, ``127.0.0.1``, ``[::1]``, ``host``, and
    ``allowed_hosts``; with ``"0.0.0.0"`` also this machine's name and any numeric address.

    Args:
        app: the app.
        host: address to listen on; ``"0.0.0.0"`` admits other machines, without a password.
        port: port to listen on; by default the first free one from 7860 on.
        open_browser: open the page in a browser.
        wait: block until interrupted; a notebook does not wait, and shows the page inline.
        allowed_hosts: further host names in requests of browsers, such as that of a reverse proxy; ``*.example.org``
            stands for all names below ``example.org``.
        framed_by: origins whose pages may show the demo in a frame, such as ``"https://example.org"``. By default
            none, and in a notebook those of this machine.

    Returns:
        The address of the page.

    Raises:
        GemmaScopeError: the port is taken or invalid, an allowed host is not a name, or an origin of ``framed_by`` is
            invalid.
    """
    from gemma_scope_tl.demo.hosts import bracketed, hosts_of, origins_of
    from gemma_scope_tl.demo.queue_rules import WAITING, QueueRules

    gr = gradio()
    check_address(host, port)
    hosts = hosts_of(host, allowed_hosts)
    frames = origins_of(framed_by) or (NOTEBOOKS if gr.utils.ipython_check() else ())
    app.queue(max_size=WAITING, default_concurrency_limit=4)
    app.queue_rules = QueueRules(app._queue)
    try:
        _, address, _ = app.launch(
            server_name=bracketed(host),
            server_port=port,
            inbrowser=open_browser,
            theme=_theme(gr),
            css=CSS,
            **_FIXED,
            app_kwargs={"lifespan": _behind_guard(hosts, app.queue_rules, frames), "openapi_url": None},
        )
    except OSError as error:
        raise GemmaScopeError(f"Cannot listen on {host}, port {port or '7860 and up'}: {error}") from error
    if wait:
        app.block_thread()
    return str(address)


def _theme(gr: Any) -> Any:
    return gr.themes.Default(
        primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(**_BUTTONS)


def _behind_guard(hosts: Hosts, rules: QueueRules, frames: Iterable[str]) -> Callable[[Any], Any]:
    """A lifespan of Gradio's server that puts the guard in front of it, before its own middleware."""
    from gemma_scope_tl.demo.guard import guarded

    @asynccontextmanager
    async def lifespan(served: Any) -> AsyncGenerator[None, None]:
        served.middleware_stack = guarded(served.middleware_stack, hosts, rules, frames)  # before the first request
        yield

    return lifespan


def check_address(host: str, port: int | None) -> None:
    """Check that a server can listen there, before the model is loaded. Without a port nothing is checked.

    Raises:
        GemmaScopeError: the address is not one of this machine, or the port is taken or invalid.
    """
    if port is None:
        return
    if not 1 <= port <= 65535:
        raise GemmaScopeError(f"A port is a number from 1 to 65535, not {port}.")
    try:
        try_listening(host, port)
    except OSError as error:
        raise GemmaScopeError(
            f"Cannot listen on {host}, port {port}: {error.strerror or error}. Choose another port or host."
        ) from error


def try_listening(host: str, port: int | None) -> None:
    """Bind a socket to the address, or to any free port of the host, and close it again.

    Raises:
        OSError: the port is taken or reserved, or the host is not an address of this machine.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port or 0, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind, protocol) as tried:
        if os.name == "posix":  # without this, a port whose last connection has just ended counts as taken
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        tried.bind(address)

"""Serving the demo: on this machine alone unless asked, and without a request to anywhere else."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable
from functools import wraps
from typing import Any

from gemma_scope_tl.errors import GemmaScopeError

logger = logging.getLogger(__name__)

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; worker-src 'self' blob:"
)
"""What a page may load. Gradio's own page names hosts for fonts and scripts; the browser never asks them."""
_BUTTONS = {
    f"button_primary_background_fill{part}": color
    for part, color in (("", "#c2410c"), ("_hover", "#9a3412"), ("_dark", "#c2410c"), ("_hover_dark", "#9a3412"))
}  # the theme's orange is too light under white words
QUEUE = 64
SESSIONS = 256  # visitors whose last reading is kept: a megabyte or so each
CSS = """
.gradio-container { max-width: 72rem !important; margin: 0 auto !important; }
footer { display: none !important; }
/* A failure is told in a message; what was on the page before stays. */
[data-testid="status-tracker"]:has(> .error) { display: none !important; }
"""


def gradio() -> Any:
    """The gradio module, without its analytics.

    Raises:
        GemmaScopeError: when it is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    if importlib.util.find_spec("gradio") is None:
        raise GemmaScopeError("The demo needs gradio: pip install 'gemma-scope-tl[demo]'")
    import gradio

    return gradio


def as_messages(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with the package's errors shown as messages; any other is logged, and shown without its text."""
    error_class = gradio().Error

    @wraps(function)
    def run(*args: Any) -> Any:
        try:
            return function(*args)
        except GemmaScopeError as error:
            raise error_class(str(error), print_exception=False) from error
        except Exception as error:
            logger.exception("the demo failed")
            words = "The demo failed; its log says how."
            raise error_class(words, print_exception=False) from error

    return run


def launch(
    app: Any, host: str = "127.0.0.1", port: int | None = None, open_browser: bool = False, wait: bool = True
) -> str:
    """Serve an app of :func:`~gemma_scope_tl.demo.app.build_app`.

    Args:
        app: what to serve.
        host: address to listen on; ``"0.0.0.0"`` lets others in, and there is no password.
        port: by default the first free one from 7860 on.
        open_browser: open the page.
        wait: stay until interrupted; a notebook does not wait, and shows the page inline.

    Returns:
        The page's address.

    Raises:
        GemmaScopeError: when the port is taken or no port.
    """
    from starlette.middleware import Middleware

    gr = gradio()
    if port is not None and not 1 <= port <= 65535:
        raise GemmaScopeError(f"A port is a number from 1 to 65535; given: {port}.")
    theme = gr.themes.Default(
        primary_hue="orange", font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
    ).set(**_BUTTONS)
    try:
        _, address, _ = app.queue(max_size=QUEUE, default_concurrency_limit=4).launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            share=False,
            ssr_mode=False,
            quiet=True,
            theme=theme,
            css=CSS,
            footer_links=[],
            state_session_capacity=SESSIONS,
            prevent_thread_lock=True,
            app_kwargs={"middleware": [Middleware(_PolicyHeader)]},
        )
    except OSError as error:
        raise GemmaScopeError(f"Cannot listen on {host}, port {port or '7860 and up'}: {error}") from error
    if wait:
        app.block_thread()
    return str(address)


class _PolicyHeader:
    """ASGI middleware: every answer carries :data:`POLICY`."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)

"""Hooks of the documentation site, which adapt docstrings written for Sphinx and pages written for a file browser."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):<code>~?([\w.]+)</code>")
_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./)+([^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Replace links to files that are not pages of the site by the paths of the files."""
    depth = page.file.src_uri.count("/")

    def shown(match: re.Match[str]) -> str:
        ups = match[0].split("(")[-1].count("../")
        return match[0] if ups <= depth else f"`{match[3]}`"

    return _OUTSIDE.sub(shown, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Replace Sphinx roles by links if the site documents the object, and by code otherwise."""

    def linked(match: re.Match[str]) -> str:
        name = match[1].rsplit(".", 1)[-1]
        return f'<autoref optional identifier="{match[1]}"><code>{name}</code></autoref>'

    return _ROLE.sub(linked, html).replace("::</p>", ":</p>")

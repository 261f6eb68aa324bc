"""Hooks of the site: docstrings are written for Sphinx too, and pages for a file browser too."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr|exc):<code>~?([\w.]+)</code>")
_OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\((\.\./)+([^)#\s]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Links to files of the repository that are no pages become their paths: the site stands alone."""
    depth = page.file.src_uri.count("/")

    def shown(match: re.Match[str]) -> str:
        ups = match[0].split("(")[-1].count("../")
        return match[0] if ups <= depth else f"`{match[3]}`"

    return _OUTSIDE.sub(shown, markdown)


def on_page_content(html: str, **_: Any) -> str:
    """Sphinx roles become links where the site documents the object, and code where it does not."""

    def linked(match: re.Match[str]) -> str:
        name = match[1].rsplit(".", 1)[-1]
        return f'<autoref optional identifier="{match[1]}"><code>{name}</code></autoref>'

    return _ROLE.sub(linked, html).replace("::</p>", ":</p>")

"""Fenced blocks of the documentation, and what is checked of those that cannot run here.

A block whose title says what it ``needs`` (a model from the Hub, another library) is not run: Python is compiled and
its names are looked up, as are commands and their options. All other Python and ``gemma-scope`` commands run.
"""

from __future__ import annotations

import ast
import builtins
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_FENCE = re.compile(r"^( *)```([\w-]*)([^\n]*)\n(.*?)^\1```[ ]*$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: str
    line: int
    language: str
    title: str
    text: str

    @property
    def runs(self) -> bool:
        return "needs" not in self.title

    @property
    def commands(self) -> list[list[str]]:
        """The words of each line that begins with ``$``."""
        return [shlex.split(line[2:], comments=True) for line in self.text.splitlines() if line.startswith("$ ")]


def pages() -> list[Path]:
    """Pages with code: the README and all of docs but the reference, which is made from docstrings."""
    found = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "api" not in path.parts]
    return [ROOT / "README.md", *found]


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    for match in _FENCE.finditer(text):
        indent, language, rest, body = match.groups()
        title = re.search(r'title="([^"]*)"', rest)
        line = text[: match.start()].count("\n") + 1
        body = re.sub(f"^{indent}", "", body, flags=re.MULTILINE)
        found.append(Block(str(page.relative_to(ROOT)), line, language, title[1] if title else "", body))
    return found


def unresolved(code: str, known: set[str]) -> list[str]:
    """Names in ``code`` that do not exist: of modules that are installed, and variables that nothing defines.

    Args:
        code: Python.
        known: variables that earlier blocks of the page define; those of ``code`` are added.
    """
    tree, modules = ast.parse(code), dict[str, Any]()
    wrong = list(_imports(tree, modules))
    if "gs" in known:
        modules.setdefault("gs", import_module("gemma_scope_tl"))
    defined = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    defined |= {n.name for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.ExceptHandler)) and n.name}
    defined |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    defined |= {alias.asname or alias.name.split(".")[0] for node in imports for alias in node.names}
    known |= defined
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            wrong += _attributes(node, modules)
        elif isinstance(node, ast.Name) and node.id not in known and not hasattr(builtins, node.id):
            wrong.append(node.id)
    return wrong


def _imports(tree: ast.AST, modules: dict[str, Any]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if find_spec(alias.name.split(".")[0]) is not None:
                    modules[alias.asname or alias.name] = import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.module and find_spec(node.module.split(".")[0]) is not None:
            module = import_module(node.module)
            yield from (f"{node.module}.{a.name}" for a in node.names if not _has(module, a.name))


def _attributes(node: ast.Attribute, modules: dict[str, Any]) -> list[str]:
    names = [node.attr]
    value: ast.expr = node.value
    while isinstance(value, ast.Attribute):
        names.insert(0, value.attr)
        value = value.value
    if not isinstance(value, ast.Name) or not isinstance(modules.get(value.id), ModuleType):
        return []
    at: Any = modules[value.id]
    for name in names:
        if not _has(at, name):
            return [f"{value.id}.{'.'.join(names)}"]
        at = getattr(at, name)
        if not isinstance(at, ModuleType):
            break
    return []


def _has(module: Any, name: str) -> bool:
    if hasattr(module, name):
        return True
    return hasattr(module, "__path__") and find_spec(f"{module.__name__}.{name}") is not None


def unknown_options(words: list[str], help_text: str) -> list[str]:
    """Options of a command that its help does not list."""
    options = [word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)]
    return [option for option in options if not re.search(rf"(^|[\s,/]){re.escape(option)}\b", help_text)]

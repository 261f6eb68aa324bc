"""Nothing outside ``families/`` names a model family, so that a new family is one value and no search through rooms."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import gemma_scope_tl as gs

PACKAGE = Path(gs.__file__).parent
NAMED = re.compile(r"gemma[-_ ]?[0-9]", re.IGNORECASE)
EXAMPLE = re.compile(r"\bsuch as \S+")  # in a message


def _examples(tree: ast.AST) -> set[ast.AST]:
    """Docstrings, other strings that stand alone, and ``help=`` texts: they may give a model's name as an example."""
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            found.add(node.value)
        elif isinstance(node, ast.keyword) and node.arg == "help":
            found |= set(ast.walk(node.value))
    return found


def names_of_families(source: str) -> Iterator[tuple[int, str]]:
    """Line and text of each string and identifier that names a family."""
    tree = ast.parse(source)
    examples = _examples(tree)
    for node in ast.walk(tree):
        texts: list[str] = []
        match node:
            case ast.Constant(value=str(text)) if node not in examples:
                texts = [text]
            case ast.Name(id=text) | ast.Attribute(attr=text) | ast.FunctionDef(name=text) | ast.ClassDef(name=text):
                texts = [text]
            case ast.arg(arg=text):
                texts = [text]
            case ast.ImportFrom():
                texts = [node.module or "", *(alias.name for alias in node.names)]
            case ast.Import():
                texts = [alias.name for alias in node.names]
            case _:
                pass
        yield from ((node.lineno, text) for text in texts if NAMED.search(EXAMPLE.sub("", text)))  # pyright: ignore


def test_nothing_else_names_a_family() -> None:
    files = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "families")
    found = [
        f"{path.relative_to(PACKAGE)}:{line}: {text[:80]}"
        for path in files
        for line, text in names_of_families(path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


def test_the_search_finds_what_it_is_for() -> None:
    source = '''
"""A docstring about gemma-2-2b."""
from transformers import Gemma2Config
x = "gemma-2-2b" if y.gemma3 else f"a {z} Gemma 2"
option(help="such as gemma-2-2b")
'''
    found = sorted(text for _, text in names_of_families(source))
    assert found == [" Gemma 2", "Gemma2Config", "gemma-2-2b", "gemma3"]

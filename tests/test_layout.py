"""Rules about the shape of the package. Each rule is one test, and its message lists every offender."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gemma_scope_tl as gs

NAME = "gemma_scope_tl"
PACKAGE = Path(gs.__file__).parent
ROOT = PACKAGE.parent

# A room may import the rooms before it, and itself. ARCHITECTURE.md draws this.
# fmt: off
ORDER = [
    "errors",
    "counts",
    "files",
    "dtypes",
    "moved",
    "families",
    "sites",
    "registry",
    "weights",
    "sae",
    "text",
    "model",
    "interventions",
    "latents",
    "activations",
    "evals",
    "training",
    "attributions",
    "studies",
    "contributing",
    "interp",
    "interop",
    "release",
    "viz",
    "demo",
    "diagnose",
    "verification",
    "cli",
]
# fmt: on

FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in FILES}
OF_TORCH = {*dir(torch.Tensor), *dir(torch.nn.Module())}  # private names of torch's that the package reads
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}

PYTEST = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]
MARKERS = {line.split(":")[0] for line in PYTEST["markers"]}


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def _named(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 1)}"


def _annotations_only(tree: ast.Module) -> set[ast.AST]:
    """Nodes inside ``if TYPE_CHECKING`` blocks."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def _imports(tree: ast.Module) -> Iterator[tuple[ast.ImportFrom | ast.Import, Path, str]]:
    """The package's files that a file imports, anywhere in it: the statement, the file, the name taken from it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == NAME:
            for alias in node.names:
                submodule = MODULES.get(f"{node.module}.{alias.name}")
                target = submodule or MODULES.get(node.module or "")
                if target is not None:  # else the package itself, for its version
                    yield node, target, "" if submodule else alias.name
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    yield node, MODULES[alias.name], ""


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def _private_definitions(path: Path) -> set[str]:
    """Private functions, classes, variables, fields and attributes that a file defines."""
    found: set[str] = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if _is_private(name)}


def _names_used(path: Path) -> Iterator[tuple[ast.AST, str]]:
    """Attributes that a file reads or writes, ``getattr(thing, "name")`` and the like included."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Attribute):
            yield node, node.attr
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr"):
            name = node.args[1] if len(node.args) > 1 else None
            if isinstance(name, ast.Constant) and isinstance(name.value, str):
                yield node, name.value


def _circles(graph: dict[Path, set[Path]]) -> list[set[Path]]:
    """Sets of files of which each imports, by whatever way, all others of its set."""

    def reached_from(start: Path) -> set[Path]:
        seen: set[Path] = set()
        open_ = [start]
        while open_:
            for target in graph[open_.pop()] - seen:
                seen.add(target)
                open_.append(target)
        return seen

    reached = {path: reached_from(path) for path in graph}
    in_circles = [path for path in graph if path in reached[path]]
    return [
        {other for other in reached[path] if path in reached[other]}
        for path in in_circles
        if path == min(other for other in reached[path] if path in reached[other])
    ]


def test_every_room_has_its_place() -> None:
    assert {_room(path) for path in FILES} == set(ORDER)


def _backward_imports(annotations: bool) -> list[str]:
    """Imports of later rooms: those that run, or those in ``TYPE_CHECKING`` blocks."""
    found: list[str] = []
    for path in FILES:
        skipped = _annotations_only(TREES[path])
        later = set(ORDER[ORDER.index(_room(path)) + 1 :])
        found += [
            f"{_named(path, node)} imports {_room(target)}"
            for node, target, _ in _imports(TREES[path])
            if _room(target) in later and (node in skipped) == annotations
        ]
    return found


def test_imports_point_one_way() -> None:
    assert _backward_imports(annotations=False) == []


def test_imports_for_annotations_point_one_way() -> None:
    assert _backward_imports(annotations=True) == []


def test_no_files_import_each_other() -> None:
    """Every import counts: those for annotations and those inside functions as well."""
    graph = {path: {target for _, target, _ in _imports(TREES[path])} - {path} for path in FILES}
    circles = [sorted(str(path.relative_to(PACKAGE)) for path in circle) for circle in _circles(graph)]
    assert circles == []


def test_private_names_stay_in_their_room() -> None:
    """A private attribute crosses if another room defines one of this name and the own room does not."""
    defined: dict[str, set[str]] = {room: set() for room in ORDER}
    for path in FILES:
        defined[_room(path)] |= _private_definitions(path)
    crossing: list[str] = []
    for path in FILES:
        room = _room(path)
        crossing += [
            f"{_named(path, node)} imports {name} of {_room(target)}"
            for node, target, name in _imports(TREES[path])
            if _is_private(name) and _room(target) != room
        ]
        for node, name in _names_used(path):
            owners = [other for other in ORDER if name in defined[other]]
            if _is_private(name) and name not in OF_TORCH and owners and room not in owners:
                crossing.append(f"{_named(path, node)} uses {name} of {', '.join(owners)}")
    assert crossing == []


def _slow_marks(nodes: list[ast.expr]) -> bool:
    """Whether one of the project's markers, all of which are of slow tests, is among decorators."""
    return any(isinstance(inner, ast.Attribute) and inner.attr in MARKERS for node in nodes for inner in ast.walk(node))


def _has_a_fast_test(tree: ast.Module) -> bool:
    whole_file = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and any(getattr(target, "id", "") == "pytestmark" for target in node.targets)
    ]
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return not _slow_marks(whole_file) and any(not _slow_marks(test.decorator_list) for test in tests)


def test_fast_tests_cover_every_room() -> None:
    """For each room there is a test file that imports something of it and has a test in ``make test-fast``."""
    covered: set[str] = set()
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        if _has_a_fast_test(tree):
            covered |= {_room(target) for _, target, _ in _imports(tree)}
    assert sorted(set(ORDER) - covered) == []


def test_files_and_functions_stay_small() -> None:
    large: list[str] = []
    for path in FILES:
        lines = len(path.read_text(encoding="utf-8").splitlines())
        large += [f"{path.relative_to(ROOT)} has {lines} lines"] if lines > 400 else []
        large += [
            f"{_named(path, node)} {node.name} has {(node.end_lineno or 0) - node.lineno + 1} lines"
            for node in ast.walk(TREES[path])
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and (node.end_lineno or 0) - node.lineno >= 60
        ]
    assert large == []


def test_only_adapters_import_transformer_lens() -> None:
    found: list[str] = []
    for path in FILES:
        for node in ast.walk(TREES[path]):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if any(name.startswith("transformer_lens") for name in names) and _room(path) != "model":
                found.append(_named(path, node))
    assert found == []


def test_nothing_unpickles() -> None:
    words = ("allow_pickle=True", "torch.load(", "pickle.load")
    assert [
        f"{path.relative_to(ROOT)}: {word}"
        for path in FILES
        for word in words
        if word in path.read_text(encoding="utf-8")
    ] == []


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import gemma_scope_tl", ["torch", "sae_lens", "transformer_lens", "pandas", "numpy"]),
        (
            "import gemma_scope_tl as gs; gs.registry.resolve('gemma-scope-2b-pt-res', 'layer_20/width_16k/canonical')",
            ["torch", "sae_lens", "transformer_lens", "pandas"],
        ),
        ("import gemma_scope_tl as gs; gs.sites.get_site('res').hook_name(3)", ["torch", "sae_lens"]),
        ("import gemma_scope_tl.cli", ["torch", "sae_lens", "pandas"]),
    ],
    ids=["package", "registry", "sites", "cli"],
)
def test_importing_is_light(statement: str, absent: list[str]) -> None:
    code = f"import sys\n{statement}\nprint([m for m in {absent!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


@pytest.mark.slow
def test_no_module_hides_a_public_function() -> None:
    """``import gemma_scope_tl.x`` sets the attribute ``x`` of the package, whatever the package wants it to be."""
    code = """
import importlib, importlib.util, pkgutil, types
import gemma_scope_tl as gs
for module in pkgutil.walk_packages(gs.__path__, "gemma_scope_tl."):
    if importlib.util.find_spec("triton") or not module.name.endswith("_triton"):
        importlib.import_module(module.name)
print([name for name in gs._NAMES if isinstance(getattr(gs, name), types.ModuleType)])
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    for name in gs.__all__:
        assert getattr(gs, name) is not None
    assert set(gs.__all__) == set(dir(gs))
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = gs.nothing_here  # pyright: ignore

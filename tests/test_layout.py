"""The package's shape: imports point one way, importing is light, files stay small."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gemma_scope_tl as gs

PACKAGE = Path(gs.__file__).parent
ROOT = PACKAGE.parent

# Left to right: a room may import those before it, and itself. ARCHITECTURE.md draws this.
ORDER = [
    "errors",
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
    "cli",
]


def _room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def _imported_rooms(path: Path) -> set[str]:
    """Rooms that a file imports when it runs: type-checking blocks do not count."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gemma_scope_tl"):
            parts = (node.module or "").split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("gemma_scope_tl.")}
    return found


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


def test_every_room_has_its_place() -> None:
    assert {_room(path) for path in FILES} == set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_one_way(path: Path) -> None:
    room = _room(path)
    later = set(ORDER[ORDER.index(room) + 1 :])
    assert not _imported_rooms(path) & later


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{path.name}:{node.name}"


def test_only_adapters_import_transformer_lens() -> None:
    for path in FILES:
        if _room(path) in ("model",):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.startswith("transformer_lens") for name in names), path


def test_nothing_unpickles() -> None:
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        for word in ("allow_pickle=True", "torch.load(", "pickle.load"):
            assert word not in text, path


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

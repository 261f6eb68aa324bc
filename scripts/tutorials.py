"""Make and run the tutorials: from tutorials/source/*.py to tutorials/*.ipynb with their outputs.

    python -m scripts.tutorials            # all, in place, with the seconds that each took
    python -m scripts.tutorials 4 5        # some, by number
    python -m scripts.tutorials --check    # only compare the notebooks' cells with their sources

A source has cells that begin with ``# %%`` (code, magics as comments) or ``# %% [markdown]`` (text, as comments). A
notebook keeps no times and no path of the machine it ran on.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from gemma_scope_tl.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
TUTORIALS = ROOT / "tutorials"
LARGEST = 700_000  # bytes of a notebook
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
SECONDS = 1200


def sources() -> list[Path]:
    """The readable sources, in order."""
    return sorted((TUTORIALS / "source").glob("*.py"))


def notebook_of(source: Path) -> Path:
    """The path of the notebook of a source."""
    return TUTORIALS / f"{source.stem}.ipynb"


def cells_of(text: str) -> list[tuple[str, str]]:
    """``(kind, text)`` of each cell of a source.

    >>> cells_of("# %% [markdown]\\n# # Title\\n#\\n# Words.\\n# %%\\nx = 1\\n")
    [('markdown', '# Title\\n\\nWords.'), ('code', 'x = 1')]
    """
    found: list[tuple[str, str]] = []
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        if "[markdown]" in head:
            lines = [re.sub(r"^# ?", "", line) for line in body.strip().split("\n")]
            found.append(("markdown", "\n".join(lines)))
        else:
            found.append(("code", re.sub(r"^# %(?=\w)", "%", body.strip(), flags=re.MULTILINE)))
    return found


def make(source: Path) -> Any:
    """A notebook without outputs."""
    cells = [
        nbformat.v4.new_markdown_cell(text) if kind == "markdown" else nbformat.v4.new_code_cell(text)
        for kind, text in cells_of(source.read_text(encoding="utf-8"))
    ]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL})


def execute(notebook: Any, folder: Path) -> float:
    """Run a notebook with ``folder`` as its working directory; returns seconds.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell raised.
    """
    began = time.perf_counter()
    settings = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1", "COLUMNS": "110"}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {**settings, **os.environ, "PYTHONPATH": paths, "PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    where = {"metadata": {"path": str(folder)}}
    client = NotebookClient(notebook, timeout=SECONDS, resources=where)
    client.execute(env=env)
    strip(notebook, folder)
    return time.perf_counter() - began


def strip(notebook: Any, folder: Path) -> None:
    """Remove outputs that depend on the run or the machine, and all output on standard error."""
    notebook["metadata"] = {"kernelspec": KERNEL}
    for cell in notebook["cells"]:
        cell["metadata"] = {}
        if cell["cell_type"] != "code":
            continue
        kept = [output for output in cell["outputs"] if output.get("name") != "stderr"]
        cell["outputs"] = [_without_paths(output, folder) for output in _joined(kept)]


def _joined(outputs: list[Any]) -> list[Any]:
    """Join consecutive pieces of printed text, because their boundaries depend on timing."""
    found: list[Any] = []
    for output in outputs:
        if found and output["output_type"] == found[-1]["output_type"] == "stream":
            found[-1]["text"] += output["text"]
        else:
            found.append(output)
    return found


def _without_paths(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        for path, name in ((str(folder), "."), (str(ROOT), "gemma_scope_tl"), (str(Path.home()), "~")):
            value = value.replace(path, name)
        return value
    if isinstance(value, list):
        return [_without_paths(item, folder) for item in value]
    if isinstance(value, dict):
        return type(value)({key: _without_paths(item, folder) for key, item in value.items()})
    return value


def main(arguments: list[str]) -> int:
    """Run the named tutorials, or all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    numbers = sorted(path.stem[0] for path in sources())
    parser.add_argument("numbers", nargs="*", metavar="number", help=f"tutorials to run, of {', '.join(numbers)}")
    parser.add_argument("--check", action="store_true", help="only compare notebooks with their sources")
    options = parser.parse_args(arguments)
    unknown = [number for number in options.numbers if number not in numbers]
    if unknown:
        parser.error(f"there is no tutorial {unknown[0]}; there are {', '.join(numbers)}")
    chosen = [path for path in sources() if not options.numbers or path.stem[0] in options.numbers]
    if options.check:
        stale = [path.name for path in chosen if not is_made_from(notebook_of(path), path)]
        print(f"not made from their sources: {stale}" if stale else f"{len(chosen)} notebooks match their sources")
        return 1 if stale else 0
    with tempfile.TemporaryDirectory(prefix="tutorials-") as folder:  # shared, since 5 and 6 use the run of 4
        for path in chosen:
            notebook = make(path)
            seconds = execute(notebook, Path(folder))
            text = nbformat.writes(notebook) + "\n"
            if len(text) > LARGEST:
                raise SystemExit(f"{path.name}: the notebook has {len(text):,} bytes, at most {LARGEST:,} are wanted.")
            write_atomically(notebook_of(path), text)
            print(f"{path.stem:24} {seconds:6.1f} s  {len(text) / 1000:6.0f} kB", flush=True)
    return 0


def is_made_from(notebook: Path, source: Path) -> bool:
    """Whether the cells of a notebook are those of its source."""
    if not notebook.exists():
        return False
    made = nbformat.read(notebook, as_version=4)
    return [(cell["cell_type"], cell["source"]) for cell in made["cells"]] == cells_of(source.read_text("utf-8"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The environment of circuit-tracer: where it is, how it is made, and how a case is run in it.

circuit-tracer needs older releases of transformers and huggingface_hub than this project, so it cannot be installed
beside it. The package of that name on PyPI is a fork of decoderesearch/circuit-tracer, which is not on PyPI.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from scripts.tracer_parity.case import Case, write

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "circuit-tracer-venv"
PYTHON = FOLDER / "bin" / "python"
READY = FOLDER / ".ready"
PACKAGES = ("circuit-tracer==0.5.0", "torch==2.13.0", "transformer-lens==3.2.1", "transformers==4.57.3")
REFERENCE = Path(__file__).with_name("reference.py")


def is_installed() -> bool:
    """Whether the environment is complete."""
    return READY.exists()


def install() -> None:
    """Make the environment, if it is not there."""
    if is_installed():
        return
    subprocess.run([sys.executable, "-m", "venv", FOLDER], check=True)
    subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", *PACKAGES], check=True)
    READY.touch()


def run(case: Case, folder: Path, dtype: str = "float64") -> Path:
    """Write a case into ``folder`` and run circuit-tracer on it.

    Returns:
        The path of its ``graph.npz``; ``graph/case.json`` is the file of its viewer.

    Raises:
        RuntimeError: it failed; the message ends with its errors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write(case, folder)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    env = {**inherited, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [str(PYTHON), str(REFERENCE), str(folder), "--dtype", dtype]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"circuit-tracer failed on {case.name}: {done.stderr[-2000:]}")
    return folder / "graph.npz"

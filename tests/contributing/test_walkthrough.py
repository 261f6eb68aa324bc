"""The commands in CONTRIBUTING.md, run as they stand: on a folder, and on a repository of a local Hub.

``pytest -s`` shows each command and what it prints.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.hub.server import LocalHub

ROOT = Path(__file__).resolve().parents[2]
SHOW = Console(soft_wrap=True, highlight=False, markup=False)

# After the block: what stock SAELens gave, against NumPy's reading of the files.
AGAINST_NUMPY = """
import glob, numpy as np
directory = __import__("sae_lens").loading.pretrained_saes_directory.get_pretrained_saes_directory()
assert type(sae) is sae_lens.saes.jumprelu_sae.JumpReLUSAE, type(sae)
for release, folders in (("contributed-saes", sys.argv[1]), ("local-saes", sys.argv[1])):
    for id in directory[release].saes_map:
        if id.endswith("canonical"):
            continue
        one = sae_lens.SAE.from_pretrained(release, id)
        arrays = np.load(f"{folders}/{id}/params.npz")
        scale = np.float32(arrays["W_enc"].shape[0] ** 0.5) if id.startswith("embedding") else np.float32(1)
        x = np.random.default_rng(0).normal(size=(5, arrays["W_enc"].shape[0])).astype(np.float32)
        pre = (x / scale) @ arrays["W_enc"] + arrays["b_enc"]
        wanted = scale * (np.where(pre > arrays["threshold"], pre, 0) @ arrays["W_dec"] + arrays["b_dec"])
        heads = 3 if id.startswith("att") else None
        given = torch.tensor(x.reshape(5, heads, -1) if heads else x)
        got = one(given).detach().numpy().reshape(5, -1)
        # float32 sums of a hundred terms
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)
        assert abs(scale * arrays["b_dec"] - one.b_dec.detach().numpy()).max() < 1e-5
        hook = one.cfg.metadata.hook_name
        assert hook == {"r": "blocks.2.hook_resid_post", "a": "blocks.1.attn.hook_z", "e": "hook_embed"}[id[0]]
        print("stock SAELens", release, id, hook, "equals NumPy")
assert sae_lens.SAE.from_pretrained("contributed-saes", "res/layer_2/width_1k/average_l0_90").cfg.metadata.l0 == 90
assert (sae.W_dec == sae_lens.SAE.from_pretrained("contributed-saes", "res/layer_2/width_1k/average_l0_90").W_dec).all()
"""


def blocks(heading: str) -> list[tuple[str, str]]:
    """The code blocks below a heading of CONTRIBUTING.md: language and text."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (section,) = re.findall(rf"^### {heading}\n(.*?)^##", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"```(bash|python)\n(.*?)```", section, flags=re.DOTALL)


def run(command: list[str], shown: str, folder: Path, extra: dict[str, str]) -> str:
    """Run one command in a folder and show it; it must succeed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "COLUMNS": "160", "OMP_NUM_THREADS": "1", **extra}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    SHOW.print(f"$ {shown.rstrip()}\n{done.stdout}")
    assert done.returncode == 0, f"{shown}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def bash(script: str, folder: Path, extra: dict[str, str]) -> list[str]:
    """Run each line of a script, and return what each printed."""
    return [run(["bash", "-c", line], line, folder, extra) for line in script.splitlines()]


@pytest.mark.slow
def test_from_a_folder(made_up: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (first, script), (second, code) = blocks("From a folder")
    assert (first, second) == ("bash", "python")
    shutil.copytree(made_up["gemma-scope"], tmp_path / "contributed-saes")
    new, check, show = bash(script, tmp_path, {"HF_HUB_OFFLINE": "1"})
    assert "4 SAEs of bundled" in new and "no problems" in check and check.count("measured") == 2
    assert "average_l0_90" in show and "blocks.2.hook_resid_post" in show
    monkeypatch.chdir(tmp_path)
    shown: list[str] = []
    exec(compile(code, "CONTRIBUTING.md", "exec"), {"print": lambda *values: shown.append(" ".join(map(str, values)))})
    SHOW.print(f"{code}{shown}")
    assert shown == ["blocks.2.hook_resid_post 90.0"]


@pytest.mark.slow
def test_from_the_hub(made_up: dict[str, Path], tmp_path: Path) -> None:
    (first, script), (second, code) = blocks("From the Hub")
    assert (first, second) == ("bash", "python")
    with LocalHub() as hub:
        commit = hub.repo("my-name/contributed-saes").commit_folder(made_up["gemma-scope"])
        extra = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1,127.0.0.2",
            "no_proxy": "127.0.0.1,127.0.0.2",
        }
        new, check = bash(script, tmp_path, extra)
        assert "4 SAEs of bundled" in new and "no problems" in check
        assert (tmp_path / "contributed-saes.yaml").read_text().count(commit) == 4
        assert not list((tmp_path / "cache").rglob("*.npz")), "headers only"
        folder = made_up["gemma-scope"]
        local = f"--model bundled --license MIT --release local-saes --out {tmp_path}"
        run(["bash", "-c", f"gemma-scope registry new {folder} {local}"], f"new {folder}", tmp_path, extra)
        also = 'import sys, torch, gemma_scope_tl; gemma_scope_tl.register_release("local-saes.yaml")\n'
        command = [sys.executable, "-c", also + code + AGAINST_NUMPY, str(folder)]
        printed = run(command, code, tmp_path, extra)
        assert "sae_lens.saes.jumprelu_sae blocks.2.hook_resid_post" in printed
        assert printed.count("equals NumPy") == 8

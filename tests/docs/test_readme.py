"""What the documentation says is run or compared, so that it stays true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gemma_scope_tl as gs
from scripts.page_numbers import without_marks

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/clusters.md")


def test_the_python_in_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert "activation" in printed
    assert "The king said" in printed


def test_names_in_the_readme_exist() -> None:
    for name in set(re.findall(r"\bgs\.(\w+)", README)):
        assert name in gs.__all__, name


def test_the_number_of_saes_is_that_of_the_registry() -> None:
    table = gs.list_saes()
    released = ~table["model"].str.startswith("bundled") & ~table["unverified"]
    second = table["release"].str.startswith("gemma-scope-2-")
    assert f"{(released & ~second).sum():,} sparse autoencoders" in without_marks(README)
    assert f"{(released & second).sum():,} SAEs and transcoders" in without_marks(README)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if not target.startswith("http"):
            assert ((ROOT / document).parent / target).exists(), f"{document}: {target}"


def test_every_make_target_in_the_documents_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for document in DOCUMENTS:
        for target in re.findall(r"\bmake ([\w-]+)", (ROOT / document).read_text(encoding="utf-8")):
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_yaml_in_contributing_is_valid(tmp_path: Path) -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    path = tmp_path / "my-release.yaml"
    path.write_text(block, encoding="utf-8")
    (row,) = gs.registry.read_release(path).rows
    assert (row.release, row.d_sae, row.repo) == ("my-release", 16384, "my-name/my-repo")

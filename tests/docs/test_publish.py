"""docs/publish.md, run block by block against a local Hub."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.loading.pretrained_sae_loaders import NAMED_PRETRAINED_SAE_CONFIG_GETTERS, NAMED_PRETRAINED_SAE_LOADERS
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from typer.testing import CliRunner

import gemma_scope_tl as gs
from gemma_scope_tl.cli import app
from gemma_scope_tl.interop.releases import LOADER_NAME
from gemma_scope_tl.registry import locate
from tests.hub.conftest import hub, token  # noqa: F401  # pyright: ignore[reportUnusedImport]
from tests.hub.server import LocalHub

TEXT = (Path(__file__).parents[2] / "docs" / "publish.md").read_text(encoding="utf-8")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder to work in, and nothing registered afterwards."""
    monkeypatch.setattr(locate, "_registered", {})
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    gs.registry.clear_cache()
    get_pretrained_saes_directory.cache_clear()
    for table in (NAMED_PRETRAINED_SAE_LOADERS, NAMED_PRETRAINED_SAE_CONFIG_GETTERS):
        table.pop(LOADER_NAME, None)


@pytest.mark.slow
def test_every_block_runs(hub: LocalHub, token: str, place: Path) -> None:  # noqa: F811
    names: dict[str, Any] = {}
    shown: list[str] = []
    for language, block in re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL):
        if language == "python":
            exec(compile(block, "docs/publish.md", "exec"), names)
        elif language == "bash":
            for line in block.splitlines():
                command, *arguments = shlex.split(line)
                assert command == "gemma-scope"
                result = CliRunner().invoke(app, arguments, catch_exceptions=False)
                assert result.exit_code == 0, result.output
                shown.append(result.stdout)
    exported, plan, done, checked = shown
    assert "next: gemma-scope upload my-saes OWNER/my-saes" in exported
    assert "nothing was sent. To upload: gemma-scope upload my-saes my-name/my-saes --yes" in plan
    assert "repository: my-name/my-saes (private, new), branch main" in plan
    repo = hub.repos["models", "my-name/my-saes"]
    assert f"commit: {repo.branches['main']}" in done and len(repo.commits) == 2 and "no problems" in checked
    own, row = names["sae"].state_dict(), names["row"]
    bundled = gs.JumpReLUSAE.from_pretrained("bundled-att", row.id.removeprefix("att/")).state_dict()
    for loaded in (own, names["by_name"].state_dict(), names["by_place"].state_dict()):
        for name, value in bundled.items():
            assert torch.equal(loaded[name].reshape(value.shape), value), name
    assert names["done"].revision == hub.repos["models", "my-name/one-sae"].branches["main"]
    assert names["plan"].bytes_to_send == sum(file.size for file in names["done"].files)


def test_messages_in_the_table_are_those_of_the_code() -> None:
    from gemma_scope_tl.release import release_saes as items
    from gemma_scope_tl.weights import hub_errors as upload_errors

    sources = "".join(Path(str(module.__file__)).read_text() for module in (items, upload_errors))
    for words in ("there is no token", "may not write there", "it does not exist", "has changed since", "has an L0 of"):
        assert words in TEXT and words in sources

"""``docs/coming-from.md``: blocks that need what is not here run on stand-ins; numbers against plain Hugging Face."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from sae_lens import HookedSAETransformer
from sae_lens.loading import pretrained_sae_loaders
from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory
from transformers import Gemma2ForCausalLM

import gemma_scope_tl as gs
from gemma_scope_tl.model.plain import relative_difference
from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from gemma_scope_tl.sites import BACKENDS, flatten_heads, get_site
from tests.docs.blocks import ROOT, Block, blocks_of
from tests.docs.nnsight_stand_in import LanguageModel

PAGE = ROOT / "docs" / "coming-from.md"
LAYER = 2  # the bundled model has five


@pytest.fixture(scope="module")
def hf() -> Any:
    return Gemma2ForCausalLM.from_pretrained(BUNDLED_MODEL, attn_implementation="eager").eval()


@pytest.fixture
def page(hf: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs blocks of the page one after the other, those of other packages on the bundled model."""
    sae = gs.load_sae("bundled", "res", LAYER, width="1k")
    ours = gs.load_model("bundled", backend="hooked_transformer")
    stock: Any = HookedSAETransformer(ours.cfg, tokenizer=ours.tokenizer)
    stock.load_state_dict(ours.state_dict(), strict=False)
    directory = dict(get_pretrained_saes_directory())
    monkeypatch.setattr(HookedSAETransformer, "from_pretrained_no_processing", lambda name: stock)
    gs.register_with_sae_lens()
    nnsight = ModuleType("nnsight")
    nnsight.LanguageModel = type("LanguageModel", (LanguageModel,), {"hf": hf, "tokenizer": ours.tokenizer})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "nnsight", nnsight)
    monkeypatch.setattr(torch.Tensor, "save", lambda tensor: tensor, raising=False)
    words = {
        '"google/gemma-2-2b"': repr(str(BUNDLED_MODEL)),
        '"gemma-2-2b", "res", 20, "16k"': f'"bundled", "res", {LAYER}, "1k"',
        '"gemma-2-2b"': '"bundled"',
        '"gemma-scope-2b-pt-res-canonical", "layer_20/width_16k/canonical"': f'"{sae.row.release}", "{sae.row.id}"',
        "layers[20]": f"layers[{LAYER}]",
        "blocks.20.": f"blocks.{LAYER}.",
    }

    def run(block: Block, variables: dict[str, Any]) -> None:
        text = block.text
        if not block.runs:
            for ours_, theirs in words.items():
                text = text.replace(ours_, theirs)
        exec(compile("\n" * block.line + text, str(PAGE), "exec"), variables)

    yield run
    entries = get_pretrained_saes_directory()
    entries.clear()
    entries.update(directory)
    pretrained_sae_loaders.NAMED_PRETRAINED_SAE_LOADERS.pop("gemma_scope_tl", None)


@pytest.mark.slow
def test_every_block_runs_and_its_numbers_are_those_of_the_plain_model(
    page: Any, hf: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the page saves what it trains
    variables: dict[str, Any] = {}
    foreign: dict[str, dict[str, Any]] = {}
    own = [block for block in blocks_of(PAGE) if block.language == "python"]
    assert len(own) >= 9
    for block in own:
        if block.runs:
            page(block, variables)
            continue
        word = block.title.split(",")[0]
        foreign[word] = dict(variables)
        page(block, foreign[word])
    model, tokens, sae = variables["model"], variables["tokens"], variables["sae"]
    with torch.no_grad():
        plain = hf(tokens, output_hidden_states=True)
        loss = torch.nn.functional.cross_entropy(plain.logits[0, :-1], tokens[0, 1:])
        hidden = plain.hidden_states[LAYER + 1]
        handle = hf.model.layers[LAYER].register_forward_hook(lambda m, a, out: sae.decode(sae.encode(out)))
        spliced = hf(tokens).logits
        handle.remove()
        assert relative_difference(spliced, plain.logits) > 1e-2
    # SAELens and ours: the same SAE, the same model
    theirs, mine = foreign["SAELens"], foreign["here"]
    for name, parameter in theirs["sae"].named_parameters():
        assert torch.equal(getattr(mine["sae"], name), parameter)
        assert torch.equal(getattr(mine["same"], name), parameter)
    with torch.no_grad():
        assert relative_difference(theirs["model"](tokens), plain.logits) < 1e-5
        assert relative_difference(mine["model"](tokens), plain.logits) < 1e-5
        assert relative_difference(model(tokens, return_type="loss"), loss) < 1e-5
    # TransformerLens's own bridge
    king = model.to_tokens("The king said")
    with torch.no_grad():
        at = hf(king, output_hidden_states=True).hidden_states[LAYER + 1]
    assert relative_difference(foreign["TransformerLens"]["resid"], at) < 1e-5
    # nnsight: what the trace saw and gave, by plain hooks; and ours on the page's own text
    traced = foreign["nnsight"]
    assert relative_difference(traced["hidden"], at) < 1e-5
    with torch.no_grad():
        handle = hf.model.layers[LAYER].register_forward_hook(lambda m, a, out: sae.decode(sae.encode(out)))
        assert relative_difference(traced["logits"], hf(king).logits) < 1e-5
        handle.remove()
        with gs.splice(model, sae, exclude_special_tokens=False):
            assert relative_difference(model(king), traced["logits"]) < 1e-5
    assert relative_difference(variables["hidden"], hidden) < 1e-5
    assert relative_difference(variables["logits"], spliced) < 1e-5


def rows_under(heading: str) -> list[list[str]]:
    """The rows of the last table of a section, without its head."""
    section = PAGE.read_text(encoding="utf-8").split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")
    ]
    return rows[2:]


def test_the_paths_of_the_nnsight_table_are_the_sites(hf: Any) -> None:
    """Several texts, every layer, both backends: transformers' own tensors at the paths that the table names."""
    rows = rows_under("From nnsight")
    assert len(rows) == len(gs.sites.SITES)
    ids = torch.randint(3, 200, (3, 7), generator=torch.Generator().manual_seed(0))
    caches = [gs.load_model("bundled", backend=backend).run_with_cache(ids)[1] for backend in BACKENDS]
    for layer in range(hf.config.num_hidden_layers):
        for path, place in rows:
            names = re.findall(r"`model\.([\w.\[\]]+)`", path.replace("[L]", f".{layer}"))
            site = get_site(re.findall(r"`(\w+)`", place)[0])
            value = seen(hf, names[0], ids)
            if "1 + weight" in path:
                assert "1 + weight" in path
                norm = hf.get_submodule("model." + names[0].rsplit(".", 1)[0])
                value = value / (1 + norm.weight)
            for cache, backend in zip(caches, BACKENDS, strict=True):
                wanted = flatten_heads(cache[site.hook_name(layer, backend)])
                assert relative_difference(value, wanted) < 1e-5, (path, backend)
            if site.is_transcoder:
                out = re.findall(r"`model\.([\w.\[\]]+)`", place.replace("[L]", f".{layer}"))[0]
                for cache, backend in zip(caches, BACKENDS, strict=True):
                    assert relative_difference(seen(hf, out, ids), cache[site.hook_name_out(layer, backend)]) < 1e-5


def seen(hf: Any, path: str, ids: torch.Tensor) -> torch.Tensor:
    """The tensor at ``layers.2.output`` or ``….input`` of the plain model."""
    name, end = path.rsplit(".", 1)
    kept: list[torch.Tensor] = []

    def hook(module: Any, args: Any, output: Any) -> None:
        kept.append(output if end == "output" else args[0])

    handle = hf.model.get_submodule(name).register_forward_hook(hook)
    with torch.no_grad():
        hf(ids, use_cache=False)
    handle.remove()
    assert isinstance(kept[0], torch.Tensor), f"{path} is no tensor"
    return kept[0]

"""The whole command on a random Gemma 2 of 2B's true widths, with SAEs that were trained on it, from a local Hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM
from transformers.models.gemma2 import modeling_gemma2
from typer.testing import CliRunner

from gemma_scope_tl.activations.writer import write_store
from gemma_scope_tl.cli import app
from gemma_scope_tl.model.loading import load_model
from gemma_scope_tl.registry import clear_cache, locate, register_release
from gemma_scope_tl.sites import Place
from gemma_scope_tl.text.rows import pack_texts
from gemma_scope_tl.text.token_rows import TokenRows
from gemma_scope_tl.training.suite import train_suite
from gemma_scope_tl.verification import measure as measuring
from tests.helpers import DEFAULT, CharTokenizerFactory
from tests.hub.conftest import hub  # noqa: F401
from tests.hub.server import LocalHub
from tests.verify.world import BOS, plain_text

pytestmark = pytest.mark.slow

TRUE = {  # Gemma 2 2B, with two layers and the letters as vocabulary
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "num_hidden_layers": 2,
}
CONTEXT, ROWS, WIDTH = 64, 26, 256
PLACES = [Place(site, layer) for site in ("res", "mlp", "transcoder") for layer in (0, 1)] + [Place("att", 1)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's folder ``model``, and ``saes`` of a short training, with the registry file ``shapes.yaml``."""
    root = tmp_path_factory.mktemp("true")
    torch.manual_seed(0)
    hf_model = Gemma2ForCausalLM(Gemma2Config(**{**DEFAULT, **TRUE}, attn_implementation="eager"))
    with torch.no_grad():
        for name, parameter in hf_model.named_parameters():
            parameter.normal_(std=0.3 if "norm" in name else 0.02)
            if "norm" in name:
                parameter.clamp_(-0.6, 0.6)  # a gain near 0 would hide its dimension
        hf_model.get_input_embeddings().weight[BOS] *= 30
        for layer in hf_model.model.layers:
            layer.mlp.down_proj.weight *= 8  # so that the post-MLP norm's input is of another size than its output
    hf_model.save_pretrained(root / "model")
    CharTokenizerFactory.get().save_pretrained(root / "model")
    model = load_model(hf_model=hf_model, tokenizer=CharTokenizerFactory.get())
    ids = pack_texts(CharTokenizerFactory.get(), [plain_text()], CONTEXT, ROWS)
    rows = TokenRows.from_ids(ids, special=(BOS, 1, 0))
    write_store(root / "store", model, rows, PLACES, progress=False)
    _train(root)
    return root


def _train(root: Path) -> None:
    grid = [
        {
            "sites": [place.site],
            "layers": [place.layer],
            "widths": [WIDTH],
            "target_l0s": [12],
            "steps": 300 if place.site == "transcoder" else 100,  # whose target is harder
        }
        for place in PLACES
    ]
    config = {
        "output": str(root / "run"),
        "source": {"kind": "store", "path": str(root / "store"), "bucket_rows": 1536, "scale_rows": 1536},
        "recipe": {"preset": "fast", "batch_size": 512, "lr": 1.5e-3},  # that of fast is too high for 100 steps
        "steps": 300,
        "grid": grid,
        "eval_batches": 2,
    }
    train_suite(config, force=True, progress=False)
    rows = ["release: shapes\nrepo: me/shapes-saes\nmodel: shapes\nlicense: MIT\ndescription: d\nsaes:"]
    for file in sorted((root / "run").rglob("params.npz")):
        path = file.parent.relative_to(root / "run").as_posix()
        site, layer, _, l0 = path.split("/")
        shutil.copytree(file.parent, root / "saes" / path)
        rows.append(
            f"  - {{id: {path}, site: {site}, layer: {layer.removeprefix('layer_')}, width: '{WIDTH}', d_sae: {WIDTH}, "
            f"d_in: {2048 if site == 'att' else 2304}, l0: {l0.removeprefix('average_l0_')}, path: {path}}}"
        )
    (root / "shapes.yaml").write_text("\n".join([*rows, ""]))


@pytest.fixture
def run(
    made: Path,
    hub: LocalHub,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Publish the model and the files, which may be changed before, and run the command."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locate, "_registered", dict(locate._registered))
    (tmp_path / "text.txt").write_text(plain_text()[-4000:])
    shutil.copytree(made / "saes", tmp_path / "saes")
    register_release(made / "shapes.yaml")
    hub.repo("me/shapes").commit_folder(made / "model")

    def go(*arguments: str) -> dict[str, Any]:
        hub.repo("me/shapes-saes").commit_folder(tmp_path / "saes")
        common = ["verify", "me/shapes", "--sae-model", "shapes", "--texts", "text.txt", "--context", str(CONTEXT)]
        result = CliRunner().invoke(app, [*common, "--tokens", "128", "--yes", "--json", *arguments])
        report = json.loads(result.stdout)
        assert result.exit_code == (0 if report["verdict"] == "pass" else 1), result.output
        assert report == json.loads((tmp_path / "verify-shapes" / "report.json").read_text())
        return report

    yield go
    clear_cache()


def faults(report: dict[str, Any]) -> dict[str, list[str]]:
    """The kinds of faults by site and layer."""
    return {f"{one['site']} {one['layer']}": [f["kind"] for f in one["faults"]] for one in report["saes"]}


def test_the_right_files_pass(run: Callable[..., dict[str, Any]]) -> None:
    report = run()
    assert report["verdict"] == "pass" and report["faults"] == [] and len(report["saes"]) == len(PLACES)
    assert report["model"]["dims"] == {"n_layers": 2, "d_model": 2304, "n_heads": 8, "d_head": 256}
    scale = report["model_checks"]["embedding_scale"]
    assert scale["measured"] == pytest.approx(48, rel=1e-5) and report["model_checks"]["norms"]["wrong"] == 0


def test_faults_of_files_are_named(run: Callable[..., dict[str, Any]], made: Path, tmp_path: Path) -> None:
    """Swapped layers, an SAE of another hook, a scale that is not folded, and a transcoder of another target."""
    files = {
        path.parent.relative_to(tmp_path / "saes").as_posix().rpartition("/width")[0]: path
        for path in (tmp_path / "saes").rglob("params.npz")
    }
    first, second = (files[f"res/layer_{layer}"].read_bytes() for layer in (0, 1))
    files["res/layer_0"].write_bytes(second)
    files["res/layer_1"].write_bytes(first)
    files["mlp/layer_0"].write_bytes(first)  # an SAE of the residual stream
    scale = json.loads((made / "run" / "suite.json").read_text())["scales"]["mlp/layer_1"]
    _edit(files["mlp/layer_1"], lambda a: {name: a[name] / scale for name in ("b_enc", "b_dec", "threshold")})
    weights = Gemma2ForCausalLM.from_pretrained(made / "model").model
    gain = 1 + weights.layers[0].post_feedforward_layernorm.weight.detach().numpy()
    _edit(files["transcoder/layer_0"], lambda a: {name: a[name] / gain for name in ("W_dec", "b_dec")})
    report = run()
    assert faults(report) == {
        "res 0": ["layer"],
        "res 1": ["layer"],
        "mlp 0": ["hook"],
        "mlp 1": ["not-folded"],
        "transcoder 0": ["target"],
        "transcoder 1": [],
        "att 1": [],
    }
    said = " ".join(fault["text"] for fault in report["faults"])
    assert "fits res/layer_1 better than res/layer_0" in said and "fits res/layer_0 better than res/layer_1" in said
    assert "fits site 'res' (blocks.0.hook_out) better than mlp/layer_0" in said
    assert "fits the target blocks.0.ln2_post.hook_normalized better than mlp/layer_0" in said


def _edit(file: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    with np.load(file) as held:
        arrays = dict(held)
    np.savez(file, **(arrays | change(arrays)))


def test_faults_of_the_model_are_named(run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """An embedding without its scale, and norms without the 1 in their gain, in plain Hugging Face as well."""
    plain = torch.nn.Embedding.forward
    monkeypatch.setattr(modeling_gemma2.Gemma2TextScaledWordEmbedding, "forward", plain)

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return (self._norm(x.float()) * self.weight.float()).type_as(x)

    monkeypatch.setattr(modeling_gemma2.Gemma2RMSNorm, "forward", forward)
    report = run("--site", "res", "--layer", "0")
    scale, norm = report["faults"][:2]
    assert scale["kind"] == "embedding-scale" and "by 1 in place of 48" in scale["text"]
    assert norm["kind"] == "norm" and "without adding 1" in norm["text"]
    assert report["model_checks"]["norms"] == {"checked": 8, "wrong": 8}


def test_bos_is_named(run: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "special_token_ids", lambda tokenizer: (0, 1))
    assert faults(run("--site", "res", "--layer", "1")) == {"res 1": ["first-token"]}

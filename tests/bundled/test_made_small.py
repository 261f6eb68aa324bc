"""The second bundled model, made at a tiny size by the scripts: trained, exported, loaded by name, spliced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma3ForCausalLM

import gemma_scope_tl as gs
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.files import file_sha256
from gemma_scope_tl.model.plain import relative_difference
from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from gemma_scope_tl.sites import BACKENDS
from scripts import demo
from scripts.bundled import sae_suite
from scripts.bundled.sae_publish import label_of
from scripts.bundled.train_model import Trainer, checkpoint_model
from tests.bundled.small import SMALL, STEPS, TRAINING, Made, made, read_json, write_work
from tests.parity.test_splice import ROUNDING, spliced_by_hand

KINDS = [("res", None), ("mlp", None), ("att", None), ("transcoder", False), ("transcoder", True)]
FOLDERS = {"res": "resid_post_all", "mlp": "mlp_out_all", "att": "attn_out_all", "transcoder": "transcoder_all"}
NAME = SMALL.name


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    with made(tmp_path_factory.mktemp("made")) as found:
        yield found


@pytest.fixture(scope="module")
def plain(bundle: Made) -> Any:
    """The exported model as plain Hugging Face loads it."""
    folder = bundle.bundle.model_folder
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module", params=BACKENDS)
def hooked(bundle: Made, request: pytest.FixtureRequest) -> Any:
    """By name; the self-check of `load_model` compares it with plain Hugging Face."""
    return gs.load_model(NAME, backend=request.param)


def test_the_export_is_the_checkpoint_rounded(bundle: Made, plain: Any) -> None:
    assert type(plain) is Gemma3ForCausalLM
    trained, step = checkpoint_model(bundle.work, SMALL)
    assert step == TRAINING.steps
    own = plain.state_dict()
    for name, value in trained.state_dict().items():
        assert torch.equal(own[name], value.bfloat16().float()), name
    config = read_json(bundle.bundle.model_folder / "config.json")
    assert config["dtype"] == "bfloat16"
    assert config["layer_types"] == ["sliding_attention"] * 5 + ["full_attention"]
    assert config["num_attention_heads"] * config["head_dim"] > config["hidden_size"]
    assert config["num_key_value_heads"] == 1
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (bundle.bundle.model_folder / name).read_bytes() == (BUNDLED_MODEL / name).read_bytes()


def test_the_model_learned_and_the_card_says_what_rounding_costs(bundle: Made) -> None:
    rows = [row for row in sae_suite.read_jsonl(bundle.bundle.model_folder / "training.jsonl") if "loss" in row]
    assert len(rows) == TRAINING.steps
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.05
    rounding = bundle.metrics["rounding"]
    # bfloat16 keeps eight bits: a relative error of 0.2 % of each weight
    assert rounding["mean_bits_per_byte_before"] == pytest.approx(bundle.metrics["mean_bits_per_byte"], rel=0.01)
    card = (bundle.bundle.model_folder / "README.md").read_text()
    assert "A small Gemma 3" in card
    assert "Gemma 2" not in card
    assert f"{bundle.metrics['mean_bits_per_byte']:.4f} bits per byte" in card


def test_a_stopped_training_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    write_work(tmp_path)
    whole = Trainer(tmp_path, SMALL, TRAINING)
    whole.run()
    wanted = {name: value.clone() for name, value in whole.model.state_dict().items()}
    (tmp_path / SMALL.run / "checkpoint.pt").unlink()
    stopped = Trainer(tmp_path, SMALL, TRAINING)
    step = stopped.train_step
    count = 0

    def stops(tokens: torch.Tensor) -> tuple[float, float]:
        nonlocal count
        count += 1
        if count == 4:
            stopped.save()
            raise KeyboardInterrupt
        return step(tokens)

    stopped.train_step = stops  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        stopped.run()
    resumed = Trainer(tmp_path, SMALL, TRAINING, resume=True)
    assert resumed.step == 3
    resumed.run()
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, wanted[name]), name


def test_it_is_loaded_by_name(hooked: Any, plain: Any) -> None:
    assert hooked.model_id == NAME
    assert hooked.family.title == "Gemma 3"
    tokens = torch.randint(5, 2048, (2, 40), generator=torch.Generator().manual_seed(0))  # beyond the window of 8
    tokens[:, 0] = 2
    with torch.no_grad():
        assert relative_difference(hooked(tokens), plain(tokens).logits) < ROUNDING
    ids = AutoTokenizer.from_pretrained(BUNDLED_MODEL)("<start_of_turn>user\nIn the beginning").input_ids
    assert hooked.to_tokens("<start_of_turn>user\nIn the beginning")[0].tolist() == ids


@pytest.mark.parametrize(("site", "affine"), KINDS)
@pytest.mark.parametrize("layer", [1, 5])
def test_a_coder_of_each_kind_is_spliced_by_name(
    bundle: Made, hooked: Any, plain: Any, site: str, affine: bool | None, layer: int
) -> None:
    sae = gs.load_sae(NAME, site, layer, width="256", l0="small", affine=affine)
    assert (getattr(sae, "W_skip", None) is not None) == bool(affine)
    tokens = torch.randint(5, 2048, (2, 24), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = 2
    wanted = spliced_by_hand(plain, tokens, [sae])
    with torch.no_grad(), hooked.saes(saes=[sae]):
        found = hooked(tokens)
        assert relative_difference(found, wanted) < ROUNDING
    with torch.no_grad():
        assert relative_difference(hooked(tokens), wanted) > 100 * ROUNDING  # the splice does something


def test_rows_name_the_files_and_their_targets(bundle: Made) -> None:
    rows = gs.list_saes(model=NAME)
    assert len(rows) == len(bundle.published) == 6 * (2 + 1 + 1 + 2)
    targets = {"small": [10, 15, 20, 20, 20, 20], "medium": [30, 45, 60, 60, 60, 60]}
    for row in rows.itertuples():
        folder = bundle.bundle.folder / "saes" / str(row.path)
        tail = "_affine" if row.affine else ""
        assert row.path == f"{FOLDERS[str(row.site)]}/layer_{row.layer}_width_256_l0_{row.label}{tail}"
        assert row.l0 == targets[str(row.label)][int(str(row.layer))]
        assert row.sha256 == file_sha256(folder / "params.safetensors")
        config = read_json(folder / "config.json")
        assert (config["l0"], config["width"], config["affine_connection"]) == (row.l0, 256, row.affine)
        assert config["model_name"] == NAME
        assert config["type"] == ("transcoder" if row.site == "transcoder" else "sae")
        arrays = load_file(folder / "params.safetensors")
        names = {"w_enc", "w_dec", "b_enc", "b_dec", "threshold"} | (
            {"affine_skip_connection"} if row.affine else set()
        )
        assert set(arrays) == names
        assert {name: a.dtype for name, a in arrays.items()} == {
            name: torch.float32 if name == "threshold" else torch.bfloat16 for name in names
        }
        assert (arrays["threshold"] > 0).all()
        # five significant bits leave 3 of the 7 that bfloat16 stores 0
        assert not (arrays["w_enc"].view(torch.int16) & ((1 << 3) - 1)).any()
        assert arrays["w_enc"].any()


def test_the_trained_skip_connections_are_not_zero(bundle: Made) -> None:
    for layer in range(6):
        sae = gs.load_sae(NAME, "transcoder", layer, width="256", l0="small", affine=True)
        assert sae.W_skip.abs().max() > 0


def test_the_suite_card_has_every_row_and_the_penalties(bundle: Made) -> None:
    card = (bundle.bundle.folder / "saes" / "README.md").read_text()
    for p in bundle.published:
        assert f"| `{p.folder}` | {p.target:g} | {p.metrics['l0']:.1f} | {p.metrics['fvu']:.4f} |" in card
    assert "| l0_penalty | quadratic | quadratic |" in card
    assert f"{STEPS} steps of 128 activations" in card
    assert {p.recipe.l0_penalty for p in bundle.published} == {"quadratic"}


def test_the_tour_shows_a_coder_of_each_kind(bundle: Made, capsys: pytest.CaptureFixture[str]) -> None:
    demo.show_second([demo.SENTENCE * 30])
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    assert any("a small Gemma 3" in line for line in lines)
    shown = [line for line in lines if ", layer 2" in line]
    assert [line.split(",")[0] for line in shown] == [site for site, _ in KINDS]
    assert "with skip" in shown[-1]


def test_labels_are_those_of_the_released_formula() -> None:
    assert [label_of(10, 0, 18), label_of(60, 17, 18), label_of(150, 9, 18)] == ["small", "medium", "big"]
    with pytest.raises(GemmaScopeError, match="No label means an L0 of 21"):
        label_of(21, 3, 6)


def test_a_suite_that_is_too_large_is_not_published(
    bundle: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sae_suite, "LIMIT", 1000)
    suite = bundle.work.parent / "suite"
    before = sorted(bundle.bundle.folder.rglob("*"))
    with pytest.raises(ValueError, match="more than 1,000"):
        sae_suite.publish(suite, SMALL, windows=4, report=lambda line: None, registry=tmp_path)
    assert not list(tmp_path.iterdir())
    assert sorted(bundle.bundle.folder.rglob("*")) == before

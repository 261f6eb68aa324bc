"""The whole verification on a small model: downloads from a local Hub, resuming, the report, and the command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

import gemma_scope_tl as gs
from gemma_scope_tl.cli import app
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.model.loading import load_model
from gemma_scope_tl.registry import clear_cache, locate, register_release
from gemma_scope_tl.verification import examine
from gemma_scope_tl.verification import measure as measuring
from gemma_scope_tl.verification.examine import combined
from gemma_scope_tl.verification.run import prepare, verify
from tests.helpers import CharTokenizerFactory
from tests.hub.conftest import hub  # noqa: F401
from tests.hub.server import LocalHub
from tests.verify.world import CONTEXT, World, plain_text, row_of, small_gemma, write_release

PLACES = [("res", 1), ("res", 2), ("mlp", 1), ("mlp", 2), ("att", 1), ("transcoder", 1), ("transcoder", 2)]


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "no-config"))
    monkeypatch.setenv("GEMMA_SCOPE_TL_CACHE", str(tmp_path / "record"))
    before = dict(locate._registered)
    clear_cache()
    yield
    locate._registered.clear()
    locate._registered.update(before)
    clear_cache()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(plain_text()[-6000:])
    return tmp_path / "text.txt"


def entries(small: World, change: Callable[[dict[Any, Any]], None] | None = None) -> list[Any]:
    """Rows of all places with their arrays, some of which ``change`` swaps: rows keep the L0 of the right SAE."""
    arrays = {place: small.arrays(*place) for place in PLACES}
    rows = {place: row_of(*place, arrays[place], round(small.l0(arrays[place], *place), 2)) for place in PLACES}
    if change is not None:
        change(arrays)
    return [(rows[place], arrays[place]) for place in PLACES]


def checked(small: World, text: Path, **more: Any) -> Any:
    options = {"sample": 7, "sae_model": "small", "texts": text, "tokens": 16 * CONTEXT, "context": CONTEXT}
    return verify(small.model, **{**options, "progress": False, **more})


def test_a_right_suite_passes(small: World, text: Path, tmp_path: Path) -> None:
    register_release(write_release(tmp_path, entries(small)))
    report = checked(small, text, out=tmp_path / "out")
    assert report.ok and report.faults == [] and [one["status"] for one in report.saes] == ["pass"] * 7
    assert report.path == tmp_path / "out" / "report.json"
    content = json.loads(report.path.read_text())
    assert content == report.content and content["format"] == 1
    assert content["model"]["fingerprint"] and content["versions"]["torch"] and content["machine"]["cpus"]
    assert content["text"]["rows"] == 16 and content["text"]["left_out_ids"] == [0, 1, 2]
    assert sum(one["bfloat16"] is not None for one in report.saes) == 2  # every fourth, from the second
    for one in report.saes:
        assert one["measured"]["l0_low"] < one["measured"]["l0"] < one["measured"]["l0_high"]
        assert one["measured"]["fvu"] == pytest.approx(one["fit"]["own"]["fvu"], rel=0.2)  # of other tokens


def test_planted_faults_are_named(small: World, text: Path, tmp_path: Path) -> None:
    """Four faults in one suite, each named for its SAE; the other SAEs pass."""

    def change(arrays: dict[Any, Any]) -> None:
        arrays["res", 1], arrays["res", 2] = arrays["res", 2], arrays["res", 1]
        scale = float(small.probe.hook("blocks.1.ln2_post.hook_out").square().sum(-1).mean().sqrt())
        for name in ("b_enc", "b_dec", "threshold"):
            arrays["mlp", 1][name] /= scale
        arrays["transcoder", 2]["W_dec"] = arrays["transcoder", 1]["W_dec"] * -1

    register_release(write_release(tmp_path, entries(small, change)))
    report = checked(small, text)
    kinds = {one["path"].rpartition("/width")[0]: [f["kind"] for f in one["faults"]] for one in report.saes}
    assert not report.ok and report.path is None
    assert kinds["res/layer_1"] == kinds["res/layer_2"] == ["layer"]
    assert kinds["mlp/layer_1"] == ["not-folded"]
    assert kinds["transcoder/layer_2"] == ["fvu"]  # what no alternative explains is reported as it is
    assert kinds["mlp/layer_2"] == kinds["att/layer_1"] == kinds["transcoder/layer_1"] == []
    assert {fault.kind for fault in report.faults} == {"layer", "not-folded", "fvu"}


def test_a_site_whose_hook_is_wrong_everywhere(small: World, text: Path, tmp_path: Path) -> None:
    from tests.verify.world import fitted

    def change(arrays: dict[Any, Any]) -> None:
        for layer in (1, 2):
            x = small.probe.hook(f"blocks.{layer}.ln2_post.hook_in")
            arrays["mlp", layer] = fitted(x, x)

    register_release(write_release(tmp_path, entries(small, change)))
    report = checked(small, text, sites=["mlp"])
    shared = [fault for fault in report.faults if fault.text.startswith("All 2 SAEs of site 'mlp'")]
    assert len(shared) == 1 and "blocks.L.ln2_post.hook_in" in shared[0].text and "not the files" in shared[0].text


def test_swapped_files_of_two_l0s(small: World, text: Path, tmp_path: Path) -> None:
    sparse, dense = small.arrays("mlp", 1, share=1.5), small.arrays("mlp", 1, share=0.1)
    pairs = [(row_of("mlp", 1, one, round(small.l0(one, "mlp", 1), 1)), one) for one in (sparse, dense)]
    (first, a), (second, b) = pairs
    assert first.l0 and second.l0 and second.l0 > 3 * first.l0
    register_release(write_release(tmp_path, [(first, b), (second, a)]))
    report = checked(small, text)
    assert [fault.kind for fault in report.faults] == ["label", "label"]
    assert second.path in report.faults[0].text or first.path in report.faults[0].text


def test_bos_is_named_when_it_is_counted(
    small: World, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_release(write_release(tmp_path, entries(small)))
    monkeypatch.setattr(measuring, "special_token_ids", lambda tokenizer: (0, 1))
    report = checked(small, text, sites=["res"])
    assert [fault.kind for fault in report.faults] == ["first-token", "first-token"]


def test_an_interrupted_run_continues(
    small: World, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_release(write_release(tmp_path, entries(small)))
    begun: list[str] = []
    plain = examine.diagnose

    def counted(model: Any, sae: Any, row: Any, *more: Any) -> Any:
        begun.append(row.path)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return plain(model, sae, row, *more)

    monkeypatch.setattr(examine, "diagnose", counted)
    with pytest.raises(KeyboardInterrupt):
        checked(small, text, out=tmp_path / "out", sample=4)
    assert not (tmp_path / "out" / "report.json").exists()
    report = checked(small, text, out=tmp_path / "out", sample=4)
    assert report.ok and len(begun) == 5 and len(set(begun)) == 4  # the third alone is done again
    assert begun[2] == begun[3]
    checked(small, text, out=tmp_path / "out", sample=4)
    assert len(begun) == 5
    checked(small, text, out=tmp_path / "out", sample=4, tokens=8 * CONTEXT)  # another text: nothing is reused
    assert len(begun) == 9


def test_a_file_that_is_corrupt_or_absent(small: World, text: Path, tmp_path: Path) -> None:
    register_release(write_release(tmp_path, entries(small)))
    files = sorted((tmp_path / "saes").rglob("params.npz"))
    files[0].write_bytes(files[0].read_bytes()[:-4000])
    files[1].unlink()
    report = checked(small, text)
    assert sorted(fault.kind for fault in report.faults) == ["file", "file"]
    assert sum(one["status"] == "pass" for one in report.saes) == 5


# --- the Hub and the command


@pytest.fixture
def published(small: World, hub: LocalHub, tmp_path: Path) -> LocalHub:  # noqa: F811
    """The model and the SAEs on a local Hub, and the release in the registry."""
    hf_model = small_gemma()
    hf_model.save_pretrained(tmp_path / "model")
    CharTokenizerFactory.get().save_pretrained(tmp_path / "model")
    hub.repo("me/small").commit_folder(tmp_path / "model")
    register_release(write_release(tmp_path, entries(small), repo="me/small-saes"))
    hub.repo("me/small-saes").commit_folder(tmp_path / "saes")
    return hub


ARGUMENTS = ["verify", "me/small", "--sae-model", "small", "--sample", "4", "--tokens", str(16 * CONTEXT)]


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*ARGUMENTS, *arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stdout


def test_the_command(published: LocalHub, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--texts", str(text), "--context", str(CONTEXT)]
    plan = json.loads(run(*common, "--dry-run", "--json"))
    weights = {f["path"]: f["bytes"] for f in plan["files"] if f["kind"] == "model"}
    assert weights["model.safetensors"] == (tmp_path / "model" / "model.safetensors").stat().st_size
    saes = [f for f in plan["files"] if f["kind"] == "SAE"]
    assert plan["not_in_bytes"] == []
    assert len(saes) == 4 and not any(f["here"] or f["estimated"] for f in plan["files"])
    assert all(f["bytes"] == (tmp_path / "saes" / f["path"]).stat().st_size for f in saes)
    assert not list(tmp_path.rglob("verify-small")) and not published.requests("GET", "cdn")
    with pytest.raises(GemmaScopeError, match="Nothing was downloaded: add --yes"):
        CliRunner().invoke(app, [*ARGUMENTS, *common], catch_exceptions=False)
    assert not published.requests("GET", "cdn")
    printed = run(*common, "--yes")
    assert "pass; the report: verify-small/report.json" in printed and "4 SAEs on 16 x 48 tokens" in printed
    sent = len(published.log)
    again = json.loads(run(*common, "--offline", "--json"))
    assert again["verdict"] == "pass" and len(published.log) == sent and constants.HF_HUB_OFFLINE is False
    assert "nothing to download" in run(*common, "--offline", "--dry-run")


def test_a_dry_run_says_that_the_size_of_the_model_is_unknown(
    published: LocalHub, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    common = ["--texts", str(text), "--context", str(CONTEXT), "--offline", "--dry-run"]
    printed = " ".join(run(*common).split())
    assert "6 files or more: at least 0.00 GB, and the model's weights, whose size is unknown" in printed
    plan = json.loads(run(*common, "--json"))
    assert plan["not_in_bytes"] == ["me/small/the model's weights", "me/small/config.json"]


def test_the_command_fails_on_a_fault(
    small: World, published: LocalHub, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    repo = published.repos["models", "me/small-saes"]
    names = [name for name in repo.commits[repo.branches["main"]].files if name.startswith("res/")]
    first, second = ((tmp_path / "saes" / name).read_bytes() for name in names)
    repo.commit({names[0]: second, names[1]: first})
    arguments = ["--texts", str(text), "--context", str(CONTEXT), "--site", "res", "--yes"]
    printed = run(*arguments, code=1)
    assert printed.count("fault (layer)") == 2 and "fail; the report" in printed


def test_what_the_hub_does_not_have(published: LocalHub, text: Path, small: World) -> None:
    repo = published.repos["models", "me/small-saes"]
    name = next(name for name in repo.commits[repo.branches["main"]].files if name.startswith("att/"))
    repo.commit({name: None})
    ready = prepare(small.model, sae_model="small", sites=["att"])
    assert [row.weights_path for row in ready.plan.missing] == [name] and not ready.plan.to_download
    report = checked(small, text, prepared=ready)
    assert [fault.kind for fault in report.faults] == ["file"] and "has no att/" in report.faults[0].text
    monkey = [chosen.row.model_copy(update={"unverified": True}) for chosen in ready.sample]
    from dataclasses import replace

    unsure = replace(
        ready, sample=tuple(replace(c, row=r) for c, r in zip(ready.sample, monkey, strict=True)),
        plan=replace(ready.plan, missing=tuple(monkey)),
    )  # fmt: skip
    assert checked(small, text, prepared=unsure).content["verdict"] == "nothing measured"


def test_offline_needs_everything_here(published: LocalHub, small: World) -> None:
    with pytest.raises(
        GemmaScopeError, match="Not on this machine: 9 files or more: at least 0.00 GB, and the model's weights, whose"
    ):
        verify("me/small", sae_model="small", offline=True)
    with pytest.raises(GemmaScopeError, match="download=True"):
        verify("me/small", sae_model="small")
    assert not published.requests("GET", "cdn")


def test_a_model_that_the_check_refuses(
    published: LocalHub, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gemma_scope_tl.families.gemma2 import GEMMA2

    monkeypatch.setitem(
        GEMMA2.sites,
        "mlp",
        _with(GEMMA2.sites["mlp"], bridge="blocks.{layer}.mlp.hook_out"),  # type: ignore[index]
    )
    report = verify("me/small", sae_model="small", texts=text, download=True, progress=False)
    (fault,) = report.faults
    assert fault.kind == "model" and "blocks.0.mlp.hook_out" in fault.text and report.saes == []


def test_a_model_that_overflows_in_float16(hub: LocalHub, text: Path, tmp_path: Path, small: World) -> None:  # noqa: F811
    """The check refuses NaN as a difference; the verification says where they come from."""
    hf_model = small_gemma()
    with torch.no_grad():
        hf_model.get_input_embeddings().weight *= 3e4
    hf_model.save_pretrained(tmp_path / "large")
    CharTokenizerFactory.get().save_pretrained(tmp_path / "large")
    register_release(write_release(tmp_path, entries(small)))
    options = {"sae_model": "small", "texts": text, "context": CONTEXT, "progress": False}
    (fault,) = verify(tmp_path / "large", dtype="float16", **options).faults
    assert fault.kind == "not-finite" and "res/layer_0" in fault.text and "bfloat16" in fault.text


def test_what_explains_what() -> None:
    from gemma_scope_tl.verification.diagnosis import Fault

    layer, unit, label, fvu, loss = (Fault(kind, kind) for kind in ("layer", "folded-twice", "label", "fvu", "loss"))
    assert combined([], [label, loss]) == ([label, loss], [])
    assert combined([layer], [label, fvu, loss]) == ([layer], [label, fvu, loss])
    assert combined([unit], [label]) == ([label], [unit])
    assert combined([unit], [label, fvu]) == ([unit], [label, fvu])


def _with(site: Any, **changes: Any) -> Any:
    from dataclasses import replace

    return replace(site, **changes)


def test_gs_has_it() -> None:
    assert gs.verify is verify and torch.get_num_threads() > 0


@pytest.mark.parametrize("changed", [{"final_logit_softcapping": 5.0}, {"query_pre_attn_scalar": 4}])
def test_another_configuration_is_measured_anew(
    changed: dict[str, Any], small: World, text: Path, tmp_path: Path
) -> None:
    """As after a repair of ``config.json``: the weights are the same, and every loss is another."""
    register_release(write_release(tmp_path, entries(small)))
    options: dict[str, Any] = {"sample": 1, "sites": ["res"], "layers": [1], "out": tmp_path / "out"}
    first = checked(small, text, **options)
    model = load_model(hf_model=small_gemma(**changed), tokenizer=CharTokenizerFactory.get())
    options |= {"sae_model": "small", "texts": text, "tokens": 16 * CONTEXT, "context": CONTEXT, "progress": False}
    other = verify(model, **options)
    assert other.content["model"]["fingerprint"] == first.content["model"]["fingerprint"]
    losses = [one.saes[0]["measured"]["loss_clean"] for one in (first, other)]
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


def test_hooks_are_refused_where_results_are_kept(small: World, text: Path, tmp_path: Path) -> None:
    register_release(write_release(tmp_path, entries(small)))
    options: dict[str, Any] = {"sample": 1, "sites": ["res"], "layers": [1]}
    with small.model.hooks([("blocks.0.hook_resid_post", lambda value, hook: value * 0.5)]):
        with pytest.raises(GemmaScopeError, match=r"hooks on the model.*verify without out="):
            checked(small, text, out=tmp_path / "out", **options)
        hooked = checked(small, text, **options).saes[0]["measured"]
    after = checked(small, text, out=tmp_path / "out", **options).saes[0]["measured"]
    assert after["loss_clean"] != pytest.approx(hooked["loss_clean"], rel=1e-3)

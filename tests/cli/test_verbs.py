"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from typer.testing import CliRunner

from gemma_scope_tl.cli import app


def _run(*args: str) -> Any:
    result = CliRunner().invoke(app, list(args), catch_exceptions=False, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout


def _json(*args: str) -> Any:
    return json.loads(_run(*args, "--json"))


def test_list_and_summary() -> None:
    rows = _json("list", "*layer_20/width_16k*", "--model", "gemma-2-2b", "--site", "res")
    assert sorted(row["l0"] for row in rows) == [20, 38, 71, 139, 294] or len(rows) == 5
    assert {row["layer"] for row in rows} == {20}
    summary = _json("list", "--summary", "--model", "gemma-2-2b")
    counts = {(row["site"], row["width"]): row["SAEs"] for row in summary}
    assert counts["mlp", "16k"] == 130
    assert counts["att", "65k"] == 130
    assert sum(row["SAEs"] for row in summary) == 316 + 260 + 260 + 153
    assert "SAEs" in _run("list", "--summary")


def test_show() -> None:
    facts = _json("show", "gemma-scope-2b-pt-res", "layer_20/width_16k/canonical")
    assert facts["l0"] == 71
    assert facts["hook_bridge"] == "blocks.20.hook_out"
    assert facts["hook_hooked_transformer"] == "blocks.20.hook_resid_post"
    transcoder = _json("show", "gemma-scope-2b-pt-transcoders", "layer_0/width_16k/average_l0_76")
    assert transcoder["hook_bridge_out"] == "blocks.0.ln2_post.hook_out"
    assert "residual stream" in transcoder["neuronpedia_warning"] and transcoder["unverified"] is False
    assert "neuronpedia_warning" in _run("show", "gemma-scope-2b-pt-transcoders", "layer_0/width_16k/average_l0_76")
    assert _json("show", "gemma-scope-2b-pt-transcoders", "layer_0/width_16k/average_l0_288")["unverified"] is True


def test_unverified_saes_are_listed_as_such() -> None:
    place = ("--model", "gemma-2-2b", "--site", "transcoder", "--layer", "5")
    assert [(row["l0"], row["unverified"]) for row in _json("list", *place)] == [(87, False), (153, True), (272, True)]
    assert "3 SAEs, 2 of them unverified" in _run("list", *place)
    assert "unverified" not in _run("list", "--model", "gemma-2-2b", "--site", "mlp")
    (row,) = _json("list", "--summary", *place)
    assert row["unverified"] == 2


@pytest.mark.slow
def test_features_of_the_bundled_suite() -> None:
    rows = _json("features", "And God said", "--layer", "1", "--site", "mlp", "--top", "2")
    assert rows
    assert {row["site"] for row in rows} == {"mlp"}
    assert {row["layer"] for row in rows} == {1}
    assert "And" in _run("features", "And God said", "--top", "2")


@pytest.mark.slow
def test_steering_changes_the_text() -> None:
    result = _json("steer", "The king", "--latent", "3", "--scale", "60", "--tokens", "12")
    assert result["plain"].startswith("The king")
    assert result["steered"].startswith("The king")
    assert result["plain"] != result["steered"]
    nothing = _json("steer", "The king", "--latent", "3", "--scale", "0", "--tokens", "12")
    assert nothing["plain"] == nothing["steered"] == result["plain"]


@pytest.mark.parametrize("command", ["list", "show", "features", "steer", "eval", "doctor"])
def test_help_has_examples(command: str) -> None:
    assert f"gemma-scope {command}" in _run(command, "--help").replace("\n", " ")


def test_errors_are_one_line_and_status_one() -> None:
    code = "from gemma_scope_tl.cli import main; main()"
    out = subprocess.run(
        [sys.executable, "-c", code, "list", "--site", "ress"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        check=False,
    )
    assert out.returncode == 1
    assert "Unknown site 'ress'. Nearest: res" in out.stderr
    assert "Traceback" not in out.stderr


def test_doctor_passes_here() -> None:
    facts = _json("doctor")
    assert "equal to plain Hugging Face" in facts["bundled model on bridge"]
    assert "equal to plain Hugging Face" in facts["bundled model on hooked_transformer"]


def test_clamping_in_place_of_steering() -> None:
    found = _json("steer", "The king", "--latent", "12", "--clamp", "8", "--tokens", "4")
    assert found["clamp"] == 8
    assert found["scale"] is None
    for wrong in ([], ["--scale", "3", "--clamp", "3"]):
        result = CliRunner().invoke(app, ["steer", "The king", "--latent", "12", *wrong])
        assert result.exit_code == 2
        assert "one of --scale and --clamp" in result.output


def test_top_tokens() -> None:
    rows = _json("top-tokens", "--latent", "12", "--k", "3")
    assert [row["kind"] for row in rows].count("promoted") == 3
    logits = [row["logit"] for row in rows if row["kind"] == "promoted"]
    assert logits == sorted(logits, reverse=True)


def test_attribution_of_a_logit() -> None:
    rows = _json("attribute", "In the beginning God created the heaven and the", "--target", " earth", "--top", "5")
    kinds = [row["kind"] for row in rows]
    assert kinds.count("latent") == 5
    assert {"error", "bias"} <= set(kinds)


def test_long_tables_are_whole_lines() -> None:
    """A pipe gets every row on one line, with nothing cut."""
    lines = _run("list", "--release", "gemma-scope-2b-pt-res").splitlines()
    assert len(lines) == 1 + 316 + 1
    assert any("layer_20/width_16k/average_l0_71" in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize(
    "call",
    [
        ("features", "And God said"),
        ("steer", "The king", "--latent", "12", "--scale", "3", "--tokens", "2"),
        ("top-tokens", "--latent", "12", "--top", "2"),
        ("attribute", "In the beginning God created the heaven and the", "--target", " earth", "--top", "2"),
    ],
    ids=lambda call: call[0],
)
@pytest.mark.parametrize("width", [None, "1k"])
def test_which_sae_an_answer_is_of(call: tuple[str, ...], width: str | None) -> None:
    """Text and JSON name the SAE, which without ``--width`` is the narrowest."""
    chosen = () if width is None else ("--width", width)
    found = _json(*call, *chosen)
    for row in found if isinstance(found, list) else [found]:
        assert row["release"] == "bundled-res"
        assert row["id"].startswith(f"layer_2/width_{width or 256}/")
    name = f"{row['release']} {row['id']}"
    assert re.search(rf"^SAE:? +{re.escape(name)}$", _run(*call, *chosen), flags=re.MULTILINE)


def test_an_empty_answer_names_its_sae_too() -> None:
    result = CliRunner().invoke(app, ["features", "<bos>", "--json"], catch_exceptions=False)
    assert json.loads(result.stdout) == []
    assert "bundled-res layer_2/width_256/" in result.stderr


def test_the_command_shows_the_latents_of_the_python_beside_it() -> None:
    """The pages' ``--width 1k`` and ``width="1k"`` are the same SAE."""
    import gemma_scope_tl as gs

    model, sae = gs.load_model("bundled"), gs.load_sae("bundled", "res", layer=2, width="1k")
    text = "And God said, Let there be light"
    rows = _json("features", text, "--top", "3", "--width", "1k")
    assert [row["latent"] for row in rows] == gs.features(model, text, sae, top=3)["latent"].tolist()

"""Wrong calls: one line and a status, at once, and never a traceback."""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.main import get_command

from gemma_scope_tl.attributions.gradients import METHODS
from gemma_scope_tl.cli import app, checks, failures
from gemma_scope_tl.cli import output as tables
from gemma_scope_tl.cli.command import Verb
from gemma_scope_tl.cli.failures import run
from gemma_scope_tl.dtypes import DTYPES, parse_dtype
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.run import ABLATIONS
from gemma_scope_tl.families import bundled_names, hub_ids
from gemma_scope_tl.interp.controls import SCORES
from gemma_scope_tl.interventions.functions import UNITS
from gemma_scope_tl.release.export import Layout, Repos
from gemma_scope_tl.studies.probe_fits import SELECT

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "demo.yaml")
PROBE = """
import contextlib, io, json, sys
from gemma_scope_tl.cli import app
from gemma_scope_tl.cli.failures import run
for call in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = run(app, call)
    print(json.dumps([status, out.getvalue(), err.getvalue(), "torch" in sys.modules]))
"""
CALLS = {
    "eval --model bundled-gemma3 --site res --layer 2 --canonical": "None of the 2 SAEs that fit the other conditions "
    "is canonical: give --sae-label medium or --sae-label small.",
    "features hi --site foo": "Unknown site 'foo'",
    "features hi --backend foo": "Unknown backend 'foo'",
    "features hi --dtype float23": "Unknown dtype 'float23'. Nearest: float32",
    "features hi --device gpu": "Device 'gpu' is unknown",
    "features hi --width 15k": "'15k' is not the label of a power of two",
    "features hi --width 64": "Unknown width",
    "features hi --layer 99": "Unknown layer",
    "features hi --layer -1": "'--layer'",
    "features hi --layer two": "'--layer'",
    "features hi --l0 ²": "Unknown l0",
    "features hi --l0 nan": "Unknown l0",
    "features hi --model gemma-2-2c": "Unknown model 'gemma-2-2c'. Nearest: gemma-2-2b",
    "features hi --model ./missing": "Unknown model './missing'",
    "features hi --model .": "--sae-model names the model whose SAEs to use for .",
    "features hi --sae-model foo": "Unknown model 'foo'",
    "features hi --top 0": "'--top'",
    "features hi --positions 4..9": "'4..9' names no positions: write 4:",
    "eval --positions 1:2:3": "'1:2:3' names no positions: write 4:",
    "features hi --frobnicate": "--frobnicate",
    "features ''": "The text is empty",
    "features ' '": "The text is empty",
    "steer hi --latent 3": "give one of --scale and --clamp. See `",
    "steer hi --latent 3 --scale nan": "nan is not a finite number",
    "steer hi --latent 3 --clamp inf": "inf is not a finite number",
    "steer hi --latent 3 --scale 1 --temperature nan": "'--temperature'",
    "steer hi --latent 3 --scale 1 --seed -1": "'--seed'",
    "steer hi --latent 3 --scale 1 --unit feet": "Unknown unit 'feet'",
    "steer hi --latent 99999 --scale 1": "and not 99,999",
    "top-tokens --latent 99999": "and not 99,999",
    "attribute hi --target ' x' --method foo": "Unknown method 'foo'. Nearest: integrated, gradient",
    "attribute hi --target ''": "The text is empty",
    "eval --site foo": "Unknown site 'foo'",
    "eval nothing/*": "No SAE fits",
    "eval --out t.xlsx": "Unknown table format '.xlsx'",
    "eval --out empty.txt/t.csv": "is not a folder",
    "eval --out folder.csv": "is a folder: name a file",
    "eval --resume empty.txt": "is not a folder",
    "eval --data missing.txt": "missing.txt does not exist",
    "eval --data empty.txt": "empty.txt is empty",
    "eval --data folder.txt": "is a folder: name a file",
    "eval --data t.pdf": "Unknown kind of text file '.pdf'. Nearest",
    "eval --dtype int8": "Unknown dtype 'int8'",
    "eval --ablation noise": "Unknown ablation 'noise'",
    "eval --memory inf": "'--memory'",
    "eval --model nowhere": "Unknown model 'nowhere'",
    "eval --width 17 --width 1k": "Unknown width",
    "study fidelity --figure f.svg": "Unknown figure format '.svg'",
    "study transfer --tuned nowhere": "Unknown model 'nowhere'",
    "study transfer --tuned bundled --tuned-sae-model foo": "Unknown model 'foo'",
    "study transfer --tuned bundled --temperature nan": "'--temperature'",
    "study precision --dtype foo": "Unknown dtype 'foo'",
    "study probes --site res --layer 2 --k 999": "has 256 latents. See `",
    "study probes --resume cache": "omit --resume",
    "graph": "give a text, or --read with a graph file",
    "graph hi --read t.pdf": "give a text, or --read with a graph file",
    "graph hi --out page.htm": "Unknown page format '.htm'. Nearest: .html",
    "graph hi --save graph.pt": "Unknown graph format '.pt'. Nearest: .json",
    "graph hi --out folder.txt/../folder.html/x.html --table edges.txt": "Unknown table format '.txt'",
    "graph hi --listed": "give --save",
    "graph hi --node-threshold 1.5": "'--node-threshold'",
    "graph hi --budget 0": "'--budget'",
    "graph hi --site ress": "Nearest: res",
    "graph hi --coders nothing*": "No coder fits all of these conditions",
    "graph --read missing.json": "missing.json does not exist",
    "graph --read empty.txt": "empty.txt is empty",
    "explain": "--llm NAME",
    "explain --llm x --method foo": "Unknown method of scoring 'foo'",
    "explain --llm x --base-url ftp://a": "is not an address",
    "explain --llm x --timeout nan": "'--timeout'",
    "explain --llm x --answers folder.csv": "is a folder: name a file",
    "neuronpedia --latent 99999": "and not 99,999",
    "verify nowhere": "Unknown model",
    "verify bundled --sample 0": "'--sample'",
    "verify bundled --site ress": "Nearest: res",
    "verify bundled --texts absent.txt": "does not exist",
    "verify bundled --offline --neuronpedia": "leave out --offline",
    "verify me/unknown": "--sae-model names the model",
    "neuronpedia --out empty.txt": "is not a folder",
    "train missing.yaml": "missing.yaml does not exist. The package has the configurations",
    "train configs/demo.yaml": "One of this name comes with the package: write demo",
    "train demoo": "Unknown configuration 'demoo'. Nearest: demo",
    "train empty.txt": "empty.txt is empty",
    "train t.pdf --set sead": "'sead' is not key=value",
    "train t.pdf --memory nan": "'--memory'",
    "demo --port 0": "'--port'",
    "demo --port BUSY": "Cannot listen on 127.0.0.1, port",
    "demo --release foo": "Unknown release 'foo'",
    "demo --model nowhere": "Unknown model 'nowhere'",
    "export missing out --license mit": "Unknown release 'missing'",
    "export bundled-att out --license mit --layout foo": "Unknown layout 'foo'",
    "export bundled-att out --license mit --metrics t.pdf": "Unknown table format '.pdf'",
    "export bundled-att out --license mit --recipe missing.yaml": "missing.yaml does not exist",
    "export bundled-att empty.txt --license mit": "is not a folder",
    "upload missing me/saes": "missing does not exist",
    "upload folder.txt saes": "write OWNER/NAME",
    "registry new missing": "is neither a folder",
    "registry new folder.txt --site foo": "Unknown site 'foo'",
    "registry new folder.txt --format foo": "Unknown format 'foo'",
    "registry new folder.txt --l0 nan": "'--l0'",
    "registry check missing.yaml": "missing.yaml does not exist",
    "registry check t.pdf --results missing.csv": "missing.csv does not exist",
    "registry check t.pdf --run 1 --dtype foo": "Unknown dtype 'foo'",
    "list --site ress": "Unknown site 'ress'. Nearest: res",
    "list --layer -1": "'--layer'",
    "list --width foo": "is not a width",
    "list --release foo": "Unknown release 'foo'",
    "list --model foo": "Unknown model 'foo'",
    "show foo bar": "Unknown release 'foo'",
    "show bundled-res foo": "Unknown id in bundled-res 'foo'",
    "frobnicate": "frobnicate",
    "featurs": "Did you mean 'features'? See `",
    "top-tokens --latent 1 --latnt 3": ". See `",
    "study frobnicate": "frobnicate",
}


def verbs() -> Iterator[tuple[list[str], Any]]:
    """Every verb with the words that name it."""
    for name, command in get_command(app).commands.items():  # pyright: ignore[reportAttributeAccessIssue]
        inner = getattr(command, "commands", None)
        yield from (([name, sub], c) for sub, c in inner.items()) if inner else [([name], command)]


@pytest.mark.slow
def test_wrong_arguments_are_refused_in_a_line_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "t.pdf").write_text("x")
    for name in ("folder.txt", "folder.csv"):
        (tmp_path / name).mkdir()
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        calls = [shlex.split(call.replace("BUSY", str(busy.getsockname()[1]))) for call in CALLS]
        done = subprocess.run(
            [sys.executable, "-c", PROBE], input=json.dumps(calls), capture_output=True, text=True, cwd=tmp_path
        )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(CALLS)
    for (call, words), (status, out, err, torch) in zip(CALLS.items(), found, strict=True):
        assert status in (1, 2), (call, out, err)
        assert words in err and err.startswith("error: ") and err.count("\n") == 1, (call, err)
        assert out == "", call
        assert not torch, f"{call} imports torch"


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
@pytest.mark.parametrize(
    "call",
    [
        ("features", "hi", "--device"),
        ("eval", "--device"),
        ("study", "fidelity", "--device"),
        ("neuronpedia", "--device"),
        ("demo", "--device"),
        ("train", CONFIG, "--set", "device=cuda", "--set"),
        ("train", CONFIG, "--set", "source.device=cuda", "--set"),
        ("train", CONFIG, "--set", "model.device=cuda", "--set"),
    ],
)
def test_a_device_that_is_not_here(call: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(app, [*call, "output=unused" if call[-1] == "--set" else "cuda"]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1) and "cuda" in err


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (GemmaScopeError("Do this."), 1, "error: Do this."),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 1, "error: x.txt: No such file or directory."),
        (OSError(28, "No space left on device", "t.csv"), 1, "error: t.csv: No space left on device."),
        (RuntimeError("a\nb\nc"), 1, "error: RuntimeError: a `gemma-scope --debug"),
        (ZeroDivisionError(), 1, "error: ZeroDivisionError: no message"),
        (MemoryError(), 1, "There is not enough memory"),
        (GemmaScopeError("It is\nso.\n  first\n  second"), 1, "error: It is so.\n  first\n  second\n"),
        (EOFError(), 1, "interrupted"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
        (typer.BadParameter("no good"), 2, "error: Invalid value: no good"),
        (typer.Exit(3), 3, ""),
    ],
)
def test_whatever_happens_is_a_line_and_a_status(
    error: BaseException,
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("gemma_scope_tl.registry.listing.select_rows", fail)
    monkeypatch.setattr(failures, "_forget_output", lambda: None)
    assert run(app, ["list"]) == status
    out, err = capfd.readouterr()
    assert out == "" and words in err
    assert err.strip().count("\n") == err.count("\n  ") and "Traceback" not in err


@pytest.mark.parametrize("how", ["option", "variable"])
def test_debugging_shows_where(how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    if how == "variable":
        monkeypatch.setenv("GEMMA_SCOPE_TL_DEBUG", "1")
    assert run(app, [*(["--debug"] if how == "option" else []), "show", "foo", "bar"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and err.strip().splitlines()[-1].startswith("error: Unknown release 'foo'")


@pytest.mark.slow
def test_a_reader_that_leaves_and_a_disk_that_is_full() -> None:
    command = [sys.executable, "-m", "gemma_scope_tl.cli", "list"]
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb") as left, open("/dev/full", "wb") as full:
        for stream, words in ((left, ""), (full, "error: No space left on device.")):
            done = subprocess.run(command, stdout=stream, stderr=subprocess.PIPE, text=True)
            assert (done.returncode, done.stderr.strip()) == (1, words)


def test_every_verb_is_guarded_and_reports_alike() -> None:
    """JSON of all that reports; device and dtype wherever a model is loaded; the checks of numbers everywhere."""
    loads = {"features", "steer", "top-tokens", "attribute", "eval", "explain", "neuronpedia", "demo", "study", "check"}
    loads |= {"verify", "graph"}
    for words, command in verbs():
        assert isinstance(command, Verb), words
        names = {name for param in command.params for name in param.opts}
        if words != ["demo"]:  # it reports an address
            assert "--json" in names, words
        if loads & set(words):
            assert {"--device", "--dtype"} <= names, words
        assert not names & {"--folder", "--model-path"}, words


def test_names_are_those_of_the_library() -> None:
    assert [parse_dtype(name) for name in checks.DTYPES] == [parse_dtype(name) for name in DTYPES] * 2
    assert [str(parse_dtype(name)) for name in DTYPES] == [f"torch.{name}" for name in DTYPES]
    assert checks.models() == (*bundled_names(), *hub_ids())
    assert tuple(SELECT) == checks.SELECTIONS and tuple(SCORES) == checks.SCORES
    assert checks.UNITS == UNITS and checks.ATTRIBUTIONS == METHODS and checks.ABLATIONS == ABLATIONS
    assert get_args(Layout) == checks.LAYOUTS and get_args(Repos) == checks.REPOS
    assert tables.interval(1.0, float("nan"), 2.0) == 1.0

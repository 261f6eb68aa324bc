"""``gemma-scope doctor``: each thing that can be wrong, and what it says to do."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from gemma_scope_tl import diagnose as doctor
from gemma_scope_tl.cli import app
from gemma_scope_tl.families import bundled_names
from gemma_scope_tl.registry.locate import MODEL_FOLDER, bundle_folder
from tests.hub.conftest import hub, token  # noqa: F401  (fixtures)
from tests.hub.server import LocalHub

FINE = {"torch": "2.13.0", "transformers": "5.23.0", "transformer-lens": "3.9.0", "sae-lens": "6.54.12"}


@pytest.mark.parametrize(
    ("package", "number", "serious", "words"),
    [
        ("transformers", "5.20.2", True, "soft-cap"),
        ("transformers", "5.24.0", False, "ignores the cache"),
        ("transformer-lens", "4.3.0", True, "SAELens cannot be imported"),
        ("transformer-lens", "4.0.0rc1", False, ""),  # before 4
        ("transformer-lens", "3.8.0", True, "hook_normalized"),
        ("sae-lens", "7.0.1", True, "sae-lens>=6.54,<7"),
        ("torch", "2.3.1", True, "torch>=2.4"),
        ("torch", None, True, "not installed"),
    ],
)
def test_known_bad_versions(package: str, number: str | None, serious: bool, words: str) -> None:
    assert list(doctor.version_advice(dict(FINE))) == []
    found = list(doctor.version_advice({**FINE, package: number}))
    assert [one.serious for one in found] == ([serious] if words else [])
    assert all(words in one.what + one.do for one in found)


def test_the_requirements_of_the_package_leave_out_what_is_seriously_bad() -> None:
    """What pip may install by the package's own requirements is not called bad."""
    from importlib.metadata import requires

    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    wanted = {canonicalize_name(r.name): r.specifier for r in map(Requirement, requires("gemma-scope-tl") or ())}
    edges = {"transformers": "5.21.0", "transformer-lens": "4.0.0", "sae-lens": "7.0.0", "torch": "2.3.9"}
    for package, number in edges.items():
        assert [one.serious for one in doctor.version_advice({package: number})] == [True]
        assert not wanted[canonicalize_name(package)].contains(number)


def test_python_versions() -> None:
    assert list(doctor.python_advice((3, 12))) == []
    for running in ((3, 10), (3, 14)):
        (one,) = doctor.python_advice(running)
        assert one.serious and "3.11 to 3.13" in one.do


def test_devices() -> None:
    assert list(doctor.device_advice(True, True, "12.4", True)) == []
    assert list(doctor.device_advice(False, False, None, False)) == []
    assert "without CUDA" in next(doctor.device_advice(False, True, None, True)).what
    assert "update the driver" in next(doctor.device_advice(False, True, "12.4", True)).do
    assert "pip install triton" in next(doctor.device_advice(True, True, "12.4", False)).do


def test_disk() -> None:
    assert list(doctor.disk_advice(1e12, "/cache")) == []
    (one,) = doctor.disk_advice(3e9, "/cache")
    assert "3.0 GB are free at /cache" in one.what and "HF_HOME" in one.do and not one.serious


def test_access_to_the_hub(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    repo = hub.repo(doctor.GATED)
    repo.commit({"config.json": b"{}"})
    assert doctor.hub_access() == (f"access to {doctor.GATED}", [])
    repo.gated = True
    said, (one,) = doctor.hub_access()
    assert said == "Gemma 2 is gated for you" and "accept the licence" in one.do and not one.serious
    monkeypatch.setenv("HF_TOKEN", "hf_aTokenThatNobodyKnows000000")
    said, (one,) = doctor.hub_access()
    assert "hf_aToken" not in said + one.what + one.do


def test_a_member_has_access(hub: LocalHub, token: str) -> None:  # noqa: F811
    repo = hub.repo(doctor.GATED)
    repo.commit({"config.json": b"{}"})
    repo.gated, repo.members = True, {token}
    assert doctor.hub_access() == (f"access to {doctor.GATED}", [])


def test_no_hub_at_all(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    from huggingface_hub import constants

    nowhere = "http://127.0.0.1:9"
    monkeypatch.setattr(constants, "ENDPOINT", nowhere)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", nowhere + "/{repo_id}/resolve/{revision}/{filename}")
    said, (one,) = doctor.hub_access()
    assert said == "the Hub cannot be reached" and "HF_ENDPOINT" in one.do


def test_a_failed_check_is_shown_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> Any:
        raise RuntimeError("no [such] device")

    monkeypatch.setattr(doctor, "_devices", broken)
    monkeypatch.setattr(doctor, "_self_check", lambda folder, backend: f"fine on {backend}")
    monkeypatch.setattr(doctor, "_hub", lambda: ("fine", [doctor.Advice("a note", "nothing")]))
    found = doctor.diagnose()
    assert found.facts["devices"] == "FAILED: RuntimeError: no [such] device"
    present = [name for name in bundled_names() if ((bundle_folder(name) or Path()) / MODEL_FOLDER).is_dir()]
    assert all(found.facts[f"{name} model on bridge"] == "fine on bridge" for name in present)
    assert not found.healthy and found.advice[0].serious
    plain = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert plain.exit_code == 1
    assert "no [such] device" in plain.output and "problem: the check of the devices failed" in plain.output
    assert "note: a note" in plain.output
    facts = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).output)
    assert facts["advice"][0]["serious"]
    assert facts["torch"] == version("torch")

"""The checks of ``gemma-scope doctor``: facts about the installation, and advice on problems."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gemma_scope_tl.families import BACKENDS, Backend, bundled_names, families

PACKAGES = (
    "gemma-scope-tl",
    "torch",
    "transformers",
    "transformer-lens",
    "sae-lens",
    "huggingface_hub",
    "safetensors",
    "triton",
)
PYTHONS = ((3, 11), (3, 13))
HUB_SECONDS = 5.0
ROOM = 20e9  # bytes that the smallest model and some SAEs take
_FAMILY = families()[0]
GATED = next(iter(_FAMILY.hub_ids.values()))


@dataclass(frozen=True)
class Advice:
    """A problem and its remedy.

    Attributes:
        what: the problem.
        do: the remedy.
        serious: whether results of the package may be wrong until the problem is solved.
    """

    what: str
    do: str
    serious: bool = False


@dataclass(frozen=True)
class KnownBad:
    """Versions of a library (a specifier of PEP 440) with a defect that affects this package."""

    package: str
    versions: str
    what: str
    do: str
    serious: bool = True


_LENS, _SAES = "pip install 'transformer-lens>=3.9,<4'", "pip install 'sae-lens>=6.54,<7'"
KNOWN_BAD = (
    KnownBad(
        "transformers",
        "<5.21.1",
        "sdpa attention drops the soft-cap of attention in models that Hugging Face loads by default",
        "pip install 'transformers>=5.21.1'",
    ),
    KnownBad(
        "transformers",
        ">=5.24",
        "TransformerLens's bridge ignores the cache while generating, because an argument was renamed",
        "nothing for models of load_model, which are checked and repaired; load no bridge in another way, or use "
        "transformers 5.23",
        serious=False,
    ),
    KnownBad("transformer-lens", ">=4", "SAELens cannot be imported with it, and HookedTransformer is gone", _LENS),
    KnownBad("transformer-lens", "<3.9", "edits at ln2.hook_normalized do not reach the MLP", _LENS),
    KnownBad("sae-lens", "<6.54", "its SAE classes are not those that this package extends", _SAES),
    KnownBad("sae-lens", ">=7", "its SAE classes may not be those that this package extends", _SAES),
    KnownBad("torch", "<2.4", "it is older than this package needs", "pip install 'torch>=2.4'"),
)


@dataclass
class Diagnosis:
    """The results of all checks.

    Attributes:
        facts: readable facts by name. They never contain access tokens.
        advice: advice, serious problems first.
    """

    facts: dict[str, str] = field(default_factory=dict[str, str])
    advice: list[Advice] = field(default_factory=list[Advice])

    @property
    def healthy(self) -> bool:
        """Whether no serious problem was found."""
        return not any(one.serious for one in self.advice)


def diagnose() -> Diagnosis:
    """Check versions, registry, devices, the Hub and disk space, and run the bundled models on both backends."""
    diagnosis = Diagnosis({"python": platform.python_version(), "platform": platform.platform()})
    installed = {name: installed_version(name) for name in PACKAGES}
    diagnosis.facts.update({name: number or "not installed" for name, number in installed.items()})
    diagnosis.advice += [*python_advice(sys.version_info[:2]), *version_advice(installed)]
    checks: tuple[tuple[str, Callable[[], tuple[str, list[Advice]]]], ...] = (
        ("registry", _registry),
        ("devices", _devices),
        ("hub", _hub),
        ("disk", _disk),
        *(
            (f"{name} model on {backend}", lambda folder=folder, backend=backend: (_self_check(folder, backend), []))
            for name, folder in _bundled_models().items()
            for backend in BACKENDS
        ),
    )
    for name, check in checks:
        try:
            diagnosis.facts[name], advice = check()
            diagnosis.advice += advice
        except Exception as error:  # a broken installation may fail in any way, which the report must show
            diagnosis.facts[name] = f"FAILED: {type(error).__name__}: {error}"
            do = "install the package again in a new environment, with the versions in constraints.txt"
            diagnosis.advice.append(Advice(f"the check of the {name} failed", do, serious=True))
    diagnosis.advice.sort(key=lambda one: not one.serious)
    return diagnosis


def python_advice(running: tuple[int, ...]) -> Iterator[Advice]:
    """Advice if the package does not support this version of Python."""
    low, high = PYTHONS
    if not low <= running[:2] <= high:
        names = f"{low[0]}.{low[1]} to {high[0]}.{high[1]}"
        yield Advice(f"Python {running[0]}.{running[1]} is not supported", f"use Python {names}", serious=True)


def version_advice(installed: dict[str, str | None]) -> Iterator[Advice]:
    """Advice on versions with known defects and on missing packages.

    >>> [one.serious for one in version_advice({"transformers": "5.20.2", "torch": "2.5.0"})]
    [True]
    """
    from packaging.specifiers import SpecifierSet

    for bad in KNOWN_BAD:
        number = installed.get(bad.package)
        if number is not None and SpecifierSet(bad.versions).contains(number, prereleases=True):
            yield Advice(f"{bad.package} {number}: {bad.what}", bad.do, bad.serious)
    for name in ("torch", "transformers", "transformer-lens", "sae-lens"):
        if name in installed and installed[name] is None:
            yield Advice(f"{name} is not installed", "pip install gemma-scope-tl, in a new environment", serious=True)


def installed_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _registry() -> tuple[str, list[Advice]]:
    from gemma_scope_tl.registry import list_saes, releases

    return f"{len(list_saes()):,} SAEs in {len(releases())} releases", []


def _devices() -> tuple[str, list[Advice]]:
    import torch

    found = [f"cpu ({torch.get_num_threads()} threads)"]
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        bf16 = "bfloat16" if torch.cuda.get_device_capability(number) >= (8, 0) else "no bfloat16"
        name = torch.cuda.get_device_name(number)
        found.append(f"cuda:{number} ({name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free, {bf16})")
    seen = shutil.which("nvidia-smi") is not None
    advice = device_advice(torch.cuda.is_available(), seen, torch.version.cuda, installed_version("triton") is not None)
    return ", ".join(found), list(advice)


def device_advice(usable: bool, driver: bool, built_for: str | None, triton: bool) -> Iterator[Advice]:
    """Advice on GPUs.

    Args:
        usable: whether PyTorch can use a GPU.
        driver: whether NVIDIA's tools are installed.
        built_for: the CUDA version that PyTorch was built for; None for a build without CUDA.
        triton: whether triton is installed.
    """
    if driver and not usable and built_for is None:
        yield Advice(
            "there is an NVIDIA driver, and PyTorch was built without CUDA",
            "install a CUDA build of the same version of torch, from the index that pytorch.org names",
        )
    elif driver and not usable:
        yield Advice(
            f"there is an NVIDIA driver, and PyTorch (for CUDA {built_for}) cannot use it",
            "run nvidia-smi: update the driver, or install torch for an older CUDA; look at CUDA_VISIBLE_DEVICES",
        )
    if usable and not triton:
        yield Advice("without triton, sparse kernels on the GPU are PyTorch's, which are slower", "pip install triton")


def _hub() -> tuple[str, list[Advice]]:
    from huggingface_hub import constants, get_token

    token = "logged in" if get_token() else "not logged in"
    cache = f"cache {os.path.expanduser(constants.HF_HUB_CACHE)}"
    if constants.HF_HUB_OFFLINE:
        do = "unset HF_HUB_OFFLINE to download; the bundled model and cached files work offline"
        return f"{token}, offline; {cache}", [Advice("HF_HUB_OFFLINE is set: nothing is downloaded", do)]
    access, advice = hub_access()
    return f"{token}, {access}; {cache}", advice


def hub_access() -> tuple[str, list[Advice]]:
    """Check with one request, without retries, whether the Hub answers and gives access to the models."""
    from huggingface_hub import errors, get_hf_file_metadata, hf_hub_url

    licence = f"accept the licence on the page of {GATED} with your account, then `hf auth login`"
    ungated = "the SAEs are not gated, and the bundled model needs no account"
    try:
        get_hf_file_metadata(hf_hub_url(GATED, "config.json"), timeout=HUB_SECONDS)
    except errors.GatedRepoError:
        return f"{_FAMILY.title} is gated for you", [Advice(f"no access to {_FAMILY.title}", f"{licence}; {ungated}")]
    except errors.RepositoryNotFoundError:  # the Hub's answer to an unknown token
        return "the Hub refuses the token", [Advice("the Hub refuses the token", "log in again with `hf auth login`")]
    except errors.HfHubHTTPError as error:
        number = getattr(error.response, "status_code", "an error")
        return f"the Hub answers with {number}", [Advice(f"the Hub answers with {number}", "try again later")]
    except Exception as error:  # the HTTP library and the operating system raise many kinds of errors
        do = "look at the network, a proxy (HTTPS_PROXY) and HF_ENDPOINT; without a network set HF_HUB_OFFLINE=1"
        return "the Hub cannot be reached", [Advice(f"the Hub cannot be reached ({type(error).__name__})", do)]
    return f"access to {GATED}", []


def _disk() -> tuple[str, list[Advice]]:
    from huggingface_hub import constants

    folder = os.path.expanduser(constants.HF_HUB_CACHE)
    there = os.path.abspath(folder)  # the folder is relative for a user without a home
    while not os.path.exists(there):
        there = os.path.dirname(there)
    free = shutil.disk_usage(there).free
    return f"{free / 1e9:.0f} GB free for downloads", list(disk_advice(free, folder))


def disk_advice(free: float, folder: str) -> Iterator[Advice]:
    """Advice if few bytes are free where the Hub's client keeps its files."""
    if free < ROOM:
        do = f"make room, or set HF_HOME to a larger disk; {GATED} and some SAEs take {ROOM / 1e9:.0f} GB"
        yield Advice(f"{free / 1e9:.1f} GB are free at {folder}", do)


def _bundled_models() -> dict[str, Path]:
    """The folders of the bundled models by name. A package may have been built without those after the first."""
    from gemma_scope_tl.registry.locate import MODEL_FOLDER, bundle_folder

    folders = {name: folder / MODEL_FOLDER for name in bundled_names() if (folder := bundle_folder(name)) is not None}
    first = next(iter(folders))
    return {name: folder for name, folder in folders.items() if name == first or folder.is_dir()}


def _self_check(folder: Path, backend: Backend) -> str:
    import torch
    from transformers import AutoModelForCausalLM

    from gemma_scope_tl.model.check import self_check
    from gemma_scope_tl.model.loading import load_model
    from gemma_scope_tl.model.plain import run_plain

    hf_model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    plain = run_plain(hf_model)
    model = load_model(hf_model=hf_model, backend=backend, check=False)
    worst = max(self_check(model, plain).values())
    fixes = f"; worked around: {', '.join(model.fixes)}" if model.fixes else ""
    return f"equal to plain Hugging Face within {worst:.1e}{fixes}"

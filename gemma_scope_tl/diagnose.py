"""What ``gemma-scope doctor`` looks at."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

PACKAGES = ("gemma-scope-tl", "torch", "transformers", "transformer-lens", "sae-lens", "huggingface_hub", "safetensors")


def diagnose() -> tuple[dict[str, Any], bool]:
    """Facts about this installation by name, and whether every check passed. Tokens are never shown."""
    facts: dict[str, Any] = {"python": platform.python_version(), "platform": platform.platform()}
    facts.update({name: _version(name) for name in PACKAGES})
    healthy = True
    for name, check in (("registry", _registry), ("devices", _devices), ("hub", _hub)):
        facts[name] = check()
    for backend in ("bridge", "hooked_transformer"):
        try:
            facts[f"bundled model on {backend}"] = _self_check(backend)
        except Exception as error:  # a broken installation fails in ways nobody foresaw; that is what this shows
            facts[f"bundled model on {backend}"] = f"FAILED: {type(error).__name__}: {error}"
            healthy = False
    return facts, healthy


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _registry() -> str:
    from gemma_scope_tl.registry import list_saes, releases

    return f"{len(list_saes()):,} SAEs in {len(releases())} releases"


def _devices() -> str:
    import torch

    found = [f"cpu ({torch.get_num_threads()} threads)"]
    found += [f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())]
    return ", ".join(found)


def _hub() -> str:
    from huggingface_hub import constants, get_token

    token = "logged in" if get_token() else "not logged in (Gemma 2 is gated; its SAEs are not)"
    offline = ", offline" if constants.HF_HUB_OFFLINE else ""
    return f"{token}{offline}; cache {os.path.expanduser(constants.HF_HUB_CACHE)}"


def _self_check(backend: str) -> str:
    from transformers import Gemma2ForCausalLM

    from gemma_scope_tl.adapters.check import self_check
    from gemma_scope_tl.adapters.loading import BUNDLED_FOLDER, load_model
    from gemma_scope_tl.adapters.reference import probe_tokens, run_reference

    hf_model: Any = Gemma2ForCausalLM.from_pretrained(BUNDLED_FOLDER, attn_implementation="eager")
    reference = run_reference(hf_model, probe_tokens(hf_model))
    model = load_model(hf_model=hf_model, backend=backend, check=False)
    worst = max(self_check(model, reference).values())
    fixes = f"; worked around: {', '.join(model.fixes)}" if model.fixes else ""
    return f"equal to plain Hugging Face within {worst:.1e}{fixes}"

"""``load_model``: Gemma 2 of any size, base or instruction-tuned, as a hooked model with the Gemma Scope sites."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.adapters.check import self_check
from gemma_scope_tl.adapters.reference import probe_tokens, run_reference
from gemma_scope_tl.dtypes import parse_dtype
from gemma_scope_tl.errors import AdapterError, unknown_name
from gemma_scope_tl.registry.locate import BUNDLED_MODEL
from gemma_scope_tl.sites import BACKENDS

if TYPE_CHECKING:
    from gemma_scope_tl.adapters.base import GemmaModel

logger = logging.getLogger(__name__)

BUNDLED = "bundled"
MODELS = {
    f"gemma-2-{size}{kind}": f"google/gemma-2-{size}{kind}" for size in ("2b", "9b", "27b") for kind in ("", "-it")
}


def load_model(
    name: str | Path | None = None,
    *,
    hf_model: Any = None,
    tokenizer: Any = None,
    backend: str = "bridge",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    check: bool = True,
) -> GemmaModel:
    """Load a Gemma 2 as a TransformerLens hooked model.

    Attention is always eager (the soft-cap needs it) and weights are never processed, so every site holds exactly what
    the Gemma Scope SAEs were trained on.

    Args:
        name: ``"bundled"`` (offline), ``"gemma-2-2b"`` and its kin, a Hugging Face id (``"unsloth/gemma-2-2b"``), or a
            local folder.
        hf_model: a loaded ``Gemma2ForCausalLM`` instead; the bridge wraps it in place, without a second copy.
        tokenizer: by default the one that belongs to ``name``; None with ``hf_model`` alone.
        backend: ``"bridge"`` (one copy of the weights, Hugging Face's own forward pass) or ``"hooked_transformer"`` (a
            second copy; TransformerLens 3 only).
        device: by default CUDA where there is one.
        dtype: ``"float32"`` by default, ``"bfloat16"``, ``"float16"``; a given ``hf_model`` keeps its own.
        check: run a dozen tokens through the plain and the hooked model and compare them at every site.

    Raises:
        UnknownNameError: a name that is no model, folder or Hugging Face id; a backend or dtype that does not exist.
        AdapterError: a model that is not a Gemma 2, or one that is wrapped already.
        AdapterMismatch: when the check fails.
    """
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    if (name is None) == (hf_model is None) and hf_model is None:
        raise AdapterError('Give a model name, a folder or hf_model=. Offline, "bundled" always works.')
    source = None if name is None else _source(str(name))
    if hf_model is None:
        assert source is not None
        hf_model = _load_hf_model(source, parse_dtype(dtype or "float32"), device)
    else:
        _prepare_given(hf_model, dtype, device)
    if tokenizer is None and source is not None:
        tokenizer = _load_tokenizer(source)
    if tokenizer is not None:
        _mark_bos(tokenizer)
    model_id = _model_id(source, name)
    reference = run_reference(hf_model, probe_tokens(hf_model)) if check else None
    if backend == "bridge":
        from gemma_scope_tl.adapters.bridge import build_bridge as build
    else:
        from gemma_scope_tl.adapters.hooked_transformer import build_hooked_transformer as build
    model = build(hf_model, tokenizer, model_id)
    if reference is not None:
        self_check(model, reference)
    for fix in model.fixes:
        logger.info("worked around a defect of the installed libraries: %s", fix)
    return model


def _source(name: str) -> str:
    """The folder or Hugging Face id that ``name`` stands for."""
    if name == BUNDLED:
        return str(BUNDLED_MODEL)
    if name in MODELS:
        return MODELS[name]
    if Path(name).is_dir():
        return str(Path(name).resolve())
    if name.count("/") == 1 and not name.startswith((".", "/")):
        return name
    raise unknown_name("model", name, [BUNDLED, *MODELS], "A local folder or a Hugging Face id works too.")


def _model_id(source: str | None, name: str | Path | None) -> str | None:
    if source == str(BUNDLED_MODEL):
        return BUNDLED
    last = str(name).rstrip("/").split("/")[-1].lower() if name is not None else ""
    return last if last in MODELS else None


def _check_config(config: Any, source: str) -> None:
    if getattr(config, "model_type", None) != "gemma2":
        raise AdapterError(f"{source} is a {getattr(config, 'model_type', 'model of unknown type')!r}, not a Gemma 2.")


def _load_hf_model(source: str, dtype: torch.dtype, device: str | torch.device | None) -> Any:
    from transformers import AutoConfig, Gemma2ForCausalLM

    try:
        config = AutoConfig.from_pretrained(source)
        _check_config(config, source)
        model: Any = Gemma2ForCausalLM.from_pretrained(source, config=config, dtype=dtype, attn_implementation="eager")
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"Cannot load a Gemma 2 from {source}: {error}\nThe Gemma 2 models are gated: accept the licence on their "
            'page and log in with `hf auth login`. Offline, load_model("bundled") always works.'
        ) from error
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()


def _prepare_given(hf_model: Any, dtype: str | torch.dtype | None, device: str | torch.device | None) -> None:
    _check_config(getattr(hf_model, "config", None), type(hf_model).__name__)
    if any("model_bridge" in type(module).__module__ for module in hf_model.modules()):
        raise AdapterError("This hf_model is wrapped by a bridge already. Load it again.")
    hf_model.config._attn_implementation = "eager"
    if dtype is not None:
        hf_model.to(parse_dtype(dtype))
    if device is not None:
        hf_model.to(device)
    hf_model.eval()


def _load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    if Path(source).is_dir() and not any(Path(source).glob("tokenizer*")):
        # AutoTokenizer would make up an empty Gemma tokenizer here, without a word
        logger.warning("%s has no tokenizer: the model takes token ids only", source)
        return None
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise AdapterError(f"Cannot load the tokenizer of {source}: {error}") from error


def _mark_bos(tokenizer: Any) -> None:
    """Tell TransformerLens that a tokenizer adds BOS, so that it does not load another one by its name."""
    ids = tokenizer.encode("a")
    if len(ids) > 1 and ids[0] == tokenizer.bos_token_id:
        tokenizer.init_kwargs["add_bos_token"] = True
        tokenizer.init_kwargs.setdefault("name_or_path", tokenizer.name_or_path)

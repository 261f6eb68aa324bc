"""``load_model``, which makes a hooked model from a name, a folder, or a loaded Hugging Face model."""

from __future__ import annotations

import json
import logging
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.dtypes import DTYPES, parse_device, parse_dtype
from gemma_scope_tl.errors import AdapterError, unknown_name
from gemma_scope_tl.families import (
    BACKENDS,
    Family,
    ModelDims,
    bundled_names,
    families,
    family_of_config,
    hub_ids,
    plain_name,
)
from gemma_scope_tl.model.check import repair, self_check
from gemma_scope_tl.model.plain import is_quantized, run_plain
from gemma_scope_tl.model.tokenizer import prepared, stop_token_ids
from gemma_scope_tl.model.wrapped import load_text_model, text_model, wrapper_class
from gemma_scope_tl.registry.locate import MODEL_FOLDER, bundle_folder
from gemma_scope_tl.weights.modes import float32_by_default, make_ordinary, ordinary_tensors

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

logger = logging.getLogger(__name__)


@ordinary_tensors()
@float32_by_default()
def load_model(
    name: str | PathLike[str] | None = None,
    *,
    hf_model: Any = None,
    tokenizer: Any = None,
    backend: str = "bridge",
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    check: bool = True,
) -> GemmaModel:
    """Load a model of a known family (:mod:`gemma_scope_tl.families`) as a TransformerLens hooked model.

    Attention is always eager, because fused kernels do not compute the soft-cap or expose the scores. Weights are never
    processed, so every site has exactly the activations that the SAEs were trained on. The model does not depend on
    torch modes during the call (``inference_mode``, ``autocast`` and so on).

    Args:
        name: ``"bundled"`` or ``"bundled-gemma3"`` (offline), ``"gemma-2-2b"`` or another released model, a Hugging
            Face id (``"unsloth/gemma-2-2b"``), or a local folder. Of one that reads images too, only its text model.
        hf_model: a loaded Hugging Face model with an unembedding, such as a ``Gemma2ForCausalLM``, or one whose text
            model has one. The bridge wraps it in place, without a second copy, and sets eager attention and evaluation
            mode. ``name``, if also given, says which released model, folder or id it is, with its tokenizer; leave it
            out for a model that is none of these.
        tokenizer: the default is the tokenizer of ``name``. With ``hf_model`` alone there is none, and the model
            accepts only token ids. A given tokenizer is copied and never loaded again by its name. The copy,
            ``model.tokenizer``, pads on the left.
        backend: ``"bridge"`` (one copy of the weights, Hugging Face's own forward pass) or ``"hooked_transformer"`` (a
            second copy; TransformerLens 3 only).
        device: by default CUDA if it is available, else the CPU; by default a given ``hf_model`` is not moved.
        dtype: ``"float32"`` (the default), ``"bfloat16"`` or ``"float16"``; a given ``hf_model`` keeps its dtype by
            default.
        check: whether to run a dozen tokens through the plain and the hooked model and compare them at every site,
            with and without a cache. Defects of the installed libraries are always repaired (``model.fixes``).

    Raises:
        UnknownNameError: for a name that is not a model, folder or Hugging Face id, or an unknown backend or dtype.
        DeviceError: for a device that does not exist on this machine.
        AdapterError: for a model that is of no known family, is wrapped by another object, or cannot be loaded, and
            for a tokenizer that is not from transformers.
        AdapterMismatch: when the check fails.
    """
    if backend not in BACKENDS:
        raise unknown_name("backend", backend, BACKENDS)
    if name is None and hf_model is None:
        raise AdapterError('Give a model name, a folder or hf_model=. Offline, "bundled" always works.')
    source = None if name is None else _source(name, given=hf_model is not None)
    to_dtype, to_device = _dtype_and_device(dtype, device, hf_model)
    if hf_model is not None:
        hf_model = text_model(hf_model, check_given(hf_model, backend))
    config = _load_config(str(source)) if hf_model is None else hf_model.config
    family = family_of_config(config, str(source))
    model_id = None if source is None else _model_id(str(name), source, family, config, given=hf_model is not None)
    if tokenizer is not None or source is not None:
        tokenizer = _load_tokenizer(str(source)) if tokenizer is None else prepared(tokenizer)
    if hf_model is not None:
        move_given(hf_model, to_dtype, to_device)
    else:
        hf_model = _load_weights(str(source), family, config, to_dtype or torch.float32, parse_device(to_device))
    return _hook(hf_model, tokenizer, model_id, family, backend, check)


def check_given(hf_model: Any, backend: str) -> Family:
    """Return the family of ``hf_model`` after checking that the model can be hooked. The model is not changed.

    Raises:
        AdapterError: for objects that are not a Hugging Face model of a known family, wrappers, other heads, weights
            that are not in memory, and models that are hooked already.
    """
    kind = type(hf_model).__name__
    if not isinstance(hf_model, _architectures()):
        raise AdapterError(_what_it_is(hf_model, kind))
    family = family_of_config(hf_model.config, kind)
    if any("model_bridge" in type(module).__module__ for module in hf_model.modules()):
        raise AdapterError("This hf_model is wrapped by a bridge already. Load it again.")
    if any(_compiled(module) for module in hf_model.modules()):
        raise AdapterError(
            "This hf_model is compiled, but hooks need its plain modules. Give the model before compiling."
        )
    weights = [*hf_model.parameters(), *hf_model.buffers()]
    if any(weight.is_meta for weight in weights):
        where = "offloaded" if getattr(hf_model, "hf_device_map", None) else 'on the "meta" device'
        raise AdapterError(
            f"Weights of this hf_model are {where}, so they have no values. Load the model onto a device."
        )
    if backend == "hooked_transformer" and is_quantized(text_model(hf_model, family), family):
        raise AdapterError(
            'HookedTransformer cannot copy the packed weights of a quantised model. Use backend="bridge".'
        )
    return family


def move_given(hf_model: Any, dtype: torch.dtype | None, device: torch.device | None) -> None:
    """Prepare a model that passed :func:`check_given`, in place: eager attention, evaluation mode, dtype, device.

    Raises:
        AdapterError: for a dtype that the package does not support, or a quantised model that cannot change.
    """
    try:
        if dtype is not None and dtype != hf_model.dtype:
            hf_model.to(dtype)
        if device is not None:
            hf_model.to(device)
    except ValueError as error:  # quantised and dispatched models refuse
        raise AdapterError(
            f"This hf_model cannot be moved or converted: {error}\nLeave dtype and device out."
        ) from error
    if str(hf_model.dtype).removeprefix("torch.") not in DTYPES:
        raise AdapterError(f"This hf_model is in {hf_model.dtype}. Pass dtype=, one of {', '.join(DTYPES)}.")
    _restore_embedding_scale(hf_model)
    make_ordinary(hf_model)  # it may have been loaded in inference mode
    hf_model.config._attn_implementation = "eager"
    hf_model.eval()


def _restore_embedding_scale(hf_model: Any) -> None:
    """Undo the rounding of the embedding's scale in a model that once was in another dtype.

    transformers rounds the scale to the dtype of the weights in each pass, but ``model.to`` also rounds the stored
    scale, which does not become exact again in a wider dtype.
    """
    for module in hf_model.modules():
        exact, stored = getattr(module, "scalar_embed_scale", None), getattr(module, "embed_scale", None)
        if isinstance(exact, float) and isinstance(stored, torch.Tensor):
            wanted = torch.tensor(exact, dtype=stored.dtype, device=stored.device)
            rounded = (wanted.to(dtype).to(stored.dtype) for dtype in (torch.bfloat16, torch.float16))
            if not torch.equal(stored, wanted) and any(torch.equal(stored, one) for one in rounded):
                module.embed_scale = wanted


def _architectures() -> tuple[type, ...]:
    """The Hugging Face classes of all families that the installed transformers has, those of wrappers included."""
    import transformers

    found = [getattr(transformers, family.architecture, None) for family in families()]
    return tuple(one for one in (*found, *map(wrapper_class, families())) if one is not None)


def _or(names: list[str]) -> str:
    return " or ".join(dict.fromkeys(names))


def _compiled(module: Any) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _what_it_is(given: Any, kind: str) -> str:
    """A sentence about an object that is not a model of a known family, with the attribute that contains one."""
    wanted = _or([family.architecture for family in families()])
    if isinstance(given, (str, bytes)) or not hasattr(given, "__dict__"):
        return f"hf_model= takes a {wanted}, not {given!r:.100}. Give a name or folder as the first argument."
    held = given if isinstance(given, torch.nn.Module) else getattr(given, "model", None)
    if isinstance(held, torch.nn.Module):
        for path, module in held.named_modules():
            if isinstance(module, _architectures()):
                parts = [] if held is given else ["model"]
                place = ".".join(["hf_model", *parts, *(path.split(".") if path else [])])
                adapters = " Merge adapters first (merge_and_unload())." if hasattr(given, "merge_and_unload") else ""
                return f"hf_model is a {kind} around a {type(module).__name__}. Give {place} instead.{adapters}"
    model_type = getattr(getattr(given, "config", None), "model_type", None)
    for family in families():
        if model_type in family.model_types:
            return f"hf_model is a {kind}, which has no unembedding. Load it as a {family.architecture}."
    if model_type is not None:
        return f"{kind} is a {model_type!r}, not a {_or([family.title for family in families()])}."
    return f"hf_model= takes a {wanted}, not a {kind}."


def _dtype_and_device(dtype: Any, device: Any, hf_model: Any) -> tuple[torch.dtype | None, torch.device | None]:
    """The dtype and device to load to, or to move a given model to; None for no change."""
    to_dtype = None if dtype is None else parse_dtype(dtype)
    to_device = None if device is None and hf_model is not None else parse_device(device)
    if to_device is not None and to_device.type == "meta":
        raise AdapterError('A model on the "meta" device has no values, so there is nothing to hook.')
    return to_dtype, to_device


def _hook(hf_model: Any, tokenizer: Any, model_id: str | None, family: Family, backend: str, check: bool) -> GemmaModel:
    plain = run_plain(hf_model) if check else None
    if backend == "bridge":
        from gemma_scope_tl.model.bridge import build_bridge as build
    else:  # TransformerLens 4 has no HookedTransformer
        from gemma_scope_tl.model.hooked_transformer import build_hooked_transformer as build
    model = build(hf_model, tokenizer, model_id, family)
    model.stop_token_ids = stop_token_ids(hf_model, tokenizer)
    repair(model)
    if plain is not None:
        self_check(model, plain)
    for fix in model.fixes:
        logger.info("worked around a defect of the installed libraries: %s", fix)
    return model


def _source(name: str | PathLike[str], given: bool = False) -> str:
    """The folder or Hugging Face id for ``name``; ``given`` says whether there is an ``hf_model`` too."""
    if not isinstance(name, (str, PathLike)):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise AdapterError(
            f"The name of a model must be a string, not a {type(name).__name__}. Give a loaded model as hf_model=."
        )
    text = fspath(name)
    if isinstance(name, str):
        if (bundle := bundle_folder(name)) is not None:
            return _in_package(name, bundle / MODEL_FOLDER)
        if (known := plain_name(name) if "/" not in name else name) in hub_ids():
            return hub_ids()[known]
    try:
        folder = Path(text).expanduser()
        if folder.is_dir():
            return str(folder.resolve())
    except (OSError, RuntimeError):  # the name is too long, or there is no such user
        pass
    if isinstance(name, str) and name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return hub_ids().get(plain_name(name), name)
    hint = "A local folder or a Hugging Face id works too."
    if given:
        hint = (
            "With hf_model=, name= only says which released model, folder or Hugging Face id it is: "
            "leave name= out for a model of your own, and give its tokenizer as tokenizer=. SAEs name it by their own "
            "model=, as in JumpReLUSAE.from_folder(path, model='my-model', family=...)."
        )
    raise unknown_name("model", text, [*bundled_names(), *hub_ids()], hint)


def _in_package(name: str, folder: Path) -> str:
    if not (folder / "config.json").is_file():
        hint = "In a source tree, `python scripts/train_bundled.py` makes it; otherwise install the package again."
        raise AdapterError(
            f"The model {name!r} did not come with this installation: {folder} has no config.json. {hint}"
        )
    return str(folder)


def _model_id(name: str, source: str, family: Family, config: Any, given: bool) -> str | None:
    """The name of a model in SAEs, or None for an unknown model.

    A folder or repository is recognised by the last part of its name (``"unsloth/gemma-2-2b"``,
    ``"/models/Gemma-2-2B/"``, a snapshot in the Hub's cache), but only if the sizes agree.

    Raises:
        AdapterError: when ``hf_model`` is ``given`` and has other sizes than the model that ``name`` identifies.
    """
    dims = ModelDims.from_config(family.text_config(config))
    known = _dims_by_name(name, source, family)
    for model_id, theirs in known.items():
        if theirs == dims:
            return model_id
    for model_id, theirs in known.items():
        if given:
            raise AdapterError(
                f"hf_model is {dims}, but {model_id} is {theirs}: hf_model and name= are different models."
            )
        logger.warning("%s has the name of %s but other sizes, so it is treated as an unknown model", source, model_id)
    return None


def _dims_by_name(name: str, source: str, family: Family) -> dict[str, ModelDims]:
    """The models that a name may identify, with their sizes: none, one, or two if a link and its target differ."""
    if (bundle := bundle_folder(family.bundled)) is not None and source == str(bundle / MODEL_FOLDER):
        config = json.loads((bundle / MODEL_FOLDER / "config.json").read_text(encoding="utf-8"))
        return {family.bundled: ModelDims.from_config(config)}
    found: dict[str, ModelDims] = {}
    for path in (Path(name), Path(source)):
        in_cache = path.parent.name == "snapshots"  # models--owner--name/snapshots/commit
        last = (path.parent.parent.name.split("--")[-1] if in_cache else path.name).lower()
        if (dims := family.dims_of(last)) is not None:
            found[family.plain_name(last)] = dims
    return found


def _load_config(source: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise _cannot_load(source, families(), str(error)) from error


def _load_weights(source: str, family: Family, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    from safetensors import SafetensorError

    try:
        model, info = load_text_model(source, family, config, dtype=dtype, attn_implementation="eager")
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise _cannot_load(source, (family,), str(error)) from error
    except RuntimeError as error:
        if "mismatch" not in str(error):  # an error of the machine, such as a lack of memory
            raise
        raise _cannot_load(source, (family,), str(error)) from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would continue with random values
        why = f"its files lack {len(missing)} weights, such as {', '.join(missing[:3])}"
        raise _cannot_load(source, (family,), why)
    return model.to(device).eval()


def _cannot_load(source: str, wanted: tuple[Family, ...], why: str) -> AdapterError:
    gated = [family.title for family in wanted if family.gated]
    hint = 'Offline, load_model("bundled") always works.'
    if Path(source).is_dir():
        hint = "A folder needs config.json and complete weights, as written by save_pretrained."
    elif gated:
        hint = (
            f"The {_or(gated)} models are gated: accept the licence on their page and log in with `hf auth login`. "
            + hint
        )
    return AdapterError(f"Cannot load a {_or([family.title for family in wanted])} from {source}: {why}\n{hint}")


def _load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    if Path(source).is_dir() and not any(Path(source).glob("tokenizer*")):
        # AutoTokenizer would create an empty tokenizer here, without a warning
        logger.warning("%s has no tokenizer: the model accepts only token ids", source)
        return None
    try:
        return prepared(AutoTokenizer.from_pretrained(source), own=True)
    except AdapterError:
        raise
    except Exception as error:
        if not isinstance(error, (OSError, ValueError, TypeError, KeyError)) and type(error) is not Exception:
            raise  # the tokenizers library raises bare exceptions for files that it cannot read
        raise AdapterError(f"Cannot load the tokenizer of {source}: {error}\nGive one as tokenizer=.") from error

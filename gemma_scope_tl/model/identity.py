"""What the results of a model depend on, for the keys of caches and the records of runs.

Weights and configuration are described; hooks and attached SAEs cannot be, so whoever keeps results refuses them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.weights.fingerprint import fingerprint

if TYPE_CHECKING:
    import torch

    from gemma_scope_tl.model.hooked import GemmaModel

NOT_COMPUTED = frozenset({
    # names, versions and files
    "architecture", "architectures", "id2label", "label2id", "model_name", "original_architecture", "problem_type",
    "tokenizer_name", "transformers_version", "trust_remote_code",
    "checkpoint_index", "checkpoint_label_type", "checkpoint_value", "from_checkpoint",
    # what the weights say: their dtype, number and place, and how they were drawn before they were loaded
    "device", "dtype", "init_mode", "init_weights", "initializer_range", "n_devices", "n_params", "seed", "torch_dtype",
    # how text becomes ids, which callers record as ids, and what a pass returns besides
    "default_padding_side", "default_prepend_bos", "tokenizer_appends_eos", "tokenizer_prepends_bos",
    "output_attentions", "output_hidden_states", "return_dict", "use_cache",
    # always eager, but recorded for some families only
    "attn_implementation",
})  # fmt: skip
"""Values of configurations that no activation depends on. All others count, those of future versions included."""

NO_CACHE = "remove them, or measure without cache=."
_LIBRARIES = ("gemma_scope_tl", "transformer_lens", "transformers")  # whose own hooks belong to the model
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def model_facts(model: GemmaModel) -> dict[str, Any]:
    """The backend, a fingerprint of the weights, and the configuration, as plain data.

    Returns:
        ``backend``, ``weights``, and ``config``: the values of TransformerLens's configuration by ``cfg.NAME``, and on
        the bridge those of Hugging Face's, which runs there, by their names.
    """
    config = {f"cfg.{name}": value for name, value in _computed(vars(model.cfg)).items()}
    if model.backend == "bridge":
        theirs: Any = model.family.text_config(model.original_model.config)
        config |= _computed(theirs.to_dict())
    return {"backend": model.backend, "weights": fingerprint(model), "config": config}


def digest_of(facts: Any) -> str:
    """A hash of plain data."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def as_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON holds them, sorted by name; by ``repr`` what it cannot hold."""
    return json.loads(json.dumps(values, sort_keys=True, default=repr))


def refuse_hooks(model: GemmaModel, advice: str = NO_CACHE) -> None:
    """Raise if something that no key describes changes the model's passes: an attached SAE, or a hook of any kind.

    Raises:
        GemmaScopeError: the message names the first of them, and ends with ``advice``.
    """
    if model.acts_to_saes:
        names = ", ".join(list(model.acts_to_saes)[:3])
        raise GemmaScopeError(
            f"SAEs are attached to the model ({names}), which a cache key does not describe: {advice}"
        )
    check_no_hooks("the model", hooked_modules(model), advice)


def check_no_hooks(what: str, hooked: Iterable[str], advice: str) -> None:
    """Raise if there are hooked modules.

    Raises:
        GemmaScopeError: the message names the first of them, and ends with ``advice``.
    """
    names = list(hooked)
    if names:
        shown = ", ".join(names[:3])
        raise GemmaScopeError(
            f"There are hooks on {what} ({shown}), and a cache key cannot describe what they do: {advice}"
        )


def hooked_modules(module: torch.nn.Module) -> list[str]:
    """The names of all modules with a hook that the libraries did not put there themselves."""
    return [name for name, part in module.named_modules() if _is_hooked(part)]


def _is_hooked(module: torch.nn.Module) -> bool:
    from transformer_lens.hook_points import HookPoint

    hooks = [hook for kind in _HOOKS for hook in vars(module)[kind].values()]  # torch has no public function for this
    if isinstance(module, HookPoint):  # its hooks are users', wrapped by the library
        return bool(hooks)
    return any(_module_of(hook).partition(".")[0] not in _LIBRARIES for hook in hooks)


def _module_of(hook: Any) -> str:
    function = getattr(hook, "func", hook)  # of a partial function
    return str(getattr(function, "__module__", None) or type(function).__module__)


def _computed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The values that activations may depend on. Names with an underscore are a library's own state."""
    kept = {n: v for n, v in config.items() if n not in NOT_COMPUTED and not n.startswith("_")}
    return as_plain(kept)

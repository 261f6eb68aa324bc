"""Independent copies of a model, in memory or pickled, with copies of the attached SAEs.

TransformerLens hooks a point with a local function. ``copy`` does not copy functions, so the hook of a copy would run
the SAE of the original. This module gives the copy new functions, in the same order among the user's hooks.
"""

from __future__ import annotations

import copy
from typing import Any

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.model.attachment import Attachment
from gemma_scope_tl.model.protocol import BindsToPass
from gemma_scope_tl.model.splice_options import SpliceOptions

_LOCAL = "<locals>"  # part of the qualified name of every class and function that is defined inside a function


def shallow_copy(model: Any) -> Any:
    """A new object with the same parts, as from ``copy.copy`` for any module."""
    kind: Any = type(model)
    twin = kind.__new__(kind)
    twin.__setstate__(vars(model))
    return twin


def deep_copy(model: Any, memo: dict[int, Any]) -> Any:
    """A copy that shares nothing with ``model``, with copies of hooks, interventions and attached SAEs."""
    twin = _copied(model, memo)
    for attached in twin._attached.values():
        attached.claim_names()
    return twin


def reduced(model: Any) -> Any:
    """The state for ``pickle`` and ``torch.save``: the model without its SAEs, and the SAEs with their options.

    The hooks of SAEs are local functions, which cannot be pickled.

    Raises:
        SpliceError: as :func:`check_picklable`.
    """
    check_picklable(model, own_hooks=False)
    memo: dict[int, Any] = {}
    held = list(model._attached.values())
    shared: list[Any] = [attached.sae for attached in held]
    shared += [model.tokenizer, *model.parameters(), *model.buffers()]
    for one in shared:
        memo[id(one)] = one
    bare = _copied(model, memo)
    for attached in bare._attached.values():
        attached.unhook()
        bare._after_detach(attached)
    bare._attached.clear()
    check_picklable(bare)
    once = {id(attached.sae): (attached.sae, attached.options) for attached in held}  # not once for each layer
    return restored, (bare, list(once.values()))


def check_picklable(model: Any, own_hooks: bool = True) -> None:
    """Raise for classes and functions that are defined inside a function, which ``pickle`` cannot find by name.

    Args:
        model: the model to be pickled.
        own_hooks: whether to check the hooks of the model too.

    Raises:
        SpliceError: when the model contains such a class or hook.
    """
    for module in model.modules():
        for held in (module, *vars(module).values()):
            if _local(held) or _LOCAL in type(held).__qualname__:
                raise SpliceError(
                    f"The model cannot be pickled: it contains a {type(held).__name__}, which TransformerLens defines "
                    "inside a function, where pickle cannot find it. For a copy in memory use "
                    "copy.deepcopy(model). To keep it, save the Hugging Face model before it is hooked (its "
                    'save_pretrained) and the SAEs (save_sae), or load it with backend="hooked_transformer", which '
                    "can be pickled."
                )
    points = {id(point): point for point in model.hook_dict.values()} if own_hooks else {}
    for point in points.values():
        for hook in [*point._forward_hooks.values(), *point._backward_hooks.values()]:
            if _local(hook):
                raise SpliceError(
                    f"The model cannot be pickled while there is a hook on {point.name}: it is a function inside "
                    "TransformerLens, which pickle cannot find. Pickle it outside of model.hooks, and after "
                    "reset_hooks(including_permanent=True); attached SAEs may stay. copy.deepcopy copies hooks too."
                )


def _local(function: Any) -> bool:
    return _LOCAL in str(getattr(function, "__qualname__", ""))


def restored(model: Any, recipes: list[tuple[Any, SpliceOptions]]) -> Any:
    """Attach the SAEs to ``model`` again, after unpickling."""
    for sae, options in recipes:
        model.add_sae(sae, **vars(options))
    return model


def _copied(model: Any, memo: dict[int, Any]) -> Any:
    """A copy of ``model`` and of all objects that are not in ``memo``, whose hooks run the copies of the SAEs."""
    kind: Any = type(model)
    twin = kind.__new__(kind)
    memo[id(model)] = twin
    twin.__setstate__(copy.deepcopy(vars(model), memo))
    for point in {id(point): point for point in twin.hook_dict.values()}.values():
        for handle in point.fwd_hooks:
            if isinstance(handle.user_hook, BindsToPass) or isinstance(_self_of(handle.user_hook), Attachment):
                _bind(point, handle)
    return twin


def _self_of(hook: Any) -> Any:
    return getattr(hook, "__self__", None)


def _bind(point: Any, handle: Any) -> None:
    """Replace the hook function of the original, which the copy shares, by one for the copy."""
    held = vars(point)["_forward_hooks"]
    old = held[handle.hook.id]
    inside = dict(zip(old.__code__.co_freevars, (cell.cell_contents for cell in old.__closure__), strict=True))
    point.add_hook(handle.user_hook, alias_names=inside.get("alias_names"))
    held[handle.hook.id] = held.pop(point.fwd_hooks.pop().hook.id)

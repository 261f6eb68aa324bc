"""Translation of hook names between the backends, for sites and for hook points of attached SAEs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gemma_scope_tl.errors import KeywordError, SpliceError, UnknownNameError, unknown_name
from gemma_scope_tl.families import Backend, Family, ModelDims
from gemma_scope_tl.model.attachment import Attachment
from gemma_scope_tl.sites import site_of_hook


def translate_hook_name(name: str, valid: Iterable[str], backend: Backend, family: Family | None = None) -> str:
    """Return ``name`` if the model has it, else its name of the same hook, for sites and points of attached SAEs.

    Args:
        name: a hook name of either backend.
        valid: the names that the model has.
        backend: the backend of the model.
        family: the family of the model; None to search the site in all families.

    Raises:
        UnknownNameError: when there is no such hook, with the nearest names.
    """
    names = valid if isinstance(valid, (set, dict, frozenset)) else set(valid)
    if name in names:
        return name
    base, dot, internal = name.partition(".hook_sae_")
    try:
        site, layer = site_of_hook(base, family=family)
        inside = f"{site.hook_name_out(layer, 'hooked_transformer')}{dot}{internal}"
        translated = inside if dot else site.hook_name(layer, backend)
    except (UnknownNameError, SpliceError):
        translated = None
    if translated is not None and translated in names:
        return translated
    hint = "No SAE with that hook is attached." if dot else ""
    raise unknown_name("hook", name, names, hint)


def other_names(attached: Iterable[Attachment], family: Family, dims: ModelDims, backend: Backend) -> dict[str, str]:
    """The other backend's name of every hook point of attached SAEs and of every site, by the name in this backend."""
    named: dict[str, str] = {}
    other: Backend = "bridge" if backend == "hooked_transformer" else "hooked_transformer"
    for site in family.sites.values():
        for layer in range(dims.n_layers) if site.per_layer else (None,):
            named[site.hook_name(layer, backend)] = site.hook_name(layer, other)
    for one in attached:
        base = one.site.hook_name_out(one.layer, "bridge") + one.name.removeprefix(one.write_name)
        named |= {name: base + name.removeprefix(one.name) for name in one.hook_points}
    return named


def filter_of_both(wanted: Callable[[str], bool], others: Mapping[str, str]) -> Callable[[str], bool]:
    """A filter that passes a point if ``wanted`` passes one of its two names."""

    def either(name: str) -> bool:
        return wanted(name) or (name in others and wanted(others[name]))

    return either


def add_other_names(stored: dict[str, Any], wanted: Callable[[str], bool] | None, others: Mapping[str, str]) -> None:
    """Store the tensors of a cache under the requested names.

    Args:
        stored: the cache.
        wanted: the filter of the cache; None for all names.
        others: the result of :func:`other_names`.
    """
    for name, other in others.items():
        for end in ("", "_grad"):
            if name + end not in stored:
                continue
            if wanted is None:
                if ".hook_sae_" in name:
                    stored.setdefault(other + end, stored[name + end])
                continue
            if wanted(other):
                stored.setdefault(other + end, stored[name + end])
            if not wanted(name):
                del stored[name + end]


def listed_hooks(hooks: Any) -> list[Any]:
    """Convert pairs of a name and a function, a single pair as from ``steer``, and lists of pairs among them to a list.

    Raises:
        SpliceError: for anything but such pairs.
    """
    if isinstance(hooks, tuple) and len(hooks) == 2 and callable(hooks[1]):
        return [hooks]
    pairs: list[Any] = []
    for item in hooks:
        pairs += item if isinstance(item, list) and all(map(_is_pair, item)) else [item]
    for pair in pairs:
        if not _is_pair(pair):
            raise SpliceError(
                f"Hooks must be pairs of a name (or a filter of names) and a function; given: {pair!r:.80}."
            )
    return pairs


def _is_pair(item: Any) -> bool:
    return isinstance(item, (tuple, list)) and len(item) == 2 and callable(item[1])


def positional_hooks(args: tuple[Any, ...], fwd: Any, bwd: Any) -> tuple[tuple[Any, ...], tuple[Any, Any]]:
    """Split the arguments of ``run_with_hooks`` into those without hooks and the hooks, which may follow the input.

    Raises:
        KeywordError: a ``TypeError``, for hooks that are given twice.
    """
    head, hooks = args[:1], list(args[1:3])
    hooks = hooks[: next((i for i, one in enumerate(hooks) if not isinstance(one, (list, tuple))), len(hooks))]
    for one, name, keyword in zip(hooks, ("fwd_hooks", "bwd_hooks"), (fwd, bwd), strict=False):
        if one and keyword:
            raise KeywordError(f"run_with_hooks() got {name} twice, after the input and as a keyword.")
    both = (*hooks, *(fwd, bwd)[len(hooks) :])
    given = tuple(one or keyword for one, keyword in zip(both, (fwd, bwd), strict=True))
    return (*head, *args[1 + len(hooks) :]), (given[0], given[1])

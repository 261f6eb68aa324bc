"""The ``config.json`` of a coder that spans several layers: a crosscoder or a cross-layer transcoder.

It has the keys of :mod:`~gemma_scope_tl.weights.coder_config`. In the names of the tensors, the number of the layer is
replaced by ``{all}``, for all layers of the model, or by those of the coder, such as ``{5,9,12,15}``, with the braces.
``width`` is the number of latents of all layers together.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.families import Family, bare_name, families, family_named, named_family
from gemma_scope_tl.sites import LAYERED_SITES
from gemma_scope_tl.weights.checks import CONFIG_NAME, Expected, weights_error
from gemma_scope_tl.weights.coder_config import CHECK, SEVERAL, completed, module_hooks, said_values, spans_layers
from gemma_scope_tl.weights.safetensors_file import read_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from gemma_scope_tl.registry.schema import SAERow

ALL = "all"
_BRACES = re.compile(r"\.layers\.\{([^{}]*)\}\.")
_NUMBERS = re.compile(r"\d{1,4}( ?, ?\d{1,4})*")


@dataclass(frozen=True)
class LayersConfig:
    """The checked content of a ``config.json``. Every value is None where the file has none.

    Attributes:
        source: the file, for messages.
        kind: ``crosscoder`` or ``clt``; None only if the file names neither a kind nor tensors.
        layers: the model's layers, ascending; ``"all"`` for all of them.
        affine: whether there is a linear path around the latents.
        width: number of latents of all layers together.
        l0: the target of the mean number of active latents.
        model: the model's name as in the registry, without an owner.
        family: name of the model's family, where the file states it or its tensors tell it.
    """

    source: Path
    kind: str | None = None
    layers: tuple[int, ...] | str | None = None
    affine: bool | None = None
    width: int | None = None
    l0: float | None = None
    model: str | None = None
    family: str | None = None

    @classmethod
    def of_folder(cls, folder: Path) -> LayersConfig | None:
        """The configuration of a folder; None if it has none.

        Raises:
            WeightsError: when it is not the configuration of a JumpReLU coder of several layers.
        """
        path = folder / CONFIG_NAME
        return cls.parse(read_json(path), path) if path.is_file() else None

    @classmethod
    def parse(cls, raw: dict[str, Any], source: Path) -> LayersConfig:
        """Check the content of a file; raises as :meth:`of_folder`."""
        said = said_values(raw, source)
        reads, writes, kind = (said.pop(name) for name in ("reads", "writes", "kind"))
        several = spans_layers({"reads": reads, "writes": writes, "kind": kind})
        if not several and (kind, reads, writes) != (None, None, None):
            raise weights_error(source, f"describes a {kind or 'coder'} of a single layer", CHECK)
        config = cls(source, kind, **said)
        if reads is not None:
            config = config._placed(reads, writes or reads)
        elif writes is not None:
            raise weights_error(source, f"names the tensor {writes} that is written but none read", CHECK)
        if config.width is not None and config.l0 is not None and config.l0 > config.width:
            raise weights_error(source, f"has l0 {config.l0:g}, more than its width {config.width}", CHECK)
        return config

    def _placed(self, reads: str, writes: str) -> LayersConfig:
        """This configuration with the kind, layers and family that the names of its tensors tell."""
        named = named_family(self.model) if self.family is None else family_named(self.family)
        searched = families() if named is None else (named,)
        layers = _layers(reads)
        given = (reads, writes) if layers is None else (_plain(reads, layers), _plain(writes, layers))
        places = [(kind, one) for one in searched for kind in SEVERAL]
        found = [(kind, one) for kind, one in places if layers and tensors_of(kind, one, layers) == given]
        if not found:
            titles = " or ".join(one.title for one in searched)
            known = [tensors_of(kind, one, ALL) for kind, one in places]
            shown = dict.fromkeys(" -> ".join(dict.fromkeys(pair)) for pair in known if pair)
            what = f"names {reads} -> {writes}, which coders of several layers of {titles} neither read nor write"
            raise weights_error(self.source, what, f"They have {', '.join(shown)}.")
        if self.kind not in (None, found[0][0]):
            raise weights_error(self.source, f"is of type {self.kind}, but reads {reads} and writes {writes}", CHECK)
        only = found[0][1].name if len(found) == 1 else None
        return replace(self, kind=found[0][0], layers=layers, family=self.family or only)

    def complete(self, expected: Expected) -> Expected:
        """``expected``, completed with what the file says about the width and the skip connection.

        Raises:
            WeightsError: when the two contradict each other.
        """
        return completed(expected, {"d_sae": self.width, "skip": self.affine}, self.source)

    def check_layers(self, layers: Sequence[int], said_by: str) -> None:
        """Raise :class:`WeightsError` if the file names other layers than these; "all" are those from 0 on."""
        if self.layers in (None, tuple(layers)):
            return
        if self.layers == ALL and list(layers) == list(range(len(layers))):
            return
        what = f"has the layers {_shown(self.layers)}, should be {_shown(tuple(layers))} according to {said_by}"
        raise weights_error(self.source, what, CHECK)

    def check_row(self, row: SAERow) -> None:
        """Raise :class:`WeightsError` with every contradiction to a registry row, apart from sizes and layers."""
        texts: list[str] = []
        if self.model is not None and self.model != bare_name(row.model):
            texts.append(f"model {self.model}, should be {row.model}")
        if self.l0 is not None and row.l0 is not None and not math.isclose(self.l0, row.l0):
            texts.append(f"l0 {self.l0:g}, should be {row.l0:g}")
        if self.kind not in (None, row.site):
            texts.append(f"type {self.kind}, should be {row.site}")
        if texts:
            what = f"has {'; '.join(texts)} according to the registry ({row.release}/{row.id})"
            raise weights_error(self.source, what, CHECK)


def tensors_of(kind: str, family: Family, layers: Sequence[int] | str) -> tuple[str, str] | None:
    """The names of the tensors that a coder of several layers reads and writes; None if the family has none.

    >>> from gemma_scope_tl.families import family_named
    >>> tensors_of("crosscoder", family_named("gemma3"), (5, 9))
    ('model.layers.{5,9}.output', 'model.layers.{5,9}.output')
    """
    site = LAYERED_SITES[kind]
    hooks = module_hooks(family, site, 0) if site in family.sites else None
    if hooks is None:
        return None
    inside = ALL if isinstance(layers, str) else ",".join(map(str, layers))
    reads, writes = (hook.replace(".layers.0.", f".layers.{{{inside}}}.") for hook in hooks)
    return reads, writes


def _layers(hook: str) -> tuple[int, ...] | str | None:
    """The layers that stand in the braces of a name; None for anything but ``all`` or ascending numbers."""
    match = _BRACES.search(hook)
    if match is None:
        return None
    if match[1] == ALL:
        return ALL
    numbers = tuple(map(int, match[1].split(","))) if _NUMBERS.fullmatch(match[1]) else ()
    return numbers if numbers and list(numbers) == sorted(set(numbers)) else None


def _plain(hook: str, layers: tuple[int, ...] | str) -> str:
    """The name with the layers written as :func:`tensors_of` writes them, if it has these layers."""
    inside = ALL if isinstance(layers, str) else ",".join(map(str, layers))
    return _BRACES.sub(f".layers.{{{inside}}}.", hook) if _layers(hook) == layers else hook


def _shown(layers: tuple[int, ...] | str | None) -> str:
    return layers if isinstance(layers, str) else str(list(layers or ()))

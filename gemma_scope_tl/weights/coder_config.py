"""The ``config.json`` of Gemma Scope 2's folders: what it says about the coder (SAE or transcoder) beside it.

========================= ======================================================================================
``hf_hook_point_in``      the tensor that the coder reads, as ``model.<module>.output`` or ``.input`` of the text model
``hf_hook_point_out``     the tensor that it writes; for SAEs the same, or none
``type``                  ``sae``, ``transcoder``, ``clt`` or ``crosscoder``; the last two span several layers
``affine_connection``     whether there is a linear path around the latents
``architecture``          ``jump_relu``
``width``, ``l0``         number of latents, and the target of the mean number of active ones
``model_name``            the model, in one of several spellings (:func:`~gemma_scope_tl.families.bare_name`)
``family``                only in folders that this package wrote, where it does not follow from the model's name
========================= ======================================================================================

The file has no layer, no sizes and no dtype. Some released folders lack it. Keys may be missing, and other keys are
ignored; what is there is compared with what the registry or the user says, and contradictions raise.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_scope_tl.errors import GemmaScopeError, RegistryError, WeightsError
from gemma_scope_tl.families import Family, Site, bare_name, families, family_named, named_family
from gemma_scope_tl.registry.widths import parse_width
from gemma_scope_tl.weights.checks import CONFIG_NAME, WHOLE_FOLDER, Expected, short, weights_error
from gemma_scope_tl.weights.safetensors_file import read_json

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow

ARCHITECTURE = "jump_relu"
SINGLE, SEVERAL = ("sae", "transcoder"), ("clt", "crosscoder")
_DECODER = "model"  # the text model's own path, also where it is part of a larger one
_LONGEST = 200  # characters of a text
CHECK = "Check that the files belong together, then delete them and download them again."


@dataclass(frozen=True)
class CoderConfig:
    """The checked content of a ``config.json``. Every value is None where the file has none.

    Attributes:
        source: the file, for messages.
        reads, writes: the tensors, as names of modules with a side.
        kind: ``sae`` or ``transcoder``.
        affine: whether there is a linear path around the latents.
        width: number of latents.
        l0: the target of the mean number of active latents.
        model: the model's name as in the registry, without an owner.
        family: name of the model's family.
    """

    source: Path
    reads: str | None = None
    writes: str | None = None
    kind: str | None = None
    affine: bool | None = None
    width: int | None = None
    l0: float | None = None
    model: str | None = None
    family: str | None = None

    @classmethod
    def beside(cls, weights: Path) -> CoderConfig | None:
        """The configuration beside a weights file; None if there is none.

        Raises:
            WeightsError: when it is not the configuration of a JumpReLU SAE or transcoder of one layer.
        """
        path = weights.with_name(CONFIG_NAME)
        return cls.parse(read_json(path), path) if path.is_file() else None

    @classmethod
    def parse(cls, raw: dict[str, Any], source: Path) -> CoderConfig:
        """Check the content of a file; raises as :meth:`beside`."""
        said = said_values(raw, source)
        kind = said["kind"]
        if spans_layers(said):
            what = f"describes a {kind or 'coder'} that spans several layers" if kind not in SEVERAL else _several(kind)
            raise weights_error(source, what, WHOLE_FOLDER)
        return cls(source, **said)._sound()

    def _sound(self) -> CoderConfig:
        """This configuration, if it does not contradict itself."""
        if self.width is not None and self.l0 is not None and self.l0 > self.width:
            raise weights_error(self.source, f"has l0 {self.l0:g}, more than its width {self.width}", CHECK)
        if self.reads is None:
            if self.writes is not None:
                raise weights_error(self.source, f"names the tensor {self.writes} that is written but none read", CHECK)
            return self
        crosses = self.writes not in (None, self.reads)
        if self.kind is not None and crosses != (self.kind == "transcoder"):
            what = f"is of type {self.kind}, but reads {self.reads} and writes {self.writes or self.reads}"
            raise weights_error(self.source, what, CHECK)
        if self.affine and not crosses:
            raise weights_error(self.source, "describes an SAE with an affine_connection", CHECK)
        return self

    @property
    def is_transcoder(self) -> bool | None:
        """Whether input and output are different tensors; None if the file does not say."""
        if self.kind is not None:
            return self.kind == "transcoder"
        return None if self.reads is None else self.writes not in (None, self.reads)

    def place(self, family: Family | None = None) -> tuple[Family, Site, int | None] | None:
        """The family, site and layer of the tensors that the file names; None if it names none.

        Args:
            family: the family to search. None for the one that the file names, or that the name of the model belongs
                to, and for other models for all families.

        Raises:
            WeightsError: when no site has these tensors.
        """
        if self.reads is None:
            return None
        if family is None and self.family is not None:
            family = family_named(self.family)
        if family is None:
            family = named_family(self.model)
        searched = families() if family is None else (family,)
        for one in searched:
            found = place_of_modules(self.reads, self.writes, one)
            if found is not None:
                return one, *found
        titles = " or ".join(one.title for one in searched)
        tensors = self.reads if self.writes in (None, self.reads) else f"{self.reads} -> {self.writes}"
        known = [module_hook(site, 0) for one in searched for site in one.sites.values()]
        what = f"names {tensors}, where coders of {titles} neither read nor write"
        hint = f"In layer 0 they read {', '.join(dict.fromkeys(hook for hook in known if hook))}."
        raise weights_error(self.source, what, hint)

    def complete(self, expected: Expected) -> Expected:
        """``expected``, completed with what the file says about sizes and kind.

        Raises:
            WeightsError: when the two contradict each other.
        """
        return completed(
            expected, {"d_sae": self.width, "transcoder": self.is_transcoder, "skip": self.affine}, self.source
        )

    def check_row(self, row: SAERow) -> None:
        """Raise :class:`WeightsError` with every contradiction to a registry row, apart from sizes and kind."""
        texts: list[str] = []
        if self.model is not None and self.model != bare_name(row.model):
            texts.append(f"model {self.model}, should be {row.model}")
        if self.l0 is not None and row.l0 is not None and not math.isclose(self.l0, row.l0):
            texts.append(f"l0 {self.l0:g}, should be {row.l0:g}")
        found = self.place(row.model_family)
        if found is not None and (found[1].name, found[2]) != (row.site, row.layer):
            texts.append(f"site {found[1].name}, layer {found[2]}, should be {row.site}, layer {row.layer}")
        if texts:
            what = f"has {'; '.join(texts)} according to the registry ({row.release}/{row.id})"
            raise weights_error(self.source, what, CHECK)


def said_values(raw: dict[str, Any], source: Path) -> dict[str, Any]:
    """The checked values of a file by the names of :class:`CoderConfig`'s attributes, None where the file has none.

    Raises:
        WeightsError: for a value of a wrong type, another architecture, or an unknown type of coder.
    """
    reads, writes, kind, architecture, model, family = (
        _text(raw, key, source)
        for key in ("hf_hook_point_in", "hf_hook_point_out", "type", "architecture", "model_name", "family")
    )
    if kind not in (None, *SINGLE, *SEVERAL):
        raise weights_error(source, f"has type {short(kind)}, not one of {', '.join((*SINGLE, *SEVERAL))}", CHECK)
    if architecture not in (None, ARCHITECTURE):
        what = f"has architecture {short(architecture)}, not {ARCHITECTURE}"
        raise weights_error(source, what, "Only JumpReLU SAEs and transcoders can be loaded.")
    affine = raw.get("affine_connection")
    if affine is not None and not isinstance(affine, bool):
        raise weights_error(source, f"has affine_connection {short(affine)}, not true or false", CHECK)
    if family is not None:
        _named_family(family, source)
    named = None if model is None else bare_name(model)
    width, l0 = _width(raw.get("width"), source), _l0(raw.get("l0"), source)
    names = ("reads", "writes", "kind", "affine", "width", "l0", "model", "family")
    return dict(zip(names, (reads, writes, kind, affine, width, l0, named, family), strict=True))


def completed(expected: Expected, said: dict[str, Any], source: Path) -> Expected:
    """``expected``, completed with what a file says.

    Raises:
        WeightsError: when the two contradict each other.
    """
    off = [
        f"{name} {value}, should be {getattr(expected, name)}"
        for name, value in said.items()
        if value is not None and getattr(expected, name) not in (None, value)
    ]
    if off:
        raise weights_error(source, f"has {'; '.join(off)} according to {expected.said_by}", CHECK)
    known: dict[str, Any] = {name: value for name, value in said.items() if getattr(expected, name) is None}
    return replace(expected, **known, said_by=f"{expected.said_by} or {CONFIG_NAME}")


def spans_layers(said: dict[str, Any]) -> bool:
    """Whether the values of a configuration describe a coder of several layers."""
    return said["kind"] in SEVERAL or "{" in f"{said['reads']}{said['writes']}"


def module_hook(site: Site, layer: int | None) -> str | None:
    """The name of the tensor that coders at a site read; None for one that no module takes or returns.

    >>> from gemma_scope_tl.sites import get_site
    >>> module_hook(get_site("att"), 3)
    'model.layers.3.self_attn.o_proj.input'
    """
    if site.side not in ("input", "output"):
        return None
    return f"{_DECODER}.{site.module_name(layer)}.{site.side}"


def module_hooks(family: Family, name: str, layer: int | None) -> tuple[str, str] | None:
    """The tensors that coders at a site read and write; None if a name for one does not exist."""
    site = family.site(name)
    reads, *more = [module_hook(family.site(one), layer) for one in (name, *site.writes)]
    return None if reads is None or len(more) != 1 or more[0] is None else (reads, more[0])


def place_of_modules(reads: str, writes: str | None, family: Family) -> tuple[Site, int | None] | None:
    """The site and layer of coders that read and write these tensors; None if the family has none."""
    numbered = re.search(r"\.layers\.([0-9]{1,4})\.", reads)
    layer = int(numbered[1]) if numbered else None
    for site in family.sites.values():
        if site.per_layer == (layer is not None) and module_hooks(family, site.name, layer) == (reads, writes or reads):
            return site, layer
    return None


def _several(kind: str) -> str:
    return f"describes a {'cross-layer transcoder (clt)' if kind == 'clt' else kind}, which spans several layers"


def _text(raw: dict[str, Any], key: str, source: Path) -> str | None:
    value = raw.get(key)
    if value is None or (isinstance(value, str) and 0 < len(value) <= _LONGEST and value.isprintable()):
        return value
    raise weights_error(source, f"has {key} {short(value)}, which is not a name", CHECK)


def _width(value: Any, source: Path) -> int | None:
    try:
        number = parse_width(value) if isinstance(value, str) else value
    except RegistryError as error:
        raise weights_error(source, f"has width {short(value)}, which is not a number of latents", CHECK) from error
    if number is None or (type(number) is int and number > 0):
        return number
    raise weights_error(source, f"has width {short(value)}, which is not a number of latents", CHECK)


def _l0(value: Any, source: Path) -> float | None:
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        with_limits = float(value) if abs(value) < 1e9 else math.inf
        if 0 < with_limits < math.inf:
            return with_limits
    raise weights_error(source, f"has l0 {short(value)}, which is not a positive number", CHECK)


def _named_family(name: str, source: Path) -> Family:
    try:
        return family_named(name)
    except GemmaScopeError as error:
        raise WeightsError(f"{source}: {error}") from error

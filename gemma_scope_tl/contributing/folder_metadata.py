"""What the files of one folder say about their SAE: sizes from headers, the rest from ``cfg.json`` and folder names.

This is the only place besides ``scripts/build_registry.py`` that reads meaning into a path, and only to draft a file
that a person then reads. At run time the registry's rows say everything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gemma_scope_tl.contributing.repositories import Place, sizes_of
from gemma_scope_tl.errors import GemmaScopeError, RegistryError, UnknownNameError, unknown_name
from gemma_scope_tl.registry.schema import WEIGHTS_FILES, Format
from gemma_scope_tl.registry.widths import parse_width
from gemma_scope_tl.sites import SITES, get_site, site_of_hook

ARCHITECTURES = ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")
KEYS = ("site", "layer", "l0", "model")
CFG, NAME = "cfg.json", "the folder's name"


@dataclass
class Facts:
    """One folder with weights.

    Attributes:
        path: of the folder, inside the place.
        d_in, d_sae, d_out: from the file's headers; 0 until they are read.
        says: for each of :data:`KEYS`, who says what.
        width_label: the width that the folder's name claims, in latents.
        problems: what is wrong with the folder, in sentences.
    """

    path: str
    d_in: int = 0
    d_sae: int = 0
    d_out: int = 0
    says: dict[str, dict[str, Any]] = field(default_factory=lambda: {key: {} for key in KEYS})
    width_label: int | None = None
    problems: list[str] = field(default_factory=list[str])

    def value(self, key: str) -> Any:
        """What is said of ``key``, None when nobody says anything; a contradiction becomes a problem."""
        said = self.says[key]
        values = list(said.values())
        if any(value != values[0] for value in values):
            listed = ", ".join(f"{value} according to {who}" for who, value in said.items())
            self.problems.append(f"{key} is {listed}. Give --set {self.path}:{key}=VALUE.")
        return values[0] if values else None


def folders_of(place: Place, wanted: Format | None = None) -> tuple[Format, list[str]]:
    """The layout of a place and the folders that have it, in the order of their names.

    Raises:
        GemmaScopeError: when there are none, or both layouts.
    """
    found: dict[Format, list[str]] = {}
    for format_, weights in WEIGHTS_FILES.items():
        folders = [path.rpartition("/")[0] for path in place.files() if path.rpartition("/")[2] == weights]
        if folders and wanted in (None, format_):
            found[format_] = folders
    if not found:
        files = WEIGHTS_FILES[wanted] if wanted else " or ".join(WEIGHTS_FILES.values())
        raise GemmaScopeError(f"{place.name} has no {files} in any folder. Write SAEs with gemma_scope_tl.save_sae.")
    if len(found) > 1:
        counts = " and ".join(f"{len(folders)} folders of {name}" for name, folders in found.items())
        raise GemmaScopeError(f"{place.name} has {counts}: a release has one layout. Say which with --format.")
    ((format_, folders),) = found.items()
    return format_, folders


def read_facts(place: Place, folder: str, format_: Format) -> Facts:
    """What the headers, the ``cfg.json`` and the name of one folder say; problems are kept in it, not raised."""
    facts = Facts(folder)
    if not folder:
        facts.problems.append("The weights lie at the top: put them into a folder, whose name becomes the SAE's id.")
    weights = f"{folder}/{WEIGHTS_FILES[format_]}".lstrip("/")
    try:
        facts.d_in, facts.d_sae, facts.d_out = sizes_of(place.shapes(weights), f"{place.name}/{weights}")
        _read_name(facts)
        if format_ == "sae-lens":
            _read_cfg(facts, place.cfg(folder))
    except GemmaScopeError as error:
        facts.problems.append(str(error))
    return facts


def _read_name(facts: Facts) -> None:
    """Gemma Scope's ``layer_L/width_W/average_l0_N``, perhaps below a folder named after the site."""
    patterns: Mapping[str, Callable[[str], None]] = {
        r"layer_(\d{1,4})": lambda text: facts.says["layer"].update({NAME: int(text)}),
        r"average_l0_(\d{1,9}(?:\.\d{1,9})?)": lambda text: facts.says["l0"].update({NAME: float(text)}),
        rf"({'|'.join(SITES)})": lambda text: facts.says["site"].update({NAME: text}),
    }
    for part in facts.path.split("/"):
        for pattern, note in patterns.items():
            if match := re.fullmatch(pattern, part):
                note(match[1])
        if match := re.fullmatch(r"width_(\w+)", part):
            try:
                facts.width_label = parse_width(match[1])
            except RegistryError as error:
                facts.problems.append(str(error))


def _read_cfg(facts: Facts, cfg: Mapping[str, Any]) -> None:
    """SAELens's configuration: hook names, and what this package's own metadata adds."""
    inner = cfg.get("metadata")
    meta: dict[str, Any] = {**cfg, **(inner if isinstance(inner, dict) else {})}
    if cfg.get("architecture") not in ARCHITECTURES:
        facts.problems.append(f"{CFG} is of a {cfg.get('architecture')!r} SAE: only {', '.join(ARCHITECTURES)} load.")
    for key, value in (("d_in", facts.d_in), ("d_sae", facts.d_sae)):
        if cfg.get(key) not in (None, value):
            facts.problems.append(f"{CFG} has {key} {cfg[key]}, the weights have {value}.")
    if isinstance(hook := meta.get("hook_name"), str) and hook:
        try:
            site, layer = site_of_hook(hook, meta.get("hook_name_out"))
        except UnknownNameError as error:
            facts.problems.append(f"{CFG}: {error}")
        else:
            facts.says["site"][CFG] = site.name
            if layer is not None:
                facts.says["layer"][CFG] = layer
    if isinstance(model := meta.get("model_name"), str) and model:
        facts.says["model"][CFG] = model.rpartition("/")[2]
    l0 = meta.get("l0")
    if isinstance(l0, (int, float)) and not isinstance(l0, bool) and math.isfinite(l0) and l0 > 0:
        named = facts.says["l0"].get(NAME)
        if named is None or abs(named - l0) >= 1:  # names hold a rounded number
            facts.says["l0"][CFG] = float(l0)


def parse_setting(text: str) -> tuple[str, str, Any]:
    """``FOLDER:KEY=VALUE`` taken apart.

    Raises:
        GemmaScopeError: when it is not of that form, or the value not one of the key's.

    >>> parse_setting("my/sae:layer=3")
    ('my/sae', 'layer', 3)
    """
    folder, colon, rest = text.rpartition(":")
    key, equals, value = rest.partition("=")
    if not (colon and equals and folder and key in KEYS):
        raise GemmaScopeError(f"--set {text!r} is not FOLDER:KEY=VALUE with a key of {', '.join(KEYS)}.")
    try:
        read: dict[str, Callable[[str], Any]] = {"layer": int, "l0": float, "site": lambda v: get_site(v).name}
        return folder.strip("/"), key, read.get(key, str)(value)
    except ValueError:
        raise GemmaScopeError(f"--set {text!r}: {value!r} is not a number.") from None


def checked_format(name: str | None) -> Format | None:
    """A layout by its name, or None for None.

    Raises:
        UnknownNameError: for any other.
    """
    for known in WEIGHTS_FILES:
        if name == known:
            return known
    if name is not None:
        raise unknown_name("format", name, WEIGHTS_FILES)
    return None

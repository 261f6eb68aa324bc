"""Metadata of an SAE from its folder: sizes from headers, the rest from its configuration and the folder's name.

Only this module and ``scripts/build_registry.py`` take facts from a path, and only for the draft of a registry file,
which a person then checks. At run time everything comes from the registry's rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from gemma_scope_tl.contributing.coder_paths import parse_coder_path
from gemma_scope_tl.contributing.folder_claims import KEYS, NAME, FolderMetadata
from gemma_scope_tl.contributing.layered_metadata import read_layers
from gemma_scope_tl.contributing.repositories import Repository, sizes_of
from gemma_scope_tl.errors import GemmaScopeError, RegistryError, known_name
from gemma_scope_tl.families import Family, families, family_named, named_family
from gemma_scope_tl.registry.schema import WEIGHTS_FILES, Format
from gemma_scope_tl.registry.widths import parse_width
from gemma_scope_tl.sites import SITES, known_site, site_of_hook
from gemma_scope_tl.weights.checks import CONFIG_NAME, SKIP_KEYS, Expected
from gemma_scope_tl.weights.coder_config import CoderConfig
from gemma_scope_tl.weights.layer_files import is_layer_file

ARCHITECTURES = ("jumprelu", "jumprelu_transcoder", "jumprelu_skip_transcoder")
CFG = "cfg.json"


def layout_of(repository: Repository, wanted: Format | None = None) -> tuple[Format, list[str]]:
    """The layout of a repository and the folders that have it, sorted by name.

    Raises:
        GemmaScopeError: no folder has weights, or both layouts occur.
    """
    by_format: dict[Format, list[str]] = {}
    for format_, weights in WEIGHTS_FILES.items():
        folders = [path.rpartition("/")[0] for path in repository.files if path.rpartition("/")[2] == weights]
        if format_ == "gemma_scope_2":
            layered = [path.rpartition("/") for path in repository.files]
            folders = list(dict.fromkeys([*folders, *(top for top, _, name in layered if is_layer_file(name))]))
        if folders and wanted in (None, format_):
            by_format[format_] = folders
    if not by_format:
        files = WEIGHTS_FILES[wanted] if wanted else " or ".join(WEIGHTS_FILES.values())
        raise GemmaScopeError(
            f"{repository.name} has no {files} in any folder. Write SAEs with gemma_scope_tl.save_sae."
        )
    if len(by_format) > 1:
        counts = " and ".join(f"{len(folders)} folders of {name}" for name, folders in by_format.items())
        raise GemmaScopeError(f"{repository.name} has {counts}: a release has one layout. Say which with --format.")
    ((format_, folders),) = by_format.items()
    return format_, folders


def read_metadata(repository: Repository, folder: str, format_: Format) -> FolderMetadata:
    """Read the headers, the ``cfg.json`` and the name of a folder. Errors are added to the problems, not raised."""
    metadata = FolderMetadata(folder)
    if not folder:
        metadata.problems.append("The weights lie at the top: put them into a folder, whose name becomes the SAE's id.")
    weights = f"{folder}/{WEIGHTS_FILES[format_]}".lstrip("/")
    try:
        if format_ == "gemma_scope_2" and weights not in repository.files:
            read_layers(metadata, repository)
            return metadata
        shapes, source = repository.shapes(weights), f"{repository.name}/{weights}"
        metadata.d_in, metadata.d_sae, metadata.d_out = sizes_of(shapes, source)
        metadata.has_skip = any(name in SKIP_KEYS for name in shapes)
        _read_name(metadata)
        if format_ == "gemma_scope_2":
            _read_coder(metadata, repository)
        if format_ == "sae-lens":
            _read_cfg(metadata, repository.cfg(folder))
    except GemmaScopeError as error:
        metadata.problems.append(str(error))
    return metadata


def flat_cfg(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """A SAELens configuration with the entries of ``metadata`` moved to its top level."""
    inner = cfg.get("metadata")
    return {**cfg, **(inner if isinstance(inner, dict) else {})}


def _read_name(metadata: FolderMetadata) -> None:
    """Read Gemma Scope's ``layer_L/width_W/average_l0_N``, which may be below a folder named after the site."""
    patterns: dict[str, tuple[str, Callable[[str], Any]]] = {
        r"layer_(\d{1,4})": ("layer", int),
        r"average_l0_(\d{1,9}(?:\.\d{1,9})?)(?:_affine)?": ("l0", float),
        rf"({'|'.join(SITES)})": ("site", str),
    }
    for part in metadata.path.split("/"):
        for pattern, (key, parse) in patterns.items():
            if match := re.fullmatch(pattern, part):
                metadata.claims[key][NAME] = parse(match[1])
        if match := re.fullmatch(r"width_(\w+)", part):
            try:
                metadata.width_label = parse_width(match[1])
            except RegistryError as error:
                metadata.problems.append(str(error))


def _read_coder(metadata: FolderMetadata, repository: Repository) -> None:
    """Read Gemma Scope 2's name of the folder, and its ``config.json`` if there is one."""
    named = parse_coder_path(metadata.path)
    if named is not None:
        given = {"site": named.site, "layer": named.layer, "l0": named.l0}
        for key, value in given.items():
            if value is not None:
                metadata.claims[key][NAME] = value
        metadata.width_label = parse_width(named.width)
        metadata.named |= {"label": named.label, "seed": named.seed}
        if named.affine != metadata.has_skip:
            metadata.problems.append(f"{NAME} and the weights disagree on whether there is a skip connection.")
    path = f"{metadata.path}/{CONFIG_NAME}"
    if path in repository.files:
        config = CoderConfig.parse(repository.config(path), Path(path))
        config.complete(Expected(d_sae=metadata.d_sae, skip=metadata.has_skip, said_by="the weights"))
        place = config.place()
        said = {"site": place and place[1].name, "layer": place and place[2], "model": config.model}
        if place is not None:
            one = config.family or (place[0].name if named_family(config.model) else None)
            metadata.families = _families(one, lambda family: config.place(family))
        for key, value in said.items():
            if value is not None:
                metadata.claims[key][CONFIG_NAME] = value
        if config.l0 is not None:
            if abs(metadata.claims["l0"].get(NAME, math.inf) - config.l0) < 1:  # the L0 in a name is rounded
                del metadata.claims["l0"][NAME]
            metadata.claims["l0"][CONFIG_NAME] = config.l0


def _read_cfg(metadata: FolderMetadata, cfg: Mapping[str, Any]) -> None:
    """Read SAELens's configuration: hook names, and what this package's own metadata adds."""
    meta = flat_cfg(cfg)
    architecture = cfg.get("architecture")
    if architecture not in ARCHITECTURES:
        metadata.problems.append(f"{CFG} describes a {architecture!r} SAE: only {', '.join(ARCHITECTURES)} load.")
    for key, value in (("d_in", metadata.d_in), ("d_sae", metadata.d_sae)):
        if cfg.get(key) not in (None, value):
            metadata.problems.append(f"{CFG} has {key} {cfg[key]}, but the weights have {value}.")
    if isinstance(hook := meta.get("hook_name"), str) and hook:
        try:
            site, layer = site_of_hook(hook, meta.get("hook_name_out"))
        except GemmaScopeError as error:
            metadata.problems.append(f"{CFG}: {error}")
        else:
            stated = meta.get("family")
            metadata.families = _families(
                stated if isinstance(stated, str) else None,
                lambda family: site_of_hook(hook, meta.get("hook_name_out"), family),
            )
            metadata.claims["site"][CFG] = site.name
            if layer is not None:
                metadata.claims["layer"][CFG] = layer
    if isinstance(model := meta.get("model_name"), str) and model:
        metadata.claims["model"][CFG] = model.rpartition("/")[2]
    l0 = meta.get("l0")
    if isinstance(l0, (int, float)) and not isinstance(l0, bool) and math.isfinite(l0) and l0 > 0:
        named = metadata.claims["l0"].get(NAME)
        if named is None or abs(named - l0) >= 1:  # the L0 in a name is rounded
            metadata.claims["l0"][CFG] = float(l0)


def _families(stated: str | None, place: Callable[[Family], object]) -> frozenset[str]:
    """The names of the families that have a place: the stated one, or all for which ``place`` does not raise."""
    if stated is not None:
        return frozenset({family_named(stated).name})
    found: set[str] = set()
    for family in families():
        with suppress(GemmaScopeError):
            place(family)
            found.add(family.name)
    return frozenset(found)


def parse_setting(text: str) -> tuple[str, str, Any]:
    """Parse ``FOLDER:KEY=VALUE`` into folder, key and value.

    Raises:
        GemmaScopeError: the text does not have this form, or the value does not suit the key.

    >>> parse_setting("my/sae:layer=3")
    ('my/sae', 'layer', 3)
    """
    folder, colon, rest = text.rpartition(":")
    key, equals, value = rest.partition("=")
    if not (colon and equals and folder and key in KEYS):
        raise GemmaScopeError(f"--set {text!r} is not FOLDER:KEY=VALUE with a key of {', '.join(KEYS)}.")
    try:
        read: dict[str, Callable[[str], Any]] = {"layer": int, "l0": float, "site": known_site}
        return folder.strip("/"), key, read.get(key, str)(value)
    except ValueError:
        raise GemmaScopeError(f"--set {text!r}: {value!r} is not a number.") from None


def checked_format(name: str | None) -> Format | None:
    """Check the name of a layout and return it; None for None.

    Raises:
        UnknownNameError: there is no such layout.
    """
    return None if name is None else cast("Format", known_name("format", name, WEIGHTS_FILES))

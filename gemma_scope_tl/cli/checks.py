"""Checks of arguments that need no torch, whose import takes seconds: names, paths, texts and ports."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_scope_tl import dtypes
from gemma_scope_tl.errors import DeviceError, GemmaScopeError, known_name, unknown_name
from gemma_scope_tl.families import bundled_names, hub_ids

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow

DTYPES = (*dtypes.DTYPES, *dtypes.SHORT_DTYPES)
DEVICE_KINDS = ("cpu", "cuda", "mps", "xpu")
# These lists repeat those of modules that import torch; a test in tests/cli compares them.
UNITS = ("activation", "norm", "mean_norm")
ATTRIBUTIONS = ("gradient", "integrated")
ABLATIONS = ("zero", "mean")
SCORES = ("detection", "simulation")
SELECTIONS = ("standardised", "auroc", "difference")
LAYOUTS, REPOS = ("gemma-scope", "sae-lens", "gemma_scope_2", "both"), ("one", "site")
FORMATS = (".csv", ".json", ".parquet")
_TEXT_FILES = (".txt", ".jsonl", ".json")
_POSITIONS = re.compile(r"-?[0-9]{1,9}(,-?[0-9]{1,9})*|(?=.*[0-9])(-?[0-9]{1,9})?:(-?[0-9]{1,9})?")
_DEVICE = re.compile(rf"({'|'.join(DEVICE_KINDS)})(:\d+)?")


def models() -> tuple[str, ...]:
    """Names of the bundled models and of the released models of all families."""
    return (*bundled_names(), *hub_ids())


def each(check: Callable[[Any], object]) -> Callable[[Any], Any]:
    """An option's callback that calls ``check`` with every given value."""

    def callback(value: Any) -> Any:
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item is not None:
                check(item)
        return value

    return callback


def one_of(kind: str, names: Iterable[str]) -> Callable[[Any], Any]:
    """An option's callback that raises :class:`UnknownNameError` for any value outside ``names``."""
    valid = tuple(names)

    def check(name: str) -> None:
        if name not in valid:
            raise unknown_name(kind, name, valid)

    return each(check)


def spelled(kind: str, names: Iterable[str]) -> Callable[[Any], Any]:
    """An option's callback for one of ``names``, with ``-`` or ``_`` alike, or none."""
    valid = tuple(names)
    return lambda name: None if name is None else known_name(kind, name, valid)


def site(name: str) -> None:
    """Raise unless the site exists."""
    from gemma_scope_tl.sites import get_site

    get_site(name)


def listed_site(name: str) -> None:
    """Raise unless it is a site, or a kind of coders of several layers."""
    from gemma_scope_tl.sites import known_site

    known_site(name)


def backend(name: str) -> None:
    """Raise unless the backend exists."""
    from gemma_scope_tl.sites import BACKENDS

    one_of("backend", BACKENDS)(name)


def width(label: str) -> str:
    """The registry's label of a width, such as 16k for 16384.

    Raises:
        RegistryError: the label is not a width.
    """
    from gemma_scope_tl.registry.widths import parse_width, width_label

    return width_label(parse_width(label))


def widths(given: Any) -> Any:
    """A callback for one width, several or none."""
    if isinstance(given, (list, tuple)):
        return [width(label) for label in given]
    return None if given is None else width(given)


def label(name: str) -> None:
    """Raise unless it is a label of L0s."""
    from gemma_scope_tl.registry.schema import LABELS

    one_of("label", LABELS)(name)


def series(name: str) -> None:
    """Raise unless it is a series of releases."""
    from gemma_scope_tl.registry.schema import SERIES

    one_of("series", SERIES)(name)


def dtype(name: str) -> None:
    """Raise unless the dtype exists."""
    one_of("dtype", DTYPES)(name.removeprefix("torch."))


def positions(given: str | None) -> int | slice | list[int] | None:
    """The positions that a text names: ``4:`` and ``2:9`` as in a slice, ``-1``, or ``0,3,5``; None for None.

    Raises:
        GemmaScopeError: the text has another form.

    >>> positions("4:"), positions("0,3,-1"), positions("-1")
    (slice(4, None, None), [0, 3, -1], -1)
    """
    if given is None:
        return None
    if not _POSITIONS.fullmatch(given):
        raise GemmaScopeError(
            f"{given!r} names no positions: write 4: (from 4 on, counted from 0), 2:9, 0,3,5 or -1 (the last)."
        )
    if ":" in given:
        return slice(*(int(bound) if bound else None for bound in given.split(":")))
    numbers = [int(number) for number in given.split(",")]
    return numbers if "," in given else numbers[0]


def device(name: str) -> None:
    """Raise unless the name is a kind of device, with or without a number; :func:`available` checks that it exists."""
    if not _DEVICE.fullmatch(name):
        raise DeviceError(f"Device {name!r} is unknown: write cpu, cuda, cuda:1 (the second GPU), mps or xpu.")


def available(name: str | None) -> None:
    """Raise unless this machine has the device. Torch is imported for devices other than the CPU."""
    if name is not None and name != "cpu":
        from gemma_scope_tl.dtypes import parse_device

        parse_device(name)


def latent(row: SAERow, number: int) -> None:
    """Raise unless the SAE of a registry row has this latent."""
    if number >= row.d_sae:
        raise GemmaScopeError(f"{row.release} {row.id} has latents 0 to {row.d_sae - 1:,}, and not {number:,}.")


def release(name: str) -> None:
    """Raise unless the release exists."""
    from gemma_scope_tl.registry.catalog import header_of

    header_of(name)


def model(name: str) -> None:
    """Raise unless the name is that of a model or a folder, or has the form of a name on the Hub."""
    on_hub = name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(name.split("/"))
    if name not in models() and not Path(name).is_dir() and not on_hub:
        raise unknown_name("model", name, models(), "A local folder or a Hugging Face id works too.")


def table_file(path: Path) -> None:
    """Raise unless a table can be written to the path."""
    file_format("table", path, FORMATS)
    writable(path)


def figure_file(path: Path) -> None:
    """Raise unless a figure can be written to the path."""
    file_format("figure", path, (".png",))
    writable(path)


def file_format(what: str, path: Path, formats: tuple[str, ...]) -> None:
    """Raise :class:`UnknownNameError` unless the path's ending is one of ``formats``."""
    if path.suffix.lower() not in formats:
        raise unknown_name(f"{what} format", path.suffix, formats)


def writable(path: Path) -> None:
    """Raise unless a file can be written to the path."""
    if path.is_dir():
        raise GemmaScopeError(f"{path} is a folder: name a file.")
    folder(path.parent)


def folder(path: Path) -> None:
    """Raise unless files can be written into the folder, which may not exist yet."""
    there = path.expanduser().absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise GemmaScopeError(f"{path} cannot be written to: {there} is not a folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise GemmaScopeError(f"{path} cannot be written to: you have no write permission in {there}.")


def readable(path: Path) -> None:
    """Raise unless the path is a file that can be read and is not empty."""
    if not path.exists():
        raise GemmaScopeError(f"{path} does not exist.")
    if path.is_dir():
        raise GemmaScopeError(f"{path} is a folder: name a file.")
    if not os.access(path, os.R_OK):
        raise GemmaScopeError(f"{path} cannot be read: you have no permission.")
    if path.is_file() and not path.stat().st_size:
        raise GemmaScopeError(f"{path} is empty.")


def release_file(path: Path) -> Path:
    """The registry file itself, or that of a release with this name.

    Raises:
        GemmaScopeError: the path is neither a file that can be read nor a known release.
    """
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        from gemma_scope_tl.registry.catalog import header_of

        return header_of(str(path)).path
    readable(path)
    return path


def config_file(path: Path) -> Path:
    """The file of a configuration, or that of one with this name that comes with the package.

    Raises:
        GemmaScopeError: there is neither, or the file cannot be read.
    """
    from gemma_scope_tl.registry.locate import configuration_file

    file = configuration_file(path)
    readable(file)
    return file


def url(given: str) -> None:
    """Raise unless the text is the address of a server."""
    if not re.fullmatch(r"https?://[^\s/]+\S*", given):
        raise GemmaScopeError(f"{given!r} is not an address: write http://HOST:PORT/v1 or https://….")


def existing_folder(path: Path) -> None:
    """Raise unless the folder exists."""
    if not path.expanduser().is_dir():
        raise GemmaScopeError(f"{path} is not a folder." if path.exists() else f"{path} does not exist.")


def repository(name: str) -> None:
    """Raise unless the text has the form of a repository's name on the Hub."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise GemmaScopeError(f"{name!r} is not the name of a repository: write OWNER/NAME.")


def source(name: str) -> None:
    """Raise unless the name is that of an existing folder, or has the form of a repository's name on the Hub."""
    if not Path(name).expanduser().is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise GemmaScopeError(f"{name!r} is neither a folder nor of the form OWNER/NAME.")


def table(path: Path) -> None:
    """Raise unless the path is that of a table that can be read."""
    file_format("table", path, FORMATS)
    readable(path)


def texts(source: str) -> None:
    """Raise if a file of texts cannot be read. Names of data sets are checked later."""
    path = Path(source)
    if path.suffix.lower() in _TEXT_FILES:
        readable(path)
    elif path.is_file():
        raise unknown_name("kind of text file", path.suffix, _TEXT_FILES)


def text(given: str) -> str:
    """The text itself, or standard input for ``-``.

    Raises:
        GemmaScopeError: the text is empty or not valid UTF-8.
    """
    content = sys.stdin.buffer.read().decode("utf-8-sig", "surrogateescape") if given == "-" else given
    if content != given:
        content = content.replace("\r\n", "\n").removesuffix("\n")
    if not content.strip():
        where = "Standard input" if given == "-" else "The text"
        raise GemmaScopeError(f"{where} is empty: there is nothing to show.")
    if not content.isascii() and any("\ud800" <= letter <= "\udfff" for letter in content):
        raise GemmaScopeError("The text is not valid UTF-8.")
    return content


def free_port(host: str, port: int | None) -> None:
    """Raise unless a server can listen there.

    Raises:
        GemmaScopeError: the port is taken or reserved, or the host is not an address of this machine.
    """
    from gemma_scope_tl.demo.serving import try_listening

    try:
        try_listening(host, port)
    except OSError as error:
        advice = "Choose another --port, or omit it." if port else "--host must be an address of this machine."
        raise GemmaScopeError(f"Cannot listen on {host}, port {port or 'any'}: {error.strerror}. {advice}") from error

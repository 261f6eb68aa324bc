"""What can be seen of arguments before torch is imported, which takes seconds: names, paths, texts, ports."""

from __future__ import annotations

import os
import re
import socket
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gemma_scope_tl.errors import DeviceError, GemmaScopeError, unknown_name

DTYPES = ("float32", "bfloat16", "float16", "float64", "fp32", "bf16", "fp16", "fp64")
DEVICE_KINDS = ("cpu", "cuda", "mps", "xpu")
MODELS = ("bundled", *(f"gemma-2-{size}{kind}" for size in ("2b", "9b", "27b") for kind in ("", "-it")))
UNITS = ("activation", "norm", "mean_norm")
ATTRIBUTIONS = ("gradient", "integrated")
ABLATIONS = ("zero", "mean")
SCORES = ("detection", "simulation")
LAYOUTS, REPOS = ("gemma-scope", "sae-lens", "both"), ("one", "site")
FORMATS = (".csv", ".json", ".parquet")
_TEXT_FILES = (".txt", ".jsonl", ".json")
_DEVICE = re.compile(rf"({'|'.join(DEVICE_KINDS)})(:\d+)?")


def each(check: Callable[[Any], object]) -> Callable[[Any], Any]:
    """An option's callback: every given value passes ``check``, which raises or not."""

    def callback(value: Any) -> Any:
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item is not None:
                check(item)
        return value

    return callback


def one_of(kind: str, names: Iterable[str]) -> Callable[[Any], Any]:
    """A callback for names of a kind."""
    valid = tuple(names)

    def check(name: str) -> None:
        if name not in valid:
            raise unknown_name(kind, name, valid)

    return each(check)


def site(name: str) -> None:
    """Raise unless there is such a site."""
    from gemma_scope_tl.sites import get_site

    get_site(name)


def backend(name: str) -> None:
    """Raise unless there is such a backend."""
    from gemma_scope_tl.sites import BACKENDS

    one_of("backend", BACKENDS)(name)


def width(label: str) -> str:
    """The registry's label of a width: 16k for 16384.

    Raises:
        RegistryError: it is no width.
    """
    from gemma_scope_tl.registry.widths import parse_width, width_label

    return width_label(parse_width(label))


def widths(given: Any) -> Any:
    """A callback for one width, several or none."""
    if isinstance(given, (list, tuple)):
        return [width(label) for label in given]
    return None if given is None else width(given)


def dtype(name: str) -> None:
    """Raise unless there is such a dtype."""
    one_of("dtype", DTYPES)(name.removeprefix("torch."))


def device(name: str) -> None:
    """Raise unless it is a kind of device, with a number or without; whether there is one here is seen later."""
    if not _DEVICE.fullmatch(name):
        raise DeviceError(f"Device {name!r} is no device: write cpu, cuda, cuda:1 (the second GPU), mps or xpu.")


def available(name: str | None) -> None:
    """Raise unless there is such a device here, which only torch knows."""
    if name is not None and name != "cpu":
        from gemma_scope_tl.dtypes import parse_device

        parse_device(name)


def release(name: str) -> None:
    """Raise unless there is such a release."""
    from gemma_scope_tl.registry.catalog import header_of

    header_of(name)


def model(name: str) -> None:
    """Raise unless it is a model's name, a folder, or looks like a name on the Hub."""
    on_hub = name.count("/") == 1 and not name.startswith((".", "/", "~")) and all(name.split("/"))
    if name not in MODELS and not Path(name).is_dir() and not on_hub:
        raise unknown_name("model", name, MODELS, "A local folder or a Hugging Face id works too.")


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
    """Raise unless a file can be written there."""
    if path.is_dir():
        raise GemmaScopeError(f"{path} is a folder: name a file.")
    folder(path.parent)


def folder(path: Path) -> None:
    """Raise unless files can be written into the folder, which is made when they are."""
    there = path.expanduser().absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise GemmaScopeError(f"{path} cannot be written to: {there} is no folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise GemmaScopeError(f"{path} cannot be written to: you may not write in {there}.")


def readable(path: Path) -> None:
    """Raise unless the path is a file that can be read and holds something."""
    if not path.exists():
        raise GemmaScopeError(f"{path} does not exist.")
    if path.is_dir():
        raise GemmaScopeError(f"{path} is a folder: name a file.")
    if not os.access(path, os.R_OK):
        raise GemmaScopeError(f"{path} cannot be read: you have no permission.")
    if path.is_file() and not path.stat().st_size:
        raise GemmaScopeError(f"{path} is empty.")


def url(given: str) -> None:
    """Raise unless it is the address of a server."""
    if not re.fullmatch(r"https?://[^\s/]+\S*", given):
        raise GemmaScopeError(f"{given!r} is no address: write http://HOST:PORT/v1 or https://….")


def existing_folder(path: Path) -> None:
    """Raise unless the folder is there."""
    if not path.expanduser().is_dir():
        raise GemmaScopeError(f"{path} is no folder." if path.exists() else f"{path} does not exist.")


def repository(name: str) -> None:
    """Raise unless it may be the name of a repository on the Hub."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise GemmaScopeError(f"{name!r} is no repository: write OWNER/NAME.")


def source(name: str) -> None:
    """Raise unless it is a folder that is there or may be a repository on the Hub."""
    if not Path(name).expanduser().is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name):
        raise GemmaScopeError(f"{name!r} is no folder here and no OWNER/NAME on the Hub.")


def table(path: Path) -> None:
    """Raise unless it is a table that can be read."""
    file_format("table", path, FORMATS)
    readable(path)


def texts(source: str) -> None:
    """Raise where a file of texts cannot be read; a data set's name is looked up later."""
    path = Path(source)
    if path.suffix.lower() in _TEXT_FILES:
        readable(path)
    elif path.is_file():
        raise unknown_name("kind of text file", path.suffix, _TEXT_FILES)


def text(given: str) -> str:
    """The text itself, or standard input for ``-``.

    Raises:
        GemmaScopeError: there is no text, or it is not Unicode.
    """
    found = sys.stdin.buffer.read().decode("utf-8-sig", "surrogateescape") if given == "-" else given
    if found != given:
        found = found.replace("\r\n", "\n").removesuffix("\n")
    if not found.strip():
        where = "Standard input" if given == "-" else "The text"
        raise GemmaScopeError(f"{where} is empty: there is nothing to show.")
    if not found.isascii() and any("\ud800" <= letter <= "\udfff" for letter in found):
        raise GemmaScopeError("The text is not valid UTF-8.")
    return found


def free_port(host: str, port: int | None) -> None:
    """Raise unless one can listen there.

    Raises:
        GemmaScopeError: the port is taken or reserved, or the host is no address of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), port or 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as tried:
            if os.name == "posix":  # a connection that has just ended is no obstacle
                tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            tried.bind(address)
    except OSError as error:
        advice = (
            "Take another --port, or none for the first free one." if port else "--host is an address of this machine."
        )
        raise GemmaScopeError(f"Cannot listen on {host}, port {port or 'any'}: {error.strerror}. {advice}") from error

"""What is fuzzed: for every reader its seeds, its mutator, and a run that compares it with somebody else's reader."""

from __future__ import annotations

import io
import json
import math
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import yaml

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.registry import plain_yaml
from gemma_scope_tl.registry.plain_yaml import load_yaml
from gemma_scope_tl.registry.schema import read_release
from gemma_scope_tl.weights.checks import Expected, canonical_names
from gemma_scope_tl.weights.layout import ArrayLayout, stream
from gemma_scope_tl.weights.load import load_arrays
from gemma_scope_tl.weights.npz import clear_errors, inspect_npz
from gemma_scope_tl.weights.partial import read_local
from gemma_scope_tl.weights.safetensors_file import inspect_safetensors, read_cfg
from gemma_scope_tl.weights.stamp import cache_folder, file_key, read_stamp
from tests.fuzz import mutators, seeds
from tests.fuzz.guard import Violation

MAX_MESSAGE = 10_000  # characters of an error about a file that may have been made to fill screens
_INFLATION = 1040
Run = Callable[[bytes], None]


@dataclass(frozen=True)
class Target:
    """One reader.

    Attributes:
        name: what ``--target`` takes.
        seeds: where the search starts.
        mutate: see :data:`mutators.Mutate`.
        place: writes the bytes where the reader will look.
        run: reads them; raises a GemmaScopeError, or :class:`Violation` where results are wrong.
        files: names of which an error must name one.
        limit: characters that an error may have; None where it lists all problems of a file.
    """

    name: str
    seeds: Callable[[], list[bytes]]
    mutate: mutators.Mutate
    place: Callable[[bytes], object]
    run: Run
    files: tuple[str, ...]
    limit: int | None = MAX_MESSAGE


def make_target(name: str, folder: Path) -> Target:
    """The target of a name; its files lie in ``folder``."""
    return _MAKERS[name](folder)


def _npz(folder: Path) -> Target:
    path = folder / "fuzz.npz"

    def run(data: bytes) -> None:
        outcomes = [attempt(lambda: _npz_whole(path, data)), attempt(lambda: inspect_npz(_named(data)))]
        names = ["W_dec", "b_enc", "threshold"]
        outcomes.append(attempt(lambda: inspect_npz(_named(data), names)))
        attempt(lambda: inspect_npz(_named(data), names, {"b_enc": seeds.D_SAE, "threshold": seeds.D_SAE}))
        whole, opened, some = outcomes
        if isinstance(whole, dict):
            require(opened == whole, "path and file object differ", "")
            if isinstance(some, dict):
                require(some.items() <= whole.items(), "names select other arrays", "")
        _finish(whole, attempt(lambda: _loaded(path, data)))

    return Target("npz", seeds.npz_seeds, mutators.mutate_npz, path.write_bytes, run, (path.name,))


def _npz_whole(path: Path, data: bytes) -> dict[str, ArrayLayout]:
    """Every array of any dtype, through the streaming reader, against numpy's."""
    layouts = inspect_npz(path)
    claimed = sum(layout.nbytes for layout in layouts.values())
    require(claimed <= len(data) * _INFLATION, "claims too much", f"{claimed} bytes from {len(data)}")
    made = {name: np.empty(one.count, str(one.dtype).removeprefix("torch.")) for name, one in layouts.items()}

    def put(name: str) -> Any:
        return lambda index, chunk: made[name].__setitem__(slice(index, index + len(chunk)), chunk.numpy())

    with clear_errors(path):
        stream(path, layouts, {name: [put(name)] for name in layouts}, set(layouts))
    for name, flat in made.items():
        ours = flat.reshape(layouts[name].shape, order="F" if layouts[name].fortran else "C")
        theirs = _by_numpy(path, name)
        same = theirs.shape == ours.shape and np.array_equal(
            theirs, ours.astype(theirs.dtype), equal_nan=theirs.dtype.kind == "f"
        )
        require(same and theirs.dtype.newbyteorder("=") == ours.dtype, "numpy reads another array", name)
    return layouts


def _by_numpy(path: Path, name: str) -> np.ndarray:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]
    except Exception as error:
        raise Violation("numpy refuses what we read", f"{name}: {type(error).__name__}: {error}") from error


def _loaded(path: Path, data: bytes) -> dict[str, torch.Tensor]:
    """The parameters, as the loader gives them, against numpy's or Hugging Face's reader."""
    for dtype in (torch.float32, None):
        with _counted_allocations(len(data)):
            found = load_arrays(path, dtype=dtype)
    theirs = {} if path.suffix == ".npz" else _by_safetensors(data)
    for name, tensor in found.items():
        require(bool(tensor.isfinite().all()), "loads values that are not finite", name)
        for given, new in canonical_names(_names(path), str(path)).items():
            if new == name:
                other = theirs[given] if theirs else torch.from_numpy(_native(_by_numpy(path, given)))
                require(torch.equal(other, tensor.to(other.dtype)), "loads another array", name)
    return found


class _counted_allocations:
    """Everything that the loader allocates, against the file's size: fp16 may become fp32, and no more than that."""

    def __init__(self, size: int) -> None:
        self.left = size * _INFLATION * 2 + (1 << 16)

    def __enter__(self) -> None:
        self.real = torch.empty
        torch.empty = self.empty  # pyright: ignore

    def __exit__(self, *_: object) -> None:
        torch.empty = self.real

    def empty(self, shape: Any, *more: Any, dtype: torch.dtype = torch.float32, **options: Any) -> torch.Tensor:
        sizes = (shape, *more) if isinstance(shape, int) else tuple(shape)
        self.left -= math.prod(sizes) * dtype.itemsize
        require(self.left >= 0, "allocates too much", f"{sizes} of {dtype}")
        return self.real(sizes, dtype=dtype, **options)


def _safetensors(folder: Path) -> Target:
    path = folder / "fuzz.safetensors"

    def run(data: bytes) -> None:
        whole = attempt(lambda: inspect_safetensors(path))
        opened = attempt(lambda: inspect_safetensors(_named(data)))
        if isinstance(whole, dict):
            require(opened == whole, "path and file object differ", "")
            theirs = _by_safetensors(data)
            require(set(theirs) == set(whole), "Hugging Face sees other names", f"{list(theirs)[:9]}")
            for name, one in whole.items():
                raw = data[one.start : one.start + one.stored_size]
                tensor = theirs[name].contiguous()
                same = (tuple(tensor.shape), tensor.dtype) == (one.shape, one.dtype)
                bits = tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if same else b""
                require(same and bits == raw, "Hugging Face reads another tensor", name)
        _finish(whole, attempt(lambda: _loaded(path, data)))

    return Target(
        "safetensors",
        seeds.safetensors_seeds,
        mutators.mutate_safetensors,
        path.write_bytes,
        run,
        (path.name,),
    )


def _by_safetensors(data: bytes) -> dict[str, torch.Tensor]:
    try:
        return safetensors.torch.load(data)
    except Exception as error:
        raise Violation("Hugging Face refuses what we read", f"{type(error).__name__}: {error}") from error


def _partial(folder: Path) -> Target:
    paths = {kind: folder / f"fuzz.{kind}" for kind in ("npz", "safetensors")}

    def place(data: bytes) -> Path:
        path = paths["npz" if data[:2] == b"PK" else "safetensors"]
        path.write_bytes(data)
        return path

    def run(data: bytes) -> None:
        path = paths["npz" if data[:2] == b"PK" else "safetensors"]
        for encoder in (False, True):
            part = attempt(lambda e=encoder: read_local(path, [0, 2, 0], Expected(), e))
            if not isinstance(part, dict):
                raise part
            whole = attempt(lambda: load_arrays(path))
            if isinstance(whole, dict):
                index = torch.tensor([0, 2, 0])
                for name, tensor in part.items():
                    wanted = whole[name] if name == "b_dec" else whole[name].index_select(int(name == "W_enc"), index)
                    require(torch.equal(tensor, wanted), "the part differs from the whole", name)

    def both(data: bytes, rng: Any, other: bytes) -> bytes:
        change = mutators.mutate_npz if data[:2] == b"PK" else mutators.mutate_safetensors
        return change(data, rng, other if other[:2] == data[:2] else b"")

    def starts() -> list[bytes]:
        return seeds.npz_seeds() + seeds.safetensors_seeds()

    return Target("partial", starts, both, place, run, tuple(path.name for path in paths.values()))


def _yaml(folder: Path) -> Target:
    path = folder / "fuzz.yaml"
    escape = folder / "escape"
    escape.symlink_to("/", target_is_directory=True)

    def run(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        ours = attempt(lambda: load_yaml(text, str(path)))
        with _python_loader():
            slow = attempt(lambda: load_yaml(text, str(path)))
        for read, reference in ((ours, _Reference), (slow, _SlowReference)):
            if not isinstance(read, GemmaScopeError):
                require(_same(read, _by_pyyaml(text, reference)), "pyyaml reads other data", reference.__name__)
        release = attempt(lambda: read_release(path))
        if isinstance(release, GemmaScopeError):
            raise release
        attempt(lambda: release.rows)
        again = attempt(lambda: read_release(path))
        require(again == release, "reads differently twice", "")

    return Target("yaml", seeds.yaml_seeds, mutators.mutate_yaml, path.write_bytes, run, (path.name,), None)


class _python_loader:
    def __enter__(self) -> None:
        self.real, plain_yaml._LOADER = plain_yaml._LOADER, yaml.SafeLoader

    def __exit__(self, *_: object) -> None:
        plain_yaml._LOADER = self.real


class _Reference(yaml.CSafeLoader):
    """PyYAML's own construction, but for dates, which stay strings."""


class _SlowReference(yaml.SafeLoader):
    """The same in Python; libyaml and PyYAML disagree on corners of the language."""


for _reference in (_Reference, _SlowReference):
    for _kind in ("timestamp", "value"):
        _reference.add_constructor(f"tag:yaml.org,2002:{_kind}", lambda loader, node: node.value)


def _by_pyyaml(text: str, loader: Any) -> object:
    try:
        return yaml.load(text, loader)
    except Exception as error:
        raise Violation("pyyaml refuses what we read", f"{type(error).__name__}: {error}") from error


def _cfg(folder: Path) -> Target:
    from gemma_scope_tl.sae.loading import load_folder

    (folder / "sae_weights.safetensors").write_bytes(seeds.safetensors(seeds.arrays()))
    path = folder / "cfg.json"

    def run(data: bytes) -> None:
        cfg = attempt(lambda: read_cfg(folder))
        sae = attempt(lambda: load_folder(folder))
        if isinstance(sae, GemmaScopeError):
            raise sae
        require(isinstance(cfg, dict), "loads what read_cfg refuses", "")
        require(sae.W_enc.shape == (seeds.D_IN, seeds.D_SAE), "loads another SAE", "")

    files = ("cfg.json", "sae_weights.safetensors")
    return Target("cfg", seeds.cfg_seeds, mutators.mutate_json, path.write_bytes, run, files)


def _config(folder: Path) -> Target:
    from gemma_scope_tl.sae.loading import load_folder

    made = {name.lower(): array for name, array in seeds.arrays().items()}
    (folder / "params.safetensors").write_bytes(seeds.safetensors(made))
    path = folder / "config.json"

    def run(data: bytes) -> None:
        sae = attempt(lambda: load_folder(folder))
        if isinstance(sae, GemmaScopeError):
            raise sae
        require(np.array_equal(sae.W_enc.detach().numpy(), made["w_enc"]), "loads another SAE", "")
        require(sae.site in (None, "res", "mlp", "transcoder"), "loads another place", str(sae.site))

    files = ("config.json", "params.safetensors")
    return Target("config", seeds.config_seeds, mutators.mutate_json, path.write_bytes, run, files)


def _stamp(folder: Path) -> Target:
    os.environ["GEMMA_SCOPE_TL_CACHE"] = str(folder / "cache")
    weights = folder / "params.npz"
    weights.write_bytes(seeds.npz(seeds.arrays()))
    key = json.dumps(file_key(weights)).encode()
    from gemma_scope_tl.weights import stamp as module

    place = module._place(weights)
    require(place.is_relative_to(cache_folder()), "a stamp outside the cache", str(place))
    place.parent.mkdir(parents=True, exist_ok=True)
    expected = load_arrays(weights)
    time.sleep(0.15)  # stamps are not written for younger files: what happens would hang on the clock

    def write(data: bytes) -> None:
        place.write_bytes(data.replace(b'"@KEY@"', key))

    def run(data: bytes) -> None:
        read_stamp(weights)
        for dtype in (None, torch.float16):
            found = load_arrays(weights, dtype=dtype)
            same = all(torch.equal(found[name], a.to(found[name].dtype)) for name, a in expected.items())
            require(same, "a stamp changes what is loaded", "")

    return Target("stamp", seeds.stamp_seeds, mutators.mutate_json, write, run, (weights.name,))


def attempt(read: Callable[[], Any]) -> Any:
    """What ``read`` returns, or the GemmaScopeError that it raises."""
    try:
        return read()
    except GemmaScopeError as error:
        return error


def require(holds: bool, key: str, text: str) -> None:
    """Raise a :class:`Violation` unless ``holds``."""
    if not holds:
        raise Violation(key, f"{key}: {text}")


def _finish(*outcomes: object) -> None:
    for outcome in outcomes:
        if isinstance(outcome, GemmaScopeError):
            raise outcome


def _named(data: bytes) -> Any:
    file: Any = type("Named", (io.BytesIO,), {})(data)
    file.source, file.size = "fuzz.npz or fuzz.safetensors", len(data)
    return file


def _names(path: Path) -> Collection[str]:
    return inspect_npz(path) if path.suffix == ".npz" else inspect_safetensors(path)


def _native(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.astype(array.dtype.newbyteorder("=")))


def _same(a: Any, b: Any) -> bool:
    """Equal data of equal types; NaN equals itself."""
    return repr(a) == repr(b)


_MAKERS = {
    "npz": _npz,
    "safetensors": _safetensors,
    "yaml": _yaml,
    "cfg": _cfg,
    "config": _config,
    "partial": _partial,
    "stamp": _stamp,
}
NAMES = tuple(_MAKERS)

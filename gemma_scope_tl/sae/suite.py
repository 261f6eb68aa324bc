"""``load_suite``, which returns many SAEs as one mapping that loads each SAE on first access."""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.counts import LARGEST, checked_count, checked_real
from gemma_scope_tl.dtypes import parse_device, parse_dtype
from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError, unknown_name
from gemma_scope_tl.registry import catalog
from gemma_scope_tl.registry.choice import checked_number, several
from gemma_scope_tl.registry.schema import LABELS, SERIES
from gemma_scope_tl.registry.widths import label_of
from gemma_scope_tl.sae.loading import load_row
from gemma_scope_tl.sites import get_site

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.registry.schema import SAERow

_SHOWN = 3  # rows in a suite's text
Key = tuple[str, int | None]
"""A site and a layer (None for the embedding)."""


def load_suite(
    model: str,
    sites: str | Iterable[str] = ("res", "mlp", "att"),
    layers: str | int | Iterable[int] | None = "all",
    width: str | int | None = None,
    l0: int | float | str = "canonical",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    memory: int | None = None,
    release: str | None = None,
    *,
    affine: bool | None = None,
    seed: int | None = None,
    series: str | None = None,
) -> SAESuite:
    """One SAE per site and layer, as a mapping from ``(site, layer)``. No SAE is loaded yet.

    Args:
        model: a name such as ``"gemma-2-2b"``.
        sites: one or several of ``res``, ``mlp``, ``att``, ``embedding`` (whose layer is None), ``transcoder``.
        layers: ``"all"`` (or None) for the layers that have an SAE of this width (and label, if ``l0`` is a label); or
            one or several layers.
        width, l0, affine, seed: as for :func:`load_sae`.
        device, dtype: as for :meth:`JumpReLUSAE.from_pretrained`.
        memory: limit in bytes for the loaded SAEs. Beyond it, the least recently used SAEs are dropped, and loaded
            again on access. None keeps all. On the CPU in float32, SAEs of the Hub's cache are memory-mapped, so the
            system can reclaim their pages when it needs memory.
        release: the only release to search, such as one of :func:`register_release`; needed if two releases have an
            SAE at one place.
        series: as for :func:`load_sae`. By default all SAEs are of one series if one has all of them, and the subset
            is preferred; if neither has all, each place is taken as :func:`load_sae` does.

    Raises:
        RegistryError: when several SAEs fit at one place; the message says which argument chooses one.
        UnknownNameError: when a site, layer, width or L0 does not exist, before anything is loaded.
    """
    device, dtype = parse_device(device), parse_dtype(dtype)
    numbers = _numbers(layers)
    label = label_of(width)
    candidates = [
        row
        for header in catalog.releases_of(catalog.checked_model(model), release, series)
        for row in catalog.rows_of(header)
        if row.width == label and affine in (None, bool(row.affine)) and (l0 not in LABELS or row.label == l0)
    ]
    memory = None if memory is None else int(min(checked_real(memory, "memory", least=0), LARGEST))
    keys = [key for site in several(sites) for key in _keys(site, numbers, candidates)]
    series = series or _series_of(keys, candidates, l0)
    chosen: dict[str, Any] = {"affine": affine, "seed": seed, "series": series, "release": release}
    rows = {(site, n): catalog.find(model, site, n, width, l0, **chosen) for site, n in keys}
    return SAESuite(rows, lambda row: load_row(row, device=device, dtype=dtype), memory)


def _numbers(layers: Any) -> list[int | None] | None:
    """The numbers of one layer or several (None for no layer, as of the embedding); None for all layers."""
    if layers is None or (isinstance(layers, str) and layers == "all"):
        return None
    if isinstance(layers, str):
        raise unknown_name("choice of layers", layers, ["all"], "Or give numbers.")
    return [None if n is None else checked_number("layer", n, least=None) for n in several(layers)]


def _keys(site: str, layers: list[int | None] | None, candidates: Iterable[SAERow]) -> list[Key]:
    """The places of a site: all that have a candidate, or those of the given layers."""
    once = not get_site(site).per_layer
    if layers is not None and not once:
        return [(site, n) for n in layers]
    found = {row.layer for row in candidates if row.site == site}
    # find() raises an error for the places of the second list that names the existing layers
    return [(site, n) for n in sorted(found, key=lambda n: n or 0) or [None if once else 0]]


def _series_of(keys: list[Key], candidates: list[SAERow], l0: int | float | str) -> str | None:
    """The first series that has an SAE at each place, of this L0 if it is a number; None if there is none."""
    number = None if isinstance(l0, str) else l0
    for series in SERIES:
        places = {(row.site, row.layer) for row in candidates if row.series == series and number in (None, row.l0)}
        if places and places.issuperset(keys):
            return series
    return None


@dataclass(repr=False)
class SAESuite(Mapping[Key, Any]):
    """SAEs of one model by ``(site, layer)``, loaded on access. Threads may share a suite.

    ``suite["res", 20]`` loads and returns the SAE. A later access returns the same object while it is in memory.
    ``list(suite.values())`` is an argument for ``splice``.

    Attributes:
        rows: the registry rows of all SAEs, loaded or not.
        load: a function that makes the SAE of a row.
        memory: limit in bytes for the loaded SAEs, None for no limit. One SAE of any size is always kept.
    """

    rows: Mapping[Key, SAERow]
    load: Callable[[SAERow], Any]
    memory: int | None = None
    _held: OrderedDict[Key, Any] = field(default_factory=OrderedDict[Key, Any], repr=False)
    _loading: dict[Key, Future[Any]] = field(default_factory=dict[Key, "Future[Any]"], repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def __getitem__(self, key: Key) -> Any:
        found = _as_key(key)
        if found is None or found not in self.rows:
            raise unknown_name("SAE of this suite", key, map(str, self.rows))
        key = found
        with self._lock:
            if key in self._held:
                self._held.move_to_end(key)
                return self._held[key]
            running = self._loading.get(key)
            mine = running is None
            if running is None:
                running = self._loading[key] = Future()
        if mine:
            self._load(key, running)
        return running.result()

    def __iter__(self) -> Iterator[Key]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __repr__(self) -> str:
        """The model, the number of SAEs, their sites with layers, and the first rows; ``to_frame`` has all."""
        models = ", ".join(dict.fromkeys(str(row.model) for row in self.rows.values()))
        layers: dict[str, list[int]] = {}
        for site, layer in self.rows:
            layers.setdefault(site, []).extend([] if layer is None else [layer])
        places = "; ".join(f"{site} in layers {_spans(those)}" if those else site for site, those in layers.items())
        first = [f"{row.release}/{row.id}" for row in itertools.islice(self.rows.values(), _SHOWN)]
        more = f", and {len(self) - _SHOWN} more" if len(self) > _SHOWN else ""
        loaded = f"{len(self.loaded)} loaded"
        return f"SAESuite({models}: {len(self)} SAEs, {loaded}; {places}; {', '.join(first)}{more})"

    @property
    def loaded(self) -> tuple[Key, ...]:
        """The SAEs in memory, with the least recently used one first."""
        with self._lock:
            return tuple(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters in memory."""
        with self._lock:
            return sum(_nbytes(sae) for sae in self._held.values())

    def select(
        self, site: str | Iterable[str] | None = None, layers: str | int | Iterable[int | None] | None = None
    ) -> SAESuite:
        """A suite of some of these SAEs. It shares the SAEs that are in memory now, but none that are loaded later.

        Args:
            site: one or several sites; None for all.
            layers: one or several layers, in which None is the embedding's; ``"all"`` or None for all.

        Raises:
            UnknownNameError: when no SAE meets the conditions.
        """
        sites, numbers = None if site is None else several(site), _numbers(layers)
        keep = [k for k in self.rows if (sites is None or k[0] in sites) and (numbers is None or k[1] in numbers)]
        if not keep:
            raise UnknownNameError(f"No SAE of this suite has site {site!r} and layers {numbers!r}: {list(self.rows)}.")
        with self._lock:
            held = OrderedDict((key, sae) for key, sae in self._held.items() if key in keep)
        return SAESuite({key: self.rows[key] for key in keep}, self.load, self.memory, held)

    def prefetch(self, workers: int = 4, progress: bool = True) -> SAESuite:
        """Load all SAEs, ``workers`` at a time, with a progress bar, and return self.

        With a memory limit all files are downloaded and checked too, so later loads are fast, and the SAEs used last
        stay in memory.

        Raises:
            GemmaScopeError: with every SAE that failed, after all others were loaded.
        """
        from tqdm.auto import tqdm

        workers = checked_count(workers, "workers")
        failed: list[str] = []
        with ThreadPoolExecutor(workers) as pool, tqdm(total=len(self), unit="SAE", disable=not progress) as bar:
            futures = {key: pool.submit(self.__getitem__, key) for key in self.rows}
            for key, future in futures.items():
                try:
                    future.result()
                except GemmaScopeError as error:
                    failed.append(f"{key}: {error}")
                bar.update()
        if failed:
            raise GemmaScopeError(f"{len(failed)} of {len(self)} SAEs could not be loaded:\n" + "\n".join(failed))
        return self

    def drop(self) -> None:
        """Release the SAEs in memory. References that other code holds stay valid."""
        with self._lock:
            self._held.clear()

    def to_frame(self) -> pd.DataFrame:
        """A table with a row per SAE: its registry fields, and whether it is in memory."""
        import pandas as pd

        held = set(self.loaded)
        return pd.DataFrame([{**row.model_dump(), "loaded": key in held} for key, row in self.rows.items()])

    def _load(self, key: Key, promise: Future[Any]) -> None:
        try:
            sae = self.load(self.rows[key])
        except BaseException as error:
            with self._lock:
                del self._loading[key]
            promise.set_exception(error)
            return
        with self._lock:
            self._held[key] = sae
            del self._loading[key]
            while self.memory is not None and len(self._held) > 1 and self.nbytes > self.memory:
                self._held.popitem(last=False)
        promise.set_result(sae)


def _spans(numbers: Iterable[int]) -> str:
    """Sorted numbers, in which runs are written as their ends.

    >>> _spans([3, 0, 1, 2, 7])
    '0-3, 7'
    """
    spans: list[list[int]] = []
    for number in sorted(set(numbers)):
        if spans and number == spans[-1][-1] + 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    return ", ".join("-".join(map(str, span)) for span in spans)


def _as_key(key: Any) -> Key | None:
    """A site and a layer, a number of any library, as a key of a suite; None for anything else.

    ``("res", True)`` is none, although Python finds layer 1 with it.
    """
    if not (isinstance(key, tuple) and len(key) == 2 and isinstance(key[0], str)):
        return None
    try:
        return key[0], None if key[1] is None else checked_number("layer", key[1], least=None)
    except UnknownNameError:
        return None


def _nbytes(sae: Any) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in sae.parameters())

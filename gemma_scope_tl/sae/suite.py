"""``load_suite``: many SAEs as one mapping that loads each when it is first asked for."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.dtypes import parse_device, parse_dtype
from gemma_scope_tl.errors import GemmaScopeError, UnknownNameError, unknown_name
from gemma_scope_tl.registry import catalog
from gemma_scope_tl.registry.widths import DEFAULT_WIDTH, width_label
from gemma_scope_tl.sae.loading import load_row
from gemma_scope_tl.sites import get_site

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.registry.schema import SAERow

Key = tuple[str, int | None]
"""A site and a layer (None for the embedding)."""


def load_suite(
    model: str,
    sites: str | Iterable[str] = ("res", "mlp", "att"),
    layers: str | int | Iterable[int] = "all",
    width: str | int | None = None,
    l0: int | float | str = "canonical",
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    memory: int | None = None,
    release: str | None = None,
) -> SAESuite:
    """One SAE per site and layer, as a mapping from ``(site, layer)``; none is loaded yet.

    Args:
        model: such as ``"gemma-2-2b"``.
        sites: one or several of ``res``, ``mlp``, ``att``, ``embedding`` (whose layer is None), ``transcoder``.
        layers: ``"all"`` that have an SAE of this width, or which.
        width, l0: as :func:`load_sae`.
        device, dtype: as :meth:`JumpReLUSAE.from_pretrained`.
        memory: bytes that the loaded SAEs may take; beyond it, those unused for the longest are dropped and load again
            when asked for. None keeps all. On the CPU in float32, SAEs of the Hub's cache are mapped from their files,
            so that the system takes their pages back by itself when it needs them.
        release: look in this release alone, such as one of :func:`register_release`; needed where two have an SAE at
            one place.

    Raises:
        RegistryError: when two releases have an SAE at one place and ``release`` is not given.
        UnknownNameError: when a site, layer, width or L0 does not exist, before anything is loaded.
    """
    device, dtype = parse_device(device), parse_dtype(dtype)
    rows: dict[Key, SAERow] = {}
    label = DEFAULT_WIDTH if width is None else width_label(width) if isinstance(width, int) else width
    for site in [sites] if isinstance(sites, str) else list(sites):
        if isinstance(layers, str) and layers != "all":
            raise unknown_name("choice of layers", layers, ["all"], "Or give numbers.")
        once = not get_site(site).per_layer
        if isinstance(layers, str) or once:
            numbers = _layers(model, site, label, release)
            numbers = numbers or [None if once else 0]  # of which find() says that there is none, and what there is
        else:
            numbers = [layers] if isinstance(layers, int) else list(layers)
        for layer in numbers:
            rows[site, layer] = catalog.find(model, site, layer, width, l0, release=release)
    return SAESuite(rows, lambda row: load_row(row, device=device, dtype=dtype), memory)


@dataclass
class SAESuite(Mapping[Key, Any]):
    """SAEs of one model by ``(site, layer)``, loaded when asked for. Threads may share it.

    ``suite["res", 20]`` loads and returns the SAE; asking again returns the same object while it is held.
    ``list(suite.values())`` is what ``splice`` takes.

    Attributes:
        rows: the registry rows, all of them, loaded or not.
        load: makes the SAE of a row.
        memory: bytes that held SAEs may take, None for no bound. One SAE is always held, however large.
    """

    rows: Mapping[Key, SAERow]
    load: Callable[[SAERow], Any]
    memory: int | None = None
    _held: OrderedDict[Key, Any] = field(default_factory=OrderedDict[Key, Any], repr=False)
    _loading: dict[Key, Future[Any]] = field(default_factory=dict[Key, "Future[Any]"], repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def __getitem__(self, key: Key) -> Any:
        if key not in self.rows:
            raise unknown_name("SAE of this suite", key, map(str, self.rows))
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

    @property
    def loaded(self) -> tuple[Key, ...]:
        """Which SAEs are held now, the one unused for the longest first."""
        with self._lock:
            return tuple(self._held)

    @property
    def nbytes(self) -> int:
        """Bytes of the parameters held now."""
        with self._lock:
            return sum(_nbytes(sae) for sae in self._held.values())

    def select(self, site: str | None = None, layers: Iterable[int | None] | None = None) -> SAESuite:
        """A suite of some of these SAEs; what is held is shared at this moment, not later.

        Raises:
            UnknownNameError: when nothing fits.
        """
        chosen = None if layers is None else set(layers)
        keep = [k for k in self.rows if site in (None, k[0]) and (chosen is None or k[1] in chosen)]
        if not keep:
            raise UnknownNameError(f"No SAE of this suite has site {site!r} and layers {layers!r}: {list(self.rows)}.")
        with self._lock:
            held = OrderedDict((key, sae) for key, sae in self._held.items() if key in keep)
        return SAESuite({key: self.rows[key] for key in keep}, self.load, self.memory, held)

    def prefetch(self, workers: int = 4, progress: bool = True) -> SAESuite:
        """Load everything, ``workers`` at a time, with a progress bar; then return self.

        With a memory bound files are still downloaded and checked, so later loads are quick, and the last ones used
        stay.

        Raises:
            GemmaScopeError: naming every SAE that failed, after all others were loaded.
        """
        from tqdm.auto import tqdm

        if workers < 1:
            raise GemmaScopeError(f"prefetch needs at least one worker, not {workers}.")
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
        """Forget what is held; SAEs that others still use live on there."""
        with self._lock:
            self._held.clear()

    def to_frame(self) -> pd.DataFrame:
        """A row per SAE with its registry fields and whether it is held."""
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


def _nbytes(sae: Any) -> int:
    return sum(parameter.numel() * parameter.itemsize for parameter in sae.parameters())


def _layers(model: str, site: str, width: str, release: str | None) -> list[int | None]:
    """Layers (None for the embedding) that have SAEs of this width, ascending."""
    name, only = catalog.checked_model(model), None if release is None else catalog.header_of(release)
    rows = [
        row
        for h in catalog.headers()
        if h.model == name and only in (None, h)
        for row in catalog.load_release(h.release).rows
    ]
    return sorted({row.layer for row in rows if row.site == site and row.width == width}, key=lambda n: n or 0)

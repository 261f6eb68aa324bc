"""The state that all visitors of a demo share: a model, its SAEs, and a lock. It holds no state of a visitor."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int

from gemma_scope_tl.demo.limits import Limits
from gemma_scope_tl.errors import GemmaScopeError, unknown_name
from gemma_scope_tl.registry.listing import of_one_layer, select_rows
from gemma_scope_tl.sae.suite import SAESuite
from gemma_scope_tl.sites import SITES
from gemma_scope_tl.viz.latent_facts import PageText

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel
    from gemma_scope_tl.registry.schema import SAERow

GIB = 1 << 30
wanted: ContextVar[Callable[[], bool]] = ContextVar("wanted", default=lambda: True)
"""A function that returns whether a page still waits for the result of this thread."""


class World:
    """A model and the SAEs that a demo offers. An SAE is loaded on first use.

    SAEs are named ``release/id``.

    Attributes:
        lock: a lock that is held while the model runs, since hooks and SAEs of one visitor must not act in the pass of
            another. Take it with :meth:`running`.
        limits: bounds of a request.

    Args:
        model: a model from ``load_model``.
        rows: registry rows of the SAEs.
        limits: see :class:`Limits`.
        text: text of latents' pages; by default 64 rows of the held-out text.
        sae_memory: bytes of SAEs to hold.
        dtype: dtype of the SAEs.

    Raises:
        GemmaScopeError: there is no SAE, or the model has no tokenizer.
    """

    def __init__(
        self,
        model: GemmaModel,
        rows: Sequence[SAERow],
        limits: Limits | None = None,
        text: PageText | None = None,
        sae_memory: int = 4 * GIB,
        dtype: str = "float32",
    ) -> None:
        from gemma_scope_tl.sae.loading import load_row

        if not rows:
            raise GemmaScopeError("There is no SAE to show: choose another release.")
        if model.tokenizer is None:
            raise GemmaScopeError("This model has no tokenizer, which the demo needs to read text.")
        self.model, self.limits, self.lock = model, limits or Limits(), threading.RLock()
        self._users, self._stopping, self._changed = 0, False, threading.Condition()
        self.rows = {f"{row.release}/{row.id}": row for row in rows}
        self._text = text
        keyed = {(name, row.layer): row for name, row in self.rows.items()}
        self._suite = SAESuite(keyed, lambda row: load_row(row, device=model.cfg.device, dtype=dtype), sae_memory)

    @contextmanager
    def running(self) -> Generator[None, None, None]:
        """Hold the lock of the model within the context.

        Raises:
            GemmaScopeError: the demo is stopping, or no page waits for the answer any more.
        """
        with self._changed:
            self._users += 1
        try:
            with self.lock:
                self.check()
                yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def check(self, *_: Any, **__: Any) -> None:
        """Raise if the result of the current work is no longer needed. The method can be used as a hook function.

        Raises:
            GemmaScopeError: as for :meth:`running`.
        """
        if self._stopping:
            raise GemmaScopeError("The demo is stopping.")
        if not wanted.get()():
            raise GemmaScopeError("No page waits for this answer any more.")

    @property
    def check_hook(self) -> tuple[str, Any]:
        """:meth:`check` as a hook that runs at the beginning of every pass, and therefore before each new token."""
        sites = {site.joins: site for site in self.model.family.sites.values()}
        first = sites.get("embedding") or sites["residual"]
        return first.hook_name(0, self.model.backend), self.check

    def stop(self, seconds: float = 30.0) -> bool:
        """Stop the current pass and wait for its end, since a process that exits during a forward pass would abort.

        Returns:
            Whether the pass ended within ``seconds``. The world can be used again afterwards.
        """
        with self._changed:
            self._stopping = True
            ended = self._changed.wait_for(lambda: self._users == 0, seconds)
            self._stopping = False
            return ended

    @property
    def text(self) -> PageText:
        """The text of latents' pages, read on first use."""
        with self.running():
            if self._text is None:
                self._text = PageText(self.model)
            return self._text

    def sae(self, name: str) -> Any:
        """The SAE of this name.

        Raises:
            UnknownNameError: with the nearest names.
            WeightsError: the file of the SAE cannot be loaded.
        """
        return self._suite[name, self.row(name).layer]

    def row(self, name: str) -> SAERow:
        """The registry row of this name.

        Raises:
            UnknownNameError: with the nearest names.
        """
        if not isinstance(name, str) or name not in self.rows:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise unknown_name("SAE of this demo", name, self.rows)
        return self.rows[name]

    def sites(self) -> list[str]:
        """Sites that have an SAE, in the site table's order."""
        found = {row.site for row in self.rows.values()}
        return [site for site in SITES if site in found]

    def layers(self, site: str) -> list[int | None]:
        """Layers that have an SAE at ``site``, ascending; only None for the embedding."""
        found = {row.layer for row in self.rows.values() if row.site == site}
        return sorted(found, key=lambda layer: -1 if layer is None else layer)

    def names(self, site: str, layer: int | None) -> list[str]:
        """Names of the SAEs of a place."""
        return [name for name, row in self.rows.items() if (row.site, row.layer) == (site, layer)]

    def first_name(self, site: str, layer: int | None) -> str:
        """Name of the SAE of a place to show first: a canonical one, if there is one.

        Raises:
            GemmaScopeError: the place has no SAE.
        """
        names = self.names(site, layer)
        if not names:
            raise GemmaScopeError(f"There is no SAE at site {site!r}, layer {layer}.")
        return next((name for name in names if self.rows[name].canonical), names[0])

    def start(self) -> str:
        """Name of the SAE that is shown first: one of the residual stream, if any, in the middle of the layers."""
        sites = self.sites()
        site = next((name for name in sites if SITES[name].joins == "residual"), sites[0])
        layers = self.layers(site)
        return self.first_name(site, layers[len(layers) // 2])

    def tokens(self, text: object) -> Int[torch.Tensor, "1 pos"]:
        """A visitor's text as token ids.

        Raises:
            GemmaScopeError: the text is empty or exceeds the limits.
        """
        tokens = self.model.to_tokens(self.limits.text(text))
        self.limits.token_count(int(tokens.shape[1]))
        return tokens

    def token_texts(self, tokens: Int[torch.Tensor, "1 pos"]) -> list[str]:
        """The text of each token."""
        return [self.model.tokenizer.decode([i]) for i in tokens[0].tolist()]


def load_world(
    model: str = "bundled",
    release: str | Iterable[str] | None = None,
    *,
    device: str | None = None,
    dtype: str = "float32",
    limits: Limits | None = None,
    rows: int = 64,
    context: int = 128,
) -> World:
    """Load a model by name, with the SAEs of its releases.

    Args:
        model: name of the model, as for ``load_model``.
        release: one or several releases; by default all releases of the registry for this model.
        device, dtype: device and dtype of the model and the SAEs.
        limits: bounds of a request.
        rows, context: number of rows of held-out text for latents' pages, and of tokens in a row.

    Raises:
        UnknownNameError: the model or a release does not exist. It is raised before the model is loaded.
    """
    from gemma_scope_tl.model.loading import load_model

    selected = select_rows(model=None if release else model.rstrip("/").split("/")[-1], release=release)
    found = of_one_layer(selected, "The demo")
    loaded = load_model(model, device=device, dtype=dtype)
    return World(loaded, found, limits, PageText(loaded, rows=rows, context=context), dtype=dtype)

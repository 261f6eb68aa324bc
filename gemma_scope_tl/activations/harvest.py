"""Activations of many places from one forward pass, which ends after the last place has been read.

The tensors are read at the hook points of the site table by plain PyTorch hooks. On the bridge the decoder itself is
called, which computes no logits and skips TransformerLens's handling of inputs and outputs. After the last place
has been read, the pass ends as in :mod:`gemma_scope_tl.model.read`.

Users' own hooks on the model act on the tensors. Attached SAEs are refused, because their reconstructions would be
harvested.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int

from gemma_scope_tl.errors import GemmaScopeError, SpliceError, unknown_name
from gemma_scope_tl.model.read import EndOfPass
from gemma_scope_tl.model.splicing import SpliceMixin
from gemma_scope_tl.sites import BACKENDS, Place, flatten_heads

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel


class Harvester:
    """Reads places of a model.

    Attributes:
        model: a model from ``load_model``, of either backend.
        widths: ``d`` of every place.
    """

    def __init__(self, model: GemmaModel, places: Sequence[Place]) -> None:
        """
        Raises:
            SpliceError: the model is not from ``load_model``, or does not have one of the layers.
            UnknownNameError: a site is unknown.
            GemmaScopeError: no place was given.
        """
        given: Any = model
        if not isinstance(given, SpliceMixin):
            raise SpliceError("Activations are read from a model of gemma_scope_tl.load_model(); wrap yours with it.")
        if not places:
            raise GemmaScopeError("Name the places to read, such as Place('res', 3).")
        self.model = model
        self.widths: Mapping[Place, int] = {}
        self._points: dict[Place, Any] = {}
        for place in places:
            site = model.family.site(place.site)
            site.check_layer(place.layer, model.dims)
            self.widths[place] = site.d_in(model.dims)
            self._points[place] = model.site_hook_point(site.hook_name(place.layer, model.backend))

    @property
    def device(self) -> torch.device:
        """The device on which the model takes token ids."""
        return next(self.model.embedding_module().parameters()).device

    @torch.no_grad()
    def run(
        self, tokens: Int[torch.Tensor, "batch pos"], keep: Bool[torch.Tensor, "batch pos"]
    ) -> dict[Place, Float[torch.Tensor, "kept d"]]:
        """Activations at the kept positions, in row-major order.

        Args:
            tokens: token ids; padding must be on the right, where causal attention keeps it from changing anything.
            keep: True at the positions whose activations are returned.

        Returns:
            New tensors on the model's device, in the model's dtype at the site. Equal input gives equal bits.

        Raises:
            SpliceError: SAEs are attached to the model.
            GemmaScopeError: the ids have a wrong shape or are not in the vocabulary, a row is longer than the model's
                context, or the pass does not reach a place.
        """
        self._check(tokens, keep)
        kept = keep.reshape(-1).nonzero().squeeze(1).to(self.device)
        found: dict[Place, torch.Tensor] = {}
        with self._reading(kept, found), suppress(EndOfPass):
            self._forward(tokens.to(self.device).long())
        missing = [place.key for place in self._points if place not in found]
        if missing:
            raise GemmaScopeError(f"The forward pass of this model does not reach {', '.join(missing)}.")
        return {place: found[place] for place in self._points}

    @contextmanager
    def _reading(self, kept: torch.Tensor, found: dict[Place, torch.Tensor]) -> Generator[None]:
        def read(place: Place, value: torch.Tensor) -> None:
            flat = flatten_heads(value).reshape(-1, self.widths[place])
            found[place] = flat.index_select(0, kept)  # a copy, because the model may change its tensor in place
            if len(found) == len(self._points):
                raise EndOfPass

        handles: list[Any] = []
        try:
            for place, point in self._points.items():
                handles.append(point.register_forward_hook(lambda _m, _i, out, place=place: read(place, out)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _forward(self, tokens: torch.Tensor) -> None:
        model: Any = self.model
        match model.backend:
            case "bridge":
                model.original_model.get_submodule(model.family.decoder)(input_ids=tokens, use_cache=False)
            case "hooked_transformer":  # without a mask it would take padding on the right for padding on the left
                model(tokens, stop_at_layer=model.dims.n_layers, attention_mask=torch.ones_like(tokens))
            case _:
                raise unknown_name("backend", model.backend, BACKENDS)

    def _check(self, tokens: torch.Tensor, keep: torch.Tensor) -> None:
        if self.model.acts_to_saes:
            raise SpliceError(
                "SAEs are attached, and their reconstructions would be harvested: detach them with reset_saes() first."
            )
        config = self.model.cfg
        if tokens.ndim != 2 or not tokens.numel() or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise GemmaScopeError(f"Token ids are integers [batch, pos], not {tokens.dtype} {list(tokens.shape)}.")
        if keep.shape != tokens.shape or keep.dtype != torch.bool:
            raise GemmaScopeError(
                f"keep holds a bool for each position, {list(tokens.shape)}, not {keep.dtype} {list(keep.shape)}."
            )
        if tokens.shape[1] > config.n_ctx:
            raise GemmaScopeError(f"Rows have {tokens.shape[1]} tokens, but this model's context is {config.n_ctx}.")
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= config.d_vocab:
            raise GemmaScopeError(f"Token ids run from {low} to {high}; the model's are 0..{config.d_vocab - 1}.")

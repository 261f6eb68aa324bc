"""The SAEs of an evaluation: the place of each, and its latents and reconstruction from one encoding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float

from gemma_scope_tl.model.identity import NO_CACHE, as_plain, check_no_hooks, hooked_modules
from gemma_scope_tl.sae.access import decode_with_skip, flat_heads, locate
from gemma_scope_tl.sae.base import GemmaScopeMixin
from gemma_scope_tl.sae.choices import as_saes, bring
from gemma_scope_tl.sae.hooked_pass import is_hooked
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.sae.sparse import SparseActs, decode_sparse, encode_sparse
from gemma_scope_tl.sae.suite import SAESuite
from gemma_scope_tl.sites import Place
from gemma_scope_tl.weights.fingerprint import fingerprint

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel


_NOT_COMPUTED = ("metadata", "device", "dtype")  # values of an SAE's configuration; weights say their own dtype


@dataclass(frozen=True)
class Subject:
    """An SAE to evaluate, which is loaded on demand.

    Attributes:
        get: a function that returns the SAE.
        place: the place that the SAE reads; it writes ``target_of(place)``.
        d_sae: number of latents.
        release, id: release and id in the registry; None for an SAE that is not in the registry.
        affine: whether it has a skip connection; None if only the weights say so.
    """

    get: Callable[[], Any]
    place: Place
    d_sae: int
    release: str | None
    id: str | None
    affine: bool | None = None

    @property
    def has_skip(self) -> bool:
        """Whether it is a transcoder with a skip connection. It is loaded for this if its registry row does not say."""
        return getattr(self.get(), "W_skip", None) is not None if self.affine is None else self.affine

    @property
    def columns(self) -> dict[str, Any]:
        """The columns of a table that identify the SAE."""
        named = {"release": self.release, "id": self.id, "site": self.place.site, "layer": self.place.layer}
        return {**named, "d_sae": self.d_sae}

    def facts(self) -> dict[str, Any]:
        """What the SAE computes, as a part of cache keys: its class, weights and configuration. It is loaded for this.

        Raises:
            GemmaScopeError: there are hooks on the SAE, which no key can describe.
        """
        sae = self.get()
        check_no_hooks(f"the SAE of {self.place.key}", hooked_modules(sae), NO_CACHE)
        config = {name: value for name, value in sae.cfg.to_dict().items() if name not in _NOT_COMPUTED}
        kind = f"{type(sae).__module__}.{type(sae).__qualname__}"
        return {"class": kind, "weights": fingerprint(sae), "config": as_plain(config)}


def subjects_of(model: GemmaModel, saes: Any, skip_layered: bool = False) -> list[Subject]:
    """Make subjects of an SAE, several SAEs, a mapping of them, or a suite (whose SAEs are loaded one at a time).

    Layered coders are left out with ``skip_layered``.

    Raises:
        SpliceError: there are no SAEs, or one is incomplete, does not fit the model, or does not name its place.
        UnknownNameError: a suite has layered coders, without ``skip_layered``.
    """
    if isinstance(saes, SAESuite) and len(saes):
        return [_of_suite(model, saes, key) for key in saes if not (skip_layered and saes.rows[key].layers)]
    several = as_saes(saes, whole=True, layered=skip_layered)
    return [_of_module(model, sae) for sae in several if not isinstance(sae, LayeredCoder)]


def _of_module(model: GemmaModel, sae: Any) -> Subject:
    place, row = _checked_place(model, sae), getattr(sae, "row", None)
    names = getattr(row, "release", None), getattr(row, "id", None)
    return Subject(lambda: sae, place, int(sae.cfg.d_sae), *names, getattr(sae, "W_skip", None) is not None)


def _of_suite(model: GemmaModel, suite: SAESuite, key: tuple[str, int | None]) -> Subject:
    def get() -> Any:
        sae = suite[key]
        _checked_place(model, sae)
        return sae

    row = suite.rows[key]
    model.check_row_fits(row)  # before the clean pass, and not when the SAE's turn comes
    affine = row.affine if row.model_family.site(row.site).is_transcoder else False
    return Subject(get, Place(row.site, row.layer), row.d_sae, row.release, row.id, affine)


def _checked_place(model: GemmaModel, sae: Any) -> Place:
    """Check that the SAE fits the model, and return the place that it reads."""
    site, layer = locate(sae, model.family)
    model.check_fits(sae, site, layer)
    return Place(site.name, layer if site.per_layer else None)


@torch.no_grad()
def latents_of(sae: Any, x: Float[torch.Tensor, "n d_in"]) -> SparseActs:
    """The active latents of ``x``. Hooks on the SAE's own points fire. The SAE moves to the device of ``x``."""
    bring(sae, x.device)
    if _encodes_sparsely(sae):
        return encode_sparse(x, sae.W_enc, sae.b_enc, sae.threshold)
    with flat_heads(sae):
        return SparseActs.from_dense(sae.encode(x.to(sae.dtype)))


@torch.no_grad()
def latents_and_output(sae: Any, x: Float[torch.Tensor, "n d_in"]) -> tuple[SparseActs, Float[torch.Tensor, "n d_out"]]:
    """The active latents of ``x`` and the SAE's output, from one encoding. Otherwise as :func:`latents_of`."""
    bring(sae, x.device)
    if _encodes_sparsely(sae):
        acts = latents_of(sae, x)
        out, skipped = decode_sparse(acts, sae.W_dec, sae.b_dec), sae.skip(x)
        return acts, out if skipped is None else out + skipped
    with flat_heads(sae):
        x = x.to(sae.dtype)
        dense = sae.encode(x)
        return SparseActs.from_dense(dense), decode_with_skip(sae, dense, x)


def _encodes_sparsely(sae: Any) -> bool:
    """Whether the SAE is one of this package's classes, and no hook needs its dense latents."""
    return isinstance(sae, GemmaScopeMixin) and not any(is_hooked(point) for point in sae.hook_dict.values())

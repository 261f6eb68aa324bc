"""The SAEs of an evaluation: what each is, where it sits, and its latents and reconstruction from one encoding."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from gemma_scope_tl.model.attached import decode_with_skip, locate
from gemma_scope_tl.sae.base import GemmaScopeMixin
from gemma_scope_tl.sae.choices import as_saes, bring
from gemma_scope_tl.sae.hooked_pass import is_hooked
from gemma_scope_tl.sae.sparse import SparseActs, decode_sparse, encode_sparse
from gemma_scope_tl.sae.suite import SAESuite
from gemma_scope_tl.sites import Place

_SAMPLE = 1024  # entries of each tensor that go into a fingerprint as they are


@dataclass(frozen=True)
class Subject:
    """An SAE to evaluate, loaded when asked for.

    Attributes:
        get: gives the SAE.
        place: where it reads; ``target_of(place)`` is where it writes.
        d_sae: how many latents it has.
        release, id: in the registry, None outside it.
        fingerprint: of its weights; asked for by caches only.
    """

    get: Callable[[], Any]
    place: Place
    d_sae: int
    release: str | None
    id: str | None
    fingerprint: Callable[[], str]


def subjects_of(model: Any, saes: Any) -> list[Subject]:
    """An SAE, several, a mapping of them, or a suite (whose SAEs are loaded one at a time) as subjects.

    Raises:
        SpliceError: when there is none, one is no whole SAE, does not fit the model, or does not say where it belongs.
    """
    if isinstance(saes, SAESuite) and len(saes):
        return [_of_suite(model, saes, key) for key in saes]
    return [_of_module(model, sae) for sae in as_saes(saes, whole=True)]


@torch.no_grad()
def latents_of(sae: Any, x: Float[torch.Tensor, "n d_in"]) -> SparseActs:
    """The active latents of ``x`` alone; hooks on the SAE's own points fire. The SAE moves to the device of ``x``."""
    bring(sae, x.device)
    if _encodes_sparsely(sae):
        return encode_sparse(x, sae.W_enc, sae.b_enc, sae.threshold)
    with _flat(sae):
        return SparseActs.from_dense(sae.encode(x.to(sae.dtype)))


@torch.no_grad()
def latents_and_output(sae: Any, x: Float[torch.Tensor, "n d_in"]) -> tuple[SparseActs, Float[torch.Tensor, "n d_out"]]:
    """The active latents of ``x`` and the SAE's output, from one encoding; hooks on the SAE's own points fire."""
    bring(sae, x.device)
    if _encodes_sparsely(sae):
        acts = latents_of(sae, x)
        out, skipped = decode_sparse(acts, sae.W_dec, sae.b_dec), sae.skip(x)
        return acts, out if skipped is None else out + skipped
    with _flat(sae):
        x = x.to(sae.dtype)
        dense = sae.encode(x)
        return SparseActs.from_dense(dense), decode_with_skip(sae, dense, x)


def _encodes_sparsely(sae: Any) -> bool:
    return isinstance(sae, GemmaScopeMixin) and not any(is_hooked(point) for point in sae.hook_dict.values())


@contextmanager
def _flat(sae: Any) -> Generator[None]:
    """Heads are flat here; stock SAEs are told."""
    flattened = getattr(sae, "hook_z_reshaping_mode", False) and not isinstance(sae, GemmaScopeMixin)
    if flattened:
        sae.turn_off_forward_pass_hook_z_reshaping()
    try:
        yield
    finally:
        if flattened:
            sae.turn_on_forward_pass_hook_z_reshaping()


def fingerprint(module: torch.nn.Module) -> str:
    """A hash of a module's parameters and buffers: names, dtypes, shapes, a sample of entries, and sums of all bits.

    Sums are taken of the entries' bits as integers, by row, so they are exact and every entry counts. It runs at the
    speed of memory; it tells weights apart that training, editing or rounding made, not forged ones.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(_bits(tensor.detach()))
    return digest.hexdigest()


@torch.no_grad()
def _bits(tensor: torch.Tensor) -> bytes:
    if tensor.is_sparse or not tensor.numel():
        return repr(tensor).encode()
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    by_row = tensor.reshape(-1, tensor.shape[-1]) if tensor.ndim > 1 else tensor.reshape(1, -1)
    if by_row.stride(1) != 1:
        by_row = by_row.T if by_row.stride(0) == 1 else by_row.contiguous()
    bits = by_row.view(whole)
    sums = torch.cat([part.sum(1, dtype=torch.int64) for part in bits.split(4096)])
    stride = max(1, tensor.numel() // _SAMPLE)
    sample = bits.reshape(-1)[::stride] if bits.is_contiguous() else bits[:, :8].reshape(-1)
    return b"".join(part.contiguous().cpu().numpy().tobytes() for part in (sums, sample))


def _of_module(model: Any, sae: Any) -> Subject:
    site, layer = locate(sae)
    model._check_fits(sae, site, layer)
    row = getattr(sae, "row", None)
    place = Place(site.name, layer if site.per_layer else None)
    names = getattr(row, "release", None), getattr(row, "id", None)
    kind = type(sae).__name__
    return Subject(lambda: sae, place, int(sae.cfg.d_sae), *names, lambda: f"{kind} {fingerprint(sae)}")


def _of_suite(model: Any, suite: SAESuite, key: tuple[str, int | None]) -> Subject:
    row = suite.rows[key]

    def get() -> Any:
        sae = suite[key]
        site, layer = locate(sae)
        model._check_fits(sae, site, layer)
        return sae

    def hashed() -> str:
        sae = get()
        return f"{type(sae).__name__} {fingerprint(sae)}"

    return Subject(get, Place(row.site, row.layer), row.d_sae, row.release, row.id, hashed)

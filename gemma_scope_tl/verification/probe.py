"""A short pass whose tensors are compared with an SAE: how well it reconstructs each of them, and with what L0.

An SAE reconstructs the tensor on which it was trained better than any other tensor of the model. This is what names a
fault: when another layer, another hook of the block, or the same tensor in other units fits better, that is the likely
place, hook or scale of the file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.evals.clean_pass import removed_after, run_to_final_norm
from gemma_scope_tl.evals.metrics import l0, squared_error
from gemma_scope_tl.evals.saes import latents_and_output
from gemma_scope_tl.sites import Place, flatten_heads
from gemma_scope_tl.text.tokens import special_mask

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

PROBE_TOKENS = 512
"""Tokens of the short pass. FVU on so few tokens is rough, but it is compared with FVU on the same tokens only."""


CLEARLY = 0.05
"""An alternative fits clearly better if it lowers FVU by this share at least, and by :data:`SIGMAS` standard errors."""
SIGMAS = 4.0


@dataclass(frozen=True)
class Fit:
    """How well an SAE reconstructs a tensor.

    Attributes:
        what: the tensor, or what was done to it, as a phrase.
        counts: number of active latents of each token, ``[n]``.
        errors: each token's squared error over the tensor's mean squared distance from its centre, ``[n]``.
        kind: the fault that is the case if this fits best (:mod:`gemma_scope_tl.verification.diagnosis`).
    """

    what: str
    counts: torch.Tensor = field(repr=False)
    errors: torch.Tensor = field(repr=False)
    kind: str = "own"

    @property
    def l0(self) -> float:
        """Mean number of active latents."""
        return float(self.counts.mean())

    @property
    def fvu(self) -> float:
        """Fraction of variance unexplained, around the centre of the tokens at hand; infinite for NaN."""
        value = float(self.errors.mean()) if len(self.errors) else math.inf
        return value if math.isfinite(value) else math.inf

    def clearly_better_than(self, other: Fit) -> bool:
        """Whether this fit is better than chance and than ``other``, a fit on the same tokens, beyond their spread."""
        if not self.fvu < 1 or self.fvu > other.fvu * (1 - CLEARLY):
            return False
        if not math.isfinite(other.fvu):
            return True
        gains = other.errors - self.errors
        noise = float(gains.std()) / math.sqrt(len(gains))
        return other.fvu - self.fvu > SIGMAS * noise or other.fvu > 2 * self.fvu

    def __str__(self) -> str:
        return f"FVU {self.fvu:.3g}, L0 {self.l0:.3g}"


class Probe:
    """The tensors of one short pass of a model, each read when it is first asked for.

    Args:
        model: from ``load_model``.
        tokens: ``[rows, pos]``; as many rows are read as hold :data:`PROBE_TOKENS` tokens.
        special: ids of the tokens that are left out.
        limit: the number of tokens at most.
        embedding_factor: number by which the token embedding is multiplied, to see the model that it would be.

    Attributes:
        ids: the token rows that are read, ``[rows, pos]``.
        counted: ``[rows, pos]``, True at the tokens that count.
    """

    def __init__(
        self,
        model: GemmaModel,
        tokens: torch.Tensor,
        special: Iterable[int],
        limit: int = PROBE_TOKENS,
        embedding_factor: float = 1.0,
    ) -> None:
        self.model, self._factor = model, embedding_factor
        rows = max(1, -(-limit // tokens.shape[1]))
        self.ids = tokens[:rows].to(model.cfg.device)
        self.counted = ~special_mask(self.ids, tuple(special))
        self._limit = limit
        self._read: dict[str, torch.Tensor] = {}
        points: dict[int, str] = {}
        for name, point in model.hook_dict.items():  # several names may belong to one point: the first counts
            points.setdefault(id(point), name)
        self._names = set(points.values())

    def without_first(self) -> Probe:
        """The same tensors without the first token of each row."""
        other = object.__new__(Probe)
        other.__dict__ = {**self.__dict__, "counted": self.counted.clone()}
        other.counted[:, 0] = False
        return other

    def is_first(self) -> torch.Tensor:
        """Which of the counted tokens are the first of their row, ``[n]``, on the CPU."""
        columns = torch.arange(self.ids.shape[1], device=self.ids.device).expand_as(self.ids)
        return (self._counted(columns) == 0).cpu()

    def at(self, place: Place) -> torch.Tensor:
        """The counted tokens' activations at a place, heads flattened, ``[n, d]``."""
        return self.hook(self.model.family.site(place.site).hook_name(place.layer, self.model.backend))

    def hook(self, name: str) -> torch.Tensor:
        """The counted tokens' activations at a hook, heads flattened, ``[n, d]``."""
        if name not in self._read:
            self._pass([name])
        return self._counted(self._read[name])

    def block(self, layer: int, width: int) -> dict[str, torch.Tensor]:
        """All tensors of a block that have this width, by hook name, without duplicates."""
        names = [name for name in self.model.hook_dict if name.startswith(f"blocks.{layer}.")]
        unread = [name for name in names if name not in self._read and name in self._names]
        if unread:
            self._pass(unread)
        found: dict[str, torch.Tensor] = {}
        for name in names:
            value = self._read.get(name)
            fits = value is not None and value.shape[2:] == (width,)
            if value is not None and fits and not any(torch.equal(value, other) for other in found.values()):
                found[name] = value
        return {name: self._counted(value) for name, value in found.items()}

    def _counted(self, value: torch.Tensor) -> torch.Tensor:
        return value[self.counted][: self._limit]

    @torch.no_grad()
    def _pass(self, names: Iterable[str]) -> None:
        with removed_after() as handles:
            if self._factor != 1.0:
                point = self.model.site_hook_point(self.model.family.embedding_hooks[self.model.backend])
                handles.append(point.register_forward_hook(lambda _m, _a, out: out * self._factor))
            for name in names:
                handles.append(self.model.site_hook_point(name).register_forward_hook(self._keeper(name)))
            run_to_final_norm(self.model, self.ids)

    def _keeper(self, name: str) -> Callable[..., None]:
        def keep(_module: Any, _args: Any, out: Any) -> None:
            if isinstance(out, torch.Tensor) and out.ndim in (3, 4) and out.shape[:2] == self.ids.shape:
                self._read[name] = flatten_heads(out)

        return keep


@torch.no_grad()
def fit(sae: Any, x: torch.Tensor, y: torch.Tensor, what: str, kind: str = "own") -> Fit:
    """The :class:`Fit` of an SAE that reads ``x [n, d_in]`` and should give ``y [n, d_out]``."""
    acts, out = latents_and_output(sae, x.to(sae.dtype))
    y = y.double()
    deviation = (y - y.mean(0)).square().sum(-1).mean()
    return Fit(what, l0(acts).cpu(), (squared_error(y, out) / deviation).cpu(), kind)

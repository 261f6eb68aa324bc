"""The forward hooks of interventions, which compute the edits and restrict them to positions."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.model.positions import Positions, chosen_columns, rows_of
from gemma_scope_tl.model.tracker import TokenTracker
from gemma_scope_tl.sae.access import check_trained_on, decoder_rows, encode_latents
from gemma_scope_tl.sae.choices import checked_positions
from gemma_scope_tl.sites import flatten_heads, unflatten_heads
from gemma_scope_tl.text.tokens import ExcludeTokens, excluded_choice, excluded_ids

if TYPE_CHECKING:
    from gemma_scope_tl.model.protocol import HasSites
    from gemma_scope_tl.sae.access import SAEOrLatents
    from gemma_scope_tl.sae.layered import LayeredCoder


class Intervention:
    """A forward hook that edits a tensor at chosen positions.

    Subclasses implement :meth:`edited`. Heads are flattened before it and restored after it. The dtype of the model is
    kept.

    Args:
        positions: see :mod:`gemma_scope_tl.model.positions`; None for all.
        exclude_special_tokens: whether to skip BOS, EOS and padding (on models from ``load_model``), or the token ids
            to skip.

    Raises:
        SpliceError: for invalid ``positions`` or ``exclude_special_tokens``.
    """

    def __init__(self, positions: Positions = None, exclude_special_tokens: ExcludeTokens = True) -> None:
        self.positions, self.exclude_special_tokens = (
            checked_positions(positions),
            excluded_choice(exclude_special_tokens),
        )
        self._tracker: TokenTracker | None = None
        self._tokenizer: Any = None

    def edited(self, x: Float[torch.Tensor, "batch pos d"]) -> Float[torch.Tensor, "batch pos d"]:
        """The tensor after an edit at every position."""
        raise NotImplementedError  # pragma: no cover - an abstract method

    def _trained(self) -> SAEOrLatents | LayeredCoder | None:
        """What the edit is made of, which was trained on one model; None for a plain vector."""
        return None

    def bound_to(self, model: HasSites) -> Intervention:
        """A copy with access to the token ids of the current pass.

        Raises:
            SpliceError: when the latents are of an SAE that was trained on another model.
        """
        if (source := self._trained()) is not None:
            check_trained_on(source, model.family, model.model_id)
        bound = copy.copy(self)
        bound._tracker, bound._tokenizer = model.token_tracker, model.tokenizer
        return bound

    def __call__(self, value: torch.Tensor, hook: Any = None) -> torch.Tensor:
        """Edit ``[batch, pos, d]`` or ``[batch, pos, head, d_head]``.

        Raises:
            SpliceError: when the positions do not exist, or the token ids of the pass are unknown (``TokenTracker``).
        """
        x = flatten_heads(value)
        keep = self._untouched(x)
        out = unflatten_heads(self.edited(x).to(value.dtype), value)
        if keep is None:
            return out
        return torch.where(keep.reshape(*keep.shape, *[1] * (value.ndim - 2)), value, out)

    def _untouched(self, x: torch.Tensor) -> torch.Tensor | None:
        """True at positions (``[batch, pos]``) that are not edited; None if all are edited."""
        keep = None
        if self.positions is not None:
            chosen = chosen_columns(self.positions, rows_of(x, self._tracker))
            keep = ~chosen[:, -x.shape[1] :]
        special_ids = excluded_ids(self._tokenizer, self.exclude_special_tokens, must_know=self._tracker is not None)
        if special_ids and self._tracker is None:
            raise SpliceError(
                "The token ids of a pass are unknown for this model, so tokens cannot be excluded by id: use a model "
                "from load_model, or exclude_special_tokens=False and positions=."
            )
        if self._tracker is not None and special_ids:
            special = self._tracker.mask(x, special_ids, padding=self.exclude_special_tokens is True)
            keep = special if keep is None else keep | special
        return keep


class Steer(Intervention):
    """Adds a vector to the activations of a site.

    The result at each position is ``x + v``, or with ``by_norm`` ``x + ||x|| v``.
    """

    def __init__(
        self,
        vector: Float[torch.Tensor, " d"],
        positions: Positions = None,
        exclude_special_tokens: ExcludeTokens = True,
        by_norm: bool = False,
    ) -> None:
        super().__init__(positions, exclude_special_tokens)
        self.by_norm, self._vector = by_norm, vector

    @property
    def vector(self) -> Float[torch.Tensor, " d"]:
        """v."""
        return self._vector

    def vector_on(self, device: torch.device) -> Float[torch.Tensor, " d"]:
        """v on a device, where it is cached."""
        self._vector = self._vector.to(device)
        return self._vector

    def edited(self, x: torch.Tensor) -> torch.Tensor:
        """``x + v`` or ``x + ||x|| v``, in the wider of the two dtypes."""
        vector = self.vector_on(x.device)
        vector = vector.to(torch.promote_types(x.dtype, vector.dtype))
        return x + x.to(vector.dtype).norm(dim=-1, keepdim=True) * vector if self.by_norm else x + vector


class SteerRows(Steer):
    """Adds ``v = sum_i a_i W_dec[i]``, with the current decoder rows in each pass. Gradients flow through the rows.

    Without gradients, v is cached until the decoder changes. A write through ``.data`` is not detected, since it does
    not change the version of a tensor.

    Args:
        source: an SAE or loaded latents, which are not moved.
        latents: indices of the latents.
        numbers: ``[k]``; ``a_i`` is the number, or with ``per_length`` the number over ``||W_dec[i]||``.
    """

    def __init__(
        self,
        source: SAEOrLatents,
        latents: list[int],
        numbers: Float[torch.Tensor, " k"],
        positions: Positions = None,
        exclude_special_tokens: ExcludeTokens = True,
        by_norm: bool = False,
        per_length: bool = False,
    ) -> None:
        Intervention.__init__(self, positions, exclude_special_tokens)
        self.source, self.latents, self.numbers = source, latents, numbers
        self.by_norm, self.per_length = by_norm, per_length
        self._kept: tuple[Any, torch.Tensor] | None = None

    def _trained(self) -> SAEOrLatents | None:
        return self.source

    @property
    def vector(self) -> Float[torch.Tensor, " d"]:
        """v on the device and in the dtype of the decoder."""
        rows = decoder_rows(self.source, self.latents)
        return steering_amounts(self.numbers, rows, self.per_length).to(rows) @ rows

    def vector_on(self, device: torch.device) -> Float[torch.Tensor, " d"]:
        """v on a device."""
        decoder: torch.Tensor = self.source.W_dec
        if torch.is_grad_enabled() and decoder.requires_grad:
            return self.vector.to(device)
        written = 0 if decoder.is_inference() else decoder._version
        state = id(decoder), decoder.data_ptr(), written, decoder.dtype, device
        if self._kept is None or self._kept[0] != state:
            with torch.inference_mode(False), torch.no_grad():  # a later pass may need gradients
                self._kept = state, self.vector.to(device)
        return self._kept[1]


def steering_amounts(
    numbers: Float[torch.Tensor, " k"], rows: Float[torch.Tensor, "k d"], per_length: bool
) -> Float[torch.Tensor, " k"]:
    """The factors of decoder rows: the numbers, or the numbers divided by the norms of the rows."""
    return numbers.to(rows.device) / rows.float().norm(dim=-1) if per_length else numbers


class LatentEdit(Intervention):
    """Changes the activations of some latents: ``f_i -> g_i(f_i)``.

    On the activations x of a site, where the SAE need not be spliced in, this adds the change of the contributions::

        x + sum_i (g_i(f_i(x)) - f_i(x)) W_dec[i]

    All f_i are computed from the incoming x. The rest of x does not change: the contributions of other latents and the
    reconstruction error. On the activations of a spliced SAE (``on_features``) f_i itself is replaced, which is equal
    with the error term. The activations of the SAE on the edited x need not be ``g_i``, because decoder rows are not
    orthogonal and the encoder is not the inverse of the decoder.
    """

    def __init__(
        self,
        source: SAEOrLatents | LayeredCoder,
        latents: list[int],
        positions: Positions = None,
        exclude_special_tokens: ExcludeTokens = True,
        on_features: bool = False,
    ) -> None:
        super().__init__(positions, exclude_special_tokens)
        self.source, self.latents, self.on_features = source, latents, on_features

    def _trained(self) -> SAEOrLatents | LayeredCoder | None:
        return self.source

    def changed(self, acts: Float[torch.Tensor, "batch pos k"]) -> Float[torch.Tensor, "batch pos k"]:
        """``g_i`` of the activations of the chosen latents, in the given order."""
        raise NotImplementedError  # pragma: no cover - an abstract method

    def edited(self, x: torch.Tensor) -> torch.Tensor:
        """The tensor after the edit that the class describes."""
        if self.on_features:
            out = x.clone()
            out[..., self.latents] = self.changed(x[..., self.latents]).to(x.dtype)
            return out
        source: Any = self.source  # layered coders are edited here on features alone
        acts = encode_latents(source, x, self.latents)
        return x + (self.changed(acts) - acts) @ decoder_rows(source, self.latents)


class Ablate(LatentEdit):
    """``f_i -> 0``, which removes the contributions of the latents."""

    def changed(self, acts: torch.Tensor) -> torch.Tensor:
        """Zeros."""
        return torch.zeros_like(acts)


class _WithNumbers(LatentEdit):
    """A latent edit with one number for each latent."""

    def __init__(
        self,
        source: SAEOrLatents | LayeredCoder,
        latents: list[int],
        numbers: Float[torch.Tensor, " k"],
        **where: Any,
    ) -> None:
        super().__init__(source, latents, **where)
        self.numbers = numbers

    def numbers_for(self, acts: torch.Tensor) -> Float[torch.Tensor, " k"]:
        """The numbers, on the device and in the dtype of the activations."""
        self.numbers = self.numbers.to(acts.device)
        return self.numbers.to(acts.dtype)


class Clamp(_WithNumbers):
    """``f_i -> c_i``."""

    def changed(self, acts: torch.Tensor) -> torch.Tensor:
        """The numbers, at every position."""
        return self.numbers_for(acts).expand_as(acts)


class Scale(_WithNumbers):
    """``f_i -> s_i f_i``."""

    def changed(self, acts: torch.Tensor) -> torch.Tensor:
        """The activations times the numbers."""
        return self.numbers_for(acts) * acts


class SteerLatents(_WithNumbers):
    """``f_i -> f_i + a_i``, for a spliced SAE; ``per_length`` as for :class:`SteerRows`."""

    def __init__(
        self,
        source: SAEOrLatents | LayeredCoder,
        latents: list[int],
        numbers: Float[torch.Tensor, " k"],
        per_length: bool = False,
        **where: Any,
    ) -> None:
        super().__init__(source, latents, numbers, **where)
        self.per_length = per_length

    def changed(self, acts: torch.Tensor) -> torch.Tensor:
        """The activations plus the amounts."""
        if not self.per_length:
            return acts + self.numbers_for(acts)
        source: Any = self.source  # not a layered coder
        rows = decoder_rows(source, self.latents)
        return acts + steering_amounts(self.numbers, rows, True).to(acts)

"""Crosscoders and cross-layer transcoders: coders that read several layers and write several layers.

A *layered coder* has one encoder for each of its layers. The latents of a layer write the outputs of that layer and of
all later ones. With row vectors, ``k`` and ``j`` counting the coder's layers, and ``f_j = JumpReLU(x_j W_enc_j +
b_enc_j)`` (Gemma Scope 2, section 2.6)::

    crosscoder               x_hat_k = b_dec_k + sum_{j <= k} f_j W_dec_j[:, k]
    cross-layer transcoder   y_hat_k = b_dec_k + sum_{j <= k} f_j W_dec_j[:, k] + x_k W_skip_k

A crosscoder reads and writes the residual stream, as an SAE does at ``res``. A cross-layer transcoder (CLT) reads what
transcoders read and writes the MLP output. Only some have the skip connection ``W_skip``.

The released files hold ``W_dec_j`` with an output plane for every layer. The planes of layers before ``j`` are zeros
and are not part of the object: ``W_dec[j]`` is ``[m_j, K - j, d_out]``, and plane 0 is the output at layer ``j``
itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from gemma_scope_tl.counts import whole_number
from gemma_scope_tl.errors import SeveralLayersError, SpliceError, unknown_name
from gemma_scope_tl.sae.planes import written_planes
from gemma_scope_tl.sae.provenance import Marks, marks_of
from gemma_scope_tl.sae.sparse import SparseActs, encode_sparse
from gemma_scope_tl.sites import LAYERED_SITES, layers_text

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow

LayeredKind = Literal["crosscoder", "clt"]
LAYERED_KINDS: Mapping[str, str] = LAYERED_SITES
"""The kinds of layered coders, with the site whose tensors they read and write in each of their layers."""


class LayeredCoder(nn.Module):
    """A crosscoder or cross-layer transcoder.

    Args:
        kind: ``"crosscoder"`` or ``"clt"``.
        layers: the model's layers that the coder reads and writes, ascending.
        W_enc: for each layer ``[d_in, m]``.
        b_enc, threshold: for each layer ``[m]``. Thresholds are float32 or wider.
        W_dec: for each layer ``[m, K - k, d_out]``, its outputs at that layer and the later ones.
        b_dec: for each layer ``[d_out]``.
        W_skip: for each layer ``[d_in, d_out]``, applied as ``x @ W_skip``; None without skip connections.
        model_name: name of the model that the coder was trained on.
        family: name of that model's family, if it is known.
        l0: the target of the mean number of active latents of all layers together, if it is known.

    Attributes:
        row: the registry row of the weights; None outside the registry, and after the weights were changed.

    Raises:
        SpliceError: for shapes that contradict each other, or layers that are not ascending.
        UnknownNameError: for another kind.
    """

    def __init__(
        self,
        kind: LayeredKind,
        layers: Sequence[int],
        W_enc: Sequence[Tensor],
        b_enc: Sequence[Tensor],
        threshold: Sequence[Tensor],
        W_dec: Sequence[Tensor],
        b_dec: Sequence[Tensor],
        W_skip: Sequence[Tensor] | None = None,
        *,
        model_name: str | None = None,
        family: str | None = None,
        l0: float | None = None,
    ) -> None:
        super().__init__()
        if kind not in LAYERED_KINDS:
            raise unknown_name("kind of layered coder", kind, LAYERED_KINDS)
        self.kind: LayeredKind = kind
        self.layers = _checked_layers(layers)
        self.model_name, self.family, self.l0 = model_name, family, l0
        self._row: SAERow | None = None
        self._marks: Marks | bool | None = None
        self.W_enc, self.b_enc, self.threshold, self.W_dec, self.b_dec = (
            _parameters(arrays) for arrays in (W_enc, b_enc, threshold, W_dec, b_dec)
        )
        self.W_skip = None if W_skip is None else _parameters(W_skip)
        if not len(self.W_enc) or not len(self.b_dec) or self.W_enc[0].ndim != 2 or self.b_dec[0].ndim != 1:
            raise SpliceError(f"A {kind} takes a list of tensors, one for each layer, as W_enc, b_dec and so on.")
        self._check_shapes()

    def _check_shapes(self) -> None:
        count, d_in, d_out = len(self.layers), self.d_in, self.d_out
        for k in range(count):
            m = self.W_enc[k].shape[-1]
            expected = {
                "W_enc": (d_in, m),
                "b_enc": (m,),
                "threshold": (m,),
                "W_dec": (m, count - k, d_out),
                "b_dec": (d_out,),
                "W_skip": (d_in, d_out),
            }
            for name, shape in expected.items():
                arrays = getattr(self, name)
                if arrays is None:
                    continue
                if len(arrays) != count or arrays[k].shape != shape:
                    found = list(arrays[k].shape) if k < len(arrays) else "missing"
                    raise SpliceError(f"{name}[{k}] of a {self.kind} must be {list(shape)}; given: {found}.")

    @property
    def name(self) -> str:
        """The release and id of the loaded weights, or else the kind and the model."""
        if self.row is not None:
            return f"{self.row.release}/{self.row.id}"
        return f"{self.kind} of {self.model_name or 'an unnamed model'}"

    def get_name(self) -> str:
        """:attr:`name`, as a method that SAEs have too."""
        return self.name

    def __repr__(self) -> str:
        """One line: name, layers, sizes and dtype."""
        layers = layers_text(self.layers)
        parts = [self.name, *([] if self.row is None else [self.kind]), f"layers {layers}", f"{self.d_sae:,} latents"]
        parts += [f"d {self.d_in}", *([] if self.W_skip is None else ["with skips"]), str(self.dtype)[len("torch.") :]]
        return f"{type(self).__name__}({', '.join(parts)})"

    @property
    def row(self) -> SAERow | None:
        """The registry row of the weights; None after they were changed (:attr:`as_loaded`)."""
        return self._row if self._row is not None and self.as_loaded else None

    @row.setter
    def row(self, row: SAERow | None) -> None:
        self._row = row

    @property
    def as_loaded(self) -> bool:
        """Whether the weights have the loaded values, apart from moves and conversions. True if nothing was loaded."""
        if self._marks is None or isinstance(self._marks, bool):
            return self._marks is not False
        return marks_of(self) == self._marks

    def mark_as_loaded(self) -> None:
        """Record the current weights as the loaded ones, to which :attr:`row` and ``l0`` apply."""
        self._marks = marks_of(self)

    @property
    def site(self) -> str:
        """Name of the site whose tensors the coder reads, and reconstructs or, for a CLT, whose output it predicts."""
        return LAYERED_KINDS[self.kind]

    @property
    def d_in(self) -> int:
        """Width of each input."""
        return self.W_enc[0].shape[0]

    @property
    def d_out(self) -> int:
        """Width of each output."""
        return self.b_dec[0].shape[0]

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of latents of each layer."""
        return tuple(w.shape[-1] for w in self.W_enc)

    @property
    def d_sae(self) -> int:
        """Number of latents of all layers together."""
        return sum(self.widths)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, apart from thresholds."""
        return self.W_enc[0].dtype

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.W_enc[0].device

    def index_of(self, layer: int) -> int:
        """The position of a model's layer among the coder's layers.

        Raises:
            SpliceError: when the coder has no such layer.
        """
        if layer not in self.layers:
            raise SpliceError(f"This {self.kind} has the layers {list(self.layers)}, not {layer}.")
        return self.layers.index(layer)

    def encode_at(self, k: int, x: Tensor) -> SparseActs:
        """The active latents of layer ``layers[k]`` for its input ``x [..., d_in]``."""
        return encode_sparse(x.to(self.dtype), self.W_enc[k], self.b_enc[k], self.threshold[k])

    def written_by(self, j: int, acts: SparseActs | Tensor, k: int) -> Tensor:
        """What the latents of layer ``layers[j]`` write at layer ``layers[k]``, ``f_j W_dec_j[:, k]``.

        Args:
            j: the layer that was read; at most ``k``.
            acts: its latents, sparse or ``[..., m]``.
            k: the layer that is written.

        Returns:
            ``[..., d_out]``, without ``b_dec``.

        Raises:
            SpliceError: no such layer is written.
        """
        if not 0 <= j <= k < len(self.layers):
            raise SpliceError(f"Layer j writes the layers k with j <= k < {len(self.layers)}; given: j={j}, k={k}.")
        return written_planes(acts, self.W_dec[j], k - j, k - j + 1)[0]

    def decode_at(self, k: int, acts: Sequence[SparseActs | Tensor], x: Tensor | None = None) -> Tensor:
        """The output at layer ``layers[k]``, ``[..., d_out]``.

        Args:
            k: the layer that is written.
            acts: the latents of the layers up to ``k``; later ones are not used.
            x: the input of layer ``k``, which only coders with skip connections need.

        Raises:
            SpliceError: no such layer, too few latents, or a missing input.
        """
        if len(acts) <= k:
            raise SpliceError(f"Output {k} needs the latents of {k + 1} layers; given: {len(acts)}.")
        if self.W_skip is not None and x is None:
            raise SpliceError(f"{self.name} has skip connections: give the input of the layer, too.")
        out = self.written_by(0, acts[0], k)
        for j in range(1, k + 1):
            out = out + self.written_by(j, acts[j], k)
        out = out + self.b_dec[k]
        return out if self.W_skip is None or x is None else out + x.to(self.dtype) @ self.W_skip[k]

    def encode(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Dense latents ``[..., m]`` of every layer for the inputs of all layers, a ``[..., d_in]`` for each.

        Raises:
            SpliceError: for another number of inputs than layers.
        """
        self._check_count(inputs, "inputs")
        return [self.encode_at(k, x).to_dense() for k, x in enumerate(inputs)]

    def decode(self, acts: Sequence[SparseActs | Tensor], inputs: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Outputs ``[..., d_out]`` of every layer. Coders with skip connections need the inputs, too.

        Raises:
            SpliceError: for another number of latents or inputs than layers, or no inputs for skip connections.
        """
        self._check_count(acts, "latents")
        if inputs is not None:
            self._check_count(inputs, "inputs")
        elif self.W_skip is not None:
            raise SpliceError(f"{self.name} has skip connections: give the inputs of all layers, too.")
        return [self.decode_at(k, acts, None if inputs is None else inputs[k]) for k in range(len(self.layers))]

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs of every layer for the inputs of all layers, a ``[..., d_in]`` for each.

        Raises:
            SpliceError: for another number of inputs than layers.
        """
        self._check_count(inputs, "inputs")
        return self.decode([self.encode_at(k, x) for k, x in enumerate(inputs)], inputs)

    def _check_count(self, tensors: Sequence[Any], what: str) -> None:
        if len(tensors) != len(self.layers):
            layers = f"{len(self.layers)} layers ({layers_text(self.layers)})"
            raise SpliceError(f"{self.name} takes {what} of its {layers}, a tensor for each; given: {len(tensors)}.")

    def __getattr__(self, name: str) -> Any:
        """Code for SAEs of one layer reads their ``cfg`` first: say why there is none."""
        if name == "cfg":
            what = f"{self.name} spans several layers, so it has no configuration of an SAE"
            raise SeveralLayersError(f"{what}. It is not supported where SAEs of one layer are needed.")
        return super().__getattr__(name)

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Keep thresholds in float32 or wider in ``to``, ``half`` and so on; moves do not count as changes."""
        before = [threshold.data for threshold in self.threshold]
        as_loaded = self._marks is not None and self.as_loaded
        out = super()._apply(fn, *args, **kwargs)
        for k, threshold in enumerate(self.threshold):
            wide = torch.promote_types(torch.float32, self.dtype)
            if threshold.dtype != wide:
                threshold.data = before[k].to(device=threshold.device, dtype=wide)
        if as_loaded:
            self._marks = marks_of(self)
        return out

    def __getstate__(self) -> dict[str, Any]:
        """The state, without the planes of earlier layers that a mapped decoder steps over."""
        planes = [weight.data.contiguous() for weight in self.W_dec]
        return self._portable({**self._modules, "W_dec": _parameters(planes, self.W_dec)})

    def __deepcopy__(self, memo: dict[int, Any]) -> LayeredCoder:
        """A copy, for which the planes are copied once."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(deepcopy(self._portable(self._modules), memo))
        return copied

    def _portable(self, modules: Mapping[str, nn.Module | None]) -> dict[str, Any]:
        """The attributes, with a bool for whether the weights are as loaded in place of marks of these tensors."""
        marks = None if self._marks is None else self.as_loaded
        return {**self.__dict__, "_marks": marks, "_modules": dict(modules)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore whether the weights are as loaded."""
        super().__setstate__(state)
        if self._marks is True:
            self._marks = marks_of(self)

    def decoder_rows(self, k: int, latents: Tensor) -> Tensor:
        """``[n, K - k, d_out]``: what latents of layer ``layers[k]`` write at that layer and the later ones."""
        return self.W_dec[k][latents]


def _checked_layers(given: Sequence[int]) -> tuple[int, ...]:
    numbers = [whole_number(one) for one in given]
    layers = tuple(one for one in numbers if one is not None)
    if len(layers) < len(numbers) or not layers or list(layers) != sorted(set(layers)) or layers[0] < 0:
        raise SpliceError(f"The layers of a layered coder ascend from 0 on; given: {list(given)}.")
    return layers


def _parameters(arrays: Sequence[Tensor], like: nn.ParameterList | None = None) -> nn.ParameterList:
    """Parameters that require gradients where those of ``like`` do."""
    tracked = [False] * len(arrays) if like is None else [parameter.requires_grad for parameter in like]
    pairs = zip(arrays, tracked, strict=True)
    return nn.ParameterList([nn.Parameter(array, requires_grad=gradient) for array, gradient in pairs])


def not_of_several_layers(coder: LayeredCoder) -> str:
    """Why a function of SAEs of one layer does not take ``coder``, and what does."""
    instead = "a cache of a pass through its splice has its latents (get_sae_hook_name(coder, layer=) names them)"
    graph = "and attribution_graph and graph_notes say what they do"
    return f"A {coder.kind} reads and writes several layers, which is not supported here: {instead}, {graph}."

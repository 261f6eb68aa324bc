"""The frozen pass: a forward pass that is linear in what is added to it.

For one prompt, let ``A_lh [pos, pos]`` be the attention patterns of the model, and ``s`` the denominators of its
RMSNorms, ``s(x) = sqrt(mean(x^2) + eps)``. Both are constants here, so a gain g and a denominator are one diagonal
factor, ``n(x) = x g / s``. With the residual stream x before layer l, row vectors, and ``m_l`` the output of the MLP,

    z_lh = A_lh (n1(x) W_V_lh)          heads, before W_O
    x'   = x + n1post(z_l W_O)          the norm after attention, in families that have one
    x''  = x' + m_l                     the next layer's x
    u    = nf(x_L) W_U                  logits, before a soft-cap

``m_l`` is a constant, too, unless a coder writes it: an MLP is cut out of the pass, and a coder's latents, error and
skip connection take its place. Norms of queries and keys, soft-caps of attention scores and positions are in the
patterns. A soft-cap of the logits is a factor (:class:`Readout`).

The pass is *replayed* in float32 or wider from the model's embedding, patterns and MLP outputs, so sums are exact to
the rounding of that dtype for a model of any dtype. The difference between the replayed logits and the model's is
:attr:`FrozenPass.deviation`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gemma_scope_tl.attributions.placing import layer_stage
from gemma_scope_tl.errors import AdapterError, GemmaScopeError, SpliceError
from gemma_scope_tl.sites import Site

if TYPE_CHECKING:
    from gemma_scope_tl.model.hooked import GemmaModel

WIDE_DEVIATION = {True: 0.3, False: 0.01}
"""The largest deviation of the replayed logits from the model's that is accepted; True for a model of 16 bits."""
_VOCABULARY = 32_768  # columns of the unembedding converted at a time


@dataclass(frozen=True, eq=False)
class FrozenPass:
    """Constants of a frozen pass, and its linear maps. Tensors have the positions in the second to last dimension.

    Attributes:
        model: the model.
        embedding: ``[pos, d]``, as it enters the first layer.
        patterns: for each layer ``[heads, pos, pos]``.
        mlps: for each layer ``[pos, d]``, what the MLP adds to the residual stream.
        denominators: for each norm ``[pos, 1]``, by its name: ``ln1``, ``ln1_post`` and ``ln2`` with the layer, and
            ``ln_final``.
        logits: ``[vocab]`` of the model at the last position that is read out.
        position: that position.
        deviation: largest absolute difference of replayed and model's logits at that position, divided by the standard
            deviation of the model's.
    """

    model: GemmaModel
    embedding: Tensor
    patterns: list[Tensor]
    mlps: list[Tensor]
    logits: Tensor
    position: int
    denominators: dict[tuple[str, int], Tensor] = field(default_factory=dict[tuple[str, int], Tensor])
    deviation: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the pass."""
        return self.embedding.dtype

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.embedding.shape[0]

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return len(self.patterns)

    # -- the maps, forwards -------------------------------------------------------------------------------------------

    def heads(self, layer: int, x: Tensor) -> Tensor:
        """``z``, ``[..., pos, heads * d_head]``: what the heads read from the residual stream before the layer."""
        v = self._scaled("ln1", layer, x) @ self._w_v(layer)
        count, d_head = self.model.dims.n_heads, self.model.dims.d_head
        grouped = v.unflatten(-1, (-1, d_head)).movedim(-2, -3)  # [..., kv, pos, d_head]
        wide = grouped.repeat_interleave(count // grouped.shape[-3], dim=-3)
        z = self.patterns[layer][:, : x.shape[-2], : x.shape[-2]] @ wide
        return z.movedim(-3, -2).flatten(-2)

    def after_heads(self, layer: int, z: Tensor) -> Tensor:
        """``[..., pos, d]``: what attention adds to the residual stream."""
        return self._scaled(self.model.family.norm_after_attention, layer, z @ self._w_o(layer))

    def mlp_input(self, layer: int, x: Tensor, site: Site) -> Tensor:
        """``[..., pos, d]``: the input of transcoders, with or without the gain of the norm as ``site`` has it."""
        return self._scaled(self.model.family.norm_before_mlp, layer, x, gain=site.side == "output")

    def final(self, x: Tensor) -> Tensor:
        """``[..., pos, d]``: the tensor that the unembedding multiplies."""
        return self._scaled("ln_final", 0, x)

    # -- and backwards ------------------------------------------------------------------------------------------------

    def heads_back(self, layer: int, gradient: Tensor) -> Tensor:
        """The gradient ``[batch, pos, d]`` at the residual stream before a layer, for one at its ``z``."""
        batch, length = gradient.shape[:2]
        count, d_head = self.model.dims.n_heads, self.model.dims.d_head
        z = gradient.unflatten(-1, (count, d_head)).permute(2, 1, 0, 3).reshape(count, length, batch * d_head)
        pattern = self.patterns[layer][:, :length, :length]
        v = (pattern.transpose(1, 2) @ z).view(count, length, batch, d_head)
        w_v = self._w_v(layer)
        shared = v.unflatten(0, (w_v.shape[1] // d_head, -1)).sum(1)  # heads that have keys and values in common
        return self._scaled("ln1", layer, shared.permute(2, 1, 0, 3).flatten(-2) @ w_v.T)

    def after_heads_back(self, layer: int, gradient: Tensor) -> Tensor:
        """The gradient ``[..., pos, heads * d_head]`` at ``z``, for one at the residual stream after attention."""
        return self._scaled(self.model.family.norm_after_attention, layer, gradient) @ self._w_o(layer).T

    # Norms are diagonal: backwards they are the same factors.
    mlp_input_back = mlp_input
    final_back = final

    # -- the pass -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def replay(self, sites: Mapping[int, Site], edited: Mapping[int, Tensor] | None = None) -> dict[int, Tensor]:
        """Run the frozen pass. The first run computes the denominators, which are constants from then on.

        Args:
            sites: the tensors to return, a site by its stage (:func:`~gemma_scope_tl.attributions.placing.stage_of`).
            edited: tensors that replace those of the pass, by their stage.

        Returns:
            The tensors by their stage, as they are before an edit; and, at the stage behind all sites, the input of the
            unembedding. Each is ``[pos, width]``.
        """
        kept: dict[int, Tensor] = {}
        edits = edited or {}

        def at(stage: int, value: Tensor) -> Tensor:
            if stage in sites:
                kept[stage] = value
            return edits.get(stage, value)

        x = at(0, self.embedding)
        after, before = self.model.family.norm_after_attention, self.model.family.norm_before_mlp
        for layer in range(self.n_layers):
            self._divide_by("ln1", layer, x)
            stage = layer_stage(layer)
            z = at(stage + 1, self.heads(layer, x))
            if after is not None:
                self._divide_by(after, layer, z @ self._w_o(layer))
            x = x + self.after_heads(layer, z)
            self._divide_by(before, layer, x)
            if stage + 2 in sites:
                kept[stage + 2] = self.mlp_input(layer, x, sites[stage + 2])
            x = at(stage + 4, x + at(stage + 3, self.mlps[layer]))
        self._divide_by("ln_final", 0, x)
        kept[layer_stage(self.n_layers) + 1] = self.final(x)
        return kept

    def _divide_by(self, norm: str, layer: int, x: Tensor) -> None:
        if (norm, layer) not in self.denominators:
            eps = float(self.model.cfg.eps)
            self.denominators[norm, layer] = (x.pow(2).mean(-1, keepdim=True) + eps).sqrt()

    # -- weights ------------------------------------------------------------------------------------------------------

    def unembedding(self) -> Iterator[tuple[slice, Tensor]]:
        """Some columns of ``W_U`` after the others, ``[d, some]``, and which they are."""
        matrix = self.model.W_U
        for start in range(0, matrix.shape[1], _VOCABULARY):
            some = slice(start, min(start + _VOCABULARY, matrix.shape[1]))
            yield some, matrix[:, some].detach().to(self.embedding)

    def _scaled(self, norm: str | None, layer: int, x: Tensor, gain: bool = True) -> Tensor:
        """``x g / s`` of a norm; ``x`` for None."""
        if norm is None:
            return x
        out = x / self.denominators[norm, layer][: x.shape[-2]]
        return out * self._gain(norm, layer) if gain else out

    def _gain(self, norm: str, layer: int) -> Tensor:
        module = self.model.ln_final if norm == "ln_final" else getattr(self.model.blocks[layer], norm)
        return module.w.detach().to(self.embedding) + self.model.family.gain_offset[self.model.backend]

    def _w_v(self, layer: int) -> Tensor:
        """``[d, kv_heads * d_head]``."""
        w = self.model.blocks[layer].attn.W_V.detach()
        count = getattr(self.model.cfg, "n_key_value_heads", None) or w.shape[0]
        if w.shape[0] != count:  # some libraries repeat the matrices of shared heads
            w = w[:: w.shape[0] // count]
        return w.permute(1, 0, 2).flatten(1).to(self.embedding)

    def _w_o(self, layer: int) -> Tensor:
        """``[heads * d_head, d]``."""
        return self.model.blocks[layer].attn.W_O.detach().flatten(0, 1).to(self.embedding)


@torch.no_grad()
def frozen_pass(model: GemmaModel, ids: Tensor, dtype: torch.dtype | None, position: int = -1) -> FrozenPass:
    """Run the model once and keep what a frozen pass needs.

    Args:
        model: from ``load_model``, without attached SAEs.
        ids: ``[pos]``, the tokens without padding.
        dtype: of the pass; None for the model's, but at least float32.
        position: the position whose logits are read out, from 0 or from the end.

    Raises:
        SpliceError: SAEs are attached to the model.
        AdapterError: its attention has biases, which the frozen pass does not have.
        GemmaScopeError: no such position, or logits that are not finite.
    """
    if model.acts_to_saes:
        raise SpliceError("SAEs are attached to this model: detach them first, a graph takes its own coders.")
    if not -len(ids) <= position < len(ids):
        raise GemmaScopeError(f"No position {position}: the text has 0..{len(ids) - 1}.")
    embedding, patterns, mlps, raw = _seen(model, ids)
    wide = torch.promote_types(raw.dtype, torch.float32) if dtype is None else dtype
    at = range(len(ids))[position]
    kept = raw[0, at].to(wide)
    if not bool(kept.isfinite().all()):
        raise GemmaScopeError(f"The logits at position {at} are not finite.")
    _check_biases(model)
    found = FrozenPass(
        model,
        embedding[0].to(wide),
        [one[0].to(wide) for one in patterns],
        [one[0].to(wide) for one in mlps],
        kept,
        at,
    )
    last = found.replay({})[layer_stage(found.n_layers) + 1]
    logits = torch.cat([last[at] @ columns for _, columns in found.unembedding()])
    cap = soft_cap_of(model)
    logits = logits if cap is None else cap * (logits / cap).tanh()
    deviation = float((logits - kept).abs().max() / kept.std())
    if deviation > WIDE_DEVIATION[raw.dtype.itemsize < 4]:
        raise GemmaScopeError(
            f"The frozen pass does not reproduce this model: its logits differ by {deviation:.3g} of their spread. Are "
            "there hooks on the model, or were its weights processed?"
        )
    return replace(found, deviation=deviation)


def soft_cap_of(model: GemmaModel) -> float | None:
    """The soft-cap c of the logits, ``c tanh(u / c)``; None without."""
    cap = getattr(model.cfg, "output_logits_soft_cap", None)
    return float(cap) if cap is not None and cap > 0 else None


def _seen(model: GemmaModel, ids: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    """Embedding, patterns and MLP outputs of every layer, and logits; with a batch dimension of 1."""
    family, layers = model.family, range(model.dims.n_layers)
    branch = next(site for site in family.sites.values() if site.joins == "branch")
    start = family.embedding_hooks[model.backend]
    patterns = [f"blocks.{layer}.attn.hook_pattern" for layer in layers]
    outputs = [branch.hook_name(layer, model.backend) for layer in layers]
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook: Any, name: str) -> None:
        seen[name] = value.detach().clone()

    hooks = [(name, lambda value, hook, name=name: keep(value, hook, name)) for name in (start, *patterns, *outputs)]
    mask = torch.ones_like(ids)[None]
    logits = model.run_with_hooks(ids[None], attention_mask=mask, fwd_hooks=hooks).detach()
    return seen[start], [seen[name] for name in patterns], [seen[name] for name in outputs], logits


def _check_biases(model: GemmaModel) -> None:
    for layer, block in enumerate(model.blocks):
        for name in ("b_V", "b_O"):
            bias = getattr(block.attn, name, None)
            if bias is not None and bool((bias != 0).any()):
                raise AdapterError(
                    f"Attention of layer {layer} has a bias {name}, which the frozen pass does not have."
                )

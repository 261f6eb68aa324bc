"""The logit lens of latents, which multiplies decoder rows by the gain of the final norm and the unembedding."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from gemma_scope_tl.counts import whole_number
from gemma_scope_tl.errors import GemmaScopeError, SpliceError, brief
from gemma_scope_tl.model.gain import gain_of
from gemma_scope_tl.sae.access import check_trained_on, chosen_latents, decoder_rows, locate
from gemma_scope_tl.sites import Place, target_of
from gemma_scope_tl.text.tokenizing import decoded_ids

if TYPE_CHECKING:
    import pandas as pd

    from gemma_scope_tl.model.hooked import GemmaModel
    from gemma_scope_tl.sae.access import SAEOrLatents

_CHUNK = 32768  # columns of the unembedding that are converted to float32 at a time
_HELD = 1 << 26  # logits that are held at once: of 262 latents with a vocabulary of 256,000 tokens


@torch.no_grad()
def top_tokens(model: GemmaModel, sae: SAEOrLatents, latent: int | Iterable[int], k: int = 10) -> pd.DataFrame:
    """The tokens that a latent promotes and suppresses most, along its direct path to the logits.

    For a decoder row v, with the gains g of the RMSNorms of the model::

        u      = v                                  added to the residual stream: res, embedding, mlp, transcoder
        u      = (v W_O) * g_post_attention[layer]  heads: att; without the gain in a family that has no such norm
        logits = (u * g_final) W_U

    The tensors of the mlp site and of a transcoder's output are added to the residual stream unchanged. The
    denominators of the norms are left out: the final norm divides all logits by the RMS of the residual stream at the
    position, and the post-attention norm by the RMS of the attention output. So for a given text ``logit`` is the
    change per unit of activation up to one positive factor, and the order of the tokens is correct. The final soft-cap
    is monotone and left out too. The effect of v on later layers is not included, so the result is less informative for
    early layers. The computation uses float32.

    Args:
        model: from ``load_model``, either backend.
        sae: an SAE, a transcoder, or :class:`~gemma_scope_tl.sae.latents.Latents` (decoder rows suffice).
        latent: index or indices.
        k: number of tokens of each kind.

    Returns:
        A table with a row per latent, kind and rank: ``latent, kind ("promoted" or "suppressed"), rank, token_id,
        token, logit``. Rank 0 is the most promoted or the most suppressed.

    Raises:
        SpliceError: for a latent that does not exist, or an SAE that does not match the layers and widths of the model.
        UnknownNameError: for a latent that was not loaded.
        GemmaScopeError: when ``k`` is not between 1 and the size of the vocabulary.
    """
    import pandas as pd

    chosen, vocabulary = chosen_latents(sae, latent), model.W_U.shape[1]
    u = _written(model, sae, chosen)
    if whole_number(k) is None or not 1 <= k <= vocabulary:
        raise GemmaScopeError(f"k must be between 1 and {vocabulary}, the size of the vocabulary; given: {brief(k)}.")
    tops = [
        [logits.topk(k, largest=largest) for largest in (True, False)]
        for logits in (_logits(model, some) for some in u.split(max(1, _HELD // vocabulary)))
    ]
    # [latents, kinds, k]
    values, ids = (torch.cat([torch.stack([top[at] for top in both], 1).cpu() for both in tops]) for at in (0, 1))
    tokens = ids.flatten().tolist()
    return pd.DataFrame(
        {
            "latent": np.repeat(np.asarray(chosen), 2 * k),
            "kind": np.tile(np.repeat(np.asarray(["promoted", "suppressed"], object), k), len(chosen)),
            "rank": np.tile(np.arange(k), 2 * len(chosen)),
            "token_id": tokens,
            "token": decoded_ids(model.tokenizer, tokens),
            "logit": values.double().flatten().numpy(),
        }
    )


@torch.no_grad()
def latent_logits(model: GemmaModel, sae: SAEOrLatents, latents: list[int]) -> Float[torch.Tensor, "k d_vocab"]:
    """The change of the logits per unit of activation of each latent, in float32 (see :func:`top_tokens`).

    Raises:
        SpliceError: for an SAE that does not match the layers and widths of the model.
    """
    return _logits(model, _written(model, sae, latents))


@torch.no_grad()
def written_logits(
    model: GemmaModel, place: Place, rows: Float[torch.Tensor, "k d"]
) -> Float[torch.Tensor, "k d_vocab"]:
    """The change of the logits by vectors that are added to a tensor, in float32 (see :func:`top_tokens`).

    Args:
        model: from ``load_model``.
        place: the tensor, such as the output of a transcoder or one of the outputs of a crosscoder.
        rows: the vectors.

    Raises:
        SpliceError: for vectors of another width than the tensor, or a tensor that is not added to the residual stream.
    """
    return _logits(model, _normed(model, place, rows))


def _written(model: GemmaModel, sae: SAEOrLatents, latents: list[int]) -> Float[torch.Tensor, "k d_model"]:
    """What each latent adds to the residual stream, times the gain of the final norm."""
    site, layer = locate(sae, model.family)
    check_trained_on(sae, model.family, model.model_id)
    site.check_layer(layer, model.dims)
    return _normed(model, target_of(Place(site.name, layer)), decoder_rows(sae, latents))


def _normed(model: GemmaModel, place: Place, rows: Float[torch.Tensor, "k d"]) -> Float[torch.Tensor, "k d_model"]:
    """What vectors that are added to a tensor add to the residual stream, times the gain of the final norm."""
    written = model.family.site(place.site)
    width = written.d_in(model.dims)
    if rows.shape[-1] != width:
        raise SpliceError(
            f"The decoder row has {rows.shape[-1]} dimensions, but site {place.site!r} has {width}: it belongs to "
            "another model."
        )
    u = rows.to(model.W_U.device, torch.float32)
    match written.joins:
        case "residual" | "embedding" | "branch":
            pass
        case "attention":
            u = _through_attention(model, model.blocks[place.layer], u)
        case _:
            raise SpliceError(f"The tensor of site {written.name!r} is not added to the residual stream.")
    return u * gain_of(model, model.ln_final).to(u)


def _logits(model: GemmaModel, u: Float[torch.Tensor, "k d_model"]) -> Float[torch.Tensor, "k d_vocab"]:
    return torch.cat([u @ columns.float() for columns in model.W_U.split(_CHUNK, dim=1)], dim=1)


def _through_attention(
    model: GemmaModel, block: Any, u: Float[torch.Tensor, "k heads"]
) -> Float[torch.Tensor, "k d_model"]:
    """The contribution of concatenated heads to the residual stream: W_O, and the gain of a norm after it."""
    u = u @ block.attn.W_O.to(u).reshape(u.shape[-1], -1)  # the layer may be on another device than the unembedding
    norm = model.family.norm_after_attention
    return u if norm is None else u * gain_of(model, getattr(block, norm)).to(u)

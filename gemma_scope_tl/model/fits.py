"""Whether a coder belongs to a model: its model, family, layers and widths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gemma_scope_tl.errors import SpliceError
from gemma_scope_tl.sae.access import check_row_trained_on, check_trained_on
from gemma_scope_tl.sae.layered import LayeredCoder
from gemma_scope_tl.sites import Family, ModelDims, Site
from gemma_scope_tl.text.tokens import ExcludeTokens, excluded_ids

if TYPE_CHECKING:
    from sae_lens import SAE

    from gemma_scope_tl.registry.schema import SAERow


class FitsMixin:
    """What a hooked model tells of itself to coders."""

    family: Family
    dims: ModelDims

    def device_of(self, layer: int | None) -> torch.device:
        """The device of a layer's weights, or without a layer that of the embedding, where token ids must be too."""
        module: Any = self.blocks[layer] if layer is not None else self.embedding_module()  # pyright: ignore
        return next(module.parameters()).device

    def check_fits(self, sae: SAE[Any] | LayeredCoder, site: Site, layer: int | None) -> None:
        """Check that ``sae``, or a layered coder, can be spliced at a site and layer of this model.

        Raises:
            SpliceError: for an SAE of another model, family, width or layer.
        """
        layered = isinstance(sae, LayeredCoder)
        self._check_sizes(site, layer, sae.d_in if layered else sae.cfg.d_in)
        if layered and sae.d_out != (wanted := self.family.d_out(site.name, self.dims)):
            raise SpliceError(
                f"The {sae.kind} writes {sae.d_out} dimensions, but this model has {wanted} there: it belongs to "
                "another model."
            )
        check_trained_on(sae, self.family, getattr(self, "model_id", None))

    def check_row_fits(self, row: SAERow) -> None:
        """Check that the SAE of a row of the registry can be spliced into this model, without loading it.

        Raises:
            SpliceError: for an SAE of another model, family, width or layer.
        """
        check_row_trained_on(row, self.family, getattr(self, "model_id", None))
        self._check_sizes(self.family.site(row.site), row.layer, row.d_in)

    def _check_sizes(self, site: Site, layer: int | None, d_in: int) -> None:
        """Check that a site has this layer and width."""
        site.check_layer(layer, self.dims)
        ours = site.d_in(self.dims)
        if d_in != ours:
            raise SpliceError(
                f"The SAE reads {d_in} dimensions, but site {site.name!r} of this model has {ours}: "
                "it belongs to another model."
            )

    def excluded_ids(self, exclude: ExcludeTokens = True) -> tuple[int, ...]:
        """The token ids for ``exclude_special_tokens`` (:func:`~gemma_scope_tl.text.tokens.excluded_ids`).

        Raises:
            SpliceError: for True without a tokenizer, which defines the special ids, or for an invalid value.
        """
        return excluded_ids(getattr(self, "tokenizer", None), exclude, must_know=True)

"""``evaluate``: L0, FVU, delta loss and loss recovered of SAEs on one fixed set of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int

from gemma_scope_tl.attached import decode_with_skip, locate
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.evals.metrics import FVU, Mean, l0, loss_recovered, next_token_losses, scored_positions
from gemma_scope_tl.interventions import Intervention
from gemma_scope_tl.sites import flatten_heads
from gemma_scope_tl.tokens import special_mask, special_token_ids

if TYPE_CHECKING:
    import pandas as pd


class Zero(Intervention):
    """Sets a site to zero: the worst that a splice should do."""

    def edited(self, x: torch.Tensor) -> torch.Tensor:
        """Zeros like ``x``."""
        return torch.zeros_like(x)


@dataclass
class _Result:
    sae: Any
    read: str
    write: str
    site: str
    layer: int | None
    l0: Mean = field(default_factory=Mean)
    fvu: FVU = field(default_factory=FVU)
    loss: Mean = field(default_factory=Mean)

    def row(self, clean: float, zeroed: float) -> dict[str, Any]:
        registered = getattr(self.sae, "row", None)
        return {
            "release": getattr(registered, "release", None),
            "id": getattr(registered, "id", None),
            "site": self.site,
            "layer": self.layer,
            "d_sae": self.sae.cfg.d_sae,
            "l0": self.l0.value,
            "fvu": self.fvu.value,
            "loss_clean": clean,
            "loss_spliced": self.loss.value,
            "delta_loss": self.loss.value - clean,
            "loss_zero_ablated": zeroed,
            "loss_recovered": loss_recovered(clean, self.loss.value, zeroed),
            "tokens": self.l0.count,
        }


@torch.no_grad()
def evaluate(
    model: Any,
    saes: Any | Iterable[Any],
    data: Sequence[str] | Int[torch.Tensor, "batch pos"],
    context: int = 256,
    batch_size: int = 8,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure SAEs on a model (paper, section 4.1). All see the same tokens and share the clean pass.

    BOS, EOS and padding are neither spliced nor counted. Losses are in nats, over predictions from an ordinary token to
    an ordinary token, in float32 whatever the model's dtype.

    Args:
        model: from ``load_model``.
        saes: one or several SAEs or transcoders; a transcoder is measured against its true target, the MLP's output.
        data: texts, packed into rows of BOS and ``context - 1`` tokens; or token ids.
        context: tokens in a row, when texts are given.
        batch_size: rows in a forward pass.
        progress: show a bar.

    Returns:
        A row per SAE: ``release, id, site, layer, d_sae, l0, fvu, loss_clean, loss_spliced, delta_loss,
        loss_zero_ablated, loss_recovered, tokens``.

    Raises:
        SpliceError: when an SAE does not fit the model.
        GemmaScopeError: when there is less text than one row.
    """
    import pandas as pd

    results = [_result(sae) for sae in ([saes] if isinstance(saes, torch.nn.Module) else saes)]
    tokens = data if isinstance(data, torch.Tensor) else pack_texts(model.tokenizer, data, context)
    clean, zeroed = Mean(), {result.write: Mean() for result in results}
    for batch in _batches(tokens, batch_size, progress):
        _evaluate_batch(model, batch.to(model.cfg.device), results, clean, zeroed)
    return pd.DataFrame([result.row(clean.value, zeroed[result.write].value) for result in results])


def pack_texts(tokenizer: Any, texts: Iterable[str], context: int) -> Int[torch.Tensor, "rows context"]:
    """Rows of BOS and ``context - 1`` consecutive tokens; texts follow each other, separated by EOS.

    Raises:
        GemmaScopeError: when there is less text than one row.
    """
    stream: list[int] = []
    for text in texts:
        stream += [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    body = context - 1
    rows = len(stream) // body
    if rows == 0:
        raise GemmaScopeError(
            f"The texts hold {len(stream)} tokens, less than one row of {body}: give more, or a smaller context."
        )
    packed = torch.tensor(stream[: rows * body]).view(rows, body)
    return torch.cat([torch.full((rows, 1), tokenizer.bos_token_id), packed], dim=1)


def _result(sae: Any) -> _Result:
    site, layer = locate(sae)
    read, write = site.hook_name(layer, "hooked_transformer"), site.hook_name_out(layer, "hooked_transformer")
    return _Result(sae, read, write, site.name, layer)


def _batches(tokens: torch.Tensor, batch_size: int, progress: bool) -> Iterator[torch.Tensor]:
    from rich.progress import track

    yield from track(tokens.split(batch_size), "evaluating", disable=not progress, transient=True)


def _evaluate_batch(
    model: Any, tokens: torch.Tensor, results: list[_Result], clean: Mean, zeroed: dict[str, Mean]
) -> None:
    special = special_mask(tokens, special_token_ids(model.tokenizer))
    scored = scored_positions(special)
    seen: dict[str, torch.Tensor] = {}

    def keep(value: torch.Tensor, hook: Any, name: str) -> None:
        seen[name] = flatten_heads(value)[~special]

    names = {name for result in results for name in (result.read, result.write)}
    hooks = [(name, lambda value, hook, name=name: keep(value, hook, name)) for name in sorted(names)]
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    clean.update(next_token_losses(logits, tokens)[scored])
    for name, mean in zeroed.items():
        mean.update(next_token_losses(model.run_with_hooks(tokens, fwd_hooks=[(name, Zero())]), tokens)[scored])
    for result in results:
        acts = result.sae.encode(seen[result.read])
        result.l0.update(l0(acts))
        result.fvu.update(seen[result.write], decode_with_skip(result.sae, acts, seen[result.read]))
        result.loss.update(next_token_losses(model.run_with_saes(tokens, saes=[result.sae]), tokens)[scored])

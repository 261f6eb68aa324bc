"""Nodes, weights and checks of an attribution graph, from the effects that were traced."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gemma_scope_tl.attributions.attribution_graph import COLUMNS
from gemma_scope_tl.attributions.placing import Reader
from gemma_scope_tl.attributions.readout import Readout
from gemma_scope_tl.attributions.sources import Entries, Sources
from gemma_scope_tl.attributions.tracing import Traced
from gemma_scope_tl.text.tokenizing import decoded_ids

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_array

_ROWS = 256  # rows of effects that are made sparse at a time
Row = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Prompt:
    """The text of a graph.

    Attributes:
        ids: of its tokens.
        tokens: a string for each.
    """

    ids: tuple[int, ...]
    tokens: tuple[str, ...]


def latent_id(reader: Reader, shared: bool, latent: int, position: int) -> str:
    """The id of a latent's node: with its site in front where several coders read tensors of one layer."""
    place = reader.site.name if reader.layer is None else str(reader.layer)
    prefix = f"{reader.site.name}_" if shared and reader.layer is not None else ""
    return f"{prefix}{place}_{latent}_{position}"


def assembled(
    sources: Sources, read: Readout, traced: Traced, prompt: Prompt, smallest: float
) -> tuple[pd.DataFrame, csr_array, pd.DataFrame, int]:
    """Nodes, weights and checks, and the number of edges that were left out.

    Args:
        sources: of the pass.
        read: the logits.
        traced: their effects.
        prompt: the text.
        smallest: edges below this share of the sum of a target's absolute effects are left out.
    """
    import pandas as pd

    kept = traced.latents.sort().values
    rows = [*latent_rows(sources, kept), *_other_rows(sources, prompt), *_logit_rows(sources, read, prompt)]
    nodes = pd.DataFrame(rows, columns=list(COLUMNS)).astype(dict(COLUMNS))
    logits = len(read.token_ids)
    columns = torch.cat([kept, torch.arange(sources.n_latents, sources.count)])
    targets = np.concatenate([np.arange(len(nodes) - logits, len(nodes)), traced.latents.argsort().argsort().numpy()])
    weights, dropped = _sparse(traced.effects, columns, targets, len(nodes), smallest)
    ids = nodes["node_id"].to_numpy()[targets]
    values = torch.cat([read.values.cpu(), _activations(sources)[traced.latents]])
    return nodes, weights, checks_of(ids, values, traced.effects), dropped


def numbers(sources: Sources, prompt: Prompt) -> dict[str, int]:
    """The number of every source by the id of its node."""
    rows = [*latent_rows(sources, torch.arange(sources.n_latents)), *_other_rows(sources, prompt)]
    return {row["node_id"]: number for number, row in enumerate(rows)}


def latent_rows(sources: Sources, numbers: Tensor) -> list[Row]:
    """Rows of the table of nodes for latents with these numbers, ascending."""
    layers = Counter(one.reader.layer for one in sources.entries)
    rows: list[Row] = []
    for entries in sources.entries:
        inside = (numbers >= entries.first) & (numbers < entries.first + len(entries))
        chosen = (numbers[inside] - entries.first).to(entries.position.device)
        columns = (one[chosen].tolist() for one in (entries.position, entries.latent, entries.activation))
        rows += [
            _latent_row(entries, layers[entries.reader.layer] > 1, *values) for values in zip(*columns, strict=True)
        ]
    return rows


def _latent_row(entries: Entries, shared: bool, position: int, latent: int, activation: float) -> Row:
    reader = entries.reader
    return {
        "node_id": latent_id(reader, shared, latent, position),
        "kind": "latent",
        "site": reader.site.name,
        "layer": reader.layer,
        "position": position,
        "latent": latent,
        "coder": reader.name,
        "activation": activation,
        "label": f"{reader.kind} {'' if reader.layer is None else f'{reader.layer} '}#{latent}",
    }


def _other_rows(sources: Sources, prompt: Prompt) -> list[Row]:
    """Rows of errors, biases, MLPs and embeddings, in the order of the sources."""
    rows: list[Row] = []
    for cut in sources.cuts.values():
        place, name = cut.written.place, sources.placed.names[cut.written.coder]
        about = {"site": place.site, "layer": place.layer, "coder": name}
        where = place.site if place.layer is None else f"{place.site}_{place.layer}"
        shown = where.replace("_", " ")
        for position in range(len(prompt.ids)):
            one = {"node_id": f"error_{where}_{position}", "kind": "error", "position": position}
            rows.append(one | about | {"label": f"error, {shown}"})
        rows.append({"node_id": f"bias_{where}", "kind": "bias", "label": f"bias, {shown}"} | about)
    branch = next(site for site in sources.frozen.model.family.sites.values() if site.joins == "branch").name
    for raw in sources.raw.values():
        for position, (token_id, token) in enumerate(zip(prompt.ids, prompt.tokens, strict=True)):
            if raw.layer is None:
                one = {"node_id": f"E_{token_id}_{position}", "kind": "embedding", "label": token}
                rows.append(one | {"position": position, "token_id": token_id})
                continue
            covered = raw.stage in sources.cuts
            name = f"{branch}-in" if covered else branch
            one = {"node_id": f"error_{name}_{raw.layer}_{position}", "kind": "error", "position": position}
            label = f"MLP {raw.layer}" + (", read by the SAE" if covered else ", without a coder")
            rows.append(one | {"site": branch, "layer": raw.layer, "label": label})
    rows.append({"node_id": "bias_encoders", "kind": "bias", "label": "biases of encoders"})
    return rows


def _logit_rows(sources: Sources, read: Readout, prompt: Prompt) -> list[Row]:
    position = sources.frozen.position
    names = decoded_ids(sources.frozen.model.tokenizer, read.token_ids)
    return [
        {
            "node_id": f"logit_{token_id}_{position}",
            "kind": "logit",
            "position": position,
            "activation": value,
            "probability": probability,
            "token_id": token_id,
            "label": name,
        }
        for token_id, name, value, probability in zip(
            read.token_ids, names, read.values.tolist(), read.probabilities, strict=True
        )
    ]


def checks_of(ids: npt.NDArray[Any], values: Tensor, effects: Tensor) -> pd.DataFrame:
    """What each target is, and what its parts add up to."""
    import pandas as pd

    sums, sizes = [], []
    for some in effects.split(_ROWS):
        sums.append(some.sum(1, dtype=torch.float64))
        sizes.append(some.abs().sum(1, dtype=torch.float64))
    value, total, size = values.double().numpy(), torch.cat(sums).numpy(), torch.cat(sizes).numpy()
    missing = value - total
    share = np.abs(missing) / np.maximum(size, np.finfo(np.float64).tiny)
    table = {"node_id": ids, "value": value, "sum": total, "missing": missing, "missing_share": share}
    return pd.DataFrame(table)


def _activations(sources: Sources) -> Tensor:
    found = [one.activation.cpu() for one in sources.entries]
    return torch.cat(found) if found else torch.zeros(0)


def _sparse(
    effects: Tensor, columns: Tensor, targets: npt.NDArray[np.int64], count: int, smallest: float
) -> tuple[csr_array, int]:
    """The effects as a matrix over all nodes, and the number of edges that were left out as small."""
    from scipy.sparse import csr_array

    found: list[tuple[Any, Any, Any]] = []
    dropped = 0
    for start in range(0, len(effects), _ROWS):
        block = effects[start : start + _ROWS]
        least = smallest * block.abs().sum(1, keepdim=True)
        some = block[:, columns]
        kept = (some != 0) & (some.abs() >= least)
        dropped += int(((some != 0) & ~kept).sum())
        row, column = kept.nonzero(as_tuple=True)
        found.append((some[row, column].numpy(), targets[start + row.numpy()], column.numpy()))
    data, row, column = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return csr_array((data, (row, column)), shape=(count, count)), dropped

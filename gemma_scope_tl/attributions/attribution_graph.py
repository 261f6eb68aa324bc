"""The attribution graph of a prompt: nodes, direct effects between them, and how well they add up.

A node is a source: something that the frozen pass adds to a tensor of the model, such as a latent at a token. Nodes of
kind ``latent`` and ``logit`` are targets as well: linear functions of what they read. ``weights[t, s]`` is the direct
effect of source s on target t, in units of the pre-activation of a latent or of a logit. The pass is linear in its
sources, so for every target

    value_t = sum_s weights[t, s]

holds to rounding, as long as no node was left out; ``checks`` has both sides. The pass and its sources are
defined in :mod:`gemma_scope_tl.attributions.frozen`, and graphs are made by :func:`gemma_scope_tl.attribution_graph`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gemma_scope_tl.attributions.influence import edge_influence, node_influence, pruned_masks, scores_of
from gemma_scope_tl.errors import GemmaScopeError, unknown_name

if TYPE_CHECKING:
    import pandas as pd
    from scipy.sparse import csr_array

KINDS = ("embedding", "latent", "error", "bias", "logit")
"""The kinds of nodes. Nodes of kind ``latent`` and ``logit`` are the targets of edges."""
TARGETS = ("latent", "logit")
COLUMNS: Mapping[str, str] = {
    "node_id": "str",
    "kind": "str",
    "site": "str",
    "layer": "Int64",
    "position": "Int64",
    "latent": "Int64",
    "coder": "str",
    "activation": "float64",
    "probability": "float64",
    "token_id": "Int64",
    "influence": "float64",
    "label": "str",
}
"""The columns of ``nodes`` and their types."""
CHECKS: tuple[str, ...] = ("node_id", "value", "sum", "missing", "missing_share")
"""The columns of ``checks``."""


class GraphScores(NamedTuple):
    """Two scores of a graph, each from 0 to 1, defined as in circuit-tracer.

    Attributes:
        replacement: the influence of embeddings as a share of that of embeddings and errors: how much of the way from
            the tokens to the logits passes through latents alone.
        completeness: the share of inputs of all targets, weighted with their influence, that do not come from errors.
    """

    replacement: float
    completeness: float


@dataclass(frozen=True, eq=False)
class AttributionGraph:
    """Nodes of a prompt and the direct effects between them.

    Attributes:
        model: name of the model.
        text: the prompt as text.
        token_ids: the prompt's tokens, without padding.
        tokens: a string for each token.
        nodes: row i is node i, with the columns of :data:`COLUMNS`.

            ``node_id``: ``E_<token id>_<position>``, ``<layer>_<latent>_<position>`` (with the coder's site in front
            when coders of several sites read one layer), ``error_<site>_<layer>_<position>``,
            ``bias_<site>_<layer>``, ``logit_<token id>_<position>``.
            ``kind``: one of :data:`KINDS`. ``site, layer``: of latents, the site of the coder and the layer that it
            reads; of errors and biases, the written place. ``position``: index into ``tokens``; missing for biases,
            which are sums over positions. ``latent``: index within the layer. ``coder``: release and id, or a given
            name. ``activation``: of a latent its activation, of a logit its value. ``probability``: of the logit's
            token. ``influence``: see :meth:`influence`. ``label``: a short text for people.
        weights: ``[n, n]``; ``weights[target, source]`` is the direct effect of source on target.
        checks: a row per target: ``node_id``, ``value`` in the frozen pass, ``sum`` of all its parts before any node or
            edge was left out, ``missing`` (value minus sum), and ``missing_share``, the missing part divided by the sum
            of the parts' absolute values.
        settings: the options that made the graph, and the versions of the libraries.
        supernodes: groups of nodes, each a name and its ``node_id`` values.

    Raises:
        GemmaScopeError: for missing columns, node ids that are not unique, weights of another shape or not finite,
            edges into nodes that are not targets, or supernodes of unknown nodes.
        UnknownNameError: for an unknown kind of node.
    """

    model: str
    text: str
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    nodes: pd.DataFrame
    weights: csr_array
    checks: pd.DataFrame
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    supernodes: tuple[tuple[str, tuple[str, ...]], ...] = ()

    def __post_init__(self) -> None:
        _check_nodes(self.nodes, len(self.token_ids), len(self.tokens))
        _check_weights(self.weights, self.nodes)
        missing = [name for name in CHECKS if name not in self.checks]
        if missing:
            raise GemmaScopeError(f"The checks of a graph have the columns {list(CHECKS)}; missing: {missing}.")
        known = set(self.nodes["node_id"])
        names = [name for name, _ in self.supernodes]
        if len(set(names)) < len(names):
            raise GemmaScopeError(f"Two supernodes have one name: {sorted(names)}.")
        for name, members in self.supernodes:
            if stray := [one for one in members if one not in known]:
                raise unknown_name(f"node in supernode {name!r}", stray[0], known)

    def __len__(self) -> int:
        return len(self.nodes)

    def number_of(self, node_id: str) -> int:
        """The row of a node.

        Raises:
            UnknownNameError: there is no such node; names the nearest.
        """
        found = np.flatnonzero(self.nodes["node_id"].to_numpy() == node_id)
        if not len(found):
            raise unknown_name("node", node_id, self.nodes["node_id"])
        return int(found[0])

    def edges(self) -> pd.DataFrame:
        """All edges, strongest first: ``source, target`` (node ids) and ``weight``."""
        import pandas as pd

        pairs = self.weights.tocoo()
        order = np.argsort(-np.abs(pairs.data), kind="stable")
        ids = self.nodes["node_id"].to_numpy()
        columns = {"source": ids[pairs.col[order]], "target": ids[pairs.row[order]], "weight": pairs.data[order]}
        return pd.DataFrame(columns)

    def influence(self) -> pd.Series:
        """The influence of every node on the logits along all paths, in the order of ``nodes``.

        It is the sum over paths of the products of the shares that each edge has in its target's inputs, weighted with
        the probabilities of the logits (:mod:`gemma_scope_tl.attributions.influence`). Biases are left out. The column
        ``influence`` has these numbers for the graph as it was made.
        """
        import pandas as pd

        found = node_influence(self._explained(), self._probabilities())
        return pd.Series(found, index=self.nodes.index, name="influence")

    def edge_influence(self) -> pd.Series:
        """The influence of every edge on the logits, in the order of :meth:`edges`."""
        import pandas as pd

        pairs = self.weights.tocoo()
        order = np.argsort(-np.abs(pairs.data), kind="stable")
        found = edge_influence(self._explained(), self._probabilities())
        values = np.asarray(found[pairs.row[order], pairs.col[order]]).ravel() if pairs.nnz else np.zeros(0)
        return pd.Series(values, name="influence")

    def pruned(self, node_threshold: float = 0.8, edge_threshold: float = 0.98) -> AttributionGraph:
        """The graph without nodes and edges of little influence; ``checks`` and influence are those of this graph.

        Args:
            node_threshold: the most influential nodes with this share of all influence are kept, and all embeddings and
                logits.
            edge_threshold: of the edges between these, the most influential with this share of their influence are
                kept. Then nodes that have no way to a logit, and latents without a source, are removed, and so are
                all biases.

        Raises:
            GemmaScopeError: for thresholds outside of 0..1.
        """
        kinds = self.nodes["kind"].to_numpy(dtype=object)
        keep, left = pruned_masks(self._explained(), self._probabilities(), kinds, node_threshold, edge_threshold)
        return self._only(keep, left, {"node_threshold": node_threshold, "edge_threshold": edge_threshold})

    def scores(self) -> GraphScores:
        """How much of the computation the graph explains without errors (:class:`GraphScores`)."""
        kinds = self.nodes["kind"].to_numpy(dtype=object)
        return GraphScores(*scores_of(self._explained(), self._probabilities(), kinds))

    def _explained(self) -> csr_array:
        """The weights without those of biases, which are the same for every prompt."""
        from scipy.sparse import diags_array

        kept = (self.nodes["kind"] != "bias").to_numpy()
        kept_columns: Any = diags_array(kept.astype(self.weights.dtype))
        out = (self.weights @ kept_columns).tocsr()
        out.eliminate_zeros()
        return out

    def _probabilities(self) -> Any:
        logits = (self.nodes["kind"] == "logit").to_numpy()
        return np.where(logits, self.nodes["probability"].to_numpy(dtype=float), 0.0)

    def _only(self, keep: Any, weights: csr_array, settings: dict[str, Any]) -> AttributionGraph:
        """The graph of some nodes, with these weights between them."""
        chosen = np.flatnonzero(keep)
        nodes = self.nodes.iloc[chosen].reset_index(drop=True)
        known = set(nodes["node_id"])
        checks = self.checks[self.checks["node_id"].isin(known)].reset_index(drop=True)
        groups = ((name, tuple(one for one in members if one in known)) for name, members in self.supernodes)
        left = tuple((name, members) for name, members in groups if members)
        rows: Any = weights[chosen]
        smaller = rows[:, chosen].tocsr()
        said = {**self.settings, **settings}
        return replace(self, nodes=nodes, weights=smaller, checks=checks, supernodes=left, settings=said)

    def grouped(self, name: str, node_ids: Iterable[str]) -> AttributionGraph:
        """This graph with one more supernode. Nodes that are in another supernode move to the new one.

        Raises:
            GemmaScopeError: for no node, or a name that is taken.
            UnknownNameError: for a node that is not in the graph.
        """
        members = tuple(dict.fromkeys([node_ids] if isinstance(node_ids, str) else node_ids))
        if not members:
            raise GemmaScopeError(f"Supernode {name!r} has no nodes: give the node_id of at least one.")
        for one in members:
            self.number_of(one)
        left = ((other, tuple(one for one in old if one not in members)) for other, old in self.supernodes)
        return replace(self, supernodes=(*((other, old) for other, old in left if old), (name, members)))


def _check_nodes(nodes: pd.DataFrame, ids: int, tokens: int) -> None:
    missing = [name for name in COLUMNS if name not in nodes]
    if missing:
        raise GemmaScopeError(f"The nodes of a graph have the columns {list(COLUMNS)}; missing: {missing}.")
    for kind in dict.fromkeys(nodes["kind"]):
        if kind not in KINDS:
            raise unknown_name("kind of node", kind, KINDS)
    twice = nodes["node_id"][nodes["node_id"].duplicated()]
    if len(twice):
        raise GemmaScopeError(f"Node ids are unique, but {twice.iloc[0]!r} is there twice.")
    if ids != tokens:
        raise GemmaScopeError(f"A graph has a string for each token: {ids} ids and {tokens} strings were given.")
    places = nodes["position"].dropna()
    if len(places) and not (places.min() >= 0 and places.max() < tokens):
        raise GemmaScopeError(f"Positions of nodes are 0..{tokens - 1}; given: {places.min()}..{places.max()}.")


def _check_weights(weights: csr_array, nodes: pd.DataFrame) -> None:
    shape: Any = weights.shape
    if tuple(shape) != (len(nodes), len(nodes)):
        raise GemmaScopeError(f"{len(nodes)} nodes need weights of that many rows and columns, not {shape}.")
    if not np.isfinite(weights.data).all():
        raise GemmaScopeError("The weights of a graph must be finite, but some are NaN or infinite.")
    indptr: Any = weights.indptr
    into = np.diff(indptr) > 0
    if stray := nodes["kind"][into & ~nodes["kind"].isin(TARGETS).to_numpy()].tolist():
        raise GemmaScopeError(f"Edges lead to nodes of kind latent and logit, but some lead to {stray[0]!r}.")

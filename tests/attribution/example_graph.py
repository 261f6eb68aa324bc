"""Attribution graphs made by hand or drawn at random, for tests of files and pages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_array, lil_array

from gemma_scope_tl.attributions.attribution_graph import CHECKS, COLUMNS, AttributionGraph

HOSTILE = ["</script><script>document.title='owned'</script>", '"><img src=x onerror=alert(1)>', "\u202e<!--"]


def table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Rows of nodes with the columns and types of a graph."""
    return pd.DataFrame([dict.fromkeys(COLUMNS) | row for row in rows], columns=list(COLUMNS)).astype(dict(COLUMNS))


def checks_of(nodes: pd.DataFrame, weights: Any) -> pd.DataFrame:
    """Checks of a graph in which nothing is missing."""
    sums = np.asarray(weights.sum(axis=1)).ravel()
    at = np.flatnonzero(nodes["kind"].isin(["latent", "logit"]))
    frame = pd.DataFrame({"node_id": nodes["node_id"].iloc[at].tolist(), "value": sums[at], "sum": sums[at]})
    return frame.assign(missing=0.0, missing_share=0.0)[list(CHECKS)]


def small_graph() -> AttributionGraph:
    """Four tokens, hostile texts among them; latents of a transcoder, a CLT and an SAE; errors, a bias, two logits."""
    tokens = ("<bos>", "The", HOSTILE[0], " cat\n")
    rows: list[dict[str, Any]] = [
        {"node_id": f"E_{10 + p}_{p}", "kind": "embedding", "position": p, "token_id": 10 + p} for p in range(4)
    ]
    for site, layer, latent, position, value in [
        ("transcoder", 0, 5, 1, 3.5),
        ("transcoder", 0, 7, 2, 0.25),
        ("res", 1, 5, 2, 1.5),
        ("clt", 1, 5, 2, 8.0),
        ("clt", 2, 9, 3, 2.0),
    ]:
        name = f"{site}_{layer}_{latent}_{position}"
        text = HOSTILE[1] if latent == 9 else ""
        fields = {"site": site, "layer": layer, "latent": latent, "coder": f"{site}-release/layer_{layer}"}
        rows.append(
            {"node_id": name, "kind": "latent", "position": position, "activation": value, **fields, "label": text}
        )
    rows += [
        {"node_id": f"error_mlp_{layer}_3", "kind": "error", "site": "mlp", "layer": layer, "position": 3}
        for layer in (0, 2)
    ]
    rows.append({"node_id": "bias_mlp_1", "kind": "bias", "site": "mlp", "layer": 1})
    rows += [
        {
            "node_id": f"logit_{token}_3",
            "kind": "logit",
            "position": 3,
            "token_id": token,
            "probability": p,
            "label": text,
        }
        for token, p, text in [(40, 0.75, " sat"), (41, 0.125, HOSTILE[2])]
    ]
    nodes = table(rows)
    at = {name: n for n, name in enumerate(nodes["node_id"])}
    weights = lil_array((len(nodes), len(nodes)))
    for source, target, weight in [
        ("E_11_1", "transcoder_0_5_1", 2.5),
        ("E_10_0", "transcoder_0_5_1", -0.5),
        ("E_12_2", "transcoder_0_7_2", 1.25),
        ("transcoder_0_5_1", "res_1_5_2", 0.75),
        ("transcoder_0_7_2", "clt_1_5_2", -1.75),
        ("transcoder_0_5_1", "clt_1_5_2", 4.0),
        ("bias_mlp_1", "clt_2_9_3", 0.1),
        ("clt_1_5_2", "clt_2_9_3", 1 / 3),
        ("res_1_5_2", "logit_40_3", 1.5),
        ("clt_2_9_3", "logit_40_3", 2.0),
        ("error_mlp_2_3", "logit_40_3", -0.3),
        ("error_mlp_0_3", "clt_2_9_3", 0.2),
        ("clt_2_9_3", "logit_41_3", -1.0),
    ]:
        weights[at[target], at[source]] = weight
    matrix = csr_array(weights)
    graph = AttributionGraph(
        model="bundled-gemma3",
        text="".join(tokens[1:]),
        token_ids=(10, 11, 12, 13),
        tokens=tokens,
        nodes=nodes,
        weights=matrix,
        checks=checks_of(nodes, matrix),
        settings={"budget": 1 << 30, "logits": 2, "nested": {"a": [1, 2.5, None]}},
    )
    return graph.grouped(HOSTILE[1], ["transcoder_0_5_1", "clt_1_5_2"])


def random_graph(latents: int, tokens: int, layers: int, edges: int, seed: int = 0) -> AttributionGraph:
    """A graph of random latents of three kinds, errors, embeddings and logits, with about ``edges`` edges."""
    rng = np.random.default_rng(seed)
    words = np.array([" the", " king", " of", " Golden", " Gate", " bridge", ",", " said", "\n", " unbelievable"])
    strings = ("<bos>", *rng.choice(words, tokens - 1))
    rows: list[dict[str, Any]] = [
        {"node_id": f"E_{p}_{p}", "kind": "embedding", "position": p, "token_id": p} for p in range(tokens)
    ]
    found: set[tuple[str, int, int, int]] = set()
    while len(found) < latents:
        layer, position = int(rng.integers(layers)), int(tokens * rng.beta(3, 1.2))
        found.add((str(rng.choice(["att", "transcoder", "res"])), layer, int(rng.integers(16384)), position))
    for site, layer, latent, position in sorted(found, key=lambda key: (key[1], key[0])):
        fields = {"site": site, "layer": layer, "latent": latent, "coder": f"gemma-scope-{site}/layer_{layer}"}
        label = f"{rng.choice(words).strip()} after {rng.choice(words).strip()}" if rng.random() < 0.3 else ""
        name = f"{site}_{layer}_{latent}_{position}"
        value = float(rng.exponential(8))
        rows.append(
            {"node_id": name, "kind": "latent", "position": position, "activation": value, "label": label, **fields}
        )
    for layer in range(layers):
        for position in range(tokens):
            if rng.random() < 0.3:
                name = f"error_mlp_{layer}_{position}"
                rows.append({"node_id": name, "kind": "error", "site": "mlp", "layer": layer, "position": position})
    rows += [{"node_id": f"bias_mlp_{n}", "kind": "bias", "site": "mlp", "layer": n} for n in range(layers)]
    for n, p in enumerate((0.42, 0.21, 0.08, 0.03)):
        fields = {"position": tokens - 1, "token_id": 900 + n, "probability": p, "label": str(words[n])}
        rows.append({"node_id": f"logit_{900 + n}_{tokens - 1}", "kind": "logit", **fields})
    nodes = table(rows)
    depth = nodes["layer"].fillna(-1).astype(int).where(nodes["kind"] != "logit", layers).to_numpy()
    place = nodes["position"].fillna(0).astype(int).to_numpy()
    target = rng.choice(np.flatnonzero(nodes["kind"].isin(["latent", "logit"])), 4 * edges)
    source = rng.choice(np.flatnonzero(nodes["kind"] != "logit"), 4 * edges)
    fits = (depth[source] < depth[target]) & (place[source] <= place[target])
    pairs = np.unique(np.stack([target[fits], source[fits]], 1), axis=0)
    pairs = pairs[rng.permutation(len(pairs))[:edges]]
    values = rng.standard_normal(len(pairs)) * rng.exponential(1, len(pairs)) ** 2
    matrix = csr_array((values, (pairs[:, 0], pairs[:, 1])), shape=(len(nodes), len(nodes)))
    return AttributionGraph(
        model="random",
        text="".join(strings[1:]),
        token_ids=tuple(range(tokens)),
        tokens=tuple(str(word) for word in strings),
        nodes=nodes,
        weights=matrix,
        checks=checks_of(nodes, matrix),
    )

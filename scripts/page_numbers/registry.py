"""Every number in the prose of the pages: its name there, the file it comes from, and how it is shown."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from gemma_scope_tl.interp import Sampling
from gemma_scope_tl.model.sizes import sizes_of
from scripts.page_numbers import Number
from scripts.page_numbers.graphs import GRAPH_NUMBERS

ATTRIBUTION = "docs/attribution.json"
HARDWARE, CLUSTERS = "docs/hardware.json", "docs/clusters.json"
CARD, GPU = "gemma_scope_tl/bundled/saes/README.md", "benchmarks/results/gpu.json"
RESULTS, LOG = "gemma_scope_tl/bundled/results", "gemma_scope_tl/bundled/saes/training.jsonl"
MODEL, METRICS = "gemma_scope_tl/bundled/model/config.json", "gemma_scope_tl/bundled/model/metrics.json"
METRICS3 = "gemma_scope_tl/bundled/gemma3/model/metrics.json"
CONFIG = "configs/bundled.yaml"
GEMMA3 = "benchmarks/results/gemma3.json"
PARETO, SMOLLM2 = "benchmarks/results/pareto.json", "benchmarks/results/smollm2_pareto.json"
LAYERED = ("res", "mlp", "att")
"""The sites whose SAEs have two widths."""


def _attribution(site: str, method: str) -> Callable[[Any], float]:
    def value(facts: Any) -> float:
        (row,) = [row for row in facts["results"] if (row["site"], row["method"]) == (site, method)]
        return row["pearson"]

    return value


def _gigabytes(model: str, **wanted: Any) -> Callable[[Any], float]:
    def value(data: Any) -> float:
        rows = data["saes"] if wanted else data["models"]
        (row,) = [r for r in rows if r["model"] == model and all(r[key] == item for key, item in wanted.items())]
        return row["bytes_float32"] / 1e9

    return value


def _canonical(pick: Callable[[Any], Any]) -> Callable[[Any], float]:
    def value(rows: Any) -> float:
        return float(pick(rows[rows["canonical"] & ~rows["model"].str.startswith("bundled")]["l0"]))

    return value


def _ranked(table: Any) -> Any:
    """The results with ``rank``: the number, from 0, of an SAE among those of its place and width by L0."""
    keys = ["site", "layer", "d_sae"]
    return table.assign(rank=table.groupby(keys, dropna=False)["l0"].rank().astype(int) - 1)


def _widths(table: Any) -> list[int]:
    return sorted(table[table["site"].isin(LAYERED)]["d_sae"].unique())


def _at(pick: int, **wanted: Any) -> Callable[[Any], Any]:
    """The rows of the narrow (0) or wide (1) SAEs with these values; ``rank=2`` are the densest."""

    def rows(table: Any) -> Any:
        table = _ranked(table)
        table = table[table["d_sae"] == _widths(table)[pick]]
        for key, value in wanted.items():
            table = table[table[key].isin(value if isinstance(value, tuple) else (value,))]
        return table

    return rows


def _same(column: str) -> Callable[[Any], int]:
    """The value that all rows have."""

    def value(table: Any) -> int:
        (found,) = table[column].unique()
        return int(found)

    return value


def _mean(pick: int, column: str, **wanted: Any) -> Callable[[Any], float]:
    return lambda table: float(_at(pick, **wanted)(table)[column].mean())


def _largest_mean(pick: int, column: str, sites: tuple[str, ...], **wanted: Any) -> Callable[[Any], float]:
    """The largest of the means over layers, of each site and sparsity."""
    return lambda table: float(_at(pick, site=sites, **wanted)(table).groupby(["site", "rank"])[column].mean().max())


def _embedding_end(log: Any) -> Any:
    """The last row of the log of the embedding SAE with the largest target."""
    rows = log[log["site"] == "embedding"]
    return rows[rows["target_l0"] == rows["target_l0"].max()].sort_values("step").iloc[-1]


def _trained(config: Any) -> float:
    """Activations that each SAE of the suite was trained on, in millions."""
    return config["steps"] * config["recipe"]["batch_size"] / 1e6


def _labels(data: Any) -> list[str]:
    """The L0s at which two recipes are compared, as the rows name them."""
    found = [re.search(r"at L0 (\d+)", row["what"]) for row in data["rows"]]
    return list(dict.fromkeys(match[1] for match in found if match))


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _gains(metric: str) -> Callable[[Any], tuple[float, float]]:
    """By how much the peer's metric is larger: the least and the most over the L0s."""

    def value(data: Any) -> tuple[float, float]:
        ratios = [row["ratio"] - 1 for row in data["rows"] if row["what"].startswith(metric)]
        return min(ratios), max(ratios)

    return value


def _undecided(data: Any) -> str:
    """The comparisons whose interval contains 1."""
    found = [row["what"].partition(",")[0] for row in data["rows"] if row["ratio_low"] <= 1 <= row["ratio_high"]]
    return f"once, for {found[0]}" if len(found) == 1 else f"for {_listed(found)}" if found else "nowhere"


def _dense_near(recipe: str, rank: int = -2) -> Callable[[Any], float]:
    """The mean share of L0 from dense latents, of the SAEs of a recipe within a quarter of the L0 of this rank."""

    def value(data: Any) -> float:
        at = int(_labels(data)[rank])
        near = [p for p in data["points"] if p["recipe"] == recipe and 0.75 < p["l0"] / at < 1.25]
        return sum(p["dense_share"] for p in near) / len(near)

    return value


def _densest(data: Any, recipe: str = "ours") -> Any:
    return max((p for p in data["points"] if p["recipe"] == recipe), key=lambda point: point["l0"])


def _spliced(row: str, side: str) -> Callable[[Any], float]:
    """The largest logit error of a side for a spliced transcoder, or by how much the splice moves logits."""

    def value(data: Any) -> float:
        (found,) = [one for one in data["rows"] if one["id"] == row]
        return found[side]["largest"]

    return value


def _released(layout: str, *unverified: bool) -> Callable[[Any], int]:
    """The SAEs of the registry in one layout that are not bundled, whose mark ``unverified`` is one of these."""

    def value(rows: Any) -> int:
        marked = rows["unverified"].isin(unverified)
        return int((~rows["model"].str.startswith("bundled") & marked & (rows["format"] == layout)).sum())

    return value


def _card(pattern: str) -> Callable[[str], float]:
    """A number of the card of the bundled suite, without commas and signs of per cent."""

    def value(text: str) -> float:
        (found,) = re.findall(pattern, text)
        return float(found)

    return value


def _wide_step(data: Any) -> dict[str, Any]:
    """The training step on a GPU whose repeats differ most."""
    return max(data["steps"], key=lambda row: row["ratio_max"] / row["ratio_min"])


def _picture(record: Any) -> str:
    """What the page of the demo says of its picture: nothing, unless the last run had to leave it as it was."""
    return "The picture was made with an earlier suite." if "left_out" in record.get("demo-picture", {}) else ""


NUMBERS: dict[str, Number] = {
    **GRAPH_NUMBERS,
    **{
        f"registry.{name}{ending}": Number("pretrained_yaml", _released(layout, *marks), "{:,}")
        for ending, layout in (("", "gemma-scope"), (".second", "gemma_scope_2"))
        for name, marks in (("released", (False,)), ("unverified", (True,)), ("listed", (False, True)))
    },
    "registry.bundled": Number("pretrained_yaml", lambda rows: int((rows["model"] == "bundled").sum())),
    "registry.canonical.lowest": Number("pretrained_yaml", _canonical(np.min), "{:.0f}"),
    "registry.canonical.highest": Number("pretrained_yaml", _canonical(np.max), "{:.0f}"),
    **{
        f"attribution.{site}.{method}": Number(ATTRIBUTION, _attribution(site, method), "{:.2f}")
        for site in ("res", "mlp")
        for method in ("gradient", "integrated")
    },
    "attribution.pairs": Number(ATTRIBUTION, lambda facts: sum(r["pairs"] for r in facts["results"]) // 2),
    # Memory and disk, computed from shapes.
    "size.2b": Number(HARDWARE, _gigabytes("gemma-2-2b"), "{:.0f} GB"),
    "size.2b.16k": Number(HARDWARE, lambda d: 1e3 * _gigabytes("gemma-2-2b", site="res", width="16k")(d), "{:.0f} MB"),
    "size.2b.1m": Number(HARDWARE, _gigabytes("gemma-2-2b", site="res", width="1m"), "{:.0f} GB"),
    "hardware.reserve": Number("scripts/hardware_table.py", lambda m: m.RESERVE / 1e9, "{:.0f} GB"),
    "hardware.batch": Number("scripts/hardware_table.py", lambda m: m.BATCH, "{:,}"),
    "hardware.bucket": Number("scripts/hardware_table.py", lambda m: m.BUCKET, "{:,}"),
    "hardware.float32": Number(CLUSTERS, lambda plan: plan["hardware"]["fp32_flops"] / 1e12, "{:.0f} TFLOP/s"),
    "hardware.places.2b": Number(HARDWARE, lambda data: data["buffers"][1]["places"]),
    "plan.layers": Number(CLUSTERS, lambda plan: plan["model"]["layers"]),
    "plan.places": Number(CLUSTERS, lambda plan: plan["model"]["places"]),
    "plan.products": Number(CLUSTERS, lambda plan: plan["measured"]["products"], "{:.1f}"),
    # The shape of Gemma 2 2B.
    "shape.2b.d_model": Number("gemma_scope_tl/model/sizes.py", lambda _: sizes_of("gemma-2-2b").dims.d_model, "{:,}"),
    "shape.2b.heads": Number(
        "gemma_scope_tl/model/sizes.py",
        lambda _: sizes_of("gemma-2-2b").dims.n_heads * sizes_of("gemma-2-2b").dims.d_head,
        "{:,}",
    ),
    "shape.2b.scale": Number(
        "gemma_scope_tl/model/sizes.py", lambda _: sizes_of("gemma-2-2b").dims.d_model ** 0.5, "{:.0f}"
    ),
    "shape.vocabulary": Number("gemma_scope_tl/model/sizes.py", lambda _: sizes_of("gemma-2-2b").d_vocab, "{:,}"),
    # The bundled model and suite.
    "model.parameters": Number(METRICS, lambda data: data["parameters"] / 1e6, "{:.1f} million"),
    "model3.parameters": Number(METRICS3, lambda data: data["parameters"] / 1e6, "{:.1f} million"),
    "model.d_model": Number(MODEL, lambda config: config["hidden_size"]),
    "suite.activations": Number(CONFIG, _trained, "{:.1f} million"),
    "suite.shorter": Number(CONFIG, lambda config: 4e9 / (1e6 * _trained(config)), "{:,.0f}"),
    "suite.narrow": Number(RESULTS, lambda table: _widths(table)[0], "{:,}"),
    "suite.wide": Number(RESULTS, lambda table: _widths(table)[1], "{:,}"),
    "suite.densest": Number(RESULTS, _mean(0, "l0", site=("res", "mlp"), rank=2), "{:.0f}"),
    "suite.dense.res": Number(RESULTS, _mean(0, "dense", site="res", rank=2), "{:.0%}"),
    "suite.dense.mlp": Number(RESULTS, _mean(0, "dense", site="mlp", rank=2), "{:.0%}"),
    "suite.dense.att": Number(RESULTS, _mean(0, "dense", site="att", rank=2), "{:.0%}"),
    **{f"suite.dense.wide.{site}": Number(RESULTS, _mean(1, "dense", site=site, rank=2), "{:.1%}") for site in LAYERED},
    "suite.results.rows": Number(f"{RESULTS}/bundled-att.json", lambda facts: facts["configuration"]["rows"]),
    "suite.results.tokens": Number(RESULTS, _same("tokens"), "{:,}"),
    "suite.card.tokens": Number(CARD, _card(r"over (\d+) text positions"), "{:,.0f}"),
    "suite.card.dead.att": Number(CARD, _card(r"([\d.]+)% for att"), "{:.1f}%"),
    "suite.dead.att.mean": Number(RESULTS, lambda table: table[table["site"] == "att"]["dead"].mean(), "{:.1%}"),
    **{
        f"suite.dead.att.{name}": Number(RESULTS, _mean(1, "dead", site="att", rank=rank), "{:.0%}")
        for rank, name in enumerate(("sparse", "middle", "dense"))
    },
    "suite.dead.att.narrow": Number(RESULTS, _mean(0, "dead", site="att", rank=2), "{:.0%}"),
    "suite.sparsest": Number(RESULTS, _mean(0, "l0", site=("res", "mlp"), rank=0), "{:.0f}"),
    "suite.middle": Number(RESULTS, _mean(0, "l0", site=("res", "mlp"), rank=1), "{:.0f}"),
    "suite.att.d_in": Number(MODEL, lambda config: config["num_attention_heads"] * config["head_dim"]),
    "suite.dead.others": Number(RESULTS, _largest_mean(1, "dead", ("res", "mlp")), "{:.1%}"),
    "suite.embedding.l0": Number(RESULTS, lambda t: t[t["site"] == "embedding"]["l0"].max(), "{:.0f}"),
    "suite.embedding.target": Number(LOG, lambda log: _embedding_end(log)["target_l0"], "{:.0f}"),
    "suite.embedding.lambda": Number(LOG, lambda log: _embedding_end(log)["lambda"], "{:.1g}"),
    # The comparisons of recipes.
    **{
        f"{name}.{key}": Number(source, value, form)
        for name, source in (("pareto", PARETO), ("smollm2", SMOLLM2))
        for key, value, form in (
            ("densest", lambda data: _labels(data)[-1], "{}"),
            ("latents", lambda data: data["setting"]["budget"]["d_sae"], "{:,}"),
            ("ours.dense", lambda data: _densest(data)["dense_share"], "{:.0%}"),
            ("seeds", lambda data: data["rows"][0]["seeds"], "{}"),
            ("fvu", _gains("FVU"), "{:.0%} to {:.0%}"),
            ("loss", _gains("delta loss"), "{:.0%} to {:.0%}"),
            ("undecided", _undecided, "{}"),
        )
    },
    "pareto.tokens": Number(PARETO, lambda data: data["setting"]["tokens"] / 1e6, "{:.1f} million"),
    "smollm2.steps": Number(SMOLLM2, lambda data: data["setting"]["budget"]["steps"], "{:,}"),
    "smollm2.batch": Number(SMOLLM2, lambda data: data["setting"]["budget"]["batch_size"], "{:,}"),
    "pareto.searched": Number("benchmarks/recipe_search.py", lambda m: _listed([f"{t:g}" for t in m.TARGETS])),
    "pareto.middle": Number(PARETO, lambda data: _labels(data)[-2]),
    "pareto.ours.middle": Number(PARETO, _dense_near("ours"), "{:.0%}"),
    "pareto.peer.middle": Number(PARETO, _dense_near("SAELens JumpReLU, tanh"), "{:.0%}"),
    "smollm2.peer.dense": Number(SMOLLM2, _dense_near("SAELens JumpReLU, tanh", -1), "{:.0%}"),
    # Transcoders of Gemma Scope 2, spliced into a random Gemma 3.
    "gemma3.moves": Number(GEMMA3, _spliced("transcoder-released", "moves"), "{:.1f}"),
    "gemma3.moves.skip": Number(GEMMA3, _spliced("skip-transcoder-released", "moves"), "{:.1f}"),
    "gemma3.released": Number(GEMMA3, _spliced("transcoder-released", "peer_error"), "{:.1f}"),
    "gemma3.released.skip": Number(GEMMA3, _spliced("skip-transcoder-released", "peer_error"), "{:.1f}"),
    "gemma3.corrected.skip": Number(GEMMA3, _spliced("skip-transcoder-corrected", "peer_error"), "{:.1f}"),
    "gemma3.ours": Number(
        GEMMA3,
        lambda data: max(error["largest"] for row in data["rows"] for error in row["ours_error"].values()),
        "{:.0e}",
    ),
    **{
        f"gpu.step.{name}": Number(GPU, value, form)
        for name, value, form in (
            ("latents", lambda data: re.findall(r"d \d+, [\d,]+ latents", _wide_step(data)["what"])[0], "{}"),
            ("runs", lambda data: _wide_step(data)["runs"], "{}"),
            ("worst", lambda data: 1 / _wide_step(data)["ratio_min"], "{:.1f}"),
            ("ratio", lambda data: _wide_step(data)["ratio"], "{:.1f}"),
        )
    },
    # Limits and sizes that the code states.
    **{
        f"demo.{name}": Number("gemma_scope_tl/demo/limits.py", lambda m, n=name: asdict(m.Limits())[n], form)
        for name, form in (
            ("characters", "{:,}"),
            ("tokens", "{}"),
            ("new_tokens", "{}"),
            ("strength", "{:g}"),
            ("spliced", "{}"),
        )
    },
    "demo.waiting": Number("gemma_scope_tl/demo/queue_rules.py", lambda m: m.WAITING),
    "demo.waiting_of_a_page": Number("gemma_scope_tl/demo/queue_rules.py", lambda m: m.WAITING_OF_A_PAGE),
    "demo.memory": Number(
        "gemma_scope_tl/demo/world.py",
        lambda m: inspect.signature(m.World).parameters["sae_memory"].default / 2**30,
        "{:.0f} GiB",
    ),
    "demo.body": Number("gemma_scope_tl/demo/guard.py", lambda m: m.BODY_BYTES / 1024, "{:.0f} KiB"),
    "demo.picture": Number("docs/artefacts.json", _picture),
    "verify.largest": Number(
        "gemma_scope_tl/verification/run.py",
        lambda m: inspect.signature(m.prepare).parameters["largest"].default,
        "{:.0f} GiB",
    ),
    **{
        f"verify.{name}": Number(f"gemma_scope_tl/verification/{module}.py", value, form)
        for name, module, value, form in (
            ("l0", "bands", lambda m: m.L0_FACTOR, "{:g}"),
            ("l0.embedding", "bands", lambda m: m.L0_FACTORS["embedding"], "{:g}"),
            ("fvu", "bands", lambda m: m.FVU_BOUND, "{:g}"),
            ("fvu.transcoder", "bands", lambda m: m.FVU_BOUNDS["transcoder"], "{:g}"),
            ("fvu.embedding", "bands", lambda m: m.FVU_BOUNDS["embedding"], "{:g}"),
            ("bfloat16.fvu", "bands", lambda m: m.BFLOAT16_FVU, "{:g}"),
            ("bfloat16.l0", "bands", lambda m: m.BFLOAT16_L0, "{:.0%}"),
            ("neuronpedia.correlation", "neuronpedia", lambda m: m.CORRELATION, "{:g}"),
            ("neuronpedia.peak", "neuronpedia", lambda m: m.PEAK, "{:.0%}"),
        )
    },
    "interp.bytes": Number(
        "gemma_scope_tl/interp/sampling.py", lambda _: Sampling().bytes_per_latent() / 1e3, "{:.1f} kB"
    ),
}

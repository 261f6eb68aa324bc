"""What the data of the studies support: the conclusions of docs/studies.md, as text made from the stored tables.

A conclusion is a difference with its interval over resamples of sources. Where the interval holds zero, the text says
that no difference is resolved; so the page stays true whatever is measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pandas as pd

from scripts.page_tables import table as markdown
from scripts.study_sources import Resampled, Value, mean_ratio

FEW = 10
"""Test sources below this number are marked on the page."""
METRICS = {"squared_error": ("tokens", "squared error"), "delta_loss": ("predictions", "delta loss")}
FIDELITY = {"delta_loss": ("predictions", "delta loss"), "error": ("deviation", "FVU")}


def position_claims(sums: pd.DataFrame, places: Sequence[tuple[int, int]]) -> str:
    """Each range of positions against the last one, by SAE."""
    draws, lines = Resampled(sums), list[list[str]]()
    for site, rows in sums.groupby("site", sort=False):
        for place, other in [(place, places[-1]) for place in places[:-1]]:
            cells: list[str] = []
            for name, (under, _) in METRICS.items():
                one, two = (rows[(rows["first"] == at[0]) & (rows["last"] == at[1])] for at in (place, other))
                cells.append(judged(draws.value(draws.ratio(one, name, under) - draws.ratio(two, name, under))))
            lines.append([f"{site}, {_range(place)} against {_range(other)}", *cells])
    return markdown(["difference", *(word for _, word in METRICS.values())], lines)


def domain_table(sums: pd.DataFrame) -> str:
    """Means over the SAEs by kind of text, with intervals and the number of sources, sorted by delta loss."""
    values, counts = _by_domain(sums), sums.groupby("domain")["source"].nunique()
    draws = Resampled(sums)
    order = sorted(counts.index, key=lambda name: values["delta_loss"][name][0])
    lines = [
        [name, str(counts[name]), *(draws.value(values[metric][name]).text() for metric in FIDELITY)] for name in order
    ]
    return markdown(["text", "sources", *(f"{word}, mean over sites" for _, word in FIDELITY.values())], lines)


def domain_claims(sums: pd.DataFrame) -> str:
    """Which kinds of text are lowest and highest in each metric, and from which others this is resolved."""
    lines: list[str] = []
    for metric, values in _by_domain(sums).items():
        order = sorted(values, key=lambda name: values[name][0])
        for word, first in (("lowest", order[0]), ("highest", order[-1])):
            rest = [
                name for name in order if name != first and not Resampled.value(values[name] - values[first]).resolved
            ]
            others = "the difference from every other kind of text is resolved"
            if rest:
                others = f"no difference is resolved from {_listed(rest)}"
            lines.append(f"- The {word} {FIDELITY[metric][1]} is that of {first}; {others}.")
    return "\n".join(lines)


def _by_domain(sums: pd.DataFrame) -> dict[str, dict[str, np.ndarray]]:
    draws = Resampled(sums)
    found: dict[str, dict[str, np.ndarray]] = {}
    for metric, (under, _) in FIDELITY.items():
        found[metric] = {
            str(name): mean_ratio(draws, [part for _, part in rows.groupby("site")], metric, under)
            for name, rows in sums.groupby("domain", sort=False)
        }
    return found


def frequency_claims(rows: pd.DataFrame) -> str:
    """Median frequency by width, and the latents that are active on more than a tenth of the tokens."""
    first = rows.groupby(["site", "id"], sort=False).first().reset_index()
    first["rank"] = first.groupby(["site", "d_sae"])["l0"].rank().astype(int)
    narrow, wide = min(first["d_sae"]), max(first["d_sae"])
    pairs = first.pivot_table(index=["site", "rank"], columns="d_sae", values="median").dropna()
    lower = int((pairs[wide] < pairs[narrow]).sum())
    lines = [
        f"- In {lower} of {len(pairs)} pairs of SAEs of one site and about equal L0, the median latent of the SAE with "
        f"{wide:,} latents is active less often than that of the SAE with {narrow:,}."
    ]
    highest = first[first["d_sae"] == narrow].sort_values("rank").groupby("site", sort=False).last()
    shares = [f"{row.dense:.0%} ({site}, L0 {row.l0:.0f})" for site, row in highest.iterrows()]
    lines.append(
        f"- Of the {narrow:,} latents of the SAEs with the highest L0, {_listed(shares)} are active on more than a "
        "tenth of the tokens. Where that is a large share, the SAE is closer to a basis than to a sparse dictionary."
    )
    return "\n".join(lines)


def precision_claims(rows: pd.DataFrame) -> str:
    """The direction of the change of L0, and the largest changes, in bfloat16."""
    changed = rows[rows["dtype"] == "bfloat16"]
    lower, largest = int((changed["l0_change"] < 0).sum()), changed["delta_loss_change"].abs().max()
    share = (changed["fvu_change"].abs() / changed["fvu"]).max()
    return (
        f"In bfloat16, L0 is lower for {lower} of {len(changed)} SAEs. Delta loss changes by at most {largest:.4f} "
        f"nats, and FVU by at most {share:.1%} of its value."
    )


def uniformity_claims(sums: pd.DataFrame) -> str:
    """Uniformity by L0 at each width, and by width at each L0, paired over sources."""
    draws, lines = Resampled(sums), list[str]()
    for site, rows in sums.groupby("site", sort=False):
        values = {
            width: [draws.ratio(part, "uniformity", "tokens") for _, part in rows[rows["d_sae"] == width].groupby("l0")]
            for width in sorted(set(rows["d_sae"].tolist()))
        }
        steps = [draws.value(two - one) for parts in values.values() for one, two in pairwise(parts)]
        fewer, more = min(values), max(values)
        widths = [draws.value(one - two) for one, two in zip(values[fewer], values[more], strict=True)]
        lines.append(
            f"- {site}: from each L0 to the next, uniformity {_directions(steps)}. With {fewer:,} latents in place of "
            f"{more:,}, at about equal L0, it {_directions(widths)}: {', '.join(v.text(signed=True) for v in widths)}."
        )
    return "\n".join(lines)


def probe_table(contrasts: pd.DataFrame, counts: pd.DataFrame) -> str:
    """AUROC of latents and of raw activations, and the latents' difference from random ones, by concept and k."""
    sizes, lines = sorted(set(contrasts["k"])), list[list[str]]()
    for part, rows in contrasts[contrasts["part"].isin(counts.index)].groupby("part", sort=False):
        sources, positive = (int(counts[name][part]) for name in ("positive_sources", "positive"))
        cells = [f"{sources}{'†' if sources < FEW else ''}", f"{positive:,}"]
        for row in (rows[rows["k"] == k].iloc[0] for k in sizes):
            cells += [f"{row.latents:.3f}", _difference(row).text(signed=True)]
        lines.append([str(part), *cells, f"{rows['dense'].iloc[0]:.3f}"])
    head = ["concept", "test sources", "positives"]
    head += [word for k in sizes for word in (f"latents, k = {k}", "over random")]
    return markdown([*head, "dense"], lines)


def probe_claims(contrasts: pd.DataFrame, parts: dict[str, list[str]]) -> str:
    """Means over the concepts of rows and of tokens, and for how many concepts latents differ from random ones."""
    lines: list[str] = []
    for part, concepts in parts.items():
        for row in contrasts[contrasts["part"] == part].itertuples():
            single = contrasts[contrasts["part"].isin(concepts) & (contrasts["k"] == row.k)]
            found = [_difference(one) for one in single.itertuples()]
            over, dense = _difference(row), _difference(row, "over_dense")
            lines.append(
                f"- **{part}, k = {row.k}**: latents {row.latents:.3f}, random {row.random:.3f}, raw activations "
                f"{row.dense:.3f}. Latents against random: {judged(over)}; concept by concept, higher for "
                f"{sum(v.low > 0 for v in found)}, lower for {sum(v.high < 0 for v in found)}, not resolved for "
                f"{sum(not v.resolved for v in found)}. Latents against raw activations: "
                f"{judged(dense)}."
            )
    return "\n".join(lines)


def probe_split(rows: pd.DataFrame) -> str:
    """How the documents of the concepts were split and resampled, where it is not by several test sources."""
    first = rows.groupby("concept", sort=False).first()
    within = [str(name) for name in first.index[first["split"] == "within one source"]]
    alone = [str(name) for name in first.index[first["interval"] == "documents of one source"]]
    lines = ["No source is on both sides of the split."]
    if within:
        lines = [f"No source is on both sides of the split, except for {_listed(within)}, whose text has one source."]
    if alone:
        lines.append(
            f"One source tests {_listed(alone)}; the intervals of these resample its pieces, and do not hold the "
            "difference between sources."
        )
    few = int((first["positive_sources"] < FEW).sum())
    lines.append(f"{few} of {len(first)} concepts have fewer than {FEW} test sources with the property (marked †).")
    return " ".join(lines)


def judged(value: Value, more: str = "higher", less: str = "lower") -> str:
    """A difference in words: its direction, or that it is not resolved, and its interval."""
    word = (more if value.low > 0 else less) if value.resolved else "no difference is resolved"
    return f"{word}, {value.text(signed=True)}"


def _difference(row: object, name: str = "over_random") -> Value:
    return Value(*(float(getattr(row, f"{name}{end}")) for end in ("", "_low", "_high")))


def _directions(values: Sequence[Value]) -> str:
    """``falls in 4 of 4`` and the like."""
    falls, rises = sum(v.high < 0 for v in values), sum(v.low > 0 for v in values)
    words = [f"{word} in {count}" for word, count in (("falls", falls), ("rises", rises)) if count]
    open_ = len(values) - falls - rises
    words += [f"is not resolved to change in {open_}"] if open_ else []
    return f"{_listed(words)} of {len(values)} cases"


def _range(place: tuple[int, int]) -> str:
    return f"position {place[0]}" if place[0] == place[1] else f"positions {place[0]}–{place[1]}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"

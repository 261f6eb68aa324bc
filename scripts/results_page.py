"""The tables and figures of docs/results.md, from the released results of the bundled suite and its training log.

python -m scripts.results_page
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pandas as pd

from gemma_scope_tl.files import write_atomically
from gemma_scope_tl.registry.listing import RESULTS
from gemma_scope_tl.registry.locate import BUNDLED_SAES
from gemma_scope_tl.viz.figures import save_figure
from gemma_scope_tl.viz.study_figures import fidelity_figure
from gemma_scope_tl.viz.training_figures import training_curves
from scripts.page_tables import with_tables

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "results.md"
SITES = ("res", "mlp", "att", "transcoder", "embedding")
COLUMNS = {
    "l0": ("L0", "{:.1f}"),
    "fvu": ("FVU", "{:.4f}"),
    "delta_loss": ("delta loss", "{:.4f}"),
    "loss_recovered": ("loss recovered", "{:.4f}"),
    "dead": ("dead", "{:.1%}"),
    "dense": ("dense", "{:.1%}"),
}


def results() -> pd.DataFrame:
    """A row for each bundled SAE; ``rank`` numbers the L0s of a place and width from 0."""
    table = pd.concat([pd.read_csv(path) for path in sorted(RESULTS.glob("bundled-*.csv"))], ignore_index=True)
    keys = ["site", "layer", "d_sae"]
    return table.assign(rank=table.groupby(keys, dropna=False)["l0"].rank().astype(int) - 1)


def markdown(table: pd.DataFrame) -> str:
    """Means over layers for each site, width and sparsity."""
    means = table.groupby(["site", "d_sae", "rank"])[list(COLUMNS)].mean()
    lines = ["| site | latents | " + " | ".join(name for name, _ in COLUMNS.values()) + " |"]
    lines.append("|---|---:|" + "---:|" * len(COLUMNS))
    for site in SITES:
        for at, row in means.loc[site].iterrows():
            d_sae, _ = cast("tuple[int, int]", at)
            numbers = (form.format(row[key]) for key, (_, form) in COLUMNS.items())
            lines.append(f"| {site} | {d_sae} | " + " | ".join(numbers) + " |")
    return "\n".join(lines)


def with_table(page: str) -> str:
    """``page`` with a new table; errors are those of :func:`scripts.page_tables.with_tables`."""
    return with_tables(page, {"results": markdown(results())})


def main() -> None:
    """Write the table and both figures."""
    write_atomically(PAGE, with_table(PAGE.read_text(encoding="utf-8")))
    table = results()
    save_figure(fidelity_figure(table[table["site"].isin(["res", "mlp", "att"])]), ROOT / "docs" / "fidelity.png")
    log = pd.read_json(BUNDLED_SAES / "training.jsonl", lines=True)
    shown = log[(log["site"] == "res") & (log["layer"] == 2)]
    save_figure(training_curves(shown), ROOT / "docs" / "training.png")
    print(f"wrote {PAGE.relative_to(ROOT)} and two figures")


if __name__ == "__main__":
    main()

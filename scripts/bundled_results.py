"""Measure the registry's SAEs of a model and write the results that ``list_saes(with_metrics=True)`` joins.

    python scripts/bundled_results.py                        the bundled suite, on bundled held-out text
    python scripts/bundled_results.py --check                exit 1 where results are missing, or of other weights
    python scripts/bundled_results.py --model bundled-gemma3   the second bundled suite, in a folder of its own
    python scripts/bundled_results.py --model gemma-2-2b --release gemma-scope-2b-pt-mlp --data texts.jsonl

For each release ``gemma_scope_tl/bundled/results/`` gets ``<release>.csv``, with a row per SAE, and ``<release>.json``,
with the configuration, the versions of the software and the meaning of each column; for coders of several layers
``<release>-by-layer.csv`` has a row for each layer too. Rows are spread evenly over the
text, so that every kind of text is included. ``--cache`` continues a stopped run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import gemma_scope_tl as gs
from gemma_scope_tl.evals.cache import VERSION
from gemma_scope_tl.evals.suite import evaluate
from gemma_scope_tl.files import replace_files
from gemma_scope_tl.registry.listing import results_folder, select_rows
from gemma_scope_tl.sae.loading import load_row
from gemma_scope_tl.sae.suite import SAESuite
from gemma_scope_tl.text.documents import read_texts
from gemma_scope_tl.text.rows import pack_texts

SOFTWARE = ("torch", "transformers", "transformer-lens", "sae-lens", "numpy", "pandas")
INTERVALS = {"confidence": 0.95, "resamples": 1000, "seed": 0}
COLUMNS = {
    "release": "registry release",
    "id": "registry id",
    "sha256": "of the weights file that was measured, or of the hashes of several files in a row",
    "site": "site of the SAE",
    "layer": "from 0; empty for the embedding, and for coders of several layers",
    "d_sae": "number of latents",
    "l0": "mean number of active latents of a token",
    "fvu": "fraction of variance unexplained; of the MLP's output for transcoders, of several outputs together",
    "loss_clean": "the model's own next-token loss, nats",
    "loss_spliced": "the loss with the SAE spliced in, nats",
    "delta_loss": "loss_spliced - loss_clean",
    "loss_zero_ablated": "the loss with zeros at the site, nats",
    "loss_recovered": "(loss_zero_ablated - loss_spliced) / (loss_zero_ablated - loss_clean)",
    "tokens": "ordinary tokens measured; BOS, EOS and padding are left out",
    "kl": "KL divergence of the spliced from the clean prediction, nats",
    "loss_mean_ablated": "the loss with the dataset's mean activation at the site, nats",
    "loss_recovered_mean": "as loss_recovered, against the mean ablation",
    "dead": "share of latents that fired on none of these tokens",
    "dense": "share of latents that fired on more than a tenth of them",
    "uniformity": "uniformity r_L0 of active latent importance; empty where it was not measured",
    "sequences": "rows of tokens",
}
BOUNDS = "<metric>_low and <metric>_high: bootstrap interval over sequences"


def main() -> int:
    """Measure and write the results, or check them."""
    options = _arguments()
    folder = results_folder(options.model) if options.out is None else Path(options.out)
    rows = select_rows(options.model, release=options.release or None)
    if options.check:
        problems = stale(rows, folder)
        print("\n".join(problems) or f"{len(rows)} SAEs have results of their weights")
        return 1 if problems else 0
    model = gs.load_model(options.model, device=options.device, dtype=options.dtype)
    tokens = spread_rows(model, options.data, options.context, options.rows)
    device = model.cfg.device

    def load(row: Any) -> Any:
        return load_row(row, device=device, dtype=options.dtype)

    single = {(f"{row.release}/{row.id}", row.layer): row for row in rows if row.layers is None}
    several = [row for row in rows if row.layers is not None]
    keywords: dict[str, Any] = {"batch_size": options.batch_size, "cache": options.cache, **INTERVALS}
    tables: list[pd.DataFrame] = []
    if single:
        suite = SAESuite(single, load, options.sae_memory << 30)
        tables.append(evaluate(model, suite, tokens, uniformity=options.uniformity, **keywords))
    tables += [evaluate(model, [load(row)], tokens, **keywords) for row in several]
    table = pd.concat(tables)
    keys = {(row.release, row.id): row.digest for row in rows}
    table.insert(2, "sha256", [keys[str(row.release), str(row.id)] for row in table.itertuples()])
    parts = {row.release for row in several}
    for release, found in table.groupby("release", sort=False):
        name, config = str(release), configuration(options, tokens)
        whole = found[found["layer"].isna()] if name in parts else found
        write(folder, name, whole, config, found if name in parts else None)
    print(table[["release", "id", "l0", "fvu", "delta_loss", "dead"]].to_string(index=False))
    return 0


def spread_rows(model: Any, source: str | None, context: int, rows: int) -> torch.Tensor:
    """``rows`` rows of tokens at even distances over the whole text, or all rows if there are fewer."""
    tokens = pack_texts(model.tokenizer, read_texts(source), context)
    if tokens.shape[0] <= rows:
        return tokens
    return tokens[torch.arange(rows) * tokens.shape[0] // rows]


def stale(rows: list[Any], folder: Path) -> list[str]:
    """A line for each SAE without a result for its current weights."""
    known: set[tuple[str, str, str | None]] = set()
    for path in {folder / f"{row.release}.csv" for row in rows}:
        if path.is_file():
            found = pd.read_csv(path, dtype={"id": str, "sha256": str})
            known |= {(str(r.release), str(r.id), str(r.sha256)) for r in found.itertuples()}
    missing = [row for row in rows if (row.release, row.id, str(row.digest)) not in known]
    return [f"{row.release}/{row.id}: no result" for row in missing]


def configuration(options: argparse.Namespace, tokens: torch.Tensor) -> dict[str, Any]:
    """The settings on which the numbers depend."""
    return {
        "model": options.model,
        "dtype": options.dtype,
        "backend": "bridge",
        "device": options.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        "data": options.data or "bundled held-out text",
        "rows": int(tokens.shape[0]),
        "rows_asked": options.rows,
        "context": options.context,
        "batch_size": options.batch_size,
        "uniformity": options.uniformity,
        "tokens_sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        "ablations": ["zero", "mean"],
        "metrics_version": VERSION,
        **INTERVALS,
    }


def write(
    folder: Path, release: str, table: pd.DataFrame, config: dict[str, Any], layers: pd.DataFrame | None = None
) -> None:
    """Write the table and the configuration of one release, and of coders over several layers a table with each."""
    software = {"python": platform.python_version(), "gemma-scope-tl": gs.__version__}
    software |= {name: version(name) for name in SOFTWARE}
    facts = {"release": release, "configuration": config, "software": software, "columns": COLUMNS, "bounds": BOUNDS}
    files = {f"{release}.csv": _csv(table), f"{release}.json": json.dumps(facts, indent=2) + "\n"}
    files |= {} if layers is None else {f"{release}-by-layer.csv": _csv(layers)}
    replace_files(
        folder, {name: lambda path, text=text: path.write_text(text, "utf-8") for name, text in files.items()}
    )


def _csv(table: pd.DataFrame) -> str:
    return table.to_csv(index=False, float_format="%.7g", lineterminator="\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled")
    parser.add_argument("--release", action="append", help="only this release; several times")
    parser.add_argument("--data", help="a .txt or .jsonl file or a data set's name; by default bundled text")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--uniformity", type=int, default=0, help="positions of each row")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device")
    parser.add_argument("--sae-memory", type=int, default=8, help="GiB of SAEs to hold at a time")
    parser.add_argument("--cache", help="a folder to go on in")
    parser.add_argument("--out", help="a folder; by default that of the model's results in the package")
    parser.add_argument("--check", action="store_true", help="measure nothing")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())

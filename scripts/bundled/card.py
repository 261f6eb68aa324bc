"""Write the model card and the files beside it from the JSON that the runs wrote."""

from __future__ import annotations

import json
import shutil
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import Any

from scripts.bundled.bundles import REPO, Bundle
from scripts.bundled.files import read_jsonl, write_atomic, write_text

INTRO = """# A small {title}, trained for tests and demos

{what} It was trained from scratch on a CPU on the text listed below. It contains no weights of Google's Gemma models
and was not made by Google.{stored}

```python
from transformers import AutoTokenizer, {architecture}

folder = "{folder}"
model = {architecture}.from_pretrained(folder, attn_implementation="eager")
tokenizer = AutoTokenizer.from_pretrained(folder)  # adds <bos>, pads on the left
```
"""

ROUNDED = """

The weights are stored in {dtype}, as those of the released models are, and were trained in float32. Rounded, they need
{after:.4f} bits per byte in the mean of the domains, and {before:.4f} before; the largest rise of a domain is
{rise:.4f}."""

LIMITS = """## Limits

- It exists so that code can be tried and tested offline. **Do not present its features as evidence about {title}** or
  about language models of useful size.
- It has learned the style of its domains, not their meaning: names, facts and sums in its output are made up.
- It was trained on sequences of {context} tokens that start with `<bos>`. Longer inputs run (positions up to
  {positions}), but were not trained; inputs without `<bos>` were not trained either.
- `<start_of_turn>` and `<end_of_turn>` are in the vocabulary but never occurred in training; `<pad>` neither.
- The text includes scripture, a 19th-century commentary, plays and an old encyclopaedic snapshot: expect their
  vocabulary and views.
- One run, one seed. Held-out documents are whole documents that were not trained on, from the same sources (books
  of the Bible, plays, countries, modules, articles); the Spanish sentences and the synthetic exercises have near
  neighbours in the training text.
"""


def sources_table(manifest: dict[str, Any]) -> str:
    """A Markdown table of the domains: source, version, licence, credit, sizes and share of training."""
    lines = [
        "| domain | share | source | licence | credit | training MB (documents) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in manifest["domains"]:
        packages = "; ".join(f"{p['registry']} `{p['name']}` {p['version']}" for p in row["packages"]) or "generated"
        size = f"{row['train']['bytes'] / 1e6:.1f} ({row['train']['documents']:,})"
        share = f"{row['weight']:.0%}"
        lines.append(f"| {row['domain']} | {share} | {packages} | {row['licence']} | {row['credit']} | {size} |")
    return "\n".join(lines)


def results_table(metrics: dict[str, Any]) -> str:
    """A Markdown table of held-out bits per byte of each domain, with xz for comparison."""
    lines = [
        "| domain | bits per byte | nats per token | tokens scored | bytes scored | xz, bits per byte | lines seen |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for domain, row in metrics["domains"].items():
        lines.append(
            f"| {domain} | {row['bits_per_byte']:.3f} | {row['nats_per_token']:.3f} | {row['tokens']:,} "
            f"| {row['bytes']:,} | {row['xz_bits_per_byte']:.2f} | {row['seen_line_share']:.1%} |"
        )
    lines.append(f"| **mean of domains** | **{metrics['mean_bits_per_byte']:.3f}** | | | | | |")
    return "\n".join(lines)


def curve_table(log: list[dict[str, Any]]) -> str:
    """A Markdown table of training loss and held-out bits per byte at each evaluation of the log."""
    lines = ["| step | tokens (M) | training loss, nats per token | held-out bits per byte (sample) |"]
    lines.append("| --- | --- | --- | --- |")
    recent: list[float] = []
    for row in log:
        if "loss" in row:
            recent = [*recent[-9:], row["loss"]]
        elif "mean_bits_per_byte" in row:
            loss = sum(recent) / len(recent)
            lines.append(
                f"| {row['step']} | {row['tokens'] / 1e6:.1f} | {loss:.3f} | {row['mean_bits_per_byte']:.3f} |"
            )
    return "\n".join(lines)


def recipe_text(log: list[dict[str, Any]], metrics: dict[str, Any]) -> str:
    """A description of the run from the log: settings, restarts, steps, tokens, speed."""
    starts = [row for row in log if "event" in row]
    config = starts[-1]["config"]
    speeds = sorted(row["tokens_per_second"] for row in log if "tokens_per_second" in row)
    tokens_a_step = config["batch"] * config["context"]
    threads = starts[-1].get("threads", "two")
    cores = "one shared CPU core" if threads == 1 else f"{threads} shared CPU cores"
    text = (
        f"{metrics['step']:,} steps of {config['batch']} x {config['context']} tokens "
        f"({metrics['tokens_seen'] / 1e6:.1f}M tokens), fp32, seed {config['seed']}. Muon (learning rate "
        f"{config['muon_lr']}, momentum {config['momentum']}) for the matrices of the layers, AdamW (learning rate "
        f"{config['adam_lr']}) for embedding and gains; warm-up over {config['warmup_tokens'] / 1e6:.1f}M tokens, then "
        f"linear decay to 0. Median speed {speeds[len(speeds) // 2]:,} tokens per second on {cores}."
    )
    for before, after in pairwise(starts):
        text += f"\nThe run was stopped and continued at step {after['step']:,} from its checkpoint"
        old, new = before["config"]["total_tokens"], after["config"]["total_tokens"]
        if old != new:
            text += (
                f", and its schedule was shortened there from {old / 1e6:.1f}M to {new / 1e6:.1f}M tokens, so the "
                "learning rate steps down at that point; a run made again in one go will differ a little"
            )
        text += "."
    every = f"means of {config['log_every']} steps of {tokens_a_step:,} tokens"
    return f"{text}\nThe loss is in `training.jsonl` ({every})."


def samples_text(metrics: dict[str, Any]) -> str:
    """The samples, each in a block: prompt and continuation."""
    settings = metrics["sampling"]
    head = (
        f"Not selected: one draw a domain, seed {settings['seed']}, temperature {settings['temperature']}, top-k "
        f"{settings['top_k']}, at most {settings['new_tokens']} new tokens. `[...]` ends the prompt, which is the "
        "start of a held-out document."
    )
    blocks = [
        f"**{row['domain']}**\n\n````text\n{row['prompt']}[...]{row['continuation']}\n````"
        for row in metrics["samples"]
    ]
    return "\n\n".join([head, *blocks])


def _intro(bundle: Bundle, metrics: dict[str, Any], config: dict[str, Any]) -> str:
    parts = bundle.parts.format(
        layers=config["num_hidden_layers"],
        window=config["sliding_window"],
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        head_dim=config["head_dim"],
        kv_heads=config["num_key_value_heads"],
        vocab=config["vocab_size"],
    )
    architecture = config["architectures"][0]
    what = f"A {metrics['parameters']:,}-parameter `{architecture}` with the parts of {bundle.title} in small: {parts}."
    stored = ""
    if "rounding" in metrics:
        rounding = metrics["rounding"]
        stored = ROUNDED.format(
            dtype=rounding["dtype"],
            after=metrics["mean_bits_per_byte"],
            before=rounding["mean_bits_per_byte_before"],
            rise=rounding["largest_rise"],
        )
    folder = bundle.model_folder
    shown = folder.relative_to(REPO) if folder.is_relative_to(REPO) else folder
    return INTRO.format(
        title=bundle.title, what=textwrap.fill(what, 120), stored=stored, architecture=architecture, folder=shown
    )


def render(
    bundle: Bundle,
    manifest: dict[str, Any],
    log: list[dict[str, Any]],
    metrics: dict[str, Any],
    config: dict[str, Any],
) -> str:
    """The whole card as Markdown."""
    intro = _intro(bundle, metrics, config)
    licence = (
        "The weights are offered under the licence of this package; the sources' licences and credits are in the table "
        "and `corpus.json` gives versions and sha256. Files that name a GNU licence were left out. Some files of the "
        "Python library carry notices of other holders, which were not checked one by one. The package that carries "
        "WikiText-2 does not state the text's licence; CC BY-SA is that of Wikipedia."
    )
    scored = (
        f"Bits per byte = summed nats / ln 2 / UTF-8 bytes, over windows of {metrics['context'] - 1} held-out tokens "
        "after `<bos>`; special tokens are not counted. xz is the compressor on the same text alone, for orientation. "
        "Lines seen: share of held-out bytes in lines that also stand, word for word, in the training text."
    )
    sections = [
        intro.strip(),
        f"## Training text\n\n{sources_table(manifest)}\n\n{licence}",
        f"## Training\n\n{recipe_text(log, metrics)}\n\n{curve_table(log)}",
        f"## Held-out text\n\n{results_table(metrics)}\n\n{scored}",
        f"## Samples\n\n{samples_text(metrics)}",
        LIMITS.format(
            title=bundle.title, context=metrics["context"], positions=config["max_position_embeddings"]
        ).strip(),
        "Made by `scripts/train_bundled.py`; this file is written by `scripts/bundled/card.py`.",
    ]
    return "\n\n".join(sections) + "\n"


def write_card(work: Path, bundle: Bundle) -> None:
    """Copy the log and the manifest beside the model and write `README.md` from them and `metrics.json`."""
    folder = bundle.model_folder
    write_atomic(folder / "training.jsonl", lambda path: shutil.copyfile(work / bundle.run / "train.jsonl", path))
    write_atomic(folder / "corpus.json", lambda path: shutil.copyfile(work / "corpus.json", path))
    parts = {
        name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("corpus", "metrics", "config")
    }
    log = list(read_jsonl(folder / "training.jsonl"))
    write_text(folder / "README.md", render(bundle, parts["corpus"], log, parts["metrics"], parts["config"]))

"""Make the bundled model again: `python scripts/train_bundled.py corpus`, then `tokenizer`, `model` and `card`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Work = Annotated[Path, typer.Option(help="Folder for downloads, corpus, tokens and checkpoints.")]
DEFAULT_WORK = Path("build/bundled")


@app.command()
def corpus(work: Work = DEFAULT_WORK) -> None:
    """Fetch the pinned sources and write the corpus and its manifest."""
    from scripts.bundled.corpus import build_corpus

    for row in build_corpus(work)["domains"]:
        typer.echo(f"{row['domain']}: train {row['train']}, held out {row['heldout']}")


@app.command()
def tokenizer(work: Work = DEFAULT_WORK) -> None:
    """Train the tokenizer and tokenize the corpus."""
    from scripts.bundled.tokenizer import tokenize_corpus, train_tokenizer

    train_tokenizer(work)
    for domain, counts in tokenize_corpus(work).items():
        typer.echo(f"{domain}: {counts['train']} training tokens, {counts['heldout']} held out")


@app.command()
def model(
    work: Work = DEFAULT_WORK,
    total_tokens: Annotated[int, typer.Option(help="Length of the schedule in tokens.")] = 20_200_000,
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint.")] = False,
) -> None:
    """Train the language model."""
    from scripts.bundled.train_model import TrainConfig, train

    train(work, TrainConfig(total_tokens=total_tokens), resume=resume)


@app.command()
def card(
    work: Work = DEFAULT_WORK,
    measure_again: Annotated[bool, typer.Option("--measure/--no-measure", help="Evaluate and sample first.")] = True,
) -> None:
    """Export the last checkpoint, measure it, and write the card and the held-out text."""
    from scripts.bundled.card import write_card
    from scripts.bundled.export import MODEL_FOLDER, export_checkpoint
    from scripts.bundled.heldout_text import write_heldout_text
    from scripts.bundled.report import measure

    step = export_checkpoint(work)
    if measure_again:
        typer.echo(f"step {step}: {measure(work, MODEL_FOLDER, step)['mean_bits_per_byte']} held-out bits per byte")
    write_card(work, MODEL_FOLDER)
    write_heldout_text(work)


@app.command()
def saes(
    work: Work = DEFAULT_WORK,
    windows: Annotated[int, typer.Option(help="Held-out windows to measure on; 0 for all.")] = 240,
) -> None:
    """Train the SAE suite of configs/bundled.yaml, measure it, and write weights, registry files and card."""
    from scripts.bundled.sae_suite import publish, train

    publish(train(work, typer.echo), windows=windows or None, report=typer.echo)


if __name__ == "__main__":
    app()

"""Make a bundled model again: `python scripts/train_bundled.py corpus`, then `tokenizer`, `model`, `card` and `saes`.

`model`, `card` and `saes` take `--bundle bundled-gemma3` for the second model, which shares corpus and tokenizer.
`layers` makes the second model's crosscoder and cross-layer transcoder, which start from its SAEs and transcoders.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__)

Work = Annotated[Path, typer.Option(help="Folder for downloads, corpus, tokens and checkpoints.")]
Which = Annotated[str, typer.Option("--bundle", help="The model, as load_model names it: bundled or bundled-gemma3.")]
DEFAULT_WORK = Path("build/bundled")
DEFAULT = "bundled"


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
    bundle: Which = DEFAULT,
    total_tokens: Annotated[int | None, typer.Option(help="Length of the schedule; by default the bundle's.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue from the last checkpoint.")] = False,
    compile: Annotated[bool, typer.Option(help="Compile the loss, which needs a C++ compiler.")] = True,
) -> None:
    """Train the language model."""
    from scripts.bundled.bundles import bundle_named
    from scripts.bundled.train_model import TrainConfig, train

    chosen = bundle_named(bundle)
    train(work, chosen, TrainConfig(total_tokens=total_tokens or chosen.total_tokens, compile=compile), resume=resume)


@app.command()
def card(
    work: Work = DEFAULT_WORK,
    bundle: Which = DEFAULT,
    measure_again: Annotated[bool, typer.Option("--measure/--no-measure", help="Evaluate and sample first.")] = True,
) -> None:
    """Export the last checkpoint, measure it, and write the card and, for the first model, the held-out text."""
    from scripts.bundled.bundles import bundle_named
    from scripts.bundled.card import write_card
    from scripts.bundled.export import export_checkpoint
    from scripts.bundled.heldout_text import write_heldout_text
    from scripts.bundled.report import measure

    chosen = bundle_named(bundle)
    step = export_checkpoint(work, chosen)
    if measure_again:
        typer.echo(f"step {step}: {measure(work, chosen, step)['mean_bits_per_byte']} held-out bits per byte")
    write_card(work, chosen)
    if bundle == DEFAULT:
        write_heldout_text(work)


@app.command()
def saes(
    work: Work = DEFAULT_WORK,
    bundle: Which = DEFAULT,
    windows: Annotated[int, typer.Option(help="Held-out windows to measure on; 0 for all.")] = 240,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value for the configuration.")] = None,
) -> None:
    """Train the suite of the bundle's configuration, measure it, and write weights, registry files and card."""
    from scripts.bundled.bundles import bundle_named
    from scripts.bundled.sae_suite import publish, train

    chosen = bundle_named(bundle)
    publish(train(work, chosen, typer.echo, set_ or ()), chosen, windows=windows or None, report=typer.echo)


@app.command()
def layers(
    work: Work = DEFAULT_WORK,
    set_: Annotated[list[str] | None, typer.Option("--set", help="key=value for the configuration.")] = None,
) -> None:
    """Train the coders over several layers of the second model, and write weights, registry files and card."""
    from scripts.bundled.layers import publish, train

    publish(train(work, typer.echo, set_ or ()), typer.echo)


if __name__ == "__main__":
    app()

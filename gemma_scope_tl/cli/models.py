"""Commands that look at one SAE of a model: features, steer, top-tokens, attribute."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_scope_tl.cli import checks, options
from gemma_scope_tl.cli.command import verb
from gemma_scope_tl.cli.options import OneSAE
from gemma_scope_tl.cli.output import note, print_facts, print_frame, print_rows


def _features(
    choice: OneSAE,
    text: options.Text,
    top: Annotated[int, typer.Option(min=1, help="Strongest latents per token.")] = 5,
) -> None:
    """Show which latents fire on which token.

    Examples:

        gemma-scope features "In the beginning God created the heaven and the earth."

        gemma-scope features "The Golden Gate Bridge" --model gemma-2-2b --layer 20 --width 16k --json
    """
    _note_file(text)
    model, sae = choice.load()
    from gemma_scope_tl.latents.table import features as feature_table

    table = feature_table(model, text, sae, top=top)
    if choice.as_json:
        print_frame(choice.named(table), "", True)
        return
    rows = [
        {
            "position": position,
            "token": repr(found["token"].iloc[0]),
            "latent:activation": " ".join(f"{row.latent}:{row.activation:.2f}" for row in found.itertuples()),
        }
        for position, found in table.groupby("position", sort=True)
    ]
    active = f"tokens with active latents: {len(rows)}" if rows else "No latent is active on this text."
    print_rows(rows, f"{active}\nSAE: {choice.name()}", False)


def _steer(
    choice: OneSAE,
    text: options.Text,
    latent: options.Latent,
    scale: Annotated[float | None, typer.Option(help="Strength along the decoder row, in --unit.")] = None,
    clamp: Annotated[float | None, typer.Option(help="Set the latent to this activation instead.")] = None,
    unit: Annotated[
        str,
        typer.Option(
            help="activation, norm (of each position) or mean_norm (TEXT).",
            callback=checks.one_of("unit", checks.UNITS),
        ),
    ] = "activation",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens.")] = 40,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
) -> None:
    """Continue a text with and without steering or clamping a latent.

    Examples:

        gemma-scope steer "The king" --latent 12 --scale 8

        gemma-scope steer "The king" --latent 12 --scale 0.5 --unit norm

        gemma-scope steer "The king" --latent 12 --clamp 30

        gemma-scope steer "I went to" --model gemma-2-2b --layer 20 --latent 3124 --scale 154 --temperature 0.8
    """
    if (scale is None) == (clamp is None):
        raise typer.BadParameter("give one of --scale and --clamp")
    choice.check_latent(latent)
    _note_file(text)
    model, sae = choice.load()
    hook = _steering_hook(model, sae, text, latent, scale, clamp, unit)
    done = f"scale {scale:g} ({unit})" if clamp is None else f"clamp {clamp:g}"
    plain = _continue(model, text, tokens, temperature, seed)
    with model.hooks([hook]):
        steered = _continue(model, text, tokens, temperature, seed)
    if choice.as_json:
        facts = {"text": text, "plain": plain, "steered": steered, "latent": latent, "scale": scale}
        row = choice.row()
        named = {"release": row.release, "id": row.id}
        print_facts({**facts, "clamp": clamp, "unit": None if scale is None else unit, **named}, True)
        return
    print_facts({"plain": plain, f"latent {latent}, {done}": steered, "SAE": choice.name()})


def _top_tokens(
    choice: OneSAE,
    latent: options.Latent,
    top: Annotated[int, typer.Option(min=1, help="Tokens of each kind.")] = 10,
) -> None:
    """Show the tokens that a latent promotes and suppresses most, by its direct path to the logits.

    Examples:

        gemma-scope top-tokens --latent 12

        gemma-scope top-tokens --latent 3124 --model gemma-2-2b --layer 20 --width 16k --json
    """
    choice.check_latent(latent)
    model, sae = choice.load()
    from gemma_scope_tl.latents.logit_lens import top_tokens

    table = top_tokens(model, sae, latent, k=top)
    if choice.as_json:
        print_frame(choice.named(table), "", True)
        return
    sides = [rows.reset_index(drop=True) for _, rows in table.groupby("kind")]  # promoted, suppressed
    rows = [
        {
            "promoted": repr(up.token),
            "its logit": f"{up.logit:.3f}",
            "suppressed": repr(down.token),
            "of that": f"{down.logit:.3f}",
        }
        for up, down in zip(*(side.itertuples() for side in sides), strict=True)
    ]
    print_rows(rows, f"latent {latent}\nSAE: {choice.name()}", False)


def _attribute(
    choice: OneSAE,
    text: options.Text,
    target: Annotated[str, typer.Option(help="Next token whose logit is explained; mind the leading space.")],
    other: Annotated[str | None, typer.Option(help="Explain the logit of --target minus that of this token.")] = None,
    method: Annotated[
        str, typer.Option(help="gradient or integrated.", callback=checks.one_of("method", checks.ATTRIBUTIONS))
    ] = "gradient",
    top: Annotated[int, typer.Option(min=1, help="Strongest latents.")] = 15,
) -> None:
    """Show what each latent contributes to the logit of the next token.

    Examples:

        gemma-scope attribute "In the beginning God created the heaven and the" --target " earth" --other " Lord"

        gemma-scope attribute "The bridge is in San" --target " Francisco" --model gemma-2-2b --layer 20 --json
    """
    checks.text(target)
    _note_file(text)
    model, sae = choice.load()
    from gemma_scope_tl.attributions.gradients import attribute as attributions
    from gemma_scope_tl.attributions.targets import logit, logit_difference, single_token

    first = single_token(model, target)
    metric = logit(first) if other is None else logit_difference(first, single_token(model, other))
    table = attributions(model, text, sae, metric, method=method, top=top)
    if choice.as_json:
        print_frame(choice.named(table), "", True)
        return
    rest = table[table["kind"] != "latent"].groupby("kind")["attribution"].sum()
    shares = ", ".join(f"{kind} {share:+.3f}" for kind, share in rest.items())
    rows = [
        {
            "position": row.position,
            "token": repr(row.token),
            "latent": row.latent,
            "activation": f"{row.activation:.3f}",
            "attribution": f"{row.attribution:+.3f}",
        }
        for row in table[table["kind"] == "latent"].itertuples()
    ]
    print_rows(rows, f"metric {table.attrs['metric']:.3f}\nover all tokens: {shares}\nSAE: {choice.name()}", False)


features, steer, attribute = (verb(function, OneSAE) for function in (_features, _steer, _attribute))
top_tokens_command = verb(_top_tokens, OneSAE)


def _note_file(text: str) -> None:
    """A remark where the text is a file's name: it is taken as a text."""
    if len(text) < 256 and "\n" not in text and Path(text).is_file():
        note(f"note: {text!r} is read as the text itself; `- < {text}` reads the file.")


def _steering_hook(
    model: Any, sae: Any, text: str, latent: int, scale: float | None, clamp: float | None, unit: Any
) -> tuple[str, Any]:
    from gemma_scope_tl import interventions

    if clamp is not None:
        return interventions.clamp(sae, latent, clamp)
    norms = None
    if unit == "mean_norm":
        norms = interventions.mean_norms(model, text, sites=sae.site, layers=None if sae.layer is None else [sae.layer])
    return interventions.steer(sae, latent, scale or 0.0, unit=unit, mean_norm=norms)


def _continue(model: Any, text: str, tokens: int, temperature: float, seed: int) -> str:
    import torch

    from gemma_scope_tl.text.batch import as_batch

    torch.manual_seed(seed)
    prompt = as_batch(model, text).ids
    sampled = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    out = model.generate(prompt, max_new_tokens=tokens, return_type="tokens", **sampled)
    return model.tokenizer.decode(out[0, 1:])

"""Commands that use one SAE of a model: features, steer, top-tokens, attribute."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from gemma_scope_tl.cli import checks, options
from gemma_scope_tl.cli.options import OneSAE
from gemma_scope_tl.cli.output import note, print_facts, print_frame, print_rows


@dataclass
class Features(OneSAE):
    """Show which latents fire on which token.

    Examples:

        gemma-scope features "In the beginning God created the heaven and the earth."

        gemma-scope features "The Golden Gate Bridge" --model gemma-2-2b --layer 20 --width 16k --json

        gemma-scope features "In the beginning God created the heaven and the earth." --positions 4:
    """

    text: options.Text
    top: Annotated[int, typer.Option(min=1, help="Strongest latents per token.")] = 5
    positions: options.Positions = None

    def run(self) -> None:
        _note_file(self.text)
        model, sae = self.load()
        from gemma_scope_tl.latents.table import features as feature_table

        table = feature_table(model, self.text, sae, top=self.top, positions=checks.positions(self.positions))
        if self.as_json:
            print_frame(self.named(table), "", True)
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
        print_rows(rows, f"{active}\nSAE: {self.name()}", False)


@dataclass
class Steer(OneSAE):
    """Continue a text with and without steering or clamping a latent.

    Examples:

        gemma-scope steer "The king" --latent 12 --scale 8

        gemma-scope steer "The king" --latent 12 --scale 0.5 --unit norm

        gemma-scope steer "The king" --latent 12 --clamp 30

        gemma-scope steer "I went to" --model gemma-2-2b --layer 20 --latent 3124 --scale 154 --temperature 0.8
    """

    text: options.Text
    latent: options.Latent
    scale: Annotated[float | None, typer.Option(help="Strength along the decoder row, in --unit.")] = None
    clamp: Annotated[float | None, typer.Option(help="Set the latent to this activation instead.")] = None
    unit: Annotated[
        str,
        typer.Option(
            help="activation, norm (of each position) or mean_norm (TEXT).",
            callback=checks.one_of("unit", checks.UNITS),
        ),
    ] = "activation"
    tokens: Annotated[int, typer.Option(min=1, help="New tokens.")] = 40
    positions: options.Positions = None
    temperature: options.Temperature = 0.0
    seed: options.Seed = 0

    def run(self) -> None:
        if (self.scale is None) == (self.clamp is None):
            raise typer.BadParameter("give one of --scale and --clamp")
        self.check_latent(self.latent)
        _note_file(self.text)
        model, sae = self.load()
        hook = self.hook(model, sae)
        done = f"scale {self.scale:g} ({self.unit})" if self.clamp is None else f"clamp {self.clamp:g}"
        plain = self.continuation(model)
        with model.hooks([hook]):
            steered = self.continuation(model)
        if not self.as_json:
            print_facts({"plain": plain, f"latent {self.latent}, {done}": steered, "SAE": self.name()})
            return
        row = self.row()
        facts = {
            "text": self.text,
            "plain": plain,
            "steered": steered,
            "latent": self.latent,
            "scale": self.scale,
            "clamp": self.clamp,
            "unit": None if self.scale is None else self.unit,
            "release": row.release,
            "id": row.id,
        }
        print_facts(facts, True)

    def hook(self, model: Any, sae: Any) -> tuple[str, Any]:
        """The intervention that the options describe."""
        from gemma_scope_tl import interventions

        where: Any = checks.positions(self.positions)
        if self.clamp is not None:
            return interventions.clamp(sae, self.latent, self.clamp, positions=where)
        norms = None
        if self.unit == "mean_norm":
            layers = None if sae.layer is None else [sae.layer]
            norms = interventions.mean_norms(model, self.text, sites=sae.site, layers=layers, positions=where)
        unit: Any = self.unit  # the option's callback has checked that it is a unit
        return interventions.steer(sae, self.latent, self.scale or 0.0, where, unit=unit, mean_norm=norms)

    def continuation(self, model: Any) -> str:
        """The text and the model's continuation, which is sampled with the seed if the temperature is above 0."""
        import torch

        from gemma_scope_tl.text.batch import as_batch

        torch.manual_seed(self.seed)
        prompt = as_batch(model, self.text).ids
        sampling = (
            {"do_sample": True, "temperature": self.temperature} if self.temperature > 0 else {"do_sample": False}
        )
        out = model.generate(prompt, max_new_tokens=self.tokens, return_type="tokens", **sampling)
        return model.tokenizer.decode(out[0, 1:])


@dataclass
class TopTokens(OneSAE):
    """Show the tokens that a latent promotes and suppresses most, by its direct path to the logits.

    Examples:

        gemma-scope top-tokens --latent 12

        gemma-scope top-tokens --latent 3124 --model gemma-2-2b --layer 20 --width 16k --json
    """

    latent: options.Latent
    top: Annotated[int, typer.Option(min=1, help="Tokens of each kind.")] = 10

    def run(self) -> None:
        self.check_latent(self.latent)
        model, sae = self.load()
        from gemma_scope_tl.latents.logit_lens import top_tokens

        table = top_tokens(model, sae, self.latent, k=self.top)
        if self.as_json:
            print_frame(self.named(table), "", True)
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
        print_rows(rows, f"latent {self.latent}\nSAE: {self.name()}", False)


@dataclass
class Attribute(OneSAE):
    """Show what each latent contributes to the logit of the next token.

    Examples:

        gemma-scope attribute "In the beginning God created the heaven and the" --target " earth" --other " Lord"

        gemma-scope attribute "The bridge is in San" --target " Francisco" --model gemma-2-2b --layer 20 --json
    """

    text: options.Text
    target: Annotated[str, typer.Option(help="Next token whose logit is explained; note the leading space.")]
    other: Annotated[str | None, typer.Option(help="Explain the logit of --target minus that of this token.")] = None
    method: Annotated[
        str, typer.Option(help="gradient or integrated.", callback=checks.one_of("method", checks.ATTRIBUTIONS))
    ] = "gradient"
    top: Annotated[int, typer.Option(min=1, help="Strongest latents.")] = 15
    positions: options.Positions = None

    def run(self) -> None:
        checks.text(self.target)
        _note_file(self.text)
        model, sae = self.load()
        from gemma_scope_tl.attributions.gradients import attribute as attributions
        from gemma_scope_tl.attributions.targets import logit, logit_difference, single_token

        first = single_token(model, self.target)
        metric = logit(first) if self.other is None else logit_difference(first, single_token(model, self.other))
        where: Any = checks.positions(self.positions)
        table = attributions(model, self.text, sae, metric, method=self.method, top=self.top, positions=where)
        if self.as_json:
            print_frame(self.named(table), "", True)
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
        print_rows(rows, f"metric {table.attrs['metric']:.3f}\nover all tokens: {shares}\nSAE: {self.name()}", False)


def _note_file(text: str) -> None:
    """Note that a text which is the name of a file is not read as a file."""
    if len(text) < 256 and "\n" not in text and Path(text).is_file():
        note(f"note: {text!r} is read as the text itself; `- < {text}` reads the file.")

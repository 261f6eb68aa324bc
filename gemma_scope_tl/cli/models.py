"""Commands that run a model: features, steer, top-tokens, attribute."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.table import Table

from gemma_scope_tl.cli.output import Json, console, print_frame, progress

ModelName = Annotated[str, typer.Option(help="bundled, gemma-2-2b, gemma-2-9b-it, a Hugging Face id or a folder.")]
SaeModel = Annotated[str | None, typer.Option(help="The registry's model; by default that of --model.")]
Backend = Annotated[str, typer.Option(help="bridge or hooked_transformer.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; by default CUDA where there is one.")]
SiteOption = Annotated[str, typer.Option(help="res, mlp, att, embedding or transcoder.")]
LayerOption = Annotated[int, typer.Option(help="Layer, from 0.")]
WidthOption = Annotated[str | None, typer.Option(help="16k, 65k, …; by default the narrowest.")]
L0Option = Annotated[str, typer.Option(help="canonical, a number that exists, or closest:50.")]


def features(
    text: str,
    model: ModelName = "bundled",
    sae_model: SaeModel = None,
    site: SiteOption = "res",
    layer: LayerOption = 2,
    width: WidthOption = None,
    l0: L0Option = "canonical",
    top: Annotated[int, typer.Option(min=1, help="Strongest latents per token.")] = 5,
    backend: Backend = "bridge",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show which latents fire on which token.

    Examples:

        gemma-scope features "In the beginning God created the heaven and the earth."

        gemma-scope features "The Golden Gate Bridge" --model gemma-2-2b --layer 20 --width 16k --json
    """
    from gemma_scope_tl.feature_table import features as feature_table

    loaded, sae = _load(model, sae_model, site, layer, width, l0, backend, device)
    table = feature_table(loaded, text, sae, top=top)
    if as_json:
        print_frame(table, "", True)
        return
    shown = Table("position", "token", "latent: activation")
    for position, rows in table.groupby("position", sort=True):
        latents = "  ".join(f"[bold]{row.latent}[/]: {row.activation:.2f}" for row in rows.itertuples())
        shown.add_row(str(position), repr(rows["token"].iloc[0]), latents)
    console.print(shown)


def steer(
    text: str,
    latent: Annotated[int, typer.Option(help="Index of the latent.")],
    scale: Annotated[float | None, typer.Option(help="Strength along the decoder row, in --unit.")] = None,
    clamp: Annotated[float | None, typer.Option(help="Set the latent to this activation instead.")] = None,
    unit: Annotated[str, typer.Option(help="activation, norm (of each position) or mean_norm (TEXT).")] = "activation",
    model: ModelName = "bundled",
    sae_model: SaeModel = None,
    site: SiteOption = "res",
    layer: LayerOption = 2,
    width: WidthOption = None,
    l0: L0Option = "canonical",
    tokens: Annotated[int, typer.Option(min=1, help="New tokens.")] = 40,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    backend: Backend = "bridge",
    device: Device = None,
    as_json: Json = False,
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
    loaded, sae = _load(model, sae_model, site, layer, width, l0, backend, device)
    hook = _steering_hook(loaded, sae, text, latent, scale, clamp, unit)
    done = f"scale {scale:g} ({unit})" if clamp is None else f"clamp {clamp:g}"
    plain = _continue(loaded, text, tokens, temperature, seed)
    with loaded.hooks([hook]):
        steered = _continue(loaded, text, tokens, temperature, seed)
    if as_json:
        facts = {"text": text, "plain": plain, "steered": steered, "latent": latent, "scale": scale}
        typer.echo(json.dumps({**facts, "clamp": clamp, "unit": None if scale is None else unit}))
        return
    shown = Table("plain", f"latent {latent}, {done}", show_lines=True)
    shown.add_row(plain, steered)
    console.print(shown)


def top_tokens_command(
    latent: Annotated[int, typer.Option(help="Index of the latent.")],
    model: ModelName = "bundled",
    sae_model: SaeModel = None,
    site: SiteOption = "res",
    layer: LayerOption = 2,
    width: WidthOption = None,
    l0: L0Option = "canonical",
    k: Annotated[int, typer.Option(min=1, help="Tokens of each kind.")] = 10,
    backend: Backend = "bridge",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show the tokens that a latent promotes and suppresses most, by its direct path to the logits.

    Examples:

        gemma-scope top-tokens --latent 12

        gemma-scope top-tokens --latent 3124 --model gemma-2-2b --layer 20 --width 16k --json
    """
    from gemma_scope_tl.logit_lens import top_tokens

    loaded, sae = _load(model, sae_model, site, layer, width, l0, backend, device)
    table = top_tokens(loaded, sae, latent, k=k)
    if as_json:
        print_frame(table, "", True)
        return
    sides = [rows.reset_index(drop=True) for _, rows in table.groupby("kind")]  # promoted, suppressed
    shown = Table("promoted", "logit", "suppressed", "logit", title=f"latent {latent}")
    for up, down in zip(*(side.itertuples() for side in sides), strict=True):
        shown.add_row(repr(up.token), f"{up.logit:.3f}", repr(down.token), f"{down.logit:.3f}")
    console.print(shown)


def attribute(
    text: str,
    target: Annotated[str, typer.Option(help="Next token whose logit is explained; mind the leading space.")],
    other: Annotated[str | None, typer.Option(help="Explain the logit of --target minus that of this token.")] = None,
    model: ModelName = "bundled",
    sae_model: SaeModel = None,
    site: SiteOption = "res",
    layer: LayerOption = 2,
    width: WidthOption = None,
    l0: L0Option = "canonical",
    method: Annotated[str, typer.Option(help="gradient or integrated.")] = "gradient",
    top: Annotated[int, typer.Option(min=1, help="Strongest latents.")] = 15,
    backend: Backend = "bridge",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Show what each latent contributes to the logit of the next token.

    Examples:

        gemma-scope attribute "In the beginning God created the heaven and the" --target " earth" --other " Lord"

        gemma-scope attribute "The bridge is in San" --target " Francisco" --model gemma-2-2b --layer 20 --json
    """
    from gemma_scope_tl.attributions.gradients import attribute as attributions
    from gemma_scope_tl.attributions.targets import logit, logit_difference, single_token

    loaded, sae = _load(model, sae_model, site, layer, width, l0, backend, device)
    first = single_token(loaded, target)
    metric = logit(first) if other is None else logit_difference(first, single_token(loaded, other))
    table = attributions(loaded, text, sae, metric, method=method, top=top)
    if as_json:
        print_frame(table, "", True)
        return
    latents = table[table["kind"] == "latent"][["position", "token", "latent", "activation", "attribution"]]
    rest = table[table["kind"] != "latent"].groupby("kind")["attribution"].sum()
    print_frame(latents, f"metric {table.attrs['metric']:.3f}", False)
    console.print("over all tokens: " + ", ".join(f"{kind} {share:+.3f}" for kind, share in rest.items()))


def _load(
    model: str,
    sae_model: str | None,
    site: str,
    layer: int,
    width: str | None,
    l0: str,
    backend: str,
    device: str | None,
) -> tuple[Any, Any]:
    from gemma_scope_tl.registry.listing import select_rows

    registry_model = sae_model or model.split("/")[-1]
    number = None if site == "embedding" else layer
    if width is None:
        rows = select_rows(model=registry_model, site=site, layer=number)
        width = min(rows, key=lambda row: row.d_sae).width if rows else "16k"
    chosen: Any = float(l0) if l0.replace(".", "", 1).isdigit() else l0
    from gemma_scope_tl.adapters.loading import load_model
    from gemma_scope_tl.sae.jumprelu import load_sae

    with progress.status("loading"):
        sae = load_sae(registry_model, site, number, width, chosen)
        loaded = load_model(model, backend=backend, device=device)
        return loaded, sae.to(loaded.cfg.device)


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

    torch.manual_seed(seed)
    prompt = model.to_tokens(text)
    sampled = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    out = model.generate(prompt, max_new_tokens=tokens, return_type="tokens", **sampled)
    return model.tokenizer.decode(out[0, 1:])

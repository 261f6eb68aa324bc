"""``gemma-scope doctor`` and ``gemma-scope demo``: a check of the installation, and the web app."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from gemma_scope_tl.cli import checks, options
from gemma_scope_tl.cli.options import registry_name
from gemma_scope_tl.cli.output import print_facts, progress, say, say_json


def doctor(as_json: options.Json = False) -> None:
    """Check the installation, and say what to do: versions and known defects, devices, the Hub, disk, registry, and the
    bundled model against plain Hugging Face.

    Example:

        gemma-scope doctor
    """
    from gemma_scope_tl.diagnose import diagnose

    with progress.status("checking"):
        diagnosis = diagnose()
    if as_json:
        say_json({**diagnosis.facts, "advice": [asdict(one) for one in diagnosis.advice]})
    else:
        print_facts(diagnosis.facts)
        for one in diagnosis.advice:
            mark = typer.style("problem:", fg="red") if one.serious else typer.style("note:", fg="yellow")
            say(f"{mark} {one.what}\n  do: {one.do}")
        say("all checks passed" if diagnosis.healthy else "a check failed")
    if not diagnosis.healthy:
        raise typer.Exit(1)


def demo(
    model: options.ModelName = "bundled",
    release: options.Releases = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="By default the first free one from 7860.")] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(help="A name by which browsers ask, such as a reverse proxy's; may be given several times."),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
    rows: Annotated[int, typer.Option(min=1, help="Rows of held-out text that a latent's page looks at.")] = 64,
    context: options.Context = 128,
    device: options.Device = None,
    dtype: options.Dtype = "float32",
) -> None:
    """Explore latents in a browser: read a text, follow a latent, steer, splice. Stop it with Ctrl-C.

    Needs the extra: pip install 'gemma-scope-tl[demo]'

    Examples:

        gemma-scope demo

        gemma-scope demo --open --port 8000

        gemma-scope demo --model gemma-2-2b --release gemma-scope-2b-pt-res --dtype bfloat16 --host 0.0.0.0
    """
    checks.free_port(host, port)
    if not release:
        registry_name(model, None)
    checks.available(device)
    from gemma_scope_tl.demo.serving import gradio, launch

    gradio()  # raises for a missing extra before anything heavy is imported
    from gemma_scope_tl.demo.app import build_app

    with progress.status("loading"):
        app = build_app(model, release=release or None, device=device, dtype=dtype, rows=rows, context=context)
    address = launch(app, host, port, open_browser, wait=False, allowed_hosts=allow_host or ())
    say(f"The demo is at {address} (Ctrl-C stops it)")
    app.block_thread()

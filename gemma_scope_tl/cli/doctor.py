"""``gemma-scope doctor``: is the installation sound?"""

from __future__ import annotations

from dataclasses import asdict

import typer

from gemma_scope_tl.cli import options
from gemma_scope_tl.cli.output import progress, say, say_json
from gemma_scope_tl.cli.tables import print_facts


def doctor(as_json: options.Json = False) -> None:
    """Check the installation, and say what to do: versions and known defects, devices, the Hub, disk, registry, and the
    bundled model against plain Hugging Face.

    Example:

        gemma-scope doctor
    """
    from gemma_scope_tl.diagnose import diagnose

    with progress.status("checking"):
        found = diagnose()
    if as_json:
        say_json({**found.facts, "advice": [asdict(one) for one in found.advice]})
    else:
        print_facts(found.facts)
        for one in found.advice:
            mark = typer.style("problem:", fg="red") if one.serious else typer.style("note:", fg="yellow")
            say(f"{mark} {one.what}\n  do: {one.do}")
        say("all checks passed" if found.healthy else "a check failed")
    if not found.healthy:
        raise typer.Exit(1)

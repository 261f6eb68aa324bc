"""``gemma-scope registry``: draft and check the registry file of a release."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_scope_tl.cli import checks, options
from gemma_scope_tl.cli.command import add
from gemma_scope_tl.cli.output import print_rows, say, say_json

if TYPE_CHECKING:
    from gemma_scope_tl.contributing.check import Finding, Report

registry_app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Draft and check registry files, to make SAEs known by name.",
)
_SHOWN_ROWS = 50

Force = Annotated[bool, typer.Option("--force", help="Replace a file that exists.")]
Source = Annotated[
    str, typer.Argument(help="OWNER/NAME on Hugging Face, or a folder.", callback=checks.each(checks.source))
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="FOLDER:KEY=VALUE, which overrides the files' values.")
]


def new(
    source: Source,
    model: Annotated[str | None, typer.Option(help="The model that the SAEs read, such as gemma-2-2b.")] = None,
    site: options.OneSite = None,
    layer: Annotated[int | None, typer.Option(min=0, help="Layer, from 0, if no file states it.")] = None,
    l0: Annotated[
        float | None, typer.Option(min=0.0, help="Mean number of active latents, if no file states it.")
    ] = None,
    unknown_l0: Annotated[bool, typer.Option("--unknown-l0", help="Leave an unknown L0 open.")] = False,
    license: Annotated[str | None, typer.Option(help="SPDX identifier of the weights' licence.")] = None,
    release: Annotated[str | None, typer.Option(help="The release's name; by default that of the source.")] = None,
    description: Annotated[str | None, typer.Option(help="A description in one line.")] = None,
    out: Annotated[Path | None, typer.Option(help="The file RELEASE.yaml, or its folder.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="gemma-scope, sae-lens or gemma_scope_2, if the source has several.",
            callback=checks.spelled("format", checks.LAYOUTS[:3]),
        ),
    ] = None,
    setting: Settings = None,
    family: Annotated[
        str | None, typer.Option(help="Family of the model, if neither its name nor a file states it.")
    ] = None,
    canonical: Annotated[bool, typer.Option("--canonical", help="Mark the SAEs nearest to an L0 of 100.")] = False,
    force: Force = False,
    as_json: options.Json = False,
) -> None:
    """Draft a registry file from SAEs in a folder or on the Hub. No weights are downloaded.

    Sizes come from the headers of the files; sites, layers and L0s from cfg.json, from folder names such as
    layer_20/width_16k/average_l0_71, or from the options. Hashes and the commit are filled in.

    Examples:

        gemma-scope registry new my-saes --model gemma-2-2b --site res --license MIT

        gemma-scope registry new my-name/my-saes --model gemma-2-2b --site mlp --license MIT --canonical
    """
    checks.folder(Path() if out is None else out.parent)
    from gemma_scope_tl.contributing.draft import Options, draft_release, write_draft
    from gemma_scope_tl.contributing.folder_metadata import checked_format

    options = Options(
        release, model, site, layer, l0, license, description, revision, checked_format(format), setting or (),
        unknown_l0, canonical, family,
    )  # fmt: skip
    draft = draft_release(source, out, options, progress=True)
    path = write_draft(draft, out, force)
    if as_json:
        facts = {"file": path, "saes": len(draft.release.saes), "model": draft.release.model}
        say_json({**facts, "remarks": list(draft.remarks)})
        return
    say(f"{path}: {len(draft.release.saes)} SAEs of {draft.release.model}")
    for remark in draft.remarks:
        say(f"look at: {remark}")
    say(f"next: gemma-scope registry check {path}" + (" --remote" if draft.release.saes[0].revision else ""))


def check(
    file: Annotated[Path, typer.Argument(help="The registry file, or a known release.", callback=checks.release_file)],
    remote: Annotated[bool, typer.Option("--remote", help="Ask the Hub about files in its repositories.")] = False,
    run: Annotated[int, typer.Option(min=0, help="Number of SAEs to run, to compare their L0.")] = 0,
    model: options.OtherModel = None,
    backend: options.Backend = "bridge",
    device: options.Device = None,
    dtype: options.Dtype = "float32",
    results: Annotated[
        Path | None,
        typer.Option(
            help="Table of `eval` (.csv, .json, .parquet) whose L0s the rows are compared with.",
            callback=checks.each(checks.table),
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Check a registry file against the schema, the other releases and its SAEs' files; exit status 1 on any problem.

    Examples:

        gemma-scope registry check my-saes.yaml --run 2

        gemma-scope registry check my-saes.yaml --remote --json

        gemma-scope registry check gemma-scope-2b-pt-transcoders --remote
    """
    if run:
        checks.available(device)
    from gemma_scope_tl.contributing.check import check_release

    report = check_release(file, remote=remote, progress=not as_json)
    if run:
        from gemma_scope_tl.contributing.measure import measure_l0

        report = report.extended(
            measure_l0(
                report.rows, run, model, remote, progress=not as_json, backend=backend, device=device, dtype=dtype
            )
        )
    if results is not None:
        from gemma_scope_tl.contributing.measure import results_l0

        report = report.extended(results_l0(report.rows, results))
    if as_json:
        facts: dict[str, Any] = {"file": str(report.path), "ok": not report.problems}
        say_json(facts | {"findings": [asdict(finding) for finding in report.findings]})
    else:
        _print_report(report)
    if report.problems:
        raise typer.Exit(1)


def _print_report(report: Report) -> None:
    from gemma_scope_tl.contributing.check import CHECKS

    by_row: dict[str, dict[str, list[Finding]]] = {"": {}} | {row.id: {} for row in report.rows}
    for finding in report.findings:
        by_row.setdefault(finding.row, {}).setdefault(finding.check, []).append(finding)
    shown = list(by_row.items())[: _SHOWN_ROWS + 1]
    rows = [
        {"SAE": row or "(the file)", **{name: _mark(findings.get(name, ())) for name in CHECKS}}
        for row, findings in shown
    ]
    print_rows(rows, report.path.name, False)
    if len(by_row) > len(shown):
        say(f"and {len(by_row) - len(shown)} more SAEs")
    for finding in report.findings:
        if finding.check == "l0" and finding.ok is not False:
            say(f"{finding.row}: {finding.text}")
    reasons = {f.text for f in report.findings if f.ok is None and f.check != "l0"}
    if reasons:
        say(f"- not looked at: {'; '.join(sorted(reasons))}")
    for finding in report.problems:
        say(typer.style(f"problem: {finding.row or 'the file'}: {finding.check}: {finding.text}", fg="red"))
    count = len(report.problems)
    say(f"{count} problem{'s' if count > 1 else ''}" if count else "no problems")


def _mark(findings: Iterable[Finding]) -> str:
    """A cell of the table: a cross for a failed check, a tick for a passed one, a dash for an omitted one."""
    states = {finding.ok for finding in findings}
    if not states:
        return ""
    return "✗" if False in states else "✓" if True in states else "-"


for function in (new, check):
    add(registry_app, function)

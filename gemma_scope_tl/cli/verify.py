"""``gemma-scope verify``: a sample of released SAEs measured on the real model, and one JSON report."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemma_scope_tl.cli import checks, options
from gemma_scope_tl.cli.command import Command
from gemma_scope_tl.cli.output import note, print_rows, progress, say, say_json
from gemma_scope_tl.errors import GemmaScopeError

if TYPE_CHECKING:
    from gemma_scope_tl.verification.run import Prepared, Report


@dataclass
class Verify(Command):
    """Measure a sample of released SAEs on their model, and name everything that is wrong. Exit status 1 on any fault.

    Says first what it would download, and downloads after a confirmation or with --yes. The report is one JSON file,
    OUT/report.json. An interrupted run continues where it stopped. For the bands and the faults that are told apart,
    see docs/how-to/verify.md.

    Examples:

        gemma-scope verify gemma-2-2b --sample 12 --dry-run

        gemma-scope verify gemma-2-2b --sample 12 --yes --device cuda --dtype bfloat16

        gemma-scope verify gemma-2-2b --site transcoder --layer 5 --sample 3 --yes --neuronpedia

        gemma-scope verify gemma-2-9b-it --sample 6 --texts my-texts.jsonl --offline --json

        gemma-scope verify bundled --sample 6 --tokens 1024
    """

    model: Annotated[
        str,
        typer.Argument(
            help="gemma-2-2b, gemma-2-9b-it, bundled, a Hugging Face id or a folder.",
            callback=checks.each(checks.model),
        ),
    ]
    sample: Annotated[int, typer.Option(min=1, help="Number of SAEs.")] = 12
    seed: options.Seed = 0
    site: options.Sites = None
    layer: options.Layers = None
    width: options.Widths = None
    release: options.Releases = None
    sae_model: options.SaeModel = None
    max_size: Annotated[float, typer.Option(min=0.001, help="Leave out SAEs of more GiB in float32.")] = 4.0
    texts: Annotated[
        str | None, typer.Option(help="A .txt or .jsonl file, or a data set's name[:config]; by default bundled text.")
    ] = None
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text.")] = 8192
    context: options.Context = 256
    out: Annotated[
        Path | None, typer.Option(help="Folder for the report and unfinished results; by default verify-MODEL.")
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the sample and the downloads, then stop.")] = False
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Download without asking.")] = False
    offline: Annotated[bool, typer.Option("--offline", help="Send no request: everything must be cached.")] = False
    neuronpedia: Annotated[
        bool, typer.Option("--neuronpedia", help="Compare latents with stored examples, asking neuronpedia.org.")
    ] = False
    batch_size: options.BatchSize = 8
    memory: Annotated[float, typer.Option(min=0.01, help="GiB that tensors may take besides weights.")] = 1.0
    backend: options.Backend = "bridge"
    device: options.Device = None
    dtype: options.Dtype = "float32"
    as_json: options.Json = False

    def check(self) -> None:
        """Check before loading that the SAEs and texts exist, and that the report can be written.

        Raises:
            GemmaScopeError: a check fails.
        """
        options.registry_name(self.model, self.sae_model)
        checks.folder(self.folder)
        if self.texts is not None:
            checks.texts(self.texts)
        checks.available(self.device)
        if self.neuronpedia and self.offline:
            raise GemmaScopeError("--neuronpedia sends requests: leave out --offline, or leave out --neuronpedia.")

    @property
    def folder(self) -> Path:
        """The folder of the report."""
        return self.out or Path(f"verify-{Path(self.model).name}")

    def run(self) -> None:
        from gemma_scope_tl.verification.run import prepare, verify

        with progress.status("drawing the sample"):
            ready = prepare(
                self.model, sample=self.sample, seed=self.seed, sites=self.site, layers=self.layer, widths=self.width,
                releases=self.release, sae_model=self.sae_model, largest=self.max_size, offline=self.offline,
            )  # fmt: skip
        if self.dry_run and self.as_json:
            say_json(_plan_facts(ready))
            return
        if not self.as_json or self.dry_run:
            _print_plan(ready)
        if self.dry_run:
            return
        self._allow(ready)
        report = verify(
            self.model, prepared=ready, texts=self.texts, tokens=self.tokens, context=self.context, out=self.folder,
            backend=self.backend, device=self.device, dtype=self.dtype, batch_size=self.batch_size,
            memory_budget=int(self.memory * options.GIB), download=True, offline=self.offline,
            neuronpedia=self.neuronpedia, progress=sys.stderr.isatty(),
        )  # fmt: skip
        if self.as_json:
            say_json(report.content)
        else:
            _print_report(report)
        if not report.ok:
            raise typer.Exit(1)

    def _allow(self, ready: "Prepared") -> None:
        """Ask before a download, unless ``--yes`` allows it.

        Raises:
            GemmaScopeError: nobody can be asked, or ``--offline`` forbids it.
        """
        from gemma_scope_tl.verification.run import summary

        if not ready.plan.to_download or (self.yes and not self.offline):
            return
        if self.offline:
            raise GemmaScopeError(f"{summary(ready.plan)} Leave out --offline to download them.")
        if not sys.stdin.isatty():
            raise GemmaScopeError(f"{summary(ready.plan)} Nothing was downloaded: add --yes.")
        if not typer.confirm("Download them?", err=True):
            raise typer.Exit(1)


def _plan_facts(ready: "Prepared") -> dict[str, Any]:
    files = [
        {"repo": f.repo, "path": f.path, "bytes": f.size, "estimated": f.estimated, "here": f.here, "kind": f.kind}
        for f in ready.plan.files
    ]
    sample = [{"release": one.row.release, "id": one.row.id, "bfloat16": one.bfloat16} for one in ready.sample]
    missing = [f"{row.repo}/{row.weights_path}" for row in ready.plan.missing]
    unknown = [f"{f.repo}/{f.path}" for f in ready.plan.unknown]
    return {
        "sample": sample,
        "files": files,
        "bytes_to_download": ready.plan.bytes,
        "not_in_bytes": unknown,
        "missing": missing,
    }


def _print_plan(ready: "Prepared") -> None:
    rows = [
        {
            "release": one.row.release,
            "id": one.row.id,
            "site": one.row.site,
            "l0": one.row.l0,
            "bfloat16": one.bfloat16,
            "unverified": one.row.unverified,
        }
        for one in ready.sample
    ]
    left = f"; {ready.left_out:,} larger than --max-size are left out" if ready.left_out else ""
    print_rows(rows, f"{len(rows)} SAEs of {len(ready.rows):,}{left}", False)
    wanted = ready.plan.to_download
    if wanted:
        shown = [
            {"download": f"{one.repo}/{one.path}", "bytes": _bytes(one.size, one.estimated), "kind": one.kind}
            for one in wanted
        ]
        print_rows(shown, ready.plan.amount, False)
    else:
        say("nothing to download")
    for row in ready.plan.missing:
        note(f"note: {row.repo} has no {row.weights_path}")
    if ready.plan.unreachable:
        note(f"note: the Hub could not be asked, so sizes are estimates. {ready.plan.unreachable}")


def _bytes(size: int | None, estimated: bool) -> str:
    return "unknown" if size is None else f"{'about ' if estimated else ''}{size:,}"


def _print_report(report: "Report") -> None:
    rows = report.rows()
    if rows:
        text = report.content["text"]
        title = f"{len(rows)} SAEs on {text['rows']} x {text['context']} tokens; intervals of 95 %"
        print_rows(rows, title, False)
    for one in report.saes:
        for remark in one["notes"]:
            say(f"note: {one['id']}: {remark}")
    for one in report.content["orderings"]:
        if one["pairs"]:
            say(f"{one['name']}: {one['agree']} of {one['pairs']} pairs agree, {len(one['against'])} contradict it")
        if one["left_out"]:
            say(
                f"note: {one['name']}: {one['left_out']} pairs left out, because a tensor set to zero does not raise "
                "the loss"
            )
    for fault in report.faults:
        say(typer.style(f"fault ({fault.kind}): {fault.text}", fg="red"))
    say(f"{report.content['verdict']}; the report: {report.path}")

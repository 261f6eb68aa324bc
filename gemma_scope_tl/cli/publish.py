"""``gemma-scope export`` and ``gemma-scope upload``: writing SAEs as a repository, and publishing it on the Hub."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from gemma_scope_tl.cli import checks, options
from gemma_scope_tl.cli.output import print_rows, say, say_json

if TYPE_CHECKING:
    from gemma_scope_tl.release.upload import Upload

_SHOWN_LEFT_OUT = 20


def export(
    source: Annotated[str, typer.Argument(help="A folder of SAEs, as training leaves it, or a registered release.")],
    out: Annotated[Path, typer.Argument(help="The repository's folder; its name becomes the release's.")],
    license: Annotated[str, typer.Option(help="SPDX identifier of the weights' licence, such as cc-by-4.0.")],
    base_model: Annotated[str | None, typer.Option(help="OWNER/NAME of the model on the Hub.")] = None,
    description: Annotated[str | None, typer.Option(help="Description of these SAEs.")] = None,
    data: Annotated[str | None, typer.Option(help="Training data, and their licence.")] = None,
    evaluated_on: Annotated[str | None, typer.Option(help="Text on which the metrics were measured.")] = None,
    note: Annotated[list[str] | None, typer.Option(help="Further information for users; several times.")] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(help="Hyper-parameters, a .json or .yaml file.", callback=checks.each(checks.readable)),
    ] = None,
    searched: Annotated[list[str] | None, typer.Option(help="Name in the recipe whose value was searched for.")] = None,
    metrics: Annotated[
        Path | None, typer.Option(help="What `gemma-scope eval --out` wrote.", callback=checks.each(checks.table))
    ] = None,
    name: Annotated[str | None, typer.Option(help="The release's name.")] = None,
    layout: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(checks.LAYOUTS)}; both means gemma-scope and sae-lens.",
            callback=checks.spelled("layout", checks.LAYOUTS),
        ),
    ] = "gemma-scope",
    repos: Annotated[
        str, typer.Option(help="one, or one a site.", callback=checks.one_of("choice of repositories", checks.REPOS))
    ] = "one",
    circuit_tracer: Annotated[
        bool, typer.Option("--circuit-tracer", help="Also write transcoders for circuit-tracer.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="The model's name, if the source does not state it.")] = None,
    site: Annotated[
        str | None, typer.Option(help="The site, if no folder's name states it.", callback=checks.each(checks.site))
    ] = None,
    canonical: Annotated[bool, typer.Option("--canonical", help="Mark the SAEs nearest to an L0 of 100.")] = False,
    family: Annotated[
        str | None, typer.Option(help="Family of the model, if neither its name nor a file states it.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write SAEs as a repository: weights, model card and registry file. Nothing is sent anywhere.

    Example:

        gemma-scope export my-run my-saes --license cc-by-4.0 --base-model google/gemma-2-2b --layout both
    """
    _check_source(source)
    checks.folder(out)
    from gemma_scope_tl.release.export import Layout, Repos, export_suite
    from gemma_scope_tl.release.release_saes import About

    said, listed = _recipe(recipe) if recipe else {}, (tuple(searched or ()), tuple(note or ()))
    about = About(license, base_model, description, data, evaluated_on, said, *listed)
    folders = export_suite(
        source, out, about, name=name, layout=cast("Layout", layout), repos=cast("Repos", repos),
        circuit_tracer=circuit_tracer, model=model, site=site, metrics=_table(metrics) if metrics else None,
        canonical=canonical, family=family,
    )  # fmt: skip
    _print_folders(folders, as_json)


def _check_source(source: str) -> None:
    """Check the name of a release; a folder is read later."""
    if not Path(source).expanduser().is_dir():
        checks.release(source)


def _print_folders(folders: Sequence[Path], as_json: bool) -> None:
    counts = {folder: sum(1 for file in folder.rglob("*") if file.is_file()) for folder in folders}
    if as_json:
        say_json([{"folder": folder, "files": count} for folder, count in counts.items()])
        return
    for folder, count in counts.items():
        say(f"{folder}: {count} files")
        say(f"next: gemma-scope upload {folder} OWNER/{folder.resolve().name}")


def upload(
    folder: Annotated[
        Path,
        typer.Argument(help="The folder that `gemma-scope export` made.", callback=checks.each(checks.existing_folder)),
    ],
    repo: Annotated[
        str,
        typer.Argument(
            help="OWNER/NAME on the Hub; created if it does not exist.", callback=checks.each(checks.repository)
        ),
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Upload; without it nothing is sent.")] = False,
    private: Annotated[bool, typer.Option("--private/--public", help="Visibility of a new repository.")] = True,
    branch: Annotated[str, typer.Option(help="Branch; created from main if it does not exist.")] = "main",
    message: Annotated[str | None, typer.Option(help="Message of the commit.")] = None,
    registry_out: Annotated[Path | None, typer.Option(help="The registry file, by default beside the folder.")] = None,
    logs: Annotated[bool, typer.Option("--logs", help="Also publish metrics.jsonl and other logs.")] = False,
    as_json: options.Json = False,
) -> None:
    """Check a release and upload it in one commit. Without --yes: show what would be sent, and send nothing.

    The token is that of HF_TOKEN or of `hf auth login`. After an interruption, run the command again to continue.
    The upload writes a registry file that names the commit beside the folder.

    Examples:

        gemma-scope upload my-saes my-name/my-saes

        gemma-scope upload my-saes my-name/my-saes --public --yes
    """
    from gemma_scope_tl.release.upload import upload_suite

    done = upload_suite(
        folder, repo, private=private, dry_run=not yes, branch=branch, commit_message=message,
        registry_out=registry_out, logs=logs, progress=sys.stderr.isatty(),
    )  # fmt: skip
    if as_json:
        facts = {**asdict(done), "registry_file": done.registry_file and str(done.registry_file)}
        say_json(facts)
        return
    _print_upload(done, str(folder))


def _print_upload(done: Upload, folder: str) -> None:
    words = {"new": "new", "changed": "changed", "there": "already there"}
    rows: list[dict[str, Any]] = [
        {"file": file.path, "bytes": f"{file.size:,}", "state": words[file.state]} for file in done.files
    ]
    count = sum(file.state != "there" for file in done.files)
    total = f"{len(done.files)} files, {sum(file.size for file in done.files):,} bytes"
    more = "to send" if done.revision is None else "new to the branch"
    print_rows(rows, f"{total}; {count} files, {done.bytes_to_send:,} bytes {more}", False)
    _print_left_out(done.left_out)
    seen = f"{'private' if done.private else 'public'}, {'exists' if done.exists else 'new'}"
    say(f"repository: {done.repo} ({seen}), branch {done.branch}")
    if done.revision is None:
        options = ("" if done.private else "--public ") + (f"--branch {done.branch} " if done.branch != "main" else "")
        say(f"nothing was sent. To upload: gemma-scope upload {folder} {done.repo} {options}--yes")
        return
    say(f"commit: {done.revision}")
    say(f"registry file: {done.registry_file}")
    say(f"next: gemma-scope registry check {done.registry_file} --remote")


def _print_left_out(left_out: Sequence[str]) -> None:
    if left_out:
        more = f" and {len(left_out) - _SHOWN_LEFT_OUT} more" if len(left_out) > _SHOWN_LEFT_OUT else ""
        say(f"not part of the release, stay here: {', '.join(left_out[:_SHOWN_LEFT_OUT])}{more}")


def _recipe(path: Path) -> dict[str, Any]:
    """Hyper-parameters by name, from YAML or JSON (a subset of YAML)."""
    from gemma_scope_tl.errors import GemmaScopeError
    from gemma_scope_tl.registry.plain_yaml import load_yaml, read_text

    data = load_yaml(read_text(path), str(path))
    if not isinstance(data, dict):
        raise GemmaScopeError(f"{path} holds no hyper-parameters by name: write lines such as lr: 7e-5.")
    return {str(key): value for key, value in cast("dict[object, Any]", data).items()}


def _table(path: Path) -> Any:
    """Read the table that ``eval`` wrote."""
    import pandas as pd

    from gemma_scope_tl.errors import GemmaScopeError

    read = {".csv": pd.read_csv, ".json": pd.read_json, ".parquet": pd.read_parquet}[path.suffix.lower()]
    try:
        return read(path)
    except (OSError, ValueError) as error:
        raise GemmaScopeError(f"{path} cannot be read as a table ({error}). Write it with --out of `eval`.") from error

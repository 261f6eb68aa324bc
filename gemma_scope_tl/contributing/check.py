"""Checks of a registry file against the schema, the other releases, and the files that its rows name.

All checks of all rows are made, also after one has failed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from gemma_scope_tl.contributing.folder_metadata import ARCHITECTURES, flat_cfg
from gemma_scope_tl.contributing.layered_metadata import check_row_files
from gemma_scope_tl.contributing.repositories import Repository, ask_each, is_remote, open_repository, sizes_of
from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.families import bare_name, depends_on_family, named_family, names_with
from gemma_scope_tl.files import checked_path
from gemma_scope_tl.registry.catalog import Header, clashing_names, read_header
from gemma_scope_tl.registry.locate import builtin_folder, release_files
from gemma_scope_tl.registry.plain_yaml import load_yaml, read_text
from gemma_scope_tl.registry.schema import CFG_FILE, ReleaseFile, SAERow, escaping_rows, validate_release
from gemma_scope_tl.sites import site_of_hook
from gemma_scope_tl.weights.checks import CONFIG_NAME, Expected
from gemma_scope_tl.weights.coder_config import CoderConfig
from gemma_scope_tl.weights.seen import mark_seen

CHECKS = ("schema", "names", "files", "shapes", "sha256", "l0")
"""The names of the checks, in the order in which they are made; ``l0`` is made by ``measure.py``."""


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        check: one of :data:`CHECKS`.
        row: id of the row; empty for the file as a whole.
        ok: whether the check passed; None if it was not made.
        text: the problem, or the reason why the check was not made; empty if it passed.
    """

    check: str
    row: str
    ok: bool | None
    text: str = ""


@dataclass(frozen=True)
class Report:
    """The findings about a file, and the rows that could be read from it, in the order of the file."""

    path: Path
    rows: tuple[SAERow, ...]
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> list[Finding]:
        """The findings of checks that failed."""
        return [finding for finding in self.findings if finding.ok is False]

    def extended(self, more: Iterable[Finding]) -> Report:
        """This report with more findings."""
        return replace(self, findings=(*self.findings, *more))


def check_release(path: str | Path, remote: bool = False, progress: bool = False) -> Report:
    """Check a registry file.

    Args:
        path: the YAML file. If it violates the schema, its valid rows are still checked further.
        remote: ask the Hub about files in repositories. No weights are downloaded: headers are read by range, and
            hashes are taken from the listing. Unverified rows whose file has the row's shapes are recorded as seen.
        progress: show progress bars on standard error.

    Returns:
        The report. Problems of the file do not raise, even if it cannot be read.
    """
    path = checked_path(path).absolute()
    try:
        data = load_yaml(read_text(path), str(path))
    except GemmaScopeError as error:
        return Report(path, (), (Finding("schema", "", False, str(error)),))
    findings, rows = _schema(data, path)
    findings += _names(data, path)
    for repo, revision in dict.fromkeys((row.repo, row.revision) for row in rows):
        here = [row for row in rows if (row.repo, row.revision) == (repo, revision)]
        findings += _files(here, repo, revision, remote, progress)
    wrong = {finding.row for finding in findings if finding.ok is False}
    measured = {finding.row for finding in findings if finding.check == "shapes" and finding.ok}
    mark_seen(row for row in rows if row.id in measured - wrong)
    return Report(path, rows, tuple(findings))


def _schema(data: object, path: Path) -> tuple[list[Finding], tuple[SAERow, ...]]:
    release, problems = validate_release(data)
    findings = [Finding("schema", p.row, False, ": ".join(filter(None, (p.field, p.text)))) for p in problems]
    rows = release.at(path.resolve().parent).rows if release else _valid_rows(data, path)
    escapes = escaping_rows(rows)
    findings += [Finding("schema", problem.row, False, problem.text) for problem in escapes]
    escaping = {problem.row for problem in escapes}
    findings += _family(rows)
    return findings or [Finding("schema", "", True)], tuple(row for row in rows if row.id not in escaping)


def _family(rows: Sequence[SAERow]) -> list[Finding]:
    """A failed finding if nothing says the family of the model, although the rows' sites differ between families."""
    sites = sorted({row.site for row in rows if depends_on_family(row.site)})
    if not sites or rows[0].family is not None or named_family(rows[0].model) is not None:
        return []
    text = (
        f"family: is not stated, no family lists the model {rows[0].model!r}, and coders at {', '.join(sites)} differ"
    )
    return [Finding("schema", "", False, f"{text} between families: {names_with(*sites)}")]


def _valid_rows(data: object, path: Path) -> tuple[SAERow, ...]:
    """The rows of a broken file that are valid on their own, given valid keys of the release."""
    fields = cast("Mapping[str, object]", data) if isinstance(data, Mapping) else {}
    needed = {key: fields[key] for key in ("release", "model", "repo", "format") if key in fields}
    head = {"license": "unknown", "description": "unknown", **needed}
    found: dict[str, SAERow] = {}
    saes = fields.get("saes")
    for entry in cast("list[object]", saes) if isinstance(saes, list) else []:
        release = validate_release({**head, "saes": [entry]})[0]
        if isinstance(release, ReleaseFile):
            (row,) = release.at(path.resolve().parent).rows
            found.setdefault(row.id, row)
    return tuple(found.values())


def _names(data: object, path: Path) -> list[Finding]:
    """Whether the release's names are free: among the known registry files, and in SAELens's catalogue."""
    fields = cast("Mapping[str, object]", data) if isinstance(data, Mapping) else {}
    names = [name for key in ("release", "canonical_release") if isinstance(name := fields.get(key), str)]
    if not names:
        return [Finding("names", "", None, "the file names no release")]
    texts: list[str] = []
    if names[0] != path.stem:
        texts.append(f"The file holds release {names[0]!r}: name it {names[0]}.yaml.")
    own = Header(path, names[0], names[1] if len(names) > 1 else None, str(fields.get("model")))
    others: list[Header] = []
    try:
        known = [file for file in release_files() if os.path.realpath(file) != os.path.realpath(path)]
    except GemmaScopeError as error:
        known = []
        texts.append(f"The other registry files cannot be found: {error}")
    for file in known:
        try:
            others.append(read_header(file))
        except GemmaScopeError as error:
            texts.append(f"Another registry file is broken: {error}")
    texts += [clash for other in others for clash in clashing_names([other, own])]
    if path.parent.resolve() != builtin_folder().resolve():
        texts += [
            f"SAELens has its own release {name!r}, and would load that one. Choose another name."
            for name in sorted(set(names) & _sae_lens_names() - {n for other in others for n in other.names})
        ]
    return [Finding("names", "", False, text) for text in texts] or [Finding("names", "", True)]


def _sae_lens_names() -> set[str]:
    """Names of SAELens's releases: the top-level keys of its YAML catalogue, read without importing SAELens."""
    spec = importlib.util.find_spec("sae_lens")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        catalogue = Path(folder) / "pretrained_saes.yaml"
        if catalogue.is_file():
            lines = catalogue.read_text(encoding="utf-8").splitlines()
            return {line.partition(":")[0] for line in lines if line[:1].isalnum() and ":" in line}
    return set()


def _files(rows: Sequence[SAERow], repo: str, revision: str | None, remote: bool, progress: bool) -> list[Finding]:
    """Existence, shapes and hashes of the files in one repository."""
    if is_remote(repo) and not remote:
        return [
            Finding(check, row.id, None, "give --remote") for row in rows for check in ("files", "shapes", "sha256")
        ]
    try:
        repository = open_repository(repo, revision)
        found = repository.files
    except GemmaScopeError as error:
        return [Finding("files", row.id, False, str(error)) for row in rows]
    missing = {row.id: [name for name in _needed(row) if name not in found] for row in rows}
    findings = [
        Finding("files", id_, not names, f"{repository.name} has no {' and no '.join(names)}." if names else "")
        for id_, names in missing.items()
    ]
    there = [row for row in rows if not missing[row.id]]
    findings += _asked("shapes", there, lambda row: _shapes(repository, row), repository, progress)
    hashed = [row for row in there if None not in row.hashes]
    findings += [Finding("sha256", row.id, None, "none given") for row in there if None in row.hashes]
    return findings + _asked("sha256", hashed, lambda row: _sha256(repository, row), repository, progress)


def _asked(
    check: str,
    rows: Sequence[SAERow],
    ask: Callable[[SAERow], tuple[bool | None, str]],
    repository: Repository,
    progress: bool,
) -> list[Finding]:
    answers = ask_each(rows, ask, check, repository.workers, progress)
    pairs = [(False, str(answer)) if isinstance(answer, GemmaScopeError) else answer for answer in answers]
    return [Finding(check, row.id, ok, text) for row, (ok, text) in zip(rows, pairs, strict=True)]


def _needed(row: SAERow) -> list[str]:
    return [*row.weights_paths, *([f"{row.path}/{CFG_FILE}"] if row.format == "sae-lens" else [])]


def _shapes(repository: Repository, row: SAERow) -> tuple[bool, str]:
    is_transcoder = row.model_family.site(row.base_site).is_transcoder
    expected = Expected(row.d_in, row.d_sae, row.d_out or row.d_in, is_transcoder, row.affine, "the row")
    if row.layers is not None:
        check_row_files(repository, row, expected)
        return True, ""
    source = f"{repository.name}/{row.weights_path}"
    sizes_of(repository.shapes(row.weights_path), source, expected)
    config = f"{row.path}/{CONFIG_NAME}"
    if row.format == "gemma_scope_2" and config in repository.files:
        described = CoderConfig.parse(repository.config(config), Path(config))
        described.complete(expected)
        described.check_row(row)
    texts = _cfg_problems(row, repository.cfg(row.path)) if row.format == "sae-lens" else []
    return not texts, " ".join(texts)


def _cfg_problems(row: SAERow, cfg: Mapping[str, Any]) -> list[str]:
    """Every contradiction between a ``cfg.json`` and the row."""
    texts: list[str] = []
    architecture = cfg.get("architecture")
    if (
        architecture not in ARCHITECTURES
        or (architecture != "jumprelu") != row.model_family.site(row.site).is_transcoder
    ):
        texts.append(f"{CFG_FILE} describes a {architecture!r} SAE, which does not fit site {row.site!r}.")
    meta = flat_cfg(cfg)
    if isinstance(hook := meta.get("hook_name"), str) and hook:
        try:
            site, layer = site_of_hook(hook, meta.get("hook_name_out"), row.model_family)
        except GemmaScopeError as error:
            return [*texts, f"{CFG_FILE}: {error}"]
        if (site.name, layer) != (row.site, row.layer):
            texts.append(f"{CFG_FILE} names hook {hook}, but the row says site {row.site}, layer {row.layer}.")
    model = meta.get("model_name")
    if isinstance(model, str) and model and bare_name(model) != bare_name(row.model):
        texts.append(f"{CFG_FILE} names model {model}, but the row says {row.model}.")
    return texts


def _sha256(repository: Repository, row: SAERow) -> tuple[bool | None, str]:
    for path, said in zip(row.weights_paths, row.hashes, strict=True):
        found = repository.sha256(path)
        name = "the file" if row.layers is None else path.rpartition("/")[2]
        if found is None:
            return None, f"{name} is not in LFS, so the listing has no hash"
        if found != said:
            return False, f"{name} has {found}, but the row says {said}."
    return True, ""

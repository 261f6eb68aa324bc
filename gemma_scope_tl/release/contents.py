"""The files of a release, found in its folder and checked. Other files of the folder are not published."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_scope_tl.errors import GemmaScopeError, WeightsError
from gemma_scope_tl.files import checked_path, file_sha256, is_folder
from gemma_scope_tl.registry.locate import inside
from gemma_scope_tl.registry.schema import CFG_FILE, WEIGHTS_FILES, ReleaseFile, read_release
from gemma_scope_tl.release.card import CIRCUIT_TRACER_FOLDER, SAE_LENS_FOLDER
from gemma_scope_tl.weights.checks import CONFIG_NAME

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow

CARD = "README.md"
TEXTS = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "NOTICE.txt", "CITATION.cff")
LOGS = ("metrics.jsonl", "metrics.csv", "metrics.json", "metrics.parquet")
_SAE_LENS_FILES = (CFG_FILE, WEIGHTS_FILES["sae-lens"])
_TRANSCODER = re.compile(rf"{CIRCUIT_TRACER_FOLDER}/[^/]+/(config\.yaml|layer_\d+\.safetensors)")
_EXPORT = "Write the release with `gemma-scope export` (gs.export_suite), and upload the folder that it made."


@dataclass(frozen=True)
class Part:
    """One file of a release.

    Attributes:
        path: path relative to the folder, with ``/`` between the names.
        size: size in bytes.
        row: the registry row of a weights file of the first layout; None for all other files.
    """

    path: str
    size: int
    row: SAERow | None = None


@dataclass(frozen=True)
class ReleaseContents:
    """A release's folder.

    Attributes:
        folder: path of the folder.
        release: the registry file of the release.
        parts: the files of the release, sorted by path.
        left_out: all other files, which are not published. A name that ends with ``/`` is a folder that was not read.
    """

    folder: Path
    release: ReleaseFile
    parts: tuple[Part, ...]
    left_out: tuple[str, ...]


def read_contents(folder: str | os.PathLike[str], logs: bool = False) -> ReleaseContents:
    """Find the files of a release.

    These are the registry file, ``README.md``, licence texts, the weights that the registry file names, the same SAEs
    below ``sae_lens/``, and sets of transcoders below ``circuit_tracer/``. All other files are left out: checkpoints,
    optimizer state, locks, incomplete files, and weights that no row names.

    Args:
        folder: as :func:`export_suite` wrote it.
        logs: also take ``metrics.jsonl``, ``.csv``, ``.json`` and ``.parquet`` beside the registry file.

    Raises:
        GemmaScopeError: the folder holds no release or several, or files of the release are missing.
    """
    root = checked_path(folder)
    if not is_folder(root):
        raise GemmaScopeError(f"{root} is not a folder. {_EXPORT}")
    file, release = _registry_file(root)
    rows = {row.weights_path: row for row in _own_rows(root, file, release)}
    names = {CARD, file.name, *rows}
    names |= {f"{row.path}/{CFG_FILE}" for row in rows.values() if row.format == "sae-lens"}
    configs = {f"{row.path}/{CONFIG_NAME}" for row in rows.values() if row.format == "gemma_scope_2"}
    names |= {name for name in configs if (root / name).is_file()} | _mirrors(root, rows.values())
    missing = sorted(name for name in names if not inside(root, name).is_file())
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise GemmaScopeError(f"{root} has no {missing[0]}{more}, which its release consists of. {_EXPORT}")
    optional = set(TEXTS) | (set(LOGS) if logs else set[str]())
    found = list(_walk(root))
    kept = sorted(name for name in found if name in names or name in optional or _TRANSCODER.fullmatch(name))
    parts = tuple(Part(name, inside(root, name).stat().st_size, rows.get(name)) for name in kept)
    return ReleaseContents(root, release, parts, tuple(sorted(set(found) - set(kept))))


def _mirrors(root: Path, rows: Iterable[SAERow]) -> set[str]:
    """The files of the same SAEs in SAELens's layout: both files of an SAE of which at least one exists."""
    pairs = [[f"{SAE_LENS_FOLDER}/{row.path}/{name}" for name in _SAE_LENS_FILES] for row in rows]
    return {name for pair in pairs if any((root / one).is_file() for one in pair) for name in pair}


def check_contents(contents: ReleaseContents, progress: bool = False) -> dict[str, str]:
    """Load and check every weights file, and compare its hash with the registry file's.

    Returns:
        The sha256 of every file, by path.

    Raises:
        GemmaScopeError: files fail their checks; the message lists all of them.
    """
    from gemma_scope_tl.contributing.repositories import ask_each

    answers = ask_each(contents.parts, lambda part: _check(contents.folder, part), "checking", 1, progress)
    errors = [answer for answer in answers if isinstance(answer, GemmaScopeError)]
    if len(errors) == 1:
        raise errors[0]
    if errors:
        listed = "\n".join(f"  {error}" for error in errors)
        raise GemmaScopeError(f"{len(errors)} files of {contents.folder} failed their checks:\n{listed}")
    return {part.path: str(answer) for part, answer in zip(contents.parts, answers, strict=True)}


def _registry_file(root: Path) -> tuple[Path, ReleaseFile]:
    candidates = sorted(path for path in root.glob("*.yaml") if path.is_file() and not path.name.startswith("."))
    found: list[tuple[Path, ReleaseFile]] = []
    errors: list[GemmaScopeError] = []
    for path in candidates:
        try:
            found.append((path, read_release(inside(root, path.name))))
        except GemmaScopeError as error:
            errors.append(error)
    if len(found) > 1:
        raise GemmaScopeError(f"{root} holds several registry files ({', '.join(p.name for p, _ in found)}): keep one.")
    if not found:
        raise errors[0] if errors else GemmaScopeError(f"{root} holds no registry file, so no release. {_EXPORT}")
    return found[0]


def _own_rows(root: Path, file: Path, release: ReleaseFile) -> Sequence[SAERow]:
    if not release.repo.startswith(".") or Path(release.rows[0].repo) != root.resolve():
        raise GemmaScopeError(f"{file} is about {release.repo}, not about its own folder (repo: .). {_EXPORT}")
    return release.rows


def _walk(root: Path) -> Iterator[str]:
    """Yield the path of every file. Hidden folders and links to folders are not entered, and are named with a ``/``."""
    for place, folders, names in os.walk(root):
        here = Path(place)
        closed = [name for name in folders if name.startswith(".") or (here / name).is_symlink()]
        folders[:] = sorted(set(folders) - set(closed))
        yield from ((here / name).relative_to(root).as_posix() + "/" for name in closed)
        yield from ((here / name).relative_to(root).as_posix() for name in names)


def _check(root: Path, part: Part) -> str:
    from gemma_scope_tl.sae.loading import load_folder, load_row
    from gemma_scope_tl.weights.hub_cache import wrong_hash

    path = root / part.path
    try:
        found = file_sha256(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}). Check its disk and its permissions.") from error
    if part.row is not None:
        if part.row.sha256 not in (None, found):
            raise wrong_hash(path, found, str(part.row.sha256))
        load_row(part.row)
    elif _TRANSCODER.fullmatch(part.path):
        _check_transcoder(path)
    elif path.name == WEIGHTS_FILES["sae-lens"]:
        load_folder(path.parent)
    return found


def _check_transcoder(path: Path) -> None:
    if path.suffix != ".safetensors":
        return
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        arrays = load_file(path)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror}). Check its disk and its permissions.") from error
    except SafetensorError as error:
        raise WeightsError(f"{path} is not a safetensors file ({error}). {_EXPORT}") from error
    bad = [name for name, array in arrays.items() if not bool(array.isfinite().all())]
    if bad:
        raise WeightsError(f"{path} has values in {bad[0]} that are not finite. {_EXPORT}")

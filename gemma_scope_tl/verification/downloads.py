"""What a verification needs on this machine: the files of the model and of the sampled SAEs, with their sizes."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gemma_scope_tl.errors import GemmaScopeError
from gemma_scope_tl.families import hub_ids
from gemma_scope_tl.registry.locate import is_bundled
from gemma_scope_tl.registry.schema import CFG_FILE, SAERow
from gemma_scope_tl.verification.sample import float32_bytes
from gemma_scope_tl.weights.fetch import find_local
from gemma_scope_tl.weights.hub_errors import hub_exceptions

MODEL_SUFFIXES = (".safetensors", ".json", ".model", ".txt", ".jinja")
_CONFIG, _WEIGHTS = "config.json", "the model's weights"


@dataclass(frozen=True)
class NeededFile:
    """A file of the Hub that is needed.

    Attributes:
        repo, path: where it is.
        size: bytes; estimated from the registry if ``estimated``; None if unknown.
        here: whether it is on this machine.
        kind: ``"model"`` or ``"SAE"``.
        estimated: whether the Hub did not say the size.
    """

    repo: str
    path: str
    size: int | None
    here: bool
    kind: str
    estimated: bool = False


@dataclass(frozen=True)
class Plan:
    """The files that are needed.

    Attributes:
        files: all files of the Hub; local folders and bundled files need none.
        missing: rows whose file does not exist on the Hub.
        unreachable: why the Hub could not be asked; empty if it was.
    """

    files: tuple[NeededFile, ...]
    missing: tuple[SAERow, ...] = ()
    unreachable: str = ""

    @property
    def to_download(self) -> list[NeededFile]:
        """The files that are not on this machine."""
        return [file for file in self.files if not file.here]

    @property
    def bytes(self) -> int:
        """Bytes to download, as far as they are known."""
        return sum(file.size or 0 for file in self.to_download)

    @property
    def unknown(self) -> list[NeededFile]:
        """The files to download whose size is unknown, which :attr:`bytes` leaves out."""
        return [file for file in self.to_download if file.size is None]

    @property
    def amount(self) -> str:
        """What is to be downloaded: the number of files, their size, and what the size leaves out."""
        count, known = len(self.to_download), f"{self.bytes / 1e9:,.2f} GB"
        files = f"{count} file{'' if count == 1 else 's'}"
        if not self.unknown:
            return f"{files}, {known}"
        names = [file.path for file in self.unknown]
        left_out = _WEIGHTS if _WEIGHTS in names else ", ".join(names)
        return f"{files} or more: at least {known}, and {left_out}, whose size is unknown"


def plan_downloads(model: str | None, rows: Iterable[SAERow], offline: bool = False) -> Plan:
    """Ask the Hub for the files of the model and of the rows. Nothing is downloaded.

    Args:
        model: a model's name, folder or id on the Hub; None for a model that is loaded.
        rows: the rows of the SAEs.
        offline: ask nothing, and look into the cache only.
    """
    files: list[NeededFile] = []
    missing: list[SAERow] = []
    problems: list[str] = []
    repo = None if model is None else model_repository(model)
    if repo is not None:
        try:
            files += _cached_model(repo) if offline else _model_files(repo)
        except GemmaScopeError as error:
            problems.append(str(error))
            files += _cached_model(repo)
    by_repo: dict[tuple[str, str | None], list[SAERow]] = {}
    for row in rows:
        if not is_bundled(row.repo) and not row.repo.startswith("/"):
            by_repo.setdefault((row.repo, row.revision), []).append(row)
    for (name, revision), here in by_repo.items():
        sizes: dict[str, int] | None = None
        if not offline:
            try:
                sizes = _sizes(name, revision, [path for row in here for path in _paths(row)])
            except GemmaScopeError as error:
                problems.append(str(error))
        for row in here:
            found = _row_files(row, sizes)
            files += found
            if sizes is not None and any(file.path not in sizes for file in found):
                missing.append(row)
    files = [file for file in files if not any(_is_of(file, row) for row in missing)]
    return Plan(tuple(files), tuple(missing), " ".join(dict.fromkeys(problems)))


def model_repository(model: str) -> str | None:
    """The Hub's repository of a model; None for bundled models and for a folder."""
    if is_bundled(model) or Path(model).expanduser().is_dir():
        return None
    return hub_ids().get(model, model if model.count("/") == 1 else None)


@contextmanager
def offline_hub(offline: bool) -> Generator[None]:
    """Within the context the Hub's client sends no requests, if ``offline``."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = before or offline
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _paths(row: SAERow) -> list[str]:
    return [row.weights_path, *([f"{row.path}/{CFG_FILE}"] if row.format == "sae-lens" else [])]


def _is_of(file: NeededFile, row: SAERow) -> bool:
    return file.repo == row.repo and file.path in _paths(row)


def _row_files(row: SAERow, sizes: dict[str, int] | None) -> list[NeededFile]:
    here = find_local(row) is not None
    if sizes is None:
        return [NeededFile(row.repo, row.weights_path, float32_bytes(row), here, "SAE", estimated=True)]
    return [NeededFile(row.repo, path, sizes.get(path), here, "SAE") for path in _paths(row)]


def _model_files(repo: str) -> list[NeededFile]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with _asked(repo):
        entries = [one for one in HfApi().list_repo_tree(repo) if isinstance(one, RepoFile)]
    kept = [one for one in entries if one.path.endswith(MODEL_SUFFIXES)]
    return [NeededFile(repo, one.path, one.size, _is_cached(repo, one.path), "model") for one in kept]


def _cached_model(repo: str) -> list[NeededFile]:
    """What the cache shows of a model: its configuration and one file of weights, or their absence."""
    here = _is_cached(repo, _CONFIG)
    weights = any(_is_cached(repo, name) for name in ("model.safetensors", "model.safetensors.index.json"))
    return [
        NeededFile(repo, _WEIGHTS, None, weights, "model", estimated=True),
        NeededFile(repo, _CONFIG, None, here, "model", estimated=True),
    ]


def _is_cached(repo: str, path: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repo, path), str)


def _sizes(repo: str, revision: str | None, paths: Sequence[str]) -> dict[str, int]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    with _asked(repo):
        found = HfApi().get_paths_info(repo, list(paths), revision=revision)
    return {one.path: one.size for one in found if isinstance(one, RepoFile)}


@contextmanager
def _asked(repo: str) -> Generator[None]:
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        yield
    except GemmaScopeError:
        raise
    except OfflineModeIsEnabled as error:
        raise GemmaScopeError("HF_HUB_OFFLINE is set.") from error
    except (OSError, ValueError, *hub_exceptions()) as error:
        said = str(error).strip().splitlines()
        raise GemmaScopeError(f"{repo}: {type(error).__name__}: {said[0] if said else 'no message'}") from error

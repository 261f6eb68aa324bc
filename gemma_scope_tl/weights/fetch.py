"""From a registry row to a file on this machine: bundled in the package, in a local folder, or on the Hub."""

from __future__ import annotations

import hashlib
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from gemma_scope_tl.errors import GemmaScopeError, WeightsError
from gemma_scope_tl.weights.safetensors_file import CFG_NAME, WEIGHTS_NAME
from gemma_scope_tl.weights.sniff import weights_error

if TYPE_CHECKING:
    from gemma_scope_tl.registry.schema import SAERow

BUNDLED = "bundled"
PARAMS_NAME = "params.npz"
_CHUNK = 1 << 22


def fetch(row: SAERow) -> Path:
    """The weights file of a registry row, downloaded if need be.

    ``row.repo`` is ``"bundled"`` (files inside this package), an existing local folder, or a Hub repository, which is
    looked up in the Hub's cache before anything is downloaded.

    Returns:
        Path of ``params.npz``, or of ``sae_weights.safetensors`` (with ``cfg.json`` beside it) for rows in SAELens'
        format.

    Raises:
        WeightsError: when the file is missing, cannot be downloaded, or its sha256 is not the row's.
        GemmaScopeError: when the row's path leaves its folder.
    """
    names = (PARAMS_NAME,) if row.format == "gemma-scope" else (CFG_NAME, WEIGHTS_NAME)
    inner = PurePosixPath(row.path)
    if inner.is_absolute() or ".." in inner.parts:
        raise GemmaScopeError(f"Row {row.release}/{row.id} has the path {row.path!r}, which leaves its repository.")
    root = bundled_root() if row.repo == BUNDLED else Path(row.repo).expanduser()
    if row.repo == BUNDLED or root.is_dir():
        paths = [_local(root, inner / name) for name in names]
    else:
        paths = [_from_hub(row.repo, str(inner / name), row.revision) for name in names]
    if row.sha256 is not None:
        check_sha256(paths[-1], row.sha256)
    return paths[-1]


def bundled_root() -> Path:
    """The folder in this package that holds the bundled SAEs."""
    return Path(__file__).resolve().parent.parent / "bundled" / "saes"


def check_sha256(path: Path, wanted: str) -> None:
    """Raise :class:`WeightsError` unless the file's sha256 is ``wanted`` (hexadecimal)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if digest.hexdigest() != wanted.lower():
        raise weights_error(path, f"has sha256 {digest.hexdigest()}, the registry says {wanted.lower()}")


def _local(root: Path, inner: PurePosixPath) -> Path:
    path = root / inner
    if not path.is_file():
        raise weights_error(path, "does not exist", f"Expected {inner} under {root}.")
    return path


def _from_hub(repo: str, filename: str, revision: str | None) -> Path:
    from huggingface_hub import errors, hf_hub_download

    at = f" --revision {revision}" if revision else ""
    what, command = f"{filename} of {repo}", f"hf download {repo} {filename}{at}"
    try:
        return Path(hf_hub_download(repo_id=repo, filename=filename, revision=revision))
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/{repo}"
        raise WeightsError(f"{what} is gated. Accept its terms at {page}, then run `hf auth login`.") from error
    except errors.RepositoryNotFoundError as error:
        hint = "Check the name; a private repository needs `hf auth login`, a local folder a path that exists."
        raise WeightsError(f"{repo} is neither a local folder nor a repository on the Hub. {hint}") from error
    except errors.RevisionNotFoundError as error:
        raise WeightsError(f"{repo} has no revision {revision!r}, which the registry row names.") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        hint = f"On a machine with a connection run `{command}`, then copy its cache (HF_HOME) here."
        raise WeightsError(f"{what} is not in the local cache and the Hub cannot be reached. {hint}") from error
    except errors.EntryNotFoundError as error:
        hint = f"See what is there: https://huggingface.co/{repo}/tree/{revision or 'main'}"
        raise WeightsError(f"{what} does not exist (it may have been renamed or deleted). {hint}") from error
    except errors.HFValidationError as error:
        raise WeightsError(f"{repo!r} is neither an existing folder nor a repository name: {error}") from error
    except OSError as error:
        raise WeightsError(f"{what} could not be downloaded ({error}). Try again, or run `{command}`.") from error

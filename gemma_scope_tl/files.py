"""Atomic writes, paths given by users, and hashes of files.

An atomic write leaves either the old file or the new one after a crash. When the operating system refuses a write
(disk full, no permission, name too long), a :class:`WriteError` names the file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from gemma_scope_tl.errors import GemmaScopeError, WriteError

_BLOCK = 4 << 20
_MAX_NAME = 255  # bytes, on nearly every file system
_RANDOM = 10  # bytes that a temporary name adds: two dots and 8 random letters
_UNSYNCED = (
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EACCES,
    errno.EPERM,
    errno.EBADF,
)  # errors of fsync for a folder on some network file systems
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk is full: your quota is used up",
    errno.EFBIG: "it would exceed the largest file size that the system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENAMETOOLONG: "its name is too long for the file system",
    errno.ENOTDIR: "a file exists where a folder is needed",
    errno.EEXIST: "a file exists where a folder is needed",
    errno.EISDIR: "a folder of this name exists",
    errno.ENOTEMPTY: "a folder of this name exists",
}
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room, or choose another place"),
    errno.ENAMETOOLONG: "Choose a shorter name",
}
_UNTOUCHED = "; existing files are unchanged."
_RUST_ERRNO = re.compile(r"(?:os error|code:) (\d+)")


@contextmanager
def writing(path: str | os.PathLike[str], remedy: str = "") -> Generator[None]:
    """Raise errors of the operating system while writing ``path`` as :class:`WriteError`.

    Args:
        path: the file or folder that is written.
        remedy: advice in whole sentences that replaces the default advice.
    """
    try:
        yield
    except GemmaScopeError:
        raise
    except Exception as error:  # safetensors raises the system's errors as a class without ``errno``
        raised = write_error(path, error, remedy)
        if raised is None:
            raise
        raise raised from error


def write_error(path: str | os.PathLike[str], error: Exception, remedy: str = "") -> WriteError | None:
    """The error that :func:`writing` raises for ``error``; None unless the operating system raised it."""
    number = _errno(error)
    if number is None and not isinstance(error, OSError):
        return None
    why = reason(error)
    if number == errno.ENAMETOOLONG:
        why += f" ({len(os.fsencode(Path(path).name))} bytes)"
    advice = remedy or _REMEDIES.get(number or 0, "Choose another place") + _UNTOUCHED
    shown = os.fspath(path) if os.fspath(path).isprintable() else repr(os.fspath(path))
    raised = WriteError(f"{shown} cannot be written: {why}. {advice}")
    raised.errno = number
    return raised


def reason(error: Exception) -> str:
    """Why the system refused a write, in a few words."""
    said = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return _REASONS.get(_errno(error) or 0, said)


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create a folder and its parents where they do not exist.

    Raises:
        WriteError: when it cannot be created.
    """
    place = Path(path)
    with writing(place):
        place.mkdir(parents=True, exist_ok=True)
    return place


def replace_files(folder: str | os.PathLike[str], writers: Mapping[str, Callable[[Path], Any]]) -> None:
    """Write every file completely under a temporary name in ``folder``, then rename them into place.

    A process that is killed during the call may leave temporary files, whose names begin with a dot.

    Args:
        folder: created where it does not exist.
        writers: for each file name, a function that takes a path and writes the file there.

    Raises:
        WriteError: when a file cannot be written. None of the files has changed then.
    """
    place = make_folder(folder)
    with ExitStack() as stack:
        done = {name: stack.enter_context(_temporary(place, name, write)) for name, write in writers.items()}
        for name, temporary in done.items():
            with writing(place / name):
                temporary.replace(place / name)
        with writing(place):
            sync_folder(place)


@contextmanager
def _temporary(folder: Path, name: str, write: Callable[[Path], Any]) -> Generator[Path]:
    """Write and sync a temporary file for ``folder / name``, and delete it at the end if it was not renamed."""
    temporary: Path | None = None
    try:
        with writing(folder / name):
            _check_name(name)
            handle, found = tempfile.mkstemp(prefix=_prefix(name), dir=folder)
            os.close(handle)
            temporary = Path(found)
            write(temporary)
            with suppress(PermissionError):  # a file system without permissions
                temporary.chmod(0o644)
            sync_to_disk(temporary)
        yield temporary
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write ``data`` (text as UTF-8) to ``path`` completely or not at all, and return the path.

    Raises:
        WriteError: when it cannot be written. An existing file is unchanged then.
    """
    target = Path(path)
    encoded = data.encode() if isinstance(data, str) else data
    replace_files(target.parent, {target.name: lambda temporary: temporary.write_bytes(encoded)})
    return target


def write_new(path: str | os.PathLike[str], text: str) -> Path:
    """Write as :func:`write_atomically`, but never over a file that exists or that another process creates meanwhile.

    Raises:
        FileExistsError: when the file exists.
        WriteError: when it cannot be written.
    """
    target = Path(path)
    make_folder(target.parent)
    with _temporary(target.parent, target.name, lambda path: path.write_bytes(text.encode())) as temporary:
        try:
            os.link(temporary, target)  # unlike a rename, this fails if the file exists
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with target.open("x"), writing(target):
                temporary.replace(target)
    return target


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Append a line of UTF-8 text to a file. The file and its folder are created where they do not exist.

    Raises:
        WriteError: when the line cannot be written. A part of it may have been written.
    """
    target = Path(path)
    make_folder(target.parent)
    with writing(target), target.open("ab") as file:
        file.write(line.encode() + b"\n")


def expanded(path: str | os.PathLike[str]) -> Path | None:
    """Expand ``~`` in a path; None if the user has no home folder, as in a container without HOME."""
    given = Path(path)
    try:
        found = given.expanduser()
    except RuntimeError:
        return None
    return found if found == given or found.is_absolute() else None  # HOME may be empty


def checked_path(path: str | os.PathLike[str]) -> Path:
    """Check a path that a user gave, and expand ``~`` in it.

    Raises:
        GemmaScopeError: when the home folder is unknown, or the path is empty or contains a NUL.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise GemmaScopeError(f"{text!r} is not a path. Give a folder or a file; '.' is the working directory.")
    found = expanded(path)
    if found is None:
        what = f"{os.fspath(path)} is in a home folder, and no home folder is known"
        raise GemmaScopeError(f"{what}: give the absolute path, or set HOME.")
    return found


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder exists; False if the system cannot tell (no permission, name too long)."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file exists; False if the system cannot tell."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def file_sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file, read in blocks of a few MiB."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def sync_to_disk(path: Path) -> None:
    """Sync the content of a file to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_folder(path: Path) -> None:
    """Sync the entries of a folder to the disk, where the file system can."""
    try:
        sync_to_disk(path)
    except OSError as error:
        if error.errno not in _UNSYNCED:
            raise


def _check_name(name: str) -> None:
    """Raise for names that are paths, or that no file system accepts."""
    if "/" in name or "\0" in name or name in ("", ".", ".."):
        raise OSError(errno.EINVAL, f"{name[:80]!r} is not a file name")
    if len(os.fsencode(name)) > _MAX_NAME:
        raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))


def _prefix(name: str) -> str:
    """The prefix of the temporary name for ``name``, cut so that the whole is not too long."""
    return f".{os.fsencode(name)[: _MAX_NAME - _RANDOM].decode('utf-8', 'ignore')}."


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    if type(error).__name__ == "SafetensorError" and (found := _RUST_ERRNO.search(str(error))):
        return int(found[1])
    return None

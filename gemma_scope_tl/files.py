"""Atomic writes, which leave the old file or the new one after a crash; paths that users give; hashes of files.

When the system refuses a write (disk full, no permission, name too long), a :class:`WriteError` names the file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
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
)  # fsync of a folder on some network disks
_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk is full: your quota is used up",
    errno.EFBIG: "it would be larger than the system allows files to be",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "permission denied",
    errno.ENAMETOOLONG: "its name is too long for the file system",
    errno.ENOTDIR: "a file is in the place of a folder",
    errno.EEXIST: "a file is in the place of a folder",
    errno.EISDIR: "a folder is in its place",
    errno.ENOTEMPTY: "a folder is in its place",
}
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "Make room, or choose another place"),
    errno.ENAMETOOLONG: "Choose a shorter name",
}
_UNTOUCHED = "; what was there before is as it was."
_RUST_ERRNO = re.compile(r"(?:os error|code:) (\d+)")


@contextmanager
def writing(path: str | os.PathLike[str], remedy: str = "") -> Generator[None]:
    """Raise the system's errors in writing ``path`` as :class:`WriteError`.

    Args:
        path: the file or folder that is written.
        remedy: advice in whole sentences, in place of the usual one.
    """
    try:
        yield
    except GemmaScopeError:
        raise
    except Exception as error:  # safetensors raises the system's errors in a class without ``errno``
        raised = write_error(path, error, remedy)
        if raised is None:
            raise
        raise raised from error


def write_error(path: str | os.PathLike[str], error: Exception, remedy: str = "") -> WriteError | None:
    """The error that :func:`writing` raises for ``error``; None for errors that are not the system's."""
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

    A process that is killed meanwhile may leave temporary files, whose names begin with a dot.

    Args:
        folder: created where it does not exist.
        writers: for each file name a function that writes to the path that it is given.

    Raises:
        WriteError: naming the file. None of the files has changed then.
    """
    place = make_folder(folder)
    done: dict[str, Path] = {}
    try:
        for name, write in writers.items():
            with writing(place / name):
                _check_name(name)
                handle, temporary = tempfile.mkstemp(prefix=_prefix(name), dir=place)
                os.close(handle)
                done[name] = Path(temporary)
                write(done[name])
                with suppress(PermissionError):  # a file system without permissions
                    done[name].chmod(0o644)
                sync_to_disk(done[name])
        for name, temporary in done.items():
            with writing(place / name):
                temporary.replace(place / name)
        with writing(place):
            sync_folder(place)
    finally:
        for temporary in done.values():
            temporary.unlink(missing_ok=True)


def write_atomically(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write ``data`` (text as UTF-8) to ``path`` whole or not at all, and return the path.

    Raises:
        WriteError: when it cannot be written. An existing file is unchanged then.
    """
    target = Path(path)
    encoded = data.encode() if isinstance(data, str) else data
    replace_files(target.parent, {target.name: lambda temporary: temporary.write_bytes(encoded)})
    return target


def write_new(path: str | os.PathLike[str], text: str) -> Path:
    """As :func:`write_atomically`, for a file that must not exist, even if another process creates it meanwhile.

    Raises:
        FileExistsError: when it exists.
        WriteError: when it cannot be written.
    """
    target = Path(path)
    make_folder(target.parent)
    temporary: Path | None = None
    try:
        with writing(target):
            _check_name(target.name)
            handle, name = tempfile.mkstemp(prefix=_prefix(target.name), dir=target.parent)
            os.close(handle)
            temporary = Path(name)
            temporary.write_bytes(text.encode())
            temporary.chmod(0o644)
            sync_to_disk(temporary)
        try:
            os.link(temporary, target)  # unlike a rename, fails where the file exists
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with target.open("x"), writing(target):
                temporary.replace(target)
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return target


def append_line(path: str | os.PathLike[str], line: str) -> None:
    """Append a line of UTF-8 text to a file. The file and its folder are created where they do not exist.

    Raises:
        WriteError: when it cannot be written. A part of the line may have been written.
    """
    target = Path(path)
    make_folder(target.parent)
    with writing(target), target.open("ab") as file:
        file.write(line.encode() + b"\n")


def expanded(path: str | os.PathLike[str]) -> Path | None:
    """A path with ``~`` expanded; None where the user has no home, as in a container without HOME."""
    given = Path(path)
    try:
        found = given.expanduser()
    except RuntimeError:
        return None
    return found if found == given or found.is_absolute() else None  # HOME may be empty


def checked_path(path: str | os.PathLike[str]) -> Path:
    """A path that a user gave, with ``~`` expanded.

    Raises:
        GemmaScopeError: when there is no such home, or the path is empty or contains a NUL.
    """
    text = os.fspath(path)
    if not text or "\0" in text:
        raise GemmaScopeError(f"{text!r} is no path. Give a folder or a file; . is the working directory.")
    found = expanded(path)
    if found is None:
        what = f"{os.fspath(path)} is in a home folder, and there is none"
        raise GemmaScopeError(f"{what}: give the whole path, or set HOME.")
    return found


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Whether a folder exists; False where the system cannot say (no permission, name too long)."""
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):
        return False


def is_file(path: str | os.PathLike[str]) -> bool:
    """Whether a file exists; False where the system cannot say."""
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
    """Raise for names that are paths, or that no system accepts."""
    if "/" in name or "\0" in name or name in ("", ".", ".."):
        raise OSError(errno.EINVAL, f"{name[:80]!r} is no name of a file")
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

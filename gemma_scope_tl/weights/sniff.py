"""What weights files are called, and what a file that is none usually is, told from its first bytes."""

from __future__ import annotations

from pathlib import Path

from gemma_scope_tl.errors import WeightsError

PARAMS_NAME = "params.npz"
CFG_NAME = "cfg.json"
WEIGHTS_NAME = "sae_weights.safetensors"
MAX_ARRAYS = 64
"""Arrays that a weights file may have: an SAE has five, and every one more costs memory and lines of messages."""
REMEDY = "Delete the file and download it again (`hf download REPO FILE --force-download`)."
NOT_READ = "Check its permissions and the disk; the file may be sound."
_HEAD = 512
_MAX_NAME = 64  # characters
_ZIP_STARTS = (b"PK\x03\x04", b"PK\x05\x06")


def weights_error(source: str | Path, what: str, remedy: str = REMEDY) -> WeightsError:
    """A :class:`WeightsError` that names the file, what is wrong with it and what to do.

    >>> print(weights_error("params.npz", "is empty (0 bytes)", "Download it again."))
    params.npz is empty (0 bytes). Download it again.
    """
    return WeightsError(f"{source} {what}. {remedy}".rstrip())


def short(value: object) -> str:
    """``repr`` of something that a file says, cut: whoever made the file may want to fill screens or steer terminals.

    >>> short("x" * 1000)[-9:]
    'xxxxxx...'
    """
    try:
        text = repr(value)
    except ValueError:  # Python does not write out integers of thousands of digits
        return "a number too large to be written"
    return text if len(text) <= 80 else text[:77] + "..."


def check_name(source: str | Path, name: str) -> None:
    """Raise for the name of an array that no message should repeat: overlong, or with control characters."""
    if len(name) > _MAX_NAME or not name.isprintable():
        raise weights_error(source, f"is corrupt: it holds {short(name)}, which is no name of an array")


def read_head(path: Path) -> bytes:
    """The first bytes of a file that exists, is a file and is not empty.

    Raises:
        WeightsError: when it does not, is not, or is.
    """
    try:
        if not path.exists():
            raise weights_error(path, "does not exist", "Check the path, or download the file first.")
        if not path.is_file():
            raise weights_error(path, "is not a file", "Give the path of the file, or of the folder that holds it.")
        with path.open("rb") as file:
            head = file.read(_HEAD)
    except OSError as error:
        raise weights_error(path, f"cannot be read ({error.strerror or error})", NOT_READ) from error
    if not head:
        raise weights_error(path, "is empty (0 bytes)")
    return head


def refuse_other_kinds(path: Path, head: bytes, wanted: str) -> None:
    """Raise for web pages, Git LFS pointers, pickles and the like, saying which of them the file is.

    Args:
        path: the file, for the message.
        head: its first bytes.
        wanted: what it should have been, for example ``"an npz archive"``.
    """
    if "safetensors" in wanted and head[8:9] == b"{":
        return  # a length of 8 bytes, any of them, then JSON
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        what = "is a web page (HTML), not " + wanted + ": the download was answered by a login or error page"
    elif text.startswith(b"version https://git-lfs"):
        what = "is a Git LFS pointer, not " + wanted + ": the repository was cloned without its large files"
    elif head[:1] == b"\x80" and head[1:2] <= b"\x05" and len(head) > 1:
        what = "is a Python pickle, not " + wanted + ". Pickles can run code and are never opened"
    elif head.startswith(b"\x93NUMPY") and "npz" in wanted:
        what = "is a single .npy array, not " + wanted
    elif text.startswith((b"{", b"[")) and "npz" in wanted:
        what = "is JSON text, not " + wanted
    else:
        return
    raise weights_error(path, what)


def starts_as_zip(head: bytes) -> bool:
    """Whether the first bytes are those of a zip archive, which an npz is."""
    return head.startswith(_ZIP_STARTS)

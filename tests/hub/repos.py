"""Repositories as the local Hub keeps them: commits of files, branches and tags, in memory or from a folder."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Protocol

LFS_SUFFIXES = (".npz", ".safetensors", ".bin", ".pt")
_CHUNK = 1 << 22


class Content(Protocol):
    """Bytes that can be read in parts."""

    @property
    def size(self) -> int: ...

    def read(self, offset: int, length: int) -> bytes: ...


@dataclass(frozen=True)
class Bytes:
    """Content held in memory."""

    data: bytes

    @property
    def size(self) -> int:
        return len(self.data)

    def read(self, offset: int, length: int) -> bytes:
        return self.data[offset : offset + length]


@dataclass(frozen=True)
class OnDisk:
    """Content of a local file, which may be far larger than memory: only what is asked for is read."""

    path: Path

    @cached_property
    def size(self) -> int:
        return self.path.stat().st_size

    def read(self, offset: int, length: int) -> bytes:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            return os.pread(descriptor, length, offset)
        finally:
            os.close(descriptor)


class HubFile:
    """A file of a commit.

    Args:
        content: bytes, or a path.
        lfs: whether it is stored with LFS (its etag is the sha256, and downloads are redirected to the other host).
        sha256: the hash, where hashing the content would take long.
    """

    def __init__(self, content: bytes | Path, lfs: bool, sha256: str | None = None) -> None:
        self.content: Content = Bytes(content) if isinstance(content, bytes) else OnDisk(content)
        self.lfs = lfs
        self._sha256 = sha256

    @property
    def size(self) -> int:
        return self.content.size

    @cached_property
    def sha256(self) -> str:
        return self._sha256 or self._hash(hashlib.sha256())

    @cached_property
    def oid(self) -> str:
        """Git's id of the file: the hash of its content, or for LFS of the pointer that stands for it."""
        if not self.lfs:
            return self._hash(hashlib.sha1(b"blob %d\0" % self.size))
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.oid

    def _hash(self, digest: hashlib._Hash) -> str:
        for offset in range(0, self.size, _CHUNK):
            digest.update(self.content.read(offset, _CHUNK))
        return digest.hexdigest()


@dataclass(frozen=True)
class Commit:
    """The files of a repository at one moment."""

    sha: str
    title: str
    files: dict[str, HubFile]
    parent: str | None


@dataclass
class Repo:
    """One repository.

    Attributes:
        id: ``owner/name``.
        kind: ``models``, ``datasets`` or ``spaces``, as in the API's paths.
        gated: whether only tokens in ``members`` may read files; everybody may see the listing.
        private: whether only tokens in ``members`` may see it at all.
        members: tokens with access.
        commits: by sha, oldest first.
        branches, tags: names to shas.
    """

    id: str
    kind: str = "models"
    gated: bool = False
    private: bool = False
    members: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(
        self, files: dict[str, bytes | Path | HubFile | None], title: str = "Update", branch: str = "main"
    ) -> str:
        """Add a commit on a branch: these files added or replaced, those given as None removed.

        Returns:
            The commit's sha.
        """
        parent = self.branches.get(branch)
        now = dict(self.commits[parent].files) if parent else {}
        for name, content in files.items():
            if content is None:
                now.pop(name, None)
            else:
                given = isinstance(content, HubFile)
                now[name] = content if given else HubFile(content, name.endswith(LFS_SUFFIXES))
        listing = "\n".join(f"{name} {file.etag}" for name, file in sorted(now.items()))
        sha = hashlib.sha1(f"{self.id} {len(self.commits)} {parent} {title}\n{listing}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, title, now, parent)
        self.branches[branch] = sha
        return sha

    def commit_folder(self, folder: Path, title: str = "Add folder", branch: str = "main") -> str:
        """Commit every file below a folder; contents stay on disk."""
        paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return self.commit({path.relative_to(folder).as_posix(): path for path in paths}, title, branch)

    def find(self, revision: str) -> Commit | None:
        """The commit of a branch, a tag or a sha."""
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        return self.commits.get(sha)

    def history(self, commit: Commit) -> list[Commit]:
        """A commit and those before it, newest first."""
        found = [commit]
        while (parent := found[-1].parent) is not None:
            found.append(self.commits[parent])
        return found

    def split(self, path: str) -> tuple[str, str]:
        """``{revision}/{file}`` in two; branch names may hold slashes."""
        names = (*self.branches, *self.tags)
        known = [name for name in names if path == name or path.startswith(f"{name}/")]
        revision = max(known, key=len) if known else path.partition("/")[0]
        return revision, path[len(revision) + 1 :]

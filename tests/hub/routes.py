"""What the local Hub answers: the API's read side, files, and the second host that serves LFS content."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.hub.repos import Commit, HubFile, Repo
from tests.hub.serving import FileAnswer, Logged, error

if TYPE_CHECKING:
    from tests.hub.server import LocalHub

_DATE = "2024-08-01T12:00:00.000Z"
_NO_REPO = "Repository not found"


class Routes:
    """The handlers. Each gets its Hub's repositories, faults and log through ``hub``."""

    def __init__(self, hub: LocalHub) -> None:
        self.hub = hub

    def table(self) -> list[Route]:
        """All routes of the Hub's host, in the order in which they are tried."""
        api = "/api/{kind}/{owner}/{name}"
        return [
            Route(api, self.info),
            Route(f"{api}/revision/{{rest:path}}", self.info),
            Route(f"{api}/tree/{{rest:path}}", self.tree),
            Route(f"{api}/paths-info/{{rest:path}}", self.paths_info, methods=["POST"]),
            Route(f"{api}/refs", self.refs),
            Route(f"{api}/commits/{{rest:path}}", self.commits),
            Route("/datasets/{owner}/{name}/resolve/{rest:path}", self.dataset_file),
            Route("/spaces/{owner}/{name}/resolve/{rest:path}", self.space_file),
            Route("/{owner}/{name}/resolve/{rest:path}", self.model_file),
        ]

    def cdn_table(self) -> list[Route]:
        """All routes of the second host."""
        return [Route("/{rest:path}", self.cdn_file)]

    def info(self, request: Request) -> Response:
        repo, answer = self._repo(request, request.path_params["kind"])
        if repo is None:
            return answer
        commit, answer = self._commit(repo, request.path_params.get("rest", "main"))
        return answer if commit is None else JSONResponse(_info(repo, commit, "blobs" in request.query_params))

    def tree(self, request: Request) -> Response:
        repo, answer = self._repo(request, request.path_params["kind"])
        if repo is None:
            return answer
        revision, folder = repo.split(request.path_params["rest"])
        commit, answer = self._commit(repo, revision)
        if commit is None:
            return answer
        recursive = request.query_params.get("recursive", "").lower() in ("1", "true")
        entries = _entries(commit, folder, recursive)
        if folder and not entries:
            return error(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        return JSONResponse(entries)

    async def paths_info(self, request: Request) -> Response:
        repo, answer = self._repo(request, request.path_params["kind"])
        if repo is None:
            return answer
        commit, answer = self._commit(repo, request.path_params["rest"])
        if commit is None:
            return answer
        wanted = parse_qs((await request.body()).decode()).get("paths", [])
        folders = {entry["path"]: entry for entry in _entries(commit, "", True) if entry["type"] == "directory"}
        found = [_file_entry(path, commit.files[path]) for path in wanted if path in commit.files]
        return JSONResponse(found + [folders[path] for path in wanted if path in folders])

    def refs(self, request: Request) -> Response:
        repo, answer = self._repo(request, request.path_params["kind"])
        if repo is None:
            return answer
        listed = {
            "branches": [_ref(name, f"refs/heads/{name}", sha) for name, sha in repo.branches.items()],
            "tags": [_ref(name, f"refs/tags/{name}", sha) for name, sha in repo.tags.items()],
        }
        return JSONResponse({**listed, "converts": [], "pullRequests": []})

    def commits(self, request: Request) -> Response:
        repo, answer = self._repo(request, request.path_params["kind"])
        if repo is None:
            return answer
        commit, answer = self._commit(repo, request.path_params["rest"])
        if commit is None:
            return answer
        history = [
            {"id": c.sha, "title": c.title, "message": "", "date": _DATE, "authors": []} for c in repo.history(commit)
        ]
        return JSONResponse(history)

    def model_file(self, request: Request) -> Response:
        return self._file(request, "models")

    def dataset_file(self, request: Request) -> Response:
        return self._file(request, "datasets")

    def space_file(self, request: Request) -> Response:
        return self._file(request, "spaces")

    def cdn_file(self, request: Request) -> Response:
        """LFS content, for whoever has a valid signature; the Hub's tokens mean nothing here."""
        signed = self.hub.signed.get(request.query_params.get("Signature", ""))
        if signed is None:
            return error(403, None, "Request has expired")
        path, file = signed
        entry: Logged = request.state.entry
        fault = self.hub.faults.take(path, entry.method, "cdn")
        if fault.status is not None:
            return error(fault.status, fault.code, fault.message, fault.headers)
        return FileAnswer(file, entry, fault, {})

    def _file(self, request: Request, kind: str) -> Response:
        """HEAD or GET of a file: its bytes, or for LFS a redirect to the other host."""
        repo, answer = self._repo(request, kind)
        if repo is None:
            return answer
        entry: Logged = request.state.entry
        revision, name = repo.split(request.path_params["rest"])
        fault = self.hub.faults.take(f"{repo.id}/{name}", entry.method, "hub")
        if fault.status is not None:
            return error(fault.status, fault.code, fault.message, fault.headers)
        token = _token(request)
        if repo.gated and token not in repo.members:
            message = f"Access to model {repo.id} is restricted. You must have access to it and be authenticated."
            return error(403 if token else 401, "GatedRepo", message)
        commit, answer = self._commit(repo, revision)
        if commit is None:
            return answer
        headers = {"X-Repo-Commit": commit.sha}
        file = commit.files.get(name)
        if file is None:
            return error(404, "EntryNotFound", "Entry not found", headers)
        if not file.lfs:
            return FileAnswer(file, entry, fault, headers)
        linked = {"X-Linked-Size": str(file.size), "X-Linked-Etag": f'"{fault.etag or file.etag}"', **fault.headers}
        location = self.hub.sign(f"{repo.id}/{name}", file)
        return Response(status_code=302, headers={**headers, **linked, "Location": location})

    def _repo(self, request: Request, kind: str) -> tuple[Repo | None, Response]:
        """The repository of a request, or the answer for one that is missing or hidden."""
        repo = self.hub.repos.get((kind, "{owner}/{name}".format(**request.path_params)))
        token = _token(request)
        if token and token not in self.hub.tokens:
            return None, error(401, None, "Invalid credentials in Authorization header")
        if repo is None or (repo.private and token not in repo.members):
            return None, error(404 if token else 401, "RepoNotFound", _NO_REPO)
        return repo, Response()

    def _commit(self, repo: Repo, revision: str) -> tuple[Commit | None, Response]:
        commit = repo.find(revision)
        return commit, error(404, "RevisionNotFound", f"Invalid rev id: {revision}")


def _token(request: Request) -> str | None:
    return request.headers.get("authorization", "").removeprefix("Bearer ") or None


def _info(repo: Repo, commit: Commit, blobs: bool) -> dict[str, Any]:
    def sibling(path: str, file: HubFile) -> dict[str, Any]:
        lfs = {"sha256": file.sha256, "size": file.size, "pointerSize": 134} if file.lfs else None
        detail = {"size": file.size, "blobId": file.oid, "lfs": lfs} if blobs else {}
        return {"rfilename": path, **detail}

    return {
        "_id": repo.id,
        "id": repo.id,
        "modelId": repo.id,
        "author": repo.id.partition("/")[0],
        "sha": commit.sha,
        "lastModified": _DATE,
        "createdAt": _DATE,
        "private": repo.private,
        "gated": "manual" if repo.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": [sibling(path, file) for path, file in sorted(commit.files.items())],
    }


def _file_entry(path: str, file: HubFile) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
    if file.lfs:
        entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": 134}
    return entry


def _entries(commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Files and folders below a folder, as the tree listing has them."""
    root = f"{folder}/" if folder else ""
    below = {path: file for path, file in sorted(commit.files.items()) if path.startswith(root)}
    folders = sorted({parent for path in below for parent in _parents(path) if parent.startswith(root)})
    listed = [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]
    listed += [_file_entry(path, file) for path, file in below.items()]
    return [entry for entry in listed if recursive or "/" not in entry["path"][len(root) :]]


def _parents(path: str) -> Iterable[str]:
    parts = path.split("/")[:-1]
    return ("/".join(parts[: depth + 1]) for depth in range(len(parts)))


def _ref(name: str, ref: str, sha: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": sha}

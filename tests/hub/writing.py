"""The local Hub's write side: making repositories and branches, LFS uploads in one part or several, commits."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import math
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from tests.hub.faults import Fault, Host
from tests.hub.repos import LFS_SUFFIXES, HubFile, Repo
from tests.hub.serving import Logged, error

if TYPE_CHECKING:
    from tests.hub.server import LocalHub

Handler = Callable[[Request], Awaitable[Response]]


@dataclass
class Ticket:
    """A signed address to upload to: whose it is, what must arrive, and the parts so far."""

    repo: str
    oid: str
    size: int
    parts: dict[int, bytes] = field(default_factory=dict[int, bytes])


class Hangup(Response):
    """An answer that promises more than it sends, whereupon the server closes the connection."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-length", b"100"), (b"connection", b"close")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})


class Writing:
    """The handlers. ``fail`` knows them as ``create``, and ``owner/name/`` with preupload, batch, verify, commit,
    ``branch`` or, on the second host, ``lfs/<sha256>``."""

    def __init__(self, hub: LocalHub) -> None:
        self.hub = hub
        self.tickets: dict[str, Ticket] = {}

    def table(self) -> list[Route]:
        """Routes of the Hub's host."""
        api = "/api/{kind}/{owner}/{name}"
        lfs = "/{owner}/{name}.git/info/lfs"
        routes: list[tuple[str, Handler, str]] = [
            ("/api/whoami-v2", self.whoami, "GET"),
            ("/api/validate-yaml", self.validate_yaml, "POST"),
            ("/api/repos/create", self.create, "POST"),
            (f"{api}/branch/{{rest:path}}", self.branch, "POST"),
            (f"{api}/preupload/{{rest:path}}", self.preupload, "POST"),
            (f"{lfs}/objects/batch", self.batch, "POST"),
            (f"{lfs}/verify", self.verify, "POST"),
            ("/complete/{ticket}", self.complete, "POST"),
            (f"{api}/commit/{{rest:path}}", self.commit, "POST"),
        ]
        return [Route(path, handler, methods=[method]) for path, handler, method in routes]

    def cdn_table(self) -> list[Route]:
        """Routes of the second host."""
        return [Route("/upload/{oid}", self.put, methods=["PUT"])]

    async def whoami(self, request: Request) -> Response:
        token = _token(request)
        if token not in self.hub.tokens:
            return error(401, None, "Invalid credentials in Authorization header")
        return JSONResponse({"type": "user", "name": "owner", "auth": {"type": "access_token"}, "orgs": []})

    async def validate_yaml(self, request: Request) -> Response:
        """The front matter of a model card, which must be a mapping."""
        _, _, rest = str((await request.json())["content"]).partition("---\n")
        try:
            head: Any = yaml.safe_load(rest.partition("\n---")[0])
        except yaml.YAMLError as problem:
            head = str(problem)
        if not isinstance(head, dict):
            return JSONResponse({"error": "Invalid card", "errors": [{"message": str(head)}]}, 400)
        return JSONResponse({"errors": [], "warnings": []})

    async def create(self, request: Request) -> Response:
        body = await request.json()
        if (refusal := self._refusal(request, None, "create")) is not None:
            return refusal
        id = f"{body.get('organization') or 'owner'}/{body['name']}"
        address = {"url": f"{self.hub.url}/{id}", "name": id}
        if ("models", id) in self.hub.repos:
            return JSONResponse({"error": "You already created this model repo", **address}, 409)
        made = self.hub.repo(id, private=body.get("visibility") == "private" or bool(body.get("private")))
        made.members.add(str(_token(request)))
        made.commit({".gitattributes": b"*.npz filter=lfs diff=lfs merge=lfs -text\n"}, "initial commit")
        return JSONResponse(address)

    async def branch(self, request: Request) -> Response:
        repo, refusal = self._repo(request, "branch")
        if repo is None:
            return refusal
        name, start = request.path_params["rest"], (await request.json()).get("startingPoint", "main")
        if name in repo.branches:
            return error(409, None, "Reference already exists")
        commit = repo.find(start)
        if commit is None:
            return error(404, "RevisionNotFound", f"Invalid rev id: {start}")
        repo.branches[name] = commit.sha
        return JSONResponse({})

    async def preupload(self, request: Request) -> Response:
        """Which files go to LFS, which a ``.gitignore`` leaves out, and what the branch has of them."""
        repo, refusal = self._repo(request, "preupload")
        if repo is None:
            return refusal
        head = repo.find(request.path_params["rest"])
        if head is None:
            return error(404, "RevisionNotFound", "Invalid rev id")
        ignored = head.files[".gitignore"].content.read(0, 9999).decode().split() if ".gitignore" in head.files else []
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": file["path"] in ignored,
                "oid": head.files[file["path"]].etag if file["path"] in head.files else None,
            }
            for file in (await request.json())["files"]
        ]
        return JSONResponse({"files": answers})

    async def batch(self, request: Request) -> Response:
        repo, refusal = self._repo(request, "batch")
        if repo is None:
            return refusal
        body = await request.json()
        if "basic" not in body["transfers"] or body["operation"] != "upload":
            return error(400, None, "Not an LFS upload")
        objects = [self._actions(repo, one["oid"], one["size"]) for one in body["objects"]]
        return JSONResponse({"transfer": "multipart" if self.hub.part_size else "basic", "objects": objects})

    def _actions(self, repo: Repo, oid: str, size: int) -> dict[str, Any]:
        """What to do for one content: nothing where the repository holds it."""
        if self._held(repo, oid) is not None:
            return {"oid": oid, "size": size}
        ticket = uuid.uuid4().hex
        self.tickets[ticket] = Ticket(repo.id, oid, size)
        href = f"{self.hub.cdn_url}/upload/{oid}?Signature={ticket}"
        header: dict[str, str] = {}
        if self.hub.part_size and size > self.hub.part_size:
            count = math.ceil(size / self.hub.part_size)
            header = {str(part): f"{href}&part={part}" for part in range(1, count + 1)}
            header["chunk_size"] = str(self.hub.part_size)
            href = f"{self.hub.url}/complete/{ticket}"
        verify = {"href": f"{self.hub.url}/{repo.id}.git/info/lfs/verify"}
        return {"oid": oid, "size": size, "actions": {"upload": {"href": href, "header": header}, "verify": verify}}

    async def put(self, request: Request) -> Response:
        """One content, or one part of it, from whoever has a valid signature."""
        ticket = self.tickets.get(request.query_params.get("Signature", ""))
        oid, entry = request.path_params["oid"], _entry(request)
        if ticket is None or ticket.oid != oid:
            return error(403, None, "Request has expired")
        fault = self.hub.faults.take(f"{ticket.repo}/lfs/{oid}", "PUT", "cdn")
        await asyncio.sleep(fault.stall)
        body = bytearray()
        try:
            async for piece in request.stream():
                body += piece
                entry.taken += len(piece)
                if fault.cut_upload is not None and len(body) >= fault.cut_upload:
                    return Hangup()
        except ClientDisconnect:
            return Response(status_code=499)
        if fault.status is not None:
            return error(fault.status, fault.code, fault.message, fault.headers)
        part = request.query_params.get("part")
        if part is not None:
            ticket.parts[int(part)] = bytes(body)
            return Response(headers={"ETag": f'"{hashlib.md5(body).hexdigest()}"'})
        return self._keep(ticket, bytes(body))

    async def complete(self, request: Request) -> Response:
        """The parts of an upload become one content."""
        ticket = self.tickets.get(request.path_params["ticket"])
        body = await request.json()
        if ticket is None or body["oid"] != ticket.oid:
            return error(403, None, "Request has expired")
        pieces = [ticket.parts.get(part["partNumber"]) for part in body["parts"]]
        etags = [f'"{hashlib.md5(piece or b"").hexdigest()}"' for piece in pieces]
        if etags != [part["etag"] for part in body["parts"]]:
            return error(400, None, "Parts do not match")
        return self._keep(ticket, b"".join(piece or b"" for piece in pieces))

    def _keep(self, ticket: Ticket, data: bytes) -> Response:
        if hashlib.sha256(data).hexdigest() != ticket.oid or len(data) != ticket.size:
            return error(400, None, "The content does not match its sha256")
        self.hub.store.setdefault(ticket.repo, {})[ticket.oid] = data
        return Response()

    async def verify(self, request: Request) -> Response:
        repo, refusal = self._repo(request, "verify")
        if repo is None:
            return refusal
        body = await request.json()
        held = self._held(repo, body["oid"])
        good = held is not None and held.size == body["size"]
        return JSONResponse({}) if good else error(404, None, "No such content")

    async def commit(self, request: Request) -> Response:
        """All operations or none, on the parent that the client names."""
        fault = self._fault(request, "commit")
        if fault.status is not None and not fault.after:
            return error(fault.status, fault.code, fault.message, fault.headers)
        repo, refusal = self._repo(request, "commit", fault)
        if repo is None:
            return refusal
        branch = request.path_params["rest"]
        lines = [json.loads(line) for line in (await request.body()).splitlines() if line.strip()]
        header = lines[0]["value"]
        if branch not in repo.branches:
            return error(404, "RevisionNotFound", f"Invalid rev id: {branch}")
        if header.get("parentCommit") not in (None, repo.branches[branch]):
            return error(412, None, "A commit has happened since. Please refresh and try again.")
        changes: dict[str, HubFile | bytes | Any] = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                changes[value["path"]] = HubFile(base64.b64decode(value["content"]), lfs=False)
            elif line["key"] == "lfsFile" and (held := self._held(repo, value["oid"])) is not None:
                changes[value["path"]] = held
            elif line["key"] == "deletedFile":
                changes[value["path"]] = None
            else:
                return error(400, None, f"Cannot commit {line['key']} {value['path']}")
        sha = repo.commit(changes, header["summary"], branch)
        if fault.status is not None:
            return error(fault.status, fault.code, fault.message, fault.headers)
        address = f"{self.hub.url}/{repo.id}/commit/{sha}"
        return JSONResponse({"success": True, "commitOid": sha, "commitUrl": address, "pullRequestUrl": None})

    def _held(self, repo: Repo, oid: str) -> HubFile | None:
        """A content that was uploaded to a repository, committed or not."""
        data = self.hub.store.get(repo.id, {}).get(oid)
        if data is not None:
            return HubFile(data, lfs=True)
        files = (file for commit in repo.commits.values() for file in commit.files.values())
        return next((file for file in files if file.lfs and file.sha256 == oid), None)

    def _find(self, request: Request) -> Repo | None:
        kind = request.path_params.get("kind", "models")
        return self.hub.repos.get((kind, "{owner}/{name}".format(**request.path_params)))

    def _fault(self, request: Request, step: str, host: Host = "hub") -> Fault:
        id = "{owner}/{name}/".format(**request.path_params) if "owner" in request.path_params else ""
        return self.hub.faults.take(f"{id}{step}", request.method, host)

    def _refusal(self, request: Request, repo: Repo | None, step: str, fault: Fault | None = None) -> Response | None:
        """The answer for a fault, or for a token that is missing, unknown, or may not write."""
        fault = fault or self._fault(request, step)
        if fault.status is not None and not fault.after:
            return error(fault.status, fault.code, fault.message, fault.headers)
        token = _token(request)
        if token not in self.hub.tokens:
            return error(401, None, "Invalid credentials in Authorization header" if token else "Please log in")
        if token in self.hub.readers or (repo is not None and token not in repo.members):
            return error(403, None, "You don't have the rights to write here")
        return None

    def _repo(self, request: Request, step: str, fault: Fault | None = None) -> tuple[Repo | None, Response]:
        repo = self._find(request)
        refusal = self._refusal(request, repo, step, fault)
        if refusal is not None:
            return None, refusal
        return repo, error(404, "RepoNotFound", "Repository not found")


def _token(request: Request) -> str | None:
    return request.headers.get("authorization", "").removeprefix("Bearer ") or None


def _entry(request: Request) -> Logged:
    return request.state.entry

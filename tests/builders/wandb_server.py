"""A W&B backend on 127.0.0.1 that the real wandb-core talks to; it keeps what it is told in memory.

It answers what our use of the SDK asks: runs with history, summary, files and artifacts, resuming, syncing of
offline runs, `Api().runs`, saved views. It tells whether we use the SDK right, nothing about W&B's server.
What it was asked and does not know is in `unknown`, which a test expects to be empty.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote

ENTITY = "somebody"
KEY = "0" * 40
PROJECT_ID = "UHJvamVjdDox"

Json = dict[str, Any]


@dataclass
class BackendRun:
    """One run as the backend knows it."""

    id: str
    project: str
    name: str
    display_name: str = ""
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    config: Json = field(default_factory=dict)
    summary: Json = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    """Rows of history, events and output by their line number."""
    files: dict[str, bytes] = field(default_factory=dict)
    state: str = "running"
    exit_code: int | None = None
    preempted: bool = False

    @property
    def history(self) -> list[Json]:
        """The rows in order."""
        rows = self.lines.get("wandb-history.jsonl", {})
        return [json.loads(rows[number]) for number in sorted(rows)]

    def node(self) -> Json:
        """The run as a GraphQL answer."""
        then = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
        return {
            "id": self.id, "projectId": 1, "name": self.name, "displayName": self.display_name,
            "tags": self.tags, "group": self.group, "jobType": self.job_type, "notes": None,
            "config": json.dumps(self.config), "summaryMetrics": json.dumps(self.summary),
            "historyLineCount": len(self.history),
            "state": self.state, "createdAt": then, "heartbeatAt": then, "description": None,
            "sweepName": None,
            "commit": None, "readOnly": False, "systemMetrics": "{}", "historyKeys": None, "stopped": False,
            "user": {"name": ENTITY, "username": ENTITY}, "projectName": self.project, "entityName": ENTITY,
        }  # fmt: skip


@dataclass
class Artifact:
    """An artifact and the files that were handed in for it."""

    id: str
    name: str
    type: str
    client_id: str | None
    digest: str | None
    files: dict[str, bytes] = field(default_factory=dict)
    committed: bool = False


class Backend:
    """What the server knows; each method of GraphQL is one here, under its name."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.runs: dict[tuple[str, str], BackendRun] = {}
        self.artifacts: dict[str, Artifact] = {}
        self.views: list[Json] = []
        self.unknown: list[str] = []
        self.starts = 0
        self._numbers = itertools.count()
        self.lock = threading.RLock()

    # GraphQL

    def answer(self, question: Json) -> Json:
        """The answer to a GraphQL request."""
        found = re.search(r"(?:query|mutation)\s+(\w+)", question["query"])
        name = question.get("operationName") or (found[1] if found else "?")
        method: Callable[[Json], Json] | None = getattr(self, f"on_{name}", None)
        if method is None:
            self.unknown.append(name)
            return {"data": None, "errors": [{"message": f"this test backend knows no {name}"}]}
        return {"data": method(question.get("variables") or {})}

    def on_Viewer(self, _: Json) -> Json:
        teams = {"edges": [{"node": {"name": ENTITY}}]}
        viewer = {
            "id": "u",
            "entity": ENTITY,
            "username": ENTITY,
            "name": ENTITY,
            "email": "",
            "admin": False,
        }
        return {"viewer": {**viewer, "flags": "{}", "teams": teams}}

    def on_ServerFeaturesQuery(self, _: Json) -> Json:
        return {"serverInfo": {"features": []}}

    def on_ServerInfo(self, _: Json) -> Json:
        return {
            "serverInfo": {"cliVersionInfo": {"max_cli_version": "99.0.0"}, "latestLocalVersionInfo": None}
        }

    def on_GetDefaultEntity(self, _: Json) -> Json:
        return {"viewer": {"id": "u", "entity": ENTITY}}

    def on_ProjectInternalId(self, _: Json) -> Json:
        return {"project": {"id": "p", "internalId": PROJECT_ID}}

    def on_OrganizationCoreWeaveOrganizationID(self, _: Json) -> Json:
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def on_RunStoppedStatus(self, _: Json) -> Json:
        return {"project": {"run": {"stopped": False}}}

    def on_RunResumeStatus(self, given: Json) -> Json:
        run, bucket = self.runs.get((given["project"], given["name"])), None
        self.starts += 1
        if run is not None:
            history = run.lines.get("wandb-history.jsonl", {})
            events = run.lines.get("wandb-events.jsonl", {})
            bucket = {
                "id": run.id, "name": run.name, "displayName": run.display_name, "tags": run.tags,
                "notes": None, "config": json.dumps(run.config), "summaryMetrics": json.dumps(run.summary),
                "historyLineCount": len(history), "eventsLineCount": len(events),
                "logLineCount": len(run.lines.get("output.log", {})), "wandbConfig": json.dumps({"t": 1}),
                "historyTail": json.dumps([history[max(history)]] if history else []),
                "eventsTail": json.dumps([events[max(events)]] if events else []),
            }  # fmt: skip
        return {
            "model": {
                "id": "p",
                "name": given["project"],
                "entity": {"id": "e", "name": ENTITY},
                "bucket": bucket,
            }
        }

    def on_UpsertBucket(self, given: Json) -> Json:
        by_id = next((run for run in self.runs.values() if run.id == given.get("id")), None)
        new = by_id is None and (given["project"], given["name"]) not in self.runs
        run = by_id or self._run(given["project"], given["name"])
        for name, key in (("display_name", "displayName"), ("group", "groupName"), ("job_type", "jobType"),
                          ("tags", "tags"), ("state", "state")):  # fmt: skip
            if given.get(key) is not None:
                setattr(run, name, given[key])
        for name, key in (("config", "config"), ("summary", "summaryMetrics")):
            if given.get(key) is not None:
                setattr(run, name, json.loads(given[key]))
        project = {"id": "p", "name": run.project, "entity": {"id": "e", "name": ENTITY}}
        bucket = {**run.node(), "sweepName": None, "project": project}
        return {"upsertBucket": {"inserted": new, "bucket": bucket}}

    def on_CreateRunFiles(self, given: Json) -> Json:
        run = self._run(given["project"], given["run"])
        files = [{"name": name, "uploadUrl": self._place(run.id, name)} for name in given["files"]]
        return {"createRunFiles": {"runID": run.id, "uploadHeaders": [], "files": files}}

    def on_MarkRunFilesUploaded(self, _: Json) -> Json:
        return {"markRunFilesUploaded": {"success": True}}

    def on_ArtifactType(self, _: Json) -> Json:
        return {"project": {"artifact": None}}

    def on_ClientIDMapping(self, given: Json) -> Json:
        known = (a.id for a in self.artifacts.values() if a.client_id == given["clientID"])
        return {"clientIDMapping": {"serverID": next(known, "")}}

    def on_CreateArtifact(self, given: Json) -> Json:
        asked, number = given["input"], f"artifact-{len(self.artifacts)}"
        self.artifacts[number] = Artifact(
            number, asked["artifactCollectionName"], asked["artifactTypeName"], asked.get("clientID"),
            asked.get("digest"),
        )  # fmt: skip
        sequence = {"latestArtifact": None}
        return {
            "createArtifact": {"artifact": {"id": number, "state": "PENDING", "artifactSequence": sequence}}
        }

    def on_CreateArtifactManifest(self, given: Json) -> Json:
        return {"createArtifactManifest": {"artifactManifest": self._manifest(given["artifactID"])}}

    def on_UpdateArtifactManifest(self, given: Json) -> Json:
        number = given["artifactManifestID"].removeprefix("manifest-")
        return {"updateArtifactManifest": {"artifactManifest": self._manifest(number)}}

    def _manifest(self, number: str) -> Json:
        file = {"id": "f", "uploadUrl": self._place(number, "manifest.json"), "uploadHeaders": []}
        return {"id": f"manifest-{number}", "file": file}

    def on_CreateArtifactFiles(self, given: Json) -> Json:
        edges = [
            {
                "node": {
                    "storagePath": asked["name"], "uploadHeaders": [], "uploadMultipartUrls": None,
                    "uploadUrl": self._place(asked["artifactID"], asked["name"]),
                    "artifact": {"id": asked["artifactID"]},
                }
            }
            for asked in given.get("input", given)["artifactFiles"]
        ]  # fmt: skip
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def on_CommitArtifact(self, given: Json) -> Json:
        artifact = self.artifacts[given.get("input", given)["artifactID"]]
        artifact.committed = True
        return {"commitArtifact": {"artifact": {"id": artifact.id, "digest": artifact.digest}}}

    def on_UseArtifact(self, given: Json) -> Json:
        return {"useArtifact": {"artifact": {"id": given["input"].get("artifactID")}}}

    def on_Runs(self, given: Json) -> Json:
        wanted = json.loads(given.get("filters") or "{}")
        found = [r for r in self.runs.values() if r.project == given["project"] and _matches(r, wanted)]
        edges = [{"node": run.node(), "cursor": str(number)} for number, run in enumerate(found)]
        page = {"endCursor": None, "hasNextPage": False}
        runs = {"edges": edges, "pageInfo": page}
        return {
            "project": {"internalId": PROJECT_ID, "runCount": len(found), "readOnly": False, "runs": runs}
        }

    def on_Run(self, given: Json) -> Json:
        run = self.runs.get((given["project"], given["name"]))
        return {"project": {"internalId": PROJECT_ID, "run": run.node() if run else None}}

    def on_RunFullHistory(self, given: Json) -> Json:
        history = self.runs[given["project"], given.get("run") or given["name"]].history
        if "minStep" in given:
            history = [row for row in history if given["minStep"] <= row["_step"] < given["maxStep"]]
        return {
            "project": {"run": {"history": [json.dumps(row) for row in history], "sampledHistory": [history]}}
        }

    on_HistoryPage = on_RunSampledHistory = on_RunHistoryKeys = on_RunFullHistory

    def on_RunParquetHistory(self, given: Json) -> Json:
        rows = self.runs[given["project"], given.get("run") or given["name"]].history
        return {"project": {"run": {"parquetHistory": {"liveData": rows, "parquetUrls": []}}}}

    def on_UpsertView2(self, given: Json) -> Json:
        self.views.append(given)
        view = {"id": f"view-{len(self.views)}", "name": given["name"]}
        return {"upsertView": {"inserted": True, "view": view}}

    # Files

    def stream(self, project: str, name: str, body: Json) -> Json:
        """Lines of a run's history and the like, its summary, its end."""
        run = self._run(project, name)
        for file, part in (body.get("files") or {}).items():
            lines = part.get("content") or []
            if file == "wandb-summary.json":
                run.summary = json.loads(lines[-1]) if lines else run.summary
                continue
            kept = run.lines.setdefault(file, {})
            kept.update(enumerate(lines, start=part.get("offset", 0)))
        run.preempted |= bool(body.get("preempting"))
        if body.get("complete") is not None:
            run.exit_code = body.get("exitcode")
            ended = "preempted" if body.get("preempting") else "failed"
            run.state = ended if run.exit_code else "finished"
        return {"exitcode": None, "limits": {}}

    def store(self, owner: str, name: str, content: bytes) -> None:
        """A file of a run or of an artifact."""
        if owner in self.artifacts:
            self.artifacts[owner].files[name] = content
        for run in self.runs.values():
            if run.id == owner:
                run.files[name] = content

    def _run(self, project: str, name: str) -> BackendRun:
        if (project, name) not in self.runs:
            # Never a number again, not even after a run was removed: runs are updated by it.
            self.runs[project, name] = BackendRun(f"run-{next(self._numbers)}", project, name)
        return self.runs[project, name]

    def _place(self, owner: str, name: str) -> str:
        return f"{self.url}/storage/{quote(owner)}/{quote(name)}"


def _matches(run: BackendRun, wanted: Mapping[str, Any]) -> bool:
    """The few of W&B's filters that these tests use: equality, of a run's own fields."""
    own = {"group": run.group, "state": run.state, "jobType": run.job_type, "displayName": run.display_name}
    return all(
        own[name] == (value["$eq"] if isinstance(value, dict) else value) for name, value in wanted.items()
    )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    backend: Backend

    def log_message(self, *_: Any) -> None:
        """Says nothing."""

    def _any(self) -> None:
        content, path = self._content(), self.path
        backend = self.backend
        try:
            with backend.lock:
                self._send(self._answer(backend, path, content))
        except Exception as error:  # what this backend gets wrong must show and not hang the client
            backend.unknown.append(f"{path}: {error!r}")
            self._send({"errors": [{"message": repr(error)}]}, 400)

    def _answer(self, backend: Backend, path: str, content: bytes) -> Json:
        if path == "/graphql":
            return backend.answer(json.loads(content))
        if found := re.match(r"/files/([^/]+)/([^/]+)/([^/]+)/file_stream$", path):
            return backend.stream(unquote(found[2]), unquote(found[3]), json.loads(content))
        if found := re.match(r"/storage/([^/]+)/(.+)$", path):
            backend.store(unquote(found[1]), unquote(found[2]), content)
        else:
            backend.unknown.append(f"{self.command} {path}")
        return {}

    def _content(self) -> bytes:
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        return gzip.decompress(content) if self.headers.get("Content-Encoding") == "gzip" else content

    def _send(self, answer: Json, status: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = do_HEAD = _any


@contextmanager
def serving() -> Iterator[Backend]:
    """A backend on a free port, for as long as the block lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    backend = Backend(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = type("Handler", (_Handler,), {"backend": backend})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield backend
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

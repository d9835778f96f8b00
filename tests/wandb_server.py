"""A W&B server on loopback, as much of one as `wandb` needs to log in, make a run, resume it and upload its rows and
artifacts.

It keeps the views that `wandb-workspaces` saves, too.
"""

import base64
import gzip
import json
import re
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

KEY = "s3cr3t" + "0" * 34


class Server:
    """`fail` is the status that uploads of rows are answered with, or "stall"; None for a server that works."""

    def __init__(self, port: int = 0) -> None:
        self.runs: dict[str, dict] = {}  # id -> name, tags, notes, rows by offset, exit code
        self.projects: set[str] = set()  # of entity `e`, as far as they are listed
        self.views: dict[str, dict] = {}  # id -> what was sent
        self.artifacts: dict[str, dict] | None = None  # id -> what was sent, and its state; None: it takes none
        self.fail: int | str | None = None
        self.troubles: list[int] = []  # that pass: statuses for the first uploads
        self.trials: list[dict] = []  # of a sweep, that an agent will be told to run
        self.stopped: set[str] = set()  # ids of runs on whose page somebody has pressed "Stop run"
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.headers.get("Content-Encoding") == "gzip":
                    body = gzip.decompress(body)
                status, answer = outer.answer(urlsplit(self.path).path, self.headers.get("Authorization", ""), body)
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            do_PUT = do_GET = do_POST  # noqa: N815

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # a client that was killed
        self.port = self.http.server_port
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": f"http://127.0.0.1:{self.port}", "WANDB_API_KEY": KEY}

    def rows(self, run_id: str) -> list[dict]:
        return [row for _, row in sorted(self.runs[run_id]["rows"].items())]

    def answer(self, path: str, authorization: str, body: bytes) -> tuple[int, dict]:
        if path == "/graphql":
            key = base64.b64decode(authorization.removeprefix("Basic ")).decode().partition(":")[2]
            if key != KEY:
                return 401, {"errors": [{"message": "invalid API key"}]}
            message = json.loads(body)
            return 200, {"data": self.graphql(message["query"], message.get("variables") or {})}
        if path.endswith("/file_stream"):
            if self.fail == "stall":
                time.sleep(100)
            if self.fail or self.troubles:
                return self.fail or self.troubles.pop(0), {"error": "as the test wants it"}
            run = self.runs[path.split("/")[-2]]
            message = json.loads(body)
            history = message.get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            run["rows"] |= {i: json.loads(line) for i, line in enumerate(history["content"], history["offset"])}
            if message.get("complete"):
                run["exit_code"] = message.get("exitcode")
            return 200, {"stopped": path.split("/")[-2] in self.stopped}
        return 200, {}

    def graphql(self, query: str, variables: dict) -> dict:
        operation = (re.findall(r"(?:query|mutation)\s+(\w+)", query) or [""])[0]
        if operation == "UpsertBucket":
            known = variables["name"] in self.runs
            run = self.runs.setdefault(variables["name"], {"rows": {}, "exit_code": None})
            sent = dict(name=variables.get("displayName"), tags=variables.get("tags"), notes=variables.get("notes"))
            run |= {key: sent[key] if sent[key] is not None else run.get(key) for key in sent}  # as they are in the app
            return {"upsertBucket": {"bucket": self.bucket(variables["name"]), "inserted": not known}}
        if operation == "RunResumeStatus":
            bucket = self.bucket(variables["name"]) if variables["name"] in self.runs else None
            return {"model": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}, "bucket": bucket}}
        if operation == "Viewer":
            return {"viewer": {"id": "u", "entity": "e", "username": "u", "flags": "{}", "teams": {"edges": []}}}
        if operation == "CreateRunFiles":  # without an answer to this one wandb-core crashes
            url = f"http://127.0.0.1:{self.port}/file"
            files = [{"name": name, "uploadUrl": url} for name in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if operation == "CreateAgent":
            return {"createAgent": {"agent": {"id": "agent"}}}
        if operation == "Heartbeat":
            commands = [{"type": "run"} | self.trials.pop(0)] if self.trials else []
            return {"agentHeartbeat": {"agent": {"id": "agent"}, "commands": json.dumps(commands)}}
        if "rtifact" in operation and self.artifacts is not None:
            return self.artifact(operation, variables)
        return self.dashboard(operation, variables)

    def artifact(self, operation: str, variables: dict) -> dict:
        given, url = variables.get("input", variables), f"http://127.0.0.1:{self.port}/file"
        if operation == "CreateArtifact":
            id_ = given["clientID"]
            self.artifacts.setdefault(id_, given | {"id": id_, "state": "PENDING"})
            node = self.version(id_) | {"artifactSequence": {"latestArtifact": None}}
            return {"createArtifact": {"artifact": node}}
        if operation == "CreateArtifactManifest":
            file = {"id": "f", "uploadUrl": url, "uploadHeaders": []}
            return {"createArtifactManifest": {"artifactManifest": {"id": "m", "file": file}}}
        if operation == "CreateArtifactFiles":
            rest = {"storagePath": "s", "uploadUrl": url, "uploadHeaders": [], "uploadMultipartUrls": None}
            files = [rest | {"artifact": {"id": file["artifactID"]}} for file in given["artifactFiles"]]
            return {"createArtifactFiles": {"files": edges(files)}}
        if operation == "CommitArtifact":
            self.artifacts[given["artifactID"]]["state"] = "COMMITTED"
            return {"commitArtifact": {"artifact": self.version(given["artifactID"])}}
        if operation == "ArtifactType":  # of the artifact of this name, if there is one
            return {"project": {"artifact": None}}
        if operation == "ArtifactByID":
            return {"artifact": self.version(given["id"])}
        return {}

    def version(self, id_: str) -> dict:
        made = self.artifacts[id_]
        project = {"id": "p", "internalId": "p", "entityName": "e", "entity": {"id": "e", "name": "e"}}
        project |= {"name": "p", "createdAt": "2026-01-01", "isBenchmark": False, "user": None}
        sequence = {"__typename": "ArtifactSequence", "name": made["artifactCollectionName"], "project": project}
        return {
            "id": id_, "artifactSequence": sequence, "versionIndex": 0, "state": made["state"], "tags": [],
            "artifactType": {"name": made["artifactTypeName"]}, "digest": made["digest"], "description": None,
            "metadata": made.get("metadata"), "ttlDurationSeconds": -2, "ttlIsInherited": True, "historyStep": None,
            "commitHash": None, "size": 0, "fileCount": 0, "createdAt": "2026-01-01T00:00:00Z", "updatedAt": None,
            "aliases": [],
        }  # fmt: skip

    def dashboard(self, operation: str, variables: dict) -> dict:
        if operation == "GetProjects":
            found = self.projects if variables["entity"] == "e" else ()
            rest = {"id": "p", "entityName": "e", "createdAt": "2026-01-01", "isBenchmark": False, "user": None}
            return {"models": edges({"name": name} | rest for name in found)}
        if operation == "ProjectInternalId":
            return {"project": {"id": "p", "internalId": "p"}}
        if operation in ("View", "ProjectViews"):
            name, kind = variables.get("viewName"), variables.get("viewType", "runs")
            found = [view for view in self.views.values() if view["type"] == kind and name in (None, view["name"])]
            return {"project": {"allViews": edges(found)}}
        if operation in ("UpsertView2", "upsertView"):
            id_ = variables.get("id") or f"view{len(self.views)}"
            project = {"id": "p", "name": variables["projectName"], "entityName": variables["entityName"]}
            self.views[id_] = variables | {"id": id_, "project": project}
            return {"upsertView": {"view": self.views[id_], "inserted": not variables.get("id")}}
        return {}

    def bucket(self, run_id: str) -> dict:
        rows, run = self.rows(run_id), self.runs[run_id]
        return {
            "id": run_id, "name": run_id, "displayName": run["name"], "sweepName": None, "tags": run["tags"] or [],
            "config": "{}", "wandbConfig": json.dumps({"t": 1}),  # a client resumes no run without one
            "summaryMetrics": json.dumps(rows[-1] if rows else {}),
            "notes": run["notes"],
            "historyLineCount": len(rows), "historyTail": json.dumps([json.dumps(row) for row in rows[-1:]]),
            "eventsLineCount": 0, "eventsTail": "[]", "logLineCount": 0,
            "project": {"id": "p", "name": "p", "entity": {"id": "e", "name": "e"}},
        }  # fmt: skip


def edges(nodes: Iterable[dict]) -> dict:
    found = [{"node": node, "cursor": "c"} for node in nodes]
    return {"edges": found, "pageInfo": {"hasNextPage": False, "endCursor": None}}

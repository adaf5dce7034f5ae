"""A server that stands for the model hub: what huggingface_hub asks it during an upload.

It takes all files within the commit. How the client sends large files to the storage of the hub is its own business.
"""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub:
    """The state of the hub.

    Attributes:
        account: answer to whoami; None refuses the token.
        repositories: name -> private; created by the client.
        files: path -> content of the last commit.
        requests: method and path of every request.
        answers: path -> status and headers, in place of the usual answer.
    """

    def __init__(self) -> None:
        self.account: dict[str, Any] | None = {"name": "ada", "orgs": [{"name": "lab", "roleInOrg": "write"}]}
        self.repositories: dict[str, bool] = {}
        self.files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.answers: dict[str, tuple[int, dict[str, str]]] = {}
        self.refuses_commits = False
        self.url = ""


@contextmanager
def fake_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def answer(self, code: int, content: Any, **headers: str) -> None:
            body = json.dumps(content).encode()
            self.send_response(code)
            for name, value in {
                "Content-Type": "application/json",
                "Content-Length": str(len(body)),
                **headers,
            }.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def handle_request(self) -> None:
            hub.requests.append(f"{self.command} {self.path}")
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = self.read_chunks()
            answer_request(hub, self, self.path, body)

        def read_chunks(self) -> bytes:
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body

        do_GET = do_POST = handle_request

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def answer_request(hub: Hub, handler: Any, path: str, body: bytes) -> None:
    if path in hub.answers:
        code, headers = hub.answers[path]
        handler.answer(code, {}, **headers)
    elif path == "/api/whoami-v2":
        handler.answer(401, {"error": "Invalid token"}) if hub.account is None else handler.answer(200, hub.account)
    elif "/auth-check" in path:
        name = "/".join(path.split("/")[3:5])
        known = name in hub.repositories
        handler.answer(200 if known else 404, {}, **({} if known else {"X_Error_Code": "RepoNotFound"}))
    elif path == "/api/repos/create":
        request = json.loads(body)
        name = f"{request.get('organization') or 'ada'}/{request['name'].rpartition('/')[2]}"
        hub.repositories.setdefault(name, request.get("private") or request.get("visibility") == "private")
        handler.answer(200, {"url": f"{hub.url}/{name}", "id": "1"})
    elif path == "/api/validate-yaml":
        handler.answer(200, {"errors": [], "warnings": []})
    elif "/preupload/" in path:
        files = json.loads(body)["files"]
        modes = [{"path": file["path"], "shouldIgnore": False, "uploadMode": "regular"} for file in files]
        handler.answer(200, {"files": modes})
    elif "/commit/" in path and hub.refuses_commits:
        handler.answer(403, {}, X_Error_Message="storage quota used up")
    elif "/commit/" in path:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        name = "/".join(path.split("/")[3:5])
        handler.answer(200, {"commitOid": "0" * 40, "commitUrl": f"{hub.url}/{name}/commit/0", "success": True})
    else:
        handler.answer(404, {"error": f"unknown path {path}"})

"""A stand-in for the Hugging Face Hub: one repository, the few endpoints that fetching it takes."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "someone/tiny"
BELOW = "/mirror/hub"  # as a registry that mirrors the Hub has it


class Hub(ThreadingHTTPServer):
    """Serves the files of a folder below a path; `asked` lists (method, path, range).

    `token`, where set, must be sent. `cut` ends a download after so many bytes, `wrong` has other bytes in place of a
    file's, and the last byte of the file `stall` never comes.
    """

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        self.cut: dict[str, int] = {}
        self.wrong: dict[str, bytes] = {}
        self.token: str | None = None
        self.stalled = threading.Event()
        self.stall = ""
        self.asked: list[tuple[str, str, str | None]] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}{BELOW}"

    def close(self):
        self.shutdown()
        self.server_close()
        self._thread.join()

    def siblings(self):
        for path, data in self.files.items():
            sibling = {"rfilename": path, "size": len(data), "blobId": git_hash(data)}
            if path.endswith(".safetensors"):
                sibling["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 130}
            yield sibling


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def git_hash(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entry(sibling):
    """The same file in the listing of a tree."""
    entry = {"type": "file", "path": sibling["rfilename"], "size": sibling["size"], "oid": sibling["blobId"]}
    if lfs := sibling.get("lfs"):
        entry["lfs"] = {"oid": lfs["sha256"], "size": lfs["size"], "pointerSize": lfs["pointerSize"]}
    return entry


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, body):
        path = self.path.partition("?")[0]
        self.server.asked.append((self.command, path, self.headers.get("range")))
        below, path = path[: len(BELOW)], path[len(BELOW) :]
        if below != BELOW:
            self._send(404, b"not below the path", {}, body)
        elif self.server.token and self.headers.get("authorization") != f"Bearer {self.server.token}":
            self._send(401, b"{}", {"x-error-code": "RepoNotFound"}, body)
        elif path.startswith("/api/models/"):
            self._model(path.removeprefix("/api/models/"), body)
        elif path.startswith(f"/{REPOSITORY}/resolve/{COMMIT}/"):
            self._file(path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/"), body)
        else:
            self._send(404, b"{}", {"x-error-code": "RepoNotFound"}, body)

    def _model(self, rest, body):
        owner, name, kind, revision = (*rest.split("/"), "", "", "")[:4]
        if f"{owner}/{name}" != REPOSITORY:
            return self._send(404, b"{}", {"x-error-code": "RepoNotFound"}, body)
        if revision not in ("main", COMMIT):
            return self._send(404, b"{}", {"x-error-code": "RevisionNotFound"}, body)
        siblings = list(self.server.siblings())
        answer = {"id": REPOSITORY, "modelId": REPOSITORY, "sha": COMMIT, "siblings": siblings}
        if kind == "tree":
            answer = [_entry(sibling) for sibling in siblings]
        return self._send(200, json.dumps(answer).encode(), {"content-type": "application/json"}, body)

    def _file(self, path, body):
        data = self.server.files.get(path)
        if data is None:
            return self._send(404, b"", {"x-error-code": "EntryNotFound"}, body)
        tag = sha256(data) if path.endswith(".safetensors") else git_hash(data)
        headers = {"etag": f'"{tag}"', "x-repo-commit": COMMIT, "accept-ranges": "bytes"}
        data = self.server.wrong.get(path, data)
        begin = int((self.headers.get("range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if begin:
            headers["content-range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        cut = self.server.cut.pop(path, None) if body else None
        self._send(
            206 if begin else 200, data[begin:], headers, body, len(data) - 1 if path == self.server.stall else cut
        )
        if body and path == self.server.stall:
            self.server.stalled.set()
            self.rfile.read(1)  # until the other side ends
        return None

    def _send(self, status, data, headers, body, cut=None):
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True

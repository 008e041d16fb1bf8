"""A W&B server of a few lines, slow, silent or broken as a test likes, and the reading of W&B's offline records."""

import gzip
import json
import re
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

RUN = {"id": "UnVu", "name": "run", "displayName": "run", "config": "{}", "sweepName": None, "historyLineCount": 0}
PROJECT = {"id": "P", "name": "fer", "entity": {"id": "E", "name": "team"}}


class FakeWandb(ThreadingHTTPServer):
    """Serves on a free port of this machine.

    Attributes:
        manner: ``healthy``, ``slow`` (every answer takes 3 s), ``silent`` (no answer), ``error`` (500) or ``cut`` (the
            connection is closed instead of an answer); may change at any time.
        middle: the manner from the first rows of history on, if another.
        end: the manner from the request on that ends the run, if another.
        history: the rows of history it was sent.
        complete: whether it was told that the run has ended.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, manner: str = "healthy", middle: str | None = None, end: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.manner, self.middle, self.end = manner, middle, end
        self.history: list[dict[str, Any]] = []
        self.complete = False
        self.requests = 0
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing about connections the client closes."""

    def close(self) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeWandb

    def log_message(self, *_: Any) -> None:
        """Print nothing."""

    def _answer(self) -> None:
        body = self._body()
        self.server.requests += 1
        if self.server.end and self.path.endswith("/file_stream") and json.loads(body).get("complete"):
            self.server.manner = self.server.end
        manner = self.server.manner
        if manner == "silent":
            self.server.closing.wait()
        if manner in ("silent", "cut"):
            self.close_connection = True
            return
        if manner == "slow":
            time.sleep(3)
        failed = manner == "error"
        answer = b"{}" if failed else json.dumps(self._content(body)).encode()
        self.send_response(500 if failed else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_POST = do_PUT = _answer

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while self.headers.get("Transfer-Encoding") == "chunked":
            size = int(self.rfile.readline().strip(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if not size:
                break
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _content(self, body: bytes) -> dict[str, Any]:
        if self.path.endswith("/file_stream"):
            sent = json.loads(body)
            rows = sent.get("files", {}).get("wandb-history.jsonl", {"content": []})["content"]
            self.server.history += [json.loads(row) for row in rows]
            if rows and self.server.middle:
                self.server.manner, self.server.middle = self.server.middle, None
            self.server.complete |= bool(sent.get("complete"))
            return {}
        if self.path != "/graphql":
            return {}
        asked = json.loads(body)
        variables = asked.get("variables") or {}
        match = re.search(r"(?:query|mutation)\s*(\w+)", asked["query"])
        if match is None:
            return {"data": {}}
        data: dict[str, Any] = {}
        if match[1] == "UpsertBucket":
            bucket = {**RUN, "name": variables.get("name") or "run", "project": PROJECT}
            data = {"upsertBucket": {"bucket": bucket, "inserted": True}}
        elif match[1] == "RunResumeStatus":
            data = {"model": {**PROJECT, "bucket": None}}
        elif match[1] == "ServerFeaturesQuery":
            data = {"serverInfo": {"features": []}}
        elif match[1] == "CreateArtifact":  # of a table's rows; known already, so nothing of it is uploaded
            latest = {"id": "A", "versionIndex": 0}
            sequence = {"id": "S", "latestArtifact": latest}
            data = {"createArtifact": {"artifact": {"id": "A", "state": "COMMITTED", "artifactSequence": sequence}}}
        elif match[1] == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.server.url}/storage/{name}"} for name in variables["files"]]
            data = {"createRunFiles": {"runID": "UnVu", "uploadHeaders": [], "files": files}}
        return {"data": data}


def wandb_records(folder: Path) -> list[Any]:
    """Records of an offline run: LevelDB's log framing (32 KiB blocks, 7-byte headers) around protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    data, place, records, parts = path.read_bytes(), 7, [], b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            records.append(record)
            parts = b""
    return records

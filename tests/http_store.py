"""A real HTTP server over a folder, which can be told to fail: busy, cut off, stalled, wrong."""

import socket
import struct
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

FAULTS = ("busy", "slow_down", "forbidden", "gone", "reset", "stall", "short", "wrong", "endless")
STATUS = {"busy": 503, "slow_down": 429, "forbidden": 403, "gone": 404}


class HttpStore:
    """Serves `folder`. `requests` counts the GETs of each path; `faults` are used up one a request."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.requests: Counter[str] = Counter()
        self.authorized: Counter[str] = Counter()  # of them, those with an Authorization header
        self.pause_seconds = 0.0  # after each 1/8 of a shard's body
        self.connections: set[socket.socket] = set()
        self._faults: dict[str, deque[str]] = {}
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.store = self
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def fail(self, path: str, fault: str, times: int = 1) -> None:
        """Let the next `times` requests of a path meet a fault."""
        assert fault in FAULTS
        with self._lock:
            self._faults.setdefault(path, deque()).extend([fault] * times)

    def heal(self) -> None:
        """No more faults; what stalls is cut off."""
        with self._lock:
            self._faults.clear()
        self._stopped.set()
        self._stopped = threading.Event()

    def close(self) -> None:
        """Refuse what comes from now on, and end what is under way."""
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self.connections):  # clients keep theirs open
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def begin(self, path: str, authorized: bool) -> tuple[str | None, threading.Event]:
        """Count a request; the fault it shall meet, and what ends a stall."""
        with self._lock:
            self.requests[path] += 1
            self.authorized[path] += authorized
            faults = self._faults.get(path)
            return (faults.popleft() if faults else None), self._stopped


@contextmanager
def serve(folder: Path) -> Iterator[HttpStore]:
    store = HttpStore(folder)
    try:
        yield store
    finally:
        store.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # else the client went away in between: nothing to tell


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def setup(self) -> None:
        super().setup()
        self.server.store.connections.add(self.connection)

    def finish(self) -> None:
        self.server.store.connections.discard(self.connection)
        with suppress(OSError):
            super().finish()

    def do_GET(self) -> None:
        store: HttpStore = self.server.store
        path = self.path.lstrip("/")
        fault, stopped = store.begin(path, "Authorization" in self.headers)
        file = store.folder / path
        if fault in STATUS or not file.is_file():
            self._answer(STATUS.get(fault, 404), b"sorry")
            return
        body = file.read_bytes()
        if fault == "wrong":
            body = bytes([body[0] ^ 1]) + body[1:]
        if fault == "endless":
            body += bytes(len(body) + (64 << 20))
        try:
            self._head(200, len(body))
            if fault in ("reset", "stall", "short"):
                self._cut(fault, body[: len(body) // 2], stopped)
            else:
                self._send(body, store.pause_seconds if path.endswith(".tar") else 0)
        except OSError:
            self.close_connection = True  # the client went away

    def _cut(self, fault: str, body: bytes, stopped: threading.Event) -> None:
        self.close_connection = True
        self._send(body, 0)
        if fault == "stall":
            stopped.wait(60)
        if fault == "reset":  # closing with no time to linger sends RST
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def _send(self, body: bytes, pause_seconds: float) -> None:
        step = max(1, len(body) // 8 + 1) if pause_seconds else max(1, len(body))
        for start in range(0, len(body), step):
            self.wfile.write(body[start : start + step])
            self.wfile.flush()
            if pause_seconds:
                time.sleep(pause_seconds)

    def _answer(self, status: int, body: bytes) -> None:
        self._head(status, len(body))
        self.wfile.write(body)

    def _head(self, status: int, length: int) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def log_message(self, *args) -> None:
        pass

"""Real HTTP servers for the tests: nginx as people run it, and one that misbehaves as networks do."""

import re
import shutil
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import pytest

NGINX_CONF = """
daemon off; master_process off; pid {home}/pid; error_log {home}/error.log;
events {{ worker_connections 256; }}
http {{
  client_body_temp_path {home}/a; proxy_temp_path {home}/b; fastcgi_temp_path {home}/c; uwsgi_temp_path {home}/d;
  scgi_temp_path {home}/e;
  log_format mine '$request_method $uri $status $http_range $connection'; access_log {home}/access.log mine;
  server {{
    listen 127.0.0.1:{port};
    location /split/ {{ alias {folder}/; }}
    location /whole/ {{ alias {folder}/; max_ranges 0; }}
    location /moved/ {{ rewrite ^/moved/(.*)$ /split/$1 redirect; }}
    location /slow/ {{ alias {folder}/; max_ranges 0; limit_rate 64k; }}
  }}
}}
"""


class Nginx:
    """A running nginx: ``/split/`` serves ranges, ``/whole/`` does not, ``/moved/`` redirects, ``/slow/`` is slow."""

    def __init__(self, home: Path, port: int, process: subprocess.Popen):
        self.url, self._log, self.process = f"http://127.0.0.1:{port}", home / "access.log", process

    def requests(self, path: str = "") -> list[list[str]]:
        """[method, path, status, range, connection] of the requests so far for paths that end so."""
        lines = [line.split() for line in self._log.read_text().splitlines()]
        return [line for line in lines if line[1].endswith(path)]


@contextmanager
def nginx(folder: Path, home: Path) -> Iterator[Nginx]:
    """nginx serving a folder on a free port of this machine; the test is skipped where nginx is not installed."""
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin")
    if program is None:
        pytest.skip("nginx is not installed (Debian: apt-get install nginx-light): no real HTTP server to read from")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    home.mkdir()
    (home / "conf").write_text(NGINX_CONF.format(home=home, port=port, folder=folder))
    process = subprocess.Popen([program, "-c", str(home / "conf"), "-p", str(home), "-e", str(home / "error.log")])
    try:
        deadline = time.monotonic() + 30
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None and time.monotonic() < deadline, (home / "error.log").read_text()
            time.sleep(0.05)
        yield Nginx(home, port, process)
    finally:
        process.terminate()
        process.wait()


class Misbehaving(SimpleHTTPRequestHandler):
    """Serves ranges, except that a tar's requests meet ``fault``: each time, or only each second time."""

    protocol_version = "HTTP/1.1"
    folder: Path
    fault: str
    always: bool
    seen: Counter
    length = 0

    def do_GET(self):
        path = self.folder / unquote(self.path).lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        self.seen[self.path] += 1
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        faulty = path.suffix == ".tar" and (self.always or self.seen[self.path] % 2 == 1)
        if asked is None or (faulty and self.fault == "ignores ranges"):
            return self._send(200, {}, data)
        first, last = int(asked[1]), int(asked[2])
        part, where = data[first : last + 1], f"bytes {first}-{last}/{len(data)}"
        match self.fault if faulty else None:
            case "busy":
                return self._send(503, {"Retry-After": "7"}, b"")
            case "page":
                return self._send(200, {"Content-Type": "text/html"}, b"<html>Please log in</html>")
            case "drops":
                self.close_connection = True
                return self.connection.close()
            case "short":
                self.close_connection = True
                return self._send(206, {"Content-Range": where}, part[: len(part) // 2], len(part))
            case "shifted":
                other = f"bytes {first + 1}-{last + 1}/{len(data)}"
                return self._send(206, {"Content-Range": other}, data[first + 1 : last + 2])
            case "no content range":
                return self._send(206, {}, part)
            case "hangs":
                self.close_connection = True
                return time.sleep(2)
            case "flips":
                return self._send(206, {"Content-Range": where}, bytes([part[0] ^ 1]) + part[1:])
        self._send(206, {"Content-Range": where}, part)

    def _send(self, status: int, headers: dict[str, str], body: bytes, length: int | None = None) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body) if length is None else length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_HEAD(self):
        path = self.folder / unquote(self.path).lstrip("/")
        return self._send(200, {}, path.read_bytes()) if path.is_file() else self.send_error(404)

    def log_message(self, *_):
        pass


@contextmanager
def misbehaving(folder: Path, fault: str, always: bool = False) -> Iterator[str]:
    """The URL of a server of that folder with that fault."""
    handler = type("Handler", (Misbehaving,), {"folder": folder, "fault": fault, "always": always, "seen": Counter()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.handle_error = lambda *_: None  # broken connections are the point
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()

"""Bytes of files on HTTP servers: ranges, whole files, sizes.

Connections are kept alive, one set a process: a forked loader opens its own. A reply is believed only if it is 206 and
its Content-Range is what was asked for (Python's own http.server answers 200 and the whole file); what is short, late
or broken is asked for again for as long as outages.py has patience.
"""

import base64
import http.client
import os
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import closing
from email.utils import parsedate_to_datetime
from functools import lru_cache
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit

from shards.storage.outages import PassingError, waited_for
from shards.storage.urls import Url

TIMEOUT = 30.0  # seconds without a byte
_REDIRECTS = 5
_CHUNK = 1 << 20
_PLAIN = "%/?:@!$&'()*+,;=~"  # in a URL; what is escaped already stays so, spaces and other letters become so
_Origin = tuple[str, str]  # scheme, host:port

_idle: dict[_Origin, list[http.client.HTTPConnection]] = {}
os.register_at_fork(after_in_child=_idle.clear)


class RangesRefusedError(OSError):
    """The server answers with the whole file."""


def read_range(url: Url, offset: int, size: int, filesize: int, again: bool = False) -> bytes:
    """``size`` bytes from ``offset`` of a file that should have ``filesize``.

    Args:
        again: they were wrong before: caches on the way are to ask the server.

    Raises:
        RangesRefusedError: when the server does not serve parts of files.
        OSError: when the file is missing or has another size.
        InputError: when the server does not answer.
    """
    headers = {"Range": f"bytes={offset}-{offset + size - 1}", **({"Cache-Control": "no-cache"} if again else {})}
    return waited_for(lambda: _read_range(url, offset, size, filesize, headers))


def _read_range(url: Url, offset: int, size: int, filesize: int, headers: dict[str, str]) -> bytes:
    with closing(_Reply("GET", url, headers)) as reply:
        if reply.status == 200:
            length = reply.header("Content-Length")
            if length in ("", str(filesize)):
                raise RangesRefusedError(f"{url}: the server ignores Range")
            raise PassingError(f"{url}: asked for a range, got {length} bytes that are no such file (HTTP 200)")
        content_range = reply.header("Content-Range")
        if reply.status == 416:
            raise OSError(f"{url} ends before byte {offset + size:,} ({content_range})")
        reply.expect(206)
        found = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", content_range.strip())
        if found is None or (int(found[1]), int(found[2])) != (offset, offset + size - 1):
            asked = f"{offset}-{offset + size - 1}"
            if found and found[3].isdigit() and int(found[3]) < offset + size:
                raise OSError(f"{url} has {int(found[3]):,} bytes, the index says {filesize:,}")
            raise PassingError(f"{url}: asked for bytes {asked}, got Content-Range {content_range!r}")
        if found[3] not in ("*", str(filesize)):
            raise OSError(f"{url} has {int(found[3]):,} bytes, the index says {filesize:,}: it was replaced")
        data = reply.read(size)
    if len(data) != size:
        raise PassingError(f"{url}: the reply ended after {len(data)} of {size} bytes at {offset}")
    return data


def stream(url: Url) -> Iterator[bytes]:
    """A whole file, in chunks; one attempt.

    Raises:
        OSError: when it is missing or the connection fails; the chunks given until then are no whole file.
    """
    with closing(_Reply("GET", url, {})) as reply:
        reply.expect(200)
        length, received = reply.header("Content-Length"), 0
        while chunk := reply.read(_CHUNK):
            received += len(chunk)
            yield chunk
    if length and received != int(length):
        raise PassingError(f"{url}: the reply ended after {received:,} of {int(length):,} bytes")


def size(url: Url) -> int | None:
    """A file's size in bytes; None where the server will not tell.

    Raises:
        OSError: when it is missing or the server cannot be reached.
    """
    return waited_for(lambda: _size(url))


def _size(url: Url) -> int | None:
    with closing(_Reply("HEAD", url, {})) as reply:
        if reply.status in (400, 401, 403, 405, 501):  # a URL signed for GET alone, or no HEAD here
            return None
        reply.expect(200)
        length = reply.header("Content-Length")
        return int(length) if length.isdigit() else None


class _Reply:
    """A server's answer, redirections followed; its connection goes back to the idle ones when it was read to its end.

    Raises:
        OSError: from every method; ConnectionError and TimeoutError for what may pass.
    """

    def __init__(self, method: str, url: Url, headers: dict[str, str]):
        self._url, text = url, url.text
        for _ in range(_REDIRECTS):
            self._send(method, text, headers)
            if self.status not in (301, 302, 303, 307, 308):
                return
            text = urljoin(text, self.header("Location"))
            self.read(_CHUNK)
            self.close()
        raise OSError(f"{url}: more than {_REDIRECTS} redirections")

    def _send(self, method: str, text: str, headers: dict[str, str]) -> None:
        parts = urlsplit(text)
        self._origin = (parts.scheme, parts.netloc)
        target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=_PLAIN)
        idle = _idle.setdefault(self._origin, [])
        while True:
            try:
                connection, reused = idle.pop(), True
            except IndexError:
                connection, reused = _connect(self._origin, self._url), False
            try:
                connection.request(method, target, headers={**_headers(parts), **headers})
                self._connection, self._response = connection, connection.getresponse()
                self.status = self._response.status
                return
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                if not (reused and isinstance(error, ConnectionError)):  # a kept connection may have been closed since
                    raise _as_os_error(self._url, error) from error

    def header(self, name: str) -> str:
        return self._response.headers.get(name, "")

    def expect(self, status: int) -> None:
        match self.status:
            case found if found == status:
                return
            case 404 | 410:
                raise FileNotFoundError(f"{self._url}: the server has no such file (HTTP {self.status})")
            case 401 | 403:
                raise PermissionError(f"{self._url}: the server refuses it (HTTP {self.status})")
            case 408 | 425 | 429 | 500 | 502 | 503 | 504:
                wait = _seconds(self.header("Retry-After"))
                raise PassingError(f"{self._url}: HTTP {self.status} {self._response.reason}", wait)
        raise OSError(f"{self._url}: HTTP {self.status} {self._response.reason}, {status} is wanted")

    def read(self, size: int) -> bytes:
        try:
            return self._response.read(size)
        except (OSError, http.client.HTTPException) as error:
            raise _as_os_error(self._url, error) from error

    def close(self) -> None:
        self._response.read(0)  # notices the end of an empty body
        if self._response.isclosed() and not self._response.will_close:
            _idle.setdefault(self._origin, []).append(self._connection)
        else:
            self._connection.close()


def _connect(origin: _Origin, url: Url) -> http.client.HTTPConnection:
    scheme, host = origin
    host = host.rpartition("@")[2]
    try:
        if scheme == "https":
            return http.client.HTTPSConnection(host, timeout=TIMEOUT, context=_tls())
        return http.client.HTTPConnection(host, timeout=TIMEOUT)
    except http.client.InvalidURL as error:
        raise OSError(f"{url}: {error}") from error


@lru_cache(maxsize=1)
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _headers(parts: SplitResult) -> dict[str, str]:
    headers = {"Accept-Encoding": "identity"}
    if parts.username:
        credentials = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        headers["Authorization"] = "Basic " + base64.b64encode(credentials.encode()).decode()
    return headers


def _seconds(retry_after: str) -> float:
    """What a Retry-After header says: seconds, or a date (RFC 9110, 10.2.3); 0 where it says neither."""
    if re.fullmatch(r"\d{1,9}", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return 0.0


def _as_os_error(url: Url, error: Exception) -> OSError:
    kind: type[OSError] = TimeoutError if isinstance(error, TimeoutError) else ConnectionError
    if isinstance(error, ssl.SSLCertVerificationError | http.client.InvalidURL):
        kind = OSError
    return kind(f"{url}: {type(error).__name__}: {error}")

"""A web server of a folder, which serves ranges, lists its top folders as S3 does, and misbehaves if told to."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

from dalle_cli.data import servers


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None


@dataclass
class FileServer:
    """A server on a free port of this machine, until ``stop``."""

    folder: Path
    requests: list[Request] = field(default_factory=list)
    breaks_off: Callable[[int], bool] = lambda number: False
    """Says of a request's number whether the answer breaks off, in the middle of the content or before it."""
    status: int | None = None
    """The status with which every request is refused."""
    ranges: bool = True
    lengths: bool = True
    heads: bool = True
    """HEAD is answered, and not refused as no method of this server."""
    silent: bool = False
    """Nothing comes after the first half of each content, and the connection stays open."""
    etag: str | None = None

    def __post_init__(self) -> None:
        self.http = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(self.folder)))
        self.http.daemon_threads = True
        self.http.asked = self  # type: ignore[attr-defined]
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_port}"

    def ranges_of(self, ending: str) -> list[str | None]:
        """Return the ranges that were asked for of files whose names end so."""
        return [each.range for each in self.requests if each.method == "GET" and each.path.endswith(ending)]

    def stop(self) -> None:
        self.http.shutdown()
        self.http.server_close()


@contextmanager
def served_as_s3(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Serve ``folder``, whose folders are buckets, at its own address and at s3://."""
    server = FileServer(folder)
    for name, value in (("ENDPOINT_URL", server.url), ("SKIP_SIGNATURE", "true")):
        monkeypatch.setenv(f"AWS_{name}", value)
    servers._server.cache_clear()
    yield server
    servers._server.cache_clear()
    server.stop()


class _Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def asked(self) -> FileServer:
        found: FileServer = self.server.asked  # type: ignore[attr-defined]
        return found

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        asked, wanted = self.asked, self.headers.get("Range")
        asked.requests.append(Request(self.command, self.path, wanted))
        if asked.status is not None or (self.command == "HEAD" and not asked.heads):
            self.send_error(asked.status or HTTPStatus.METHOD_NOT_ALLOWED)
            return
        if self.path.startswith("/moved/"):
            self.send_response(HTTPStatus.FOUND)
            self.send_header("Location", self.path.removeprefix("/moved"))
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        if "list-type" in query:
            self._send(_bucket(asked.folder / address.path.strip("/"), query.get("prefix", [""])[0]).encode())
            return
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            self._index() if file.is_dir() else self.send_error(HTTPStatus.NOT_FOUND)
            return
        self._send_file(file, wanted if asked.ranges else None)

    def _index(self) -> None:
        """Send a page of links as the standard library writes it; its length is not said in advance."""
        if not urlsplit(self.path).path.endswith("/"):
            self.send_response(HTTPStatus.MOVED_PERMANENTLY)
            self.send_header("Location", f"{self.path}/")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        page = self.list_directory(self.translate_path(self.path))
        if page is not None and self.command == "GET":
            self.wfile.write(page.read())

    def _send_file(self, file: Path, wanted: str | None) -> None:
        size, first = file.stat().st_size, 0
        last = size - 1
        if wanted is not None:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            if begin:
                first, last = int(begin), min(int(end) if end else size - 1, size - 1)
            else:
                first = max(0, size - int(end))
            if first >= size:
                self.send_error(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
                return
        with file.open("rb") as opened:
            opened.seek(first)
            body = b"" if self.command == "HEAD" else opened.read(last - first + 1)
        headers = {"Last-Modified": self.date_time_string(file.stat().st_mtime)}
        if self.asked.etag is not None:
            headers["ETag"] = self.asked.etag
        if wanted is not None:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._send(body, HTTPStatus.OK if wanted is None else HTTPStatus.PARTIAL_CONTENT, headers, last - first + 1)

    def _send(
        self, body: bytes, status: int = HTTPStatus.OK, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        asked, number = self.asked, len(self.asked.requests)
        broken = self.command == "GET" and asked.breaks_off(number)
        self.close_connection = broken
        if broken and number % 2:
            return
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if asked.lengths:
            self.send_header("Content-Length", str(len(body) if length is None else length))
        else:
            self.send_header("Connection", "close")
        self.end_headers()
        with suppress(ConnectionError):  # the client has heard enough
            self.wfile.write(body[: len(body) // 2] if broken or asked.silent else body)
        if asked.silent:
            time.sleep(5)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _bucket(folder: Path, prefix: str) -> str:
    """Return S3's list of the files and folders below ``prefix``, up to the next slash."""
    place = folder / unquote(prefix)
    entries = sorted(place.iterdir()) if place.is_dir() else []
    files = [file for file in entries if file.is_file()]
    folders = "".join(
        f"<CommonPrefixes><Prefix>{escape(below.relative_to(folder).as_posix())}/</Prefix></CommonPrefixes>"
        for below in entries
        if below.is_dir()
    )
    contents = "".join(
        f"<Contents><Key>{escape(file.relative_to(folder).as_posix())}</Key>"
        f"<LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>&quot;{file.stat().st_size:x}&quot;</ETag>"
        f"<Size>{file.stat().st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for file in files
    )
    return (
        '<?xml version="1.0" encoding="UTF-8"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{escape(folder.name)}</Name><Prefix>{escape(prefix)}</Prefix><KeyCount>{len(files)}</KeyCount>"
        f"<MaxKeys>1000</MaxKeys><Delimiter>/</Delimiter><IsTruncated>false</IsTruncated>{contents}{folders}"
        "</ListBucketResult>"
    )

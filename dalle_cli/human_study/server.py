"""Serve a study as a small web page: three files, the pictures under their random names, and two API calls.

``GET /api/next`` returns an annotator's next tasks. ``POST /api/vote`` records one answer and replies once it is on
disk. Both want the secret code of the annotator's link, so that whoever holds one link has one vote. The code is in the
link's fragment, which browsers do not send, and in the header ``Authorization``, which pages of other sites cannot set.
The server reads only ``study.json``, never the key, and no path of a request reaches the file system.
"""

from __future__ import annotations

import json
import socket
import sqlite3
import sys
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from ipaddress import ip_address
from pathlib import Path
from socketserver import TCPServer
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from dalle_cli.errors import UserError
from dalle_cli.human_study.study import PICTURES, QUESTIONS, WORDING, Answer, Item, Question, Study, load_study
from dalle_cli.human_study.votes import Annotator, Task, VoteRefused, Votes
from dalle_cli.progress import log

MAX_BODY_BYTES = 4096
IDLE_SECONDS = 15
"""Seconds without a byte after which a connection is closed."""
MAX_CONNECTIONS, MAX_OF_ONE_ADDRESS = 256, 64
"""Number of open connections, each of which takes a thread, in all and from one address; others are closed at once."""
EVERY_ADDRESS = "0.0.0.0"
PAGE_FILES = {"/": ("index.html", "text/html"), "/study.css": ("study.css", "text/css"),
              "/study.js": ("study.js", "text/javascript")}  # fmt: skip
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


class BadRequest(Exception):
    """A malformed request; the message says why."""


class UnknownCode(Exception):
    """A request without the code of an annotator of this study."""


@dataclass(frozen=True)
class _PostedVote:
    item: Item
    question: Question
    answer: Answer


class StudyServer(ThreadingHTTPServer):
    """Server of one study; ``serve_forever`` runs it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self,
        folder: Path,
        host: str = "127.0.0.1",
        port: int = 0,
        names: Collection[str] = (),
        links: int | None = None,
    ) -> None:
        """Bind the address at once; port 0 takes a free one.

        ``names`` are further names of this machine under which browsers may ask for it, beside its addresses. There
        are ``links`` annotators, or as many as the votes that each question needs.

        Raises:
            UserError: ``folder`` holds no complete study, its votes cannot be opened, or the address cannot be bound.
        """
        self.study = load_study(folder)
        pictures = [name for item in self.study.items for name in (item.left, item.right)]
        self.pictures = {_url(name): folder / PICTURES / name for name in pictures}
        for path in self.pictures.values():
            if not path.is_file():
                raise UserError(f"{path}: the study's picture is missing; make the study anew")
        self.given_names = {name.lower() for name in names}
        self.names = {"localhost", socket.gethostname().lower()} | self.given_names
        self._open: Counter[str] = Counter()
        self._open_lock = Lock()
        page = files("dalle_cli.human_study") / "page"
        self.page = {url: ((page / name).read_bytes(), kind) for url, (name, kind) in PAGE_FILES.items()}
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"{host}:{port}: cannot be bound ({error}); choose another --port or --host") from None
        try:
            self.votes = Votes(folder, self.study)
            self.annotators = self.votes.annotators(links or self.study.annotators)
        except UserError:
            self.server_close()
            raise
        except sqlite3.Error as error:
            self.server_close()
            raise UserError(f"{folder}: its votes cannot be used now ({error}); try again, or free the disk") from None

    def link(self, annotator: Annotator) -> str:
        """Return the URL of the page for one annotator."""
        name = socket.gethostname() if self.server_name == EVERY_ADDRESS else self.server_name
        return f"http://{name}:{self.server_port}/#{annotator.code}"

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether one more connection from this address may be open."""
        with self._open_lock:
            return self._open.total() < MAX_CONNECTIONS and self._open[client_address[0]] < MAX_OF_ONE_ADDRESS

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a connection in a thread of its own."""
        with self._open_lock:
            self._open[client_address[0]] += 1
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._count_closed(client_address)
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a connection until it is closed."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._count_closed(client_address)

    def _count_closed(self, client_address: Any) -> None:
        with self._open_lock:
            self._open[client_address[0]] -= 1
            self._open += Counter()  # drops addresses without connections

    def server_bind(self) -> None:
        """Bind the socket without the base class's slow look-up of the host's full name."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report an error, unless a client, such as a phone out of range, dropped its connection."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        """Close the socket and the votes."""
        super().server_close()
        if hasattr(self, "votes"):
            self.votes.close()


class _Handler(BaseHTTPRequestHandler):
    server: StudyServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "dalle", ""
    timeout = IDLE_SECONDS
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        path = urlsplit(self.path).path
        if not self._is_for_us():
            self._refuse()
        elif path in PAGE_FILES:
            content, kind = self.server.page[path]
            self._send(HTTPStatus.OK, content, f"{kind}; charset=utf-8")
        elif path == "/api/next":
            self._answer(self._next)
        elif path in self.server.pictures:
            self._send_picture(self.server.pictures[path])
        else:
            self._json(HTTPStatus.NOT_FOUND, {"error": "there is no such page"})

    def _send_picture(self, file: Path) -> None:
        try:
            picture = file.read_bytes()
        except OSError as error:
            log(f"{file}: cannot be read ({error.strerror}); copy it from where the study was made")
            self._json(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "the picture cannot be read now; try again"})
        else:
            self._send(HTTPStatus.OK, picture, "image/png", cache="private, max-age=86400, immutable")

    def do_POST(self) -> None:
        if not self._is_for_us():
            self._refuse()
        elif urlsplit(self.path).path != "/api/vote":
            self.close_connection = True  # the body is left unread
            self._json(HTTPStatus.NOT_FOUND, {"error": "there is no such page"})
        else:
            self._answer(self._vote)

    def _is_for_us(self) -> bool:
        """Return whether a request is addressed to this machine and does not come from another site's page.

        A foreign name that leads here (DNS rebinding) would make this server part of a foreign site; a number cannot.
        """
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        try:
            name = urlsplit(f"//{host}").hostname or ""
            known = name in self.server.names or _is_address(name)
            sent_from = urlsplit(origin or f"http://{host}")
            # A proxy that has one of the given names may ask under another Host.
            return known and (sent_from.netloc == host or sent_from.hostname in self.server.given_names)
        except ValueError:
            return False

    def _refuse(self) -> None:
        self.close_connection = True  # a body is left unread
        name = json.dumps(self.headers.get("Host", ""))
        self._json(
            HTTPStatus.FORBIDDEN,
            {"error": f"{name} is no name of this server; allow it by dalle human-study serve --name"},
        )

    def _answer(self, call: Callable[[], dict[str, Any]]) -> None:
        """Answer with the call's result as JSON, or with the reason for its failure."""
        try:
            self._json(HTTPStatus.OK, call())
        except BadRequest as error:
            self._json(HTTPStatus.BAD_REQUEST, {"error": str(error)})
        except UnknownCode:
            self._json(HTTPStatus.FORBIDDEN, {"error": "this study has no such code; open the link that you were sent"})
        except VoteRefused as error:
            self._json(HTTPStatus.CONFLICT, {"error": str(error)})
        except sqlite3.Error as error:
            log(f"votes: {error}")
            self._json(HTTPStatus.SERVICE_UNAVAILABLE, {"error": "the vote could not be recorded; try again"})

    def _annotator(self) -> str:
        """Return the name of the annotator whose code is in the request."""
        scheme, _, code = self.headers.get("Authorization", "").partition(" ")
        name = self.server.votes.name_of(code) if scheme == "Bearer" else None
        if name is None:
            raise UnknownCode
        return name

    def _next(self) -> dict[str, Any]:
        annotator = self._annotator()
        work = self.server.votes.work(annotator)
        # The page prefetches the pictures of the second task.
        return {
            "annotator": annotator,
            "done": work.done,
            "total": work.done + len(work.tasks),
            "tasks": [_task_json(task, self.server.study) for task in work.tasks[:2]],
        }

    def _vote(self) -> dict[str, Any]:
        vote = self._read_vote()
        self.server.votes.record(self._annotator(), vote.item, vote.question, vote.answer)
        return {"kept": vote.answer}

    def _read_vote(self) -> _PostedVote:
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= MAX_BODY_BYTES:
            self.close_connection = True  # the body is left unread
            raise BadRequest(f"a vote comes with a Content-Length of at most {MAX_BODY_BYTES}")
        body = self.rfile.read(length)
        if len(body) < length:
            self.close_connection = True
            raise BadRequest("the vote is cut short")
        # A form on another site can post to this server, but not with this content type.
        if self.headers.get_content_type() != "application/json":
            raise BadRequest("a vote is application/json")
        try:
            vote = json.loads(body)
        except (ValueError, RecursionError):
            raise BadRequest("the vote is not JSON") from None
        if not isinstance(vote, dict) or vote.keys() != {"item", "question", "answer"}:
            raise BadRequest("a vote has item, question and answer, and nothing else")
        item = self.server.study.by_id.get(vote["item"]) if isinstance(vote["item"], str) else None
        if item is None:
            raise BadRequest("there is no such item")
        if vote["question"] not in QUESTIONS:
            raise BadRequest(f"question is one of {', '.join(QUESTIONS)}")
        if vote["answer"] not in (answers := self.server.study.answers(vote["question"])):
            raise BadRequest(f"answer is one of {', '.join(answers)}")
        return _PostedVote(item, vote["question"], vote["answer"])

    def _json(self, status: HTTPStatus, value: Any) -> None:
        self._send(status, json.dumps(value, ensure_ascii=False).encode(), "application/json")

    def _send(self, status: HTTPStatus, content: bytes, kind: str, cache: str = "no-store") -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(content)), "Cache-Control": cache, **_HEADERS}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing, since requests name annotators."""


def _url(picture: str) -> str:
    return f"/{PICTURES}/{picture}"


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


def _task_json(task: Task, study: Study) -> dict[str, Any]:
    """Return a task for the page, without telling whether it is a check or which systems it shows."""
    return {
        "item": task.item.id,
        "caption": task.item.caption,
        "left": _url(task.item.left),
        "right": _url(task.item.right),
        "questions": [
            {"id": question, "wording": WORDING[question], "answers": study.answers(question)}
            for question in task.questions
        ],
    }

"""dalle human-study serve: five annotators at once, what a page is told, bad posts, and kill -9 while votes come in."""

from __future__ import annotations

import http.client
import json
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import Call
from helpers.human_study_folder import Served, Stored, serving, small_study, stored

from dalle_cli.human_study.study import QUESTIONS, SIDES, load_key

ANNOTATORS = ("anna", "ben", "cleo", "dan", "eva")


def annotate(served: Served, annotator: str, checks: dict[str, str]) -> tuple[Stored, list[str]]:
    """Answer every item in one annotator's name: checks rightly, pairs by item and name."""
    given: Stored = {}
    items = []
    while tasks := served.next(annotator)["tasks"]:
        task = tasks[0]
        items.append(task["item"])
        for side in SIDES:
            status, picture, _ = served.get(task[side].lstrip("/"))
            assert status == 200
            assert picture.startswith(b"\x89PNG")
        for number, question in enumerate(task["questions"]):
            answer = checks.get(task["item"]) or SIDES[(int(task["item"][-1], 16) + number + len(annotator)) % 2]
            assert served.vote(annotator, task["item"], question["id"], answer) == (200, {"kept": answer})
            given[annotator, task["item"], question["id"]] = answer
    return given, items


def test_five_annotators_at_once_vote_on_everything_and_are_told_nothing(tmp_path: Path, call: Call) -> None:
    folder, study = small_study(tmp_path, pairs=6, checks=4)
    # The server has no use for the key.
    key = folder / "key.json"
    key.rename(tmp_path / "key.json")
    checks = {item.id: str(item.check) for item in study.checks}
    with serving(folder) as served:
        everything = [served.get(path) for path in ("", "study.css", "study.js", "api/next?annotator=anna")]
        assert [status for status, _, _ in everything] == [200] * 4
        with ThreadPoolExecutor(5) as pool:
            found = list(pool.map(lambda name: annotate(served, name, checks), ANNOTATORS))
        assert served.next("anna") == {"annotator": "anna", "done": 10, "total": 10, "tasks": []}
        # All votes are given: a sixth has only the checks to answer.
        sixth = served.next("fay")
        assert (sixth["done"], sixth["total"]) == (0, 4)
        assert {task["item"] for task in sixth["tasks"]} < checks.keys()
        status, refused = served.vote("fay", study.pairs[0].id, "caption", "left")
        assert status == 409
        assert "5 annotators" in refused["error"]
        sizes = {len(served.get(f"pictures/{item.left}")[1]) for item in study.items}
    given: Stored = {}
    for votes, items in found:
        assert sorted(items) == [item.id for item in study.items]  # each once, and both questions of it together
        given |= votes
    assert len({tuple(items) for _, items in found}) == 5  # each in an order of their own
    assert len(given) == 5 * 10 * 2
    assert stored(folder) == given
    assert len(sizes) == 1

    for _, body, headers in everything:
        told = body.decode() + json.dumps(headers)
        assert not any(word in told for word in ("mine", "theirs", '"check"', str(tmp_path)))
    tasks = json.loads(everything[3][1])["tasks"]
    assert [task.keys() for task in tasks] == [{"item", "caption", "left", "right", "questions"}] * 2
    page = b"".join(body for _, body, _ in everything[:3]).decode()
    assert not re.search(r"https?://|//\w+\.", page.replace("data:", ""))  # works offline
    assert 'name="viewport"' in page
    assert "default-src 'none'" in everything[0][2]["Content-Security-Policy"]

    (tmp_path / "key.json").rename(key)
    done = call("human-study", "report", folder, "--json")
    figures = json.loads(done.out)
    sides = load_key(folder, study).items
    for question in QUESTIONS:
        entry = figures["questions"][question]
        by_hand: Counter[str] = Counter()
        for item in study.pairs:
            left = sum(given[name, item.id, question] == "left" for name in ANNOTATORS)
            by_hand[sides[item.id].left if left >= 3 else sides[item.id].right] += 1
        assert {name: won["pairs"] for name, won in entry["majority"].items() if won["pairs"]} == by_hand
        assert entry["with_all_votes"] == 6
        assert entry["ties"] == 0
    assert [(a["checks_answered"], a["checks_wrong"]) for a in figures["annotators"]] == [(8, 0)] * 5


def raw(served: Served, text: bytes) -> bytes:
    """Return the server's answer to bytes that no client library would send."""
    connection = http.client.HTTPConnection(urlsplit(served.url).netloc, timeout=30)
    connection.connect()
    assert connection.sock is not None
    connection.sock.sendall(text)
    connection.sock.shutdown(1)  # nothing more is sent
    answer = b""
    while part := connection.sock.recv(65536):
        answer += part
    connection.close()
    return answer


def test_bad_and_repeated_posts_are_refused_and_change_nothing(tmp_path: Path) -> None:
    folder, study = small_study(tmp_path, pairs=2)
    item = study.pairs[0].id
    vote = {"annotator": "anna", "item": item, "question": "realistic", "answer": "left"}
    with serving(folder) as served:
        good = json.dumps(vote).encode()
        assert served.post(good) == (200, {"kept": "left"})
        for repeated in (vote, {**vote, "answer": "right"}, {**vote, "annotator": "  ANNA "}):
            status, refused = served.post(json.dumps(repeated).encode())
            assert status == 409
            assert "before, with left" in refused["error"]
        bad: dict[str, Any] = {
            "annotator": ["", " ", "x" * 65, 7, None, "a\u0000b", "\ud800", ["anna"]],
            "item": ["", "no such item", item.upper() + "0", 7, None, [item], "../key.json"],
            "question": ["", "Realistic", 0, None, ["realistic"]],
            "answer": ["", "LEFT", 1, None, True, "left; drop table votes"],
        }
        bodies = [json.dumps({**vote, field: value}) for field, values in bad.items() for value in values]
        bodies += [json.dumps({key: value for key, value in vote.items() if key != left_out}) for left_out in vote]
        bodies += [json.dumps({**vote, "system": "mine"}), json.dumps([vote]), "null", "7", "", "{", "[" * 3000]
        for body in bodies:
            status, refused = served.post(body.encode())
            assert status == 400, body
            assert refused["error"], body
        for body in (b"\xff\xfe\x00", good[:-1], b" " * 5000, good + b" " * 5000):
            assert served.post(body)[0] == 400, body[:50]
        assert served.post(good, kind="application/x-www-form-urlencoded")[0] == 400
        assert served.post(good, kind="text/plain")[0] == 400
        assert served.post(good, path="api/next")[0] == 404
        head = b"POST /api/vote HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        for headers in (b"", b"Content-Length: many\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999\r\n",
                        b"Transfer-Encoding: chunked\r\n", b"Content-Length: %d\r\n" % (len(good) + 9)):  # fmt: skip
            assert raw(served, head + headers + b"\r\n" + good).startswith(b"HTTP/1.1 400 "), headers
        for name in ("", "%00", "x" * 65):
            assert served.get(f"api/next?annotator={name}")[0] == 400
        assert served.get("api/next")[0] == 400
        for method in (b"PUT", b"DELETE", b"OPTIONS", b"BREW"):
            assert raw(served, method + b" /api/vote HTTP/1.1\r\nHost: x\r\n\r\n").startswith(b"HTTP/1.1 501 ")
        assert raw(served, b"\x16\x03\x01 no http at all\r\n\r\n")
        assert stored(folder) == {("anna", item, "realistic"): "left"}
        assert served.vote("anna", item, "caption", "right") == (200, {"kept": "right"})  # the server still works


def test_only_the_pages_and_the_pictures_are_served(tmp_path: Path) -> None:
    folder, study = small_study(tmp_path, pairs=2)
    (folder / "pictures" / "extra.png").write_bytes(b"\x89PNG of nobody's")
    (tmp_path / "outside.png").write_bytes(b"\x89PNG outside")
    picture = study.items[0].left
    with serving(folder) as served:
        for path in (
            *("key.json", "study.json", "votes.sqlite", "votes.sqlite-wal", "pictures", "pictures/", "index.html"),
            *("../key.json", "pictures/../key.json", "pictures/..%2fkey.json", "pictures/%2e%2e/key.json"),
            *("pictures/....//key.json", "/etc/passwd", "//etc/passwd", "..%5ckey.json", "pictures/extra.png"),
            *("pictures/../../outside.png", f"pictures/{picture}%00", f"pictures//{picture}", f"{picture}", "%2e%2e"),
            *(
                f"pictures/./{picture}",
                f"study.js/../pictures/../{picture}",
                "page/index.html",
                str(folder / "key.json"),
            ),
        ):
            answer = raw(served, b"GET /" + path.encode() + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 404 "), path
            assert b"mine" not in answer
            assert b"PNG" not in answer
        assert served.get(f"pictures/{picture}")[0] == 200
        _, _, headers = served.get(f"pictures/{picture}")
        assert headers.keys().isdisjoint({"Last-Modified", "ETag"})
        assert headers["Server"].strip() == "dalle"
        assert urlsplit(served.url).hostname == "127.0.0.1"


def test_every_acknowledged_vote_outlives_kill_9(tmp_path: Path) -> None:
    folder, study = small_study(tmp_path, pairs=60, checks=0)
    acknowledged: Stored = {}
    attempted: Stored = {}

    def vote_until_it_dies(annotator: str, served: Served, begun: int, enough: threading.Event) -> None:
        try:
            while True:
                task = served.next(annotator)["tasks"][0]
                vote = annotator, task["item"], task["questions"][0]["id"]
                attempted[vote] = SIDES[len(acknowledged) % 2]
                status, kept = served.vote(*vote, attempted[vote])
                assert (status, kept) == (200, {"kept": attempted[vote]})
                acknowledged[vote] = attempted[vote]
                if len(acknowledged) >= begun + 40:
                    enough.set()
        except (OSError, http.client.HTTPException):
            return  # the server is dead

    for kill in range(3):
        with serving(folder) as served:
            begun, enough = len(acknowledged), threading.Event()
            with ThreadPoolExecutor(5) as pool:
                running = [pool.submit(vote_until_it_dies, name, served, begun, enough) for name in ANNOTATORS]
                assert enough.wait(60)
                served.process.kill()
                for future in running:
                    future.result(60)
        found = stored(folder)
        assert acknowledged.items() <= found.items() <= attempted.items(), kill
        # At most what each annotator had on its way was kept without a reply.
        assert len(found) - len(acknowledged) <= 5 * (kill + 1)
    with serving(folder) as served:
        before = served.next("anna")
        vote, answer = next(iter(acknowledged.items()))
        assert served.vote(*vote, answer)[0] == 409
        half = [
            item for item in study.pairs if len({key for key in stored(folder) if key[:2] == ("anna", item.id)}) == 1
        ]
        if half:  # the pair that the kill left half judged comes first, with the other question
            assert before["tasks"][0]["item"] in {item.id for item in half}
        assert before["done"] == sum(
            all(("anna", item.id, q) in stored(folder) for q in QUESTIONS) for item in study.pairs
        )


def test_racing_for_the_last_vote_one_wins_even_over_two_servers(tmp_path: Path) -> None:
    folder, study = small_study(tmp_path, pairs=12, annotators=1, checks=0)
    with serving(folder) as one, serving(folder) as other, ThreadPoolExecutor(8) as pool:

        def race(votes: list[tuple[str, str, str, str]]) -> Counter[int]:
            given = [pool.submit((one, other)[place % 2].vote, *vote) for place, vote in enumerate(votes)]
            return Counter(future.result()[0] for future in given)

        for item in study.pairs:
            assert race([(f"racer {n}", item.id, "caption", SIDES[n % 2]) for n in range(8)]) == {200: 1, 409: 7}
        assert race([("sam", study.pairs[0].id, "realistic", side) for side in SIDES * 4]) == {200: 1, 409: 7}
    assert len(stored(folder)) == 13


def test_what_cannot_be_served_is_said(tmp_path: Path, call: Call) -> None:
    assert "study.json" in call("human-study", "serve", tmp_path, "--port", 0).mistake()
    folder, study = small_study(tmp_path, pairs=2)
    with serving(folder) as served:
        port = urlsplit(served.url).port
        assert f"127.0.0.1:{port}" in call("human-study", "serve", folder, "--port", port).mistake()
    (folder / "pictures" / study.items[0].right).unlink()
    assert study.items[0].right in call("human-study", "serve", folder, "--port", 0).mistake()
    (folder / "study.json").write_text("{}")
    assert "study.json" in call("human-study", "report", folder).mistake()


@pytest.mark.parametrize("command", ["", "make", "serve", "report"])
def test_help_has_an_example(call: Call, command: str) -> None:
    done = call("human-study", *([command] if command else []), "--help")
    assert done.code == 0
    assert f"dalle human-study {command or 'make'}" in " ".join(done.out.partition("Example:")[2].split())

"""dalle human-study serve: five annotators at once, what a page is told, bad posts, and kill -9 while votes come in."""

from __future__ import annotations

import http.client
import json
import re
import socket
import sqlite3
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from conftest import Call
from helpers.human_study_folder import Served, Stored, serving, small_study, stored, wait_until

from dalle_cli.human_study.server import MAX_OF_ONE_ADDRESS
from dalle_cli.human_study.study import QUESTIONS, SIDES, STUDY, load_key

ANNOTATORS = tuple(f"annotator-{number:02d}" for number in range(1, 9))
ANNA, *_ = ANNOTATORS
FIVE, SIXTH = ANNOTATORS[:5], ANNOTATORS[5]


def annotate(served: Served, annotator: str, checks: dict[str, str]) -> tuple[Stored, list[str]]:
    """Answer every item by one annotator's link: checks rightly, pairs by item and name."""
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
            answer = checks.get(task["item"]) or SIDES[(int(task["item"][-1], 16) + number + int(annotator[-2:])) % 2]
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
        everything = [served.get(path, served.code(ANNA)) for path in ("", "study.css", "study.js", "api/next")]
        assert [status for status, _, _ in everything] == [200] * 4
        with ThreadPoolExecutor(5) as pool:
            found = list(pool.map(lambda name: annotate(served, name, checks), FIVE))
        assert served.next(ANNA) == {"annotator": ANNA, "done": 10, "total": 10, "tasks": []}
        # All votes are given: a sixth has only the checks to answer.
        sixth = served.next(SIXTH)
        assert (sixth["done"], sixth["total"]) == (0, 4)
        assert {task["item"] for task in sixth["tasks"]} < checks.keys()
        status, refused = served.vote(SIXTH, study.pairs[0].id, "caption", "left")
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
            left = sum(given[name, item.id, question] == "left" for name in FIVE)
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


def test_neither_is_an_answer_to_the_caption_but_not_in_older_studies(tmp_path: Path) -> None:
    for version, status in ((2, 200), (1, 400)):
        folder, study = small_study(tmp_path / str(version), pairs=2)
        (folder / STUDY).write_text(study.model_copy(update={"version": version}).model_dump_json())
        with serving(folder) as served:
            tasks = served.next(ANNA)["tasks"]
            offered = {question["id"]: question["answers"] for question in tasks[0]["questions"]}
            assert offered["realistic"] == [*SIDES]
            assert offered["caption"] == [*SIDES, *(["neither"] if version == 2 else [])]
            assert served.vote(ANNA, study.pairs[0].id, "caption", "neither")[0] == status


def test_bad_and_repeated_posts_are_refused_and_change_nothing(tmp_path: Path) -> None:
    folder, study = small_study(tmp_path, pairs=2)
    item = study.pairs[0].id
    vote = {"item": item, "question": "realistic", "answer": "left"}
    with serving(folder) as served:
        code, good = served.code(ANNA), json.dumps(vote).encode()
        assert served.post(good, code) == (200, {"kept": "left"})
        for repeated in (vote, {**vote, "answer": "right"}):
            status, refused = served.post(json.dumps(repeated).encode(), code)
            assert status == 409
            assert "before, with left" in refused["error"]
        bad: dict[str, Any] = {
            "item": ["", "no such item", item.upper() + "0", 7, None, [item], "../key.json", "\ud800"],
            "question": ["", "Realistic", 0, None, ["realistic"]],
            "answer": ["", "LEFT", 1, None, True, "left; drop table votes", "neither"],  # that is for the caption
        }
        bodies = [json.dumps({**vote, field: value}) for field, values in bad.items() for value in values]
        bodies += [json.dumps({key: value for key, value in vote.items() if key != left_out}) for left_out in vote]
        bodies += [json.dumps({**vote, "system": "mine"}), json.dumps([vote]), "null", "7", "", "{", "[" * 3000]
        for body in bodies:
            status, refused = served.post(body.encode(), code)
            assert status == 400, body
            assert refused["error"], body
        for body in (b"\xff\xfe\x00", good[:-1], b" " * 5000, good + b" " * 5000):
            assert served.post(body, code)[0] == 400, body[:50]
        for kind in ("application/x-www-form-urlencoded", "text/plain"):
            assert served.post(good, {**code, "Content-Type": kind})[0] == 400
        assert served.post(good, code, path="api/next")[0] == 404
        head = b"POST /api/vote HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        for headers in (b"", b"Content-Length: many\r\n", b"Content-Length: -1\r\n", b"Content-Length: 99999999999\r\n",
                        b"Transfer-Encoding: chunked\r\n", b"Content-Length: %d\r\n" % (len(good) + 9)):  # fmt: skip
            assert raw(served, head + headers + b"\r\n" + good).startswith(b"HTTP/1.1 400 "), headers
        for method in (b"PUT", b"DELETE", b"OPTIONS", b"BREW"):
            assert raw(served, method + b" /api/vote HTTP/1.1\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.1 501 ")
        assert raw(served, b"\x16\x03\x01 no http at all\r\n\r\n")
        assert stored(folder) == {(ANNA, item, "realistic"): "left"}
        assert served.vote(ANNA, item, "caption", "right") == (200, {"kept": "right"})  # the server still works


def test_only_the_codes_of_links_vote_and_they_outlive_the_server(tmp_path: Path) -> None:
    folder, study = small_study(tmp_path, pairs=2)
    vote = json.dumps({"item": study.pairs[0].id, "question": "caption", "answer": "left"}).encode()
    with serving(folder) as served:
        links, right = served.links, served.code(ANNA)["Authorization"]
        assert len(set(links.values())) == 8
        assert all(len(link.partition("#")[2]) == 16 for link in links.values())  # 96 bits
        wrong = ("", "Bearer", "Bearer ", f"Bearer {ANNA}", right.swapcase(), right[:-1], f"{right}x", right[7:])
        for value in wrong:
            headers = {"Authorization": value} if value else {}
            assert served.get("api/next", headers)[0] == 403, value
            status, refused = served.post(vote, headers)
            assert status == 403, value
            assert "open the link" in refused["error"]
        assert stored(folder) == {}
    with serving(folder, links=10) as served:
        assert codes_of(links).items() < codes_of(served.links).items()
        assert served.post(vote, {"Authorization": right}) == (200, {"kept": "left"})
    assert stored(folder) == {(ANNA, study.pairs[0].id, "caption"): "left"}


def codes_of(links: dict[str, str]) -> dict[str, str]:
    return {name: link.partition("#")[2] for name, link in links.items()}


def test_foreign_names_and_other_sites_pages_are_refused(tmp_path: Path) -> None:
    folder, study = small_study(tmp_path, pairs=2)
    vote = json.dumps({"item": study.pairs[0].id, "question": "caption", "answer": "left"}).encode()
    with serving(folder) as served:
        code, own = served.code(ANNA), urlsplit(served.url).netloc
        foreign = "rebound.example.org"
        for host in (foreign, f"{foreign}:{urlsplit(served.url).port}", f"127.0.0.1.{foreign}", "", "["):
            for path in ("", "api/next", f"pictures/{study.items[0].left}"):
                assert served.get(path, {**code, "Host": host})[0] == 403, (host, path)
            assert served.post(vote, {**code, "Host": host})[0] == 403, host
        for origin in ("https://example.org", "null", f"http://{own}.example.org", "http://127.0.0.1:1"):
            assert served.post(vote, {**code, "Origin": origin})[0] == 403, origin
        assert stored(folder) == {}
        for host in ("localhost:9", "192.168.0.7", "[::1]:8000", socket.gethostname().upper()):  # through a tunnel
            assert served.get("", {"Host": host})[0] == 200, host
        assert served.post(vote, {**code, "Origin": f"http://{own}"}) == (200, {"kept": "left"})


def test_a_locked_database_holds_up_nobody_but_the_vote(tmp_path: Path) -> None:
    folder, study = small_study(tmp_path, pairs=2)
    with serving(folder) as served, closing(sqlite3.connect(folder / "votes.sqlite", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        vote = (study.pairs[0].id, "caption", "left")
        began = time.monotonic()
        with ThreadPoolExecutor(5) as pool:
            refused = [pool.submit(served.vote, name, *vote) for name in FIVE]
            assert served.next(SIXTH)["done"] == 0
            assert time.monotonic() - began < 1
            assert {future.result()[0] for future in refused} == {503}
        assert time.monotonic() - began < 5
        other.execute("COMMIT")
        assert served.vote(ANNA, *vote) == (200, {"kept": "left"})


def test_one_address_cannot_take_all_connections(tmp_path: Path) -> None:
    folder, _ = small_study(tmp_path, pairs=2)
    with serving(folder) as served, ExitStack() as held:
        place = (urlsplit(served.url).hostname, urlsplit(served.url).port)
        slow = [held.enter_context(socket.create_connection(place)) for _ in range(MAX_OF_ONE_ADDRESS)]
        for each in slow:
            each.sendall(b"GET / HT")  # and nothing more
        wait_until(lambda: not answers(served))
        with closing(slow.pop()):
            pass
        wait_until(lambda: answers(served))


def answers(served: Served) -> bool:
    try:
        return served.get("")[0] == 200
    except OSError:
        return False


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
            rest = b" HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
            answer = raw(served, b"GET /" + path.encode() + rest)
            assert answer.startswith(b"HTTP/1.1 404 "), path
            assert b"mine" not in answer
            assert b"PNG" not in answer
        assert served.get(f"pictures/{picture}")[0] == 200
        _, _, headers = served.get(f"pictures/{picture}")
        assert headers.keys().isdisjoint({"Last-Modified", "ETag"})
        assert headers["Server"].strip() == "dalle"
        assert urlsplit(served.url).hostname == "127.0.0.1"


def test_a_picture_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    folder, study = small_study(tmp_path, pairs=2)
    with serving(folder) as served:
        (folder / "pictures" / study.items[0].left).unlink()
        status, answer, _ = served.get(f"pictures/{study.items[0].left}")
        assert (status, json.loads(answer)["error"]) == (503, "the picture cannot be read now; try again")
        assert served.get(f"pictures/{study.items[0].right}")[0] == 200


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
                running = [pool.submit(vote_until_it_dies, name, served, begun, enough) for name in FIVE]
                assert enough.wait(60)
                served.process.kill()
                for future in running:
                    future.result(60)
        found = stored(folder)
        assert acknowledged.items() <= found.items() <= attempted.items(), kill
        # At most what each annotator had on its way was kept without a reply.
        assert len(found) - len(acknowledged) <= 5 * (kill + 1)
    with serving(folder) as served:
        before = served.next(ANNA)
        vote, answer = next(iter(acknowledged.items()))
        assert served.vote(*vote, answer)[0] == 409
        half = [item for item in study.pairs if len({key for key in stored(folder) if key[:2] == (ANNA, item.id)}) == 1]
        if half:  # the pair that the kill left half judged comes first, with the other question
            assert before["tasks"][0]["item"] in {item.id for item in half}
        assert before["done"] == sum(
            all((ANNA, item.id, q) in stored(folder) for q in QUESTIONS) for item in study.pairs
        )


def test_racing_for_the_last_vote_one_wins_even_over_two_servers(tmp_path: Path) -> None:
    folder, study = small_study(tmp_path, pairs=12, annotators=1, checks=0)
    with serving(folder) as one, serving(folder) as other, ThreadPoolExecutor(8) as pool:

        def race(votes: list[tuple[str, str, str, str]]) -> Counter[int]:
            given = [pool.submit((one, other)[place % 2].vote, *vote) for place, vote in enumerate(votes)]
            return Counter(future.result()[0] for future in given)

        for item in study.pairs:
            assert race([(ANNOTATORS[n], item.id, "caption", SIDES[n % 2]) for n in range(8)]) == {200: 1, 409: 7}
        assert race([(ANNA, study.pairs[0].id, "realistic", side) for side in SIDES * 4]) == {200: 1, 409: 7}
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


def test_a_name_that_was_given_is_allowed(tmp_path: Path) -> None:
    folder, study = small_study(tmp_path, pairs=2)
    vote = json.dumps({"item": study.pairs[0].id, "question": "caption", "answer": "left"}).encode()
    with serving(folder, name="Study.example.org") as served:
        code = served.code(ANNA)
        assert served.get("", {"Host": "study.example.org"})[0] == 200
        assert served.get("", {"Host": study.items[0].left})[0] == 403
        assert served.post(vote, {**code, "Origin": "https://other.example.org"})[0] == 403
        # A proxy with TLS may ask under the server's own address.
        assert served.post(vote, {**code, "Origin": "https://study.example.org"}) == (200, {"kept": "left"})

"""The study's page in headless Chromium: five scripted annotators with keys, mouse and touch, a reload and a kill -9.

Needs playwright (``pip install -e .[browser]``) and a Chromium, the system's or ``playwright install chromium``'s.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from helpers.human_study_folder import serving, small_study, stored, wait_until

from dalle_cli.human_study.study import QUESTIONS, SIDES

playwright = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (pip install -e .[browser])"
)
pytestmark = pytest.mark.slow

READY = '#judge[data-ready="true"]'
PHONE = {"viewport": {"width": 390, "height": 664}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
DESK = {"viewport": {"width": 1280, "height": 800}}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    system = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    with playwright.sync_playwright() as started:
        try:
            # Chromium's own sandbox does not start in many containers; the page is ours.
            browser = started.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except playwright.Error as error:
            pytest.skip(f"no Chromium can be started: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


class Annotator:
    """An annotator at one page, who answers by one means of input and remembers the answers."""

    def __init__(self, chromium: Any, link: str, name: str, means: str, checks: dict[str, str]) -> None:
        self.name, self.means, self.checks = name, means, checks
        self.context = chromium.new_context(**(PHONE if means == "touch" else DESK))
        self.page = self.context.new_page()
        self.answers: dict[tuple[str, str, str], str] = {}
        self.seen: list[str] = []  # what a browser's tools show of the network
        self.errors: list[str] = []
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("response", lambda response: self.seen.append(f"{response.url} {response.headers}"))
        self.page.goto(link)
        self.page.get_by_role("button", name="Start").click()

    def shown(self) -> dict[str, Any] | None:
        """Return the item and question that the page takes an answer to now."""
        found: dict[str, Any] | None = self.page.evaluate(
            "() => ready && !document.getElementById('judge').hidden"
            " ? {item: task.item, question: task.questions[0].id} : null"
        )
        return found

    def finished(self) -> bool:
        return bool(self.page.locator("#end").is_visible())

    def answer_if_asked(self) -> bool:
        shown = self.shown()
        if shown is None:
            return False
        place = (int(shown["item"][-1], 16) + int(self.name[-2:]) + QUESTIONS.index(shown["question"])) % 2
        side = self.checks.get(shown["item"]) or SIDES[place]
        if shown["question"] == "caption" and shown["item"] not in self.checks and int(shown["item"][0], 16) % 4 == 0:
            side = "neither"
        choice = self.page.locator("#neither" if side == "neither" else f'.choice[data-side="{side}"]')
        if self.means == "touch":
            choice.tap()
        elif self.means == "mouse" and shown["question"] == "caption":
            choice.evaluate("choice => { choice.click(); choice.click(); }")  # a double click is one answer
        elif self.means == "mouse":
            choice.click()
        elif self.means == "digits":
            self.page.keyboard.press({"left": "1", "right": "2", "neither": "3"}[side])
        elif self.means == "arrows":
            self.page.keyboard.press({"left": "ArrowLeft", "right": "ArrowRight", "neither": "ArrowDown"}[side])
        else:
            choice.focus()
            self.page.keyboard.press("Enter")
        self.answers[self.name, shown["item"], shown["question"]] = side
        return True


def test_five_annotators_a_reload_and_a_killed_server(tmp_path: Path, chromium: Any) -> None:
    folder, study = small_study(tmp_path, pairs=4, checks=1)
    checks = {item.id: str(item.check) for item in study.checks}
    means = ("digits", "arrows", "mouse", "touch", "enter")
    with serving(folder, links=5) as served:
        port = int(urlsplit(served.url).port or 0)
        people = [
            Annotator(chromium, link, name, how, checks)
            for (name, link), how in zip(served.links.items(), means, strict=True)
        ]
        for person in people:
            person.page.wait_for_selector(READY)
        for _ in range(2):
            for person in people:
                wait_until(person.answer_if_asked)
        for person in people:
            person.page.wait_for_selector(READY)
        people[0].page.reload()  # no name is asked again, and nothing comes twice
        wait_until(people[0].answer_if_asked)
        wait_until(lambda: people[0].answers.items() <= stored(folder).items())
        served.process.kill()
        served.process.wait()
        wait_until(people[1].answer_if_asked)
        people[1].page.wait_for_selector("#trouble:visible")
        assert "not saved yet" in people[1].page.inner_text("#trouble")
        assert people[1].shown() is None
        assert len(stored(folder)) == 11  # two of each, and one after the reload

    with serving(folder, port):
        people[1].page.wait_for_selector("#trouble", state="hidden")
        while not all(person.finished() for person in people):
            for person in people:
                person.answer_if_asked()
            people[0].page.wait_for_timeout(50)
        for person in people:
            assert "5 pairs" in person.page.inner_text("#summary")
            unexpected = [error for error in person.errors if "ERR_CONNECTION" not in error]
            assert unexpected == []
            told = "\n".join([*person.seen, person.page.content()])
            assert not any(word in told for word in ("mine", "theirs", "key.json", str(tmp_path)))
        votes = stored(folder)
        assert votes == {vote: side for person in people for vote, side in person.answers.items()}
        assert Counter((item, question) for _, item, question in votes) == {
            (item.id, question): 5 for item in study.items for question in QUESTIONS
        }


def test_both_pictures_fit_on_the_screen(tmp_path: Path, chromium: Any) -> None:
    folder, _ = small_study(tmp_path, pairs=2, checks=0)
    screens = [(320, 568), (390, 664), (390, 844), (664, 320), (768, 1024), (1024, 700), (1280, 800), (1920, 1080)]
    with serving(folder) as served:
        for width, height in screens:
            touch = min(width, height) < 700
            context = chromium.new_context(
                viewport={"width": width, "height": height}, has_touch=touch, is_mobile=touch
            )
            page = context.new_page()
            page.goto(served.links["annotator-01"])
            page.get_by_role("button", name="Start").click()
            page.wait_for_selector(READY)
            left, right = (page.locator(f'.choice[data-side="{side}"] img').bounding_box() for side in SIDES)
            for box in (left, right):
                assert 0 <= box["x"] <= width - box["width"], (width, height)
                assert 0 <= box["y"] <= height - box["height"], (width, height)
                assert box["width"] == pytest.approx(box["height"], abs=1)
                assert box["width"] >= 0.45 * min(width, height), (width, height)
            assert left["width"] == right["width"]
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            context.close()

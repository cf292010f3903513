"""dalle human-study report: the files it writes."""

from __future__ import annotations

import csv
import json
from collections import Counter
from pathlib import Path

import pytest
from conftest import Call
from helpers.html_page import Page
from helpers.human_study_folder import SIZE, small_study, write_pictures
from PIL import Image

from dalle_cli.human_study.make import StudyRequest, make_study
from dalle_cli.human_study.report import write_report
from dalle_cli.human_study.study import QUESTIONS, load_key
from dalle_cli.human_study.votes import Votes


def test_the_report_is_a_page_a_plot_and_tables_without_names(tmp_path: Path, call: Call) -> None:
    out, study = small_study(tmp_path, pairs=5, annotators=3)
    assert "nobody has voted" in call("human-study", "report", out).mistake()
    key = load_key(out, study)
    with Votes(out, study) as votes:
        for annotator in ("Zebedee", "Florence", "Dougal"):
            for item in study.items:
                for question in QUESTIONS:
                    answer = item.check or ("left" if key.items[item.id].left == "mine" else "right")
                    votes.record(annotator, item, question, answer)
    done = call("human-study", "report", out, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert found == json.loads((out / "report" / "report.json").read_text())
    for question in QUESTIONS:
        entry = found["questions"][question]
        assert entry["majority"]["mine"] == {"pairs": 5, "share": {"value": 1.0, "low": pytest.approx(0.5655, abs=1e-4),
                                                                    "high": 1.0}}  # fmt: skip
        assert entry["fleiss_kappa"] is None
        assert entry["agreement"] == 1.0
        assert entry["p_value"] == 2 / 2**5
    assert [annotator["checks_wrong"] for annotator in found["annotators"]] == [0, 0, 0]

    with (out / "report" / "pairs.csv").open() as file:
        pairs = list(csv.DictReader(file))
    assert len(pairs) == 10
    assert {(p["votes mine"], p["votes theirs"], p["majority"]) for p in pairs} == {("3", "0", "mine")}
    with (out / "report" / "votes.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * len(study.items) * 2
    assert Counter((row["system"], row["check"]) for row in rows) == {("mine", ""): 30, ("", "right"): 24}
    page = (out / "report" / "report.html").read_text()
    assert page.count("data:image/jpeg") == 10
    assert "<svg" in page
    assert "100.0" in page
    assert "http://" not in page.replace("http://www.w3.org/", "")
    assert "https://" not in page
    with Image.open(out / "report" / "votes.png") as plot:
        assert plot.width > 1000
    assert b"<svg" in (out / "report" / "votes.svg").read_bytes()[:400]
    written = b"".join(file.read_bytes() for file in (out / "report").iterdir()).lower()
    assert not any(name in written for name in (b"zebedee", b"florence", b"dougal"))
    before = {file.name: file.read_bytes() for file in (out / "report").iterdir()}
    done = call("human-study", "report", out)
    assert done.out == f"{out / 'report' / 'report.html'}\n"
    assert "100.0%" in done.err
    assert before == {file.name: file.read_bytes() for file in (out / "report").iterdir()}


def test_script_in_names_captions_and_paths_is_shown_as_text(tmp_path: Path) -> None:
    folder = tmp_path / "<script>folder<"
    captions = tmp_path / "<script>captions.txt"
    captions.write_text("<script>caption</script>\n")
    systems = {}
    for seed, name in enumerate(("<script>mine</script>", "\"><img src=x onerror='alert(1)'>")):
        write_pictures(folder / str(seed), ["1"], seed)
        systems[name] = str(folder / str(seed))
    study = make_study(StudyRequest(systems, captions, image_size=SIZE), tmp_path / "study")
    with Votes(tmp_path / "study", study) as votes:
        votes.record("anna", study.pairs[0], "realistic", "left")
    _, html = write_report(tmp_path / "study")
    page = Page(html.read_text())
    assert "script" not in page.tags
    assert set(page.images) == systems.keys()
    for text in (*systems, *systems.values(), "<script>caption</script>", str(captions)):
        assert text in page.text

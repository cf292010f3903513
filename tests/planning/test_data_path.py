"""The plan of a data path: its sums, its command and its measured constants."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from helpers.prior_recipes import tiny_prior
from helpers.running import run
from rich.console import Console

from dalle_cli.planning.data_path import CHECKING, GROWTH, NEAR, DataPath, Step, plan_data_path
from dalle_cli.planning.units import parse_count
from dalle_cli.views.plan_tables import render_data_path


def test_work_is_a_measured_time_a_pair_times_the_pairs() -> None:
    path = plan_data_path(tiny_prior(), 250_000_000, 64)
    steps = {step.name: step for step in path.steps}
    assert all(step.microseconds > 0 for step in path.steps)
    for name, step in steps.items():
        assert step.hours == pytest.approx(step.microseconds * 250_000_000 / 3.6e9)
        share = {"start of prior": 1, "encode-images": 64}.get(name, 64 * path.cores)
        assert step.elapsed == pytest.approx(step.hours / share)
    recipe = tiny_prior()
    assert steps["encode-images"].bytes == (2 * recipe.grid**2 + 1) * 250_000_000
    assert steps["tokenize-text"].bytes > 2 * recipe.tokenizer.text_length * 250_000_000
    assert steps["tokenize-text"].files + steps["encode-images"].files == 6 * 15_259
    assert steps["index"].files == 25_000
    assert steps["overlap: read"].bytes == 3 * 32**2 * 250_000_000


@pytest.mark.slow
def test_comparing_alone_grows_faster_than_the_pairs() -> None:
    few, many = ({step.name: step for step in plan_data_path(tiny_prior(), n, 1).steps} for n in (10**6, 10**9))
    checks = {n: 1e6 * NEAR * CHECKING * n for n in (10**6, 10**9)}
    assert checks[10**6] == pytest.approx(8)
    looked_up = [step["overlap: compare"].microseconds - checks[n] for n, step in ((10**6, few), (10**9, many))]
    assert looked_up[1] / looked_up[0] == pytest.approx(1000 ** (GROWTH - 1), rel=0.7)  # two measurements
    assert many["start of prior"].bytes == 125_000_000


def test_the_table_fits_a_terminal_of_80_columns() -> None:
    times = [8.3e-3, 42.0, 1.81e6]
    steps = [
        Step("encode-images", each, each * 1e8 / 3.6e9, each * 1e6 / 3.6e9, 512_200_000_000, 122_072) for each in times
    ]
    written = io.StringIO()
    render_data_path(DataPath(100_000_000, 64, 2, "cpu", "12b", steps), Console(file=written, width=80))
    text = written.getvalue()
    assert "Data path of 100,000,000 pairs for 12b" in text
    rows = [line.split() for line in text.splitlines() if line.startswith("  encode-images")]
    assert [row[1:5] for row in rows] == [
        ["8.3", "ns", "0.000231", "2.31e-06"], ["42", "us", "1.17", "0.0117"], ["1.81", "s", "50,278", "503"]
    ]  # fmt: skip
    assert all(row[5:] == ["512.2", "GB", "122,072"] for row in rows)


def test_counts_as_people_write_them() -> None:
    assert [parse_count(text, "--pairs") for text in ("250M", "4000", "1.5k", "2G")] == [
        250 * 10**6,
        4000,
        1500,
        2 * 10**9,
    ]


def test_the_command(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    done = run("plan", recipe, "--pairs", "3M", "--tasks", 4, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["pairs"], found["tasks"]) == (3_000_000, 4)
    for wrong in ("many", "0", "0.5"):
        assert (
            f"--pairs {wrong}: write a count, such as 4000 or 250M" in run("plan", recipe, "--pairs", wrong).mistake()
        )

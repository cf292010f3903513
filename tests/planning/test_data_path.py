"""The plan of a data path: its sums, its command and its measured constants."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from helpers.prior_recipes import tiny_prior
from helpers.running import run

from dalle_cli.planning.data_path import GROWTH, plan_data_path
from dalle_cli.planning.units import parse_count


def test_work_is_a_measured_time_a_pair_times_the_pairs() -> None:
    path = plan_data_path(tiny_prior(), 250_000_000, 64)
    steps = {step.name: step for step in path.steps}
    assert all(step.microseconds > 0 for step in path.steps)
    alone = {"overlap: read": path.cores, "overlap: compare": path.cores, "start of prior": 1}
    for name, step in steps.items():
        assert step.hours == pytest.approx(step.microseconds * 250_000_000 / 3.6e9)
        share = {**alone, "encode-images": 64}.get(name, 64 * path.cores)
        assert step.elapsed == pytest.approx(step.hours / share)
    recipe = tiny_prior()
    assert steps["encode-images"].bytes == (2 * recipe.grid**2 + 1) * 250_000_000
    assert steps["tokenize-text"].bytes > 2 * recipe.tokenizer.text_length * 250_000_000
    assert steps["tokenize-text"].files + steps["encode-images"].files == 6 * 61_036
    assert steps["index"].files == 25_000
    assert steps["overlap: read"].bytes == 3 * 32**2 * 250_000_000


def test_comparing_alone_grows_faster_than_the_pairs() -> None:
    few, many = ({step.name: step for step in plan_data_path(tiny_prior(), n, 1).steps} for n in (10**6, 10**9))
    grown = many["overlap: compare"].microseconds / few["overlap: compare"].microseconds
    assert grown == pytest.approx(1000 ** (GROWTH - 1), rel=0.7)  # two measurements
    assert many["start of prior"].bytes == 125_000_000


def test_counts_as_people_write_them() -> None:
    assert [parse_count(text, "--data") for text in ("250M", "4000", "1.5k", "2G")] == [
        250 * 10**6,
        4000,
        1500,
        2 * 10**9,
    ]


def test_the_command(tmp_path: Path) -> None:
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    done = run("plan", recipe, "--data", "3M", "--tasks", 4, "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert (found["pairs"], found["tasks"]) == (3_000_000, 4)
    shown = run("plan", recipe, "--data", "3M")
    assert "Data path of 3,000,000 pairs for quickstart" in shown.out
    assert re.search(
        r"^  encode-images +[\d.]+ [a-z]+ +[\d.,]+ +[\d.,]+ +[\d.]+ [kMGB]+ +[\d,]+ *$", shown.out, re.MULTILINE
    )
    for wrong in ("many", "0", "0.5"):
        assert f"--data {wrong}: write a count, such as 4000 or 250M" in run("plan", recipe, "--data", wrong).mistake()

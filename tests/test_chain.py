"""Tests of ``dalle run``: the stages in order, killed and run again, against the stages' own commands."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from helpers.killed_runs import files, finish, kill
from helpers.running import DALLE, ENVIRONMENT, run, smallest_recipe

from dalle_cli.chain import STAGE_NAMES, Stage, run_stages, stages_of
from dalle_cli.config.load import load_recipe
from dalle_cli.errors import RESUMABLE, STOP_SIGNALS, UserError
from dalle_cli.progress import log
from dalle_cli.shapes.world import make_shapes
from dalle_cli.stores.files import owned


def write_recipe(folder: Path) -> Path:
    make_shapes(folder / "shapes", n=40, test_n=2, seed=0, size=32)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(smallest_recipe(folder / "run", folder / "shapes" / "train")))
    return file


def test_a_stage_s_output_takes_its_place_and_a_failure_ends_the_chain(tmp_path: Path) -> None:
    out, never = tmp_path / "new" / "help.txt", tmp_path / "never.txt"
    never.write_text("old")
    helping = Stage("sample", ("--help",), output=out)
    with pytest.raises(SystemExit) as ended:
        run_stages([helping, Stage("rerank", ("--nonsense",), output=never), Stage("report", ("--help",), output=out)])
    assert ended.value.code == 2
    assert "Draw pictures for captions" in out.read_text()
    assert never.read_text() == "old"


def test_a_second_chain_leaves_the_output_of_the_first_alone(tmp_path: Path) -> None:
    out = tmp_path / "samples.jsonl"
    with owned(out):
        half = out.with_name("samples.jsonl.tmp")
        half.write_text("what the first has drawn so far")
        with pytest.raises(UserError, match=f"{out}: is being written by process {os.getpid()} on "):
            run_stages([Stage("sample", ("--help",), output=out)])
        assert half.read_text() == "what the first has drawn so far"
    run_stages([Stage("sample", ("--help",), output=out)])
    assert [path.name for path in tmp_path.iterdir()] == ["samples.jsonl"]


def test_a_stage_whose_file_is_made_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_stages([Stage("report", ("--nonsense",), made=tmp_path)])
    assert f"== 1 of 1: report is done: {tmp_path}" in capsys.readouterr().err


def test_stages_get_the_settings_and_the_number_of_processes(tmp_path: Path) -> None:
    file = write_recipe(tmp_path)
    stages = {stage.name: stage for stage in stages_of(file, load_recipe(file), ["seed=3"], captions=7, gpus=2)}
    assert tuple(stages) == STAGE_NAMES
    assert stages["train-clip"].arguments == (str(file), "--set", "seed=3")
    assert stages["train-prior"].arguments == (str(file), "--set", "seed=3", "--gpus", "2")
    assert stages["sample"].arguments == (str(tmp_path / "run" / "prior"), "--held-out", "--limit", "7")


def test_part_of_a_chain(tmp_path: Path) -> None:
    file = write_recipe(tmp_path)
    done = run("run", file, "--until", "tokenize-text")
    assert done.code == 0, done.err
    assert done.out == f"{tmp_path / 'run' / 'tokens.zarr'}\n"
    assert "== 2 of 2: dalle tokenize-text" in done.err
    assert "next: " not in done.err
    alone = run("tokenize-text", file, "--set", "description=a b")
    assert alone.err.splitlines()[-1] == f"next: dalle train-dvae {file} --set 'description=a b'"
    shown = run("show", tmp_path / "run", "--json")
    assert json.loads(shown.out)["line"] == f"dalle train-dvae {file} --set 'description=a b'"
    other = run("train-tokenizer", file, "--out", tmp_path / "elsewhere", "--set", f"run={tmp_path / 'other'}")
    assert (other.code, "next: " in other.err) == (0, False)
    assert (
        "--from report comes after --until sample"
        in run("run", file, "--from", "report", "--until", "sample").mistake()
    )
    assert "data.holdout is 0" in run("run", file, "--set", "data.holdout=0").mistake()


@pytest.fixture
def handlers_put_back() -> Iterator[None]:
    before = {which: signal.getsignal(which) for which in STOP_SIGNALS}
    yield
    for which, handler in before.items():
        signal.signal(which, handler)


@pytest.mark.usefixtures("handlers_put_back")
@pytest.mark.parametrize("which", STOP_SIGNALS)
@pytest.mark.parametrize(("moment", "first_is_made"), [("== 1 of 2", False), ("   ", True)])
def test_a_signal_between_stages_stops_the_chain(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    which: signal.Signals,
    moment: str,
    first_is_made: bool,
) -> None:
    """The signal comes while the first stage starts, and then after it has ended."""
    first, second = (tmp_path / name for name in ("first.txt", "second.txt"))

    def log_and_signal(line: str) -> None:
        log(line)
        if line.startswith(moment):
            signal.raise_signal(which)

    monkeypatch.setattr("dalle_cli.chain.log", log_and_signal)
    with pytest.raises(SystemExit) as ended:
        run_stages([Stage("sample", ("--help",), output=first), Stage("rerank", ("--help",), output=second)])
    assert ended.value.code == RESUMABLE
    assert (first.exists(), second.exists()) == (first_is_made, False)
    assert "run the same command again to go on" in capsys.readouterr().err
    assert {signal.getsignal(each) for each in STOP_SIGNALS} == {signal.SIG_IGN}


@pytest.mark.slow
def test_a_killed_chain_ends_with_the_bytes_of_its_stages(tmp_path: Path) -> None:
    alone, chained = write_recipe(tmp_path / "alone"), write_recipe(tmp_path / "chained")
    for stage in stages_of(alone, load_recipe(alone), [], captions=2, gpus=None):
        printed = finish([stage.name, *stage.arguments])
        if stage.output is not None:
            stage.output.write_text(printed)
    wanted = {name: value for name, value in files(alone.parent / "run").items() if name.endswith(("tensors", ".png"))}
    command = ["run", chained, "--limit", 2]
    run_folder = chained.parent / "run"
    for made in ("dvae/step-00000004", "prior/step-00000008"):
        assert kill(command, (run_folder / made).exists, 0.01)
    stopped = subprocess.Popen([DALLE, *map(str, command)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not (run_folder / "clip").exists() and stopped.poll() is None:
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(60) in (75, 0)
    assert kill(command, (run_folder / "samples").exists, 0.01)
    report = finish(command).strip()
    assert report == str(run_folder / "report.html")
    found = {name: value for name, value in files(run_folder).items() if name.endswith(("tensors", ".png"))}
    assert found == wanted
    assert len(wanted) > 10

"""Slurm batch files name existing commands and options; on a test cluster, jobs are stopped, requeued and resumed."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from helpers.killed_runs import files, journal_lines
from helpers.running import Chain, smallest_recipe, write_recipe
from helpers.slurm_cluster import ROOT, Cluster, missing
from helpers.tiny_chain import HELD_OUT, SEEN, build_chain
from helpers.token_stores import write_tokens
from typer.main import get_command

from dalle_cli.app import app
from dalle_cli.shapes.world import make_shapes
from dalle_cli.stores.tokens import TokenReader

FOLDER = ROOT / "scripts" / "slurm"
FILES = sorted(FOLDER.glob("*.sh"))
STAGES = {
    "index", "scan", "overlap", "train-tokenizer", "tokenize-text", "train-dvae", "encode-images", "train-prior",
    "train-clip", "sample", "rerank", "eval-fid", "report",
}  # fmt: skip
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
RUNS = re.compile(r"^resumable dalle (?P<rest>.*?)(?: > .*)?$", re.MULTILINE)


def options_of(command: str) -> set[str]:
    group: Any = get_command(app)
    return {name for parameter in group.commands[command].params for name in parameter.opts}


def command_of(file: Path) -> list[str]:
    """Return the words of the one ``dalle`` command that a batch file runs, its name first."""
    (found,) = RUNS.finditer(file.read_text())
    return shlex.split(found["rest"])


def examples(text: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the batch file and the arguments of every call of sbatch in ``text``."""
    for line in re.sub(r"\\\n#? *", "", text).splitlines():
        for name, rest in re.findall(r"sbatch.*scripts/slurm/([a-z-]+\.sh)([^)`]*)", line):
            yield name, rest.split()


# Without Slurm


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_batch_file_is_bash(file: Path) -> None:
    done = subprocess.run(["bash", "-n", file], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_stage_has_a_file_with_existing_options() -> None:
    jobs = {file.stem: file for file in FILES if file.name not in ("job.sh", "chain.sh")}
    assert set(jobs) == STAGES
    for stage, file in jobs.items():
        command, *words = command_of(file)
        assert command == stage
        assert '"$@"' in RUNS.findall(file.read_text())[0]
        assert {word for word in words if word.startswith("--")} <= options_of(command), stage
        for option in ("requeue", r"cpus-per-task=\d+", r"mem=\d+G"):
            assert re.search(rf"^#SBATCH --{option}$", file.read_text(), re.MULTILINE), (stage, option)
        assert file.stat().st_mode & 0o111
        assert f"`{file.name}`" in (FOLDER / "README.md").read_text()


def test_examples_name_existing_files_and_options() -> None:
    seen = set()
    for text in [(FOLDER / "README.md").read_text(), *(file.read_text() for file in FILES)]:
        for name, words in examples(text):
            seen.add(name)
            assert (FOLDER / name).is_file(), name
            given = {word for word in words if word.startswith("--")}
            assert given <= options_of(name.removesuffix(".sh")), (name, given)
    assert seen == {f"{stage}.sh" for stage in STAGES}


STUBS = {
    "srun": 'while [[ "$1" == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'echo "$@" >> "$REQUEUED"',
    "dalle": 'if [ -n "${MAKES:-}" ]; then echo more >> "$MAKES"; fi; touch "$STARTED"; exec sleep 60',
}
"""Programs in place of Slurm's and of dalle, which makes a file or nothing until a signal ends it."""


@pytest.mark.parametrize("batch_file", ["scan.sh", "overlap.sh"])
@pytest.mark.parametrize(
    ("which", "makes", "code"), [(signal.SIGUSR1, False, 1), (signal.SIGUSR1, True, 75), (signal.SIGTERM, False, 75)]
)
def test_a_share_that_does_not_fit_its_time_limit_is_not_queued_for_ever(
    tmp_path: Path, batch_file: str, which: signal.Signals, makes: bool, code: int
) -> None:
    for name, script in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "setup").write_text(f"export PATH={tmp_path}:$PATH\n")
    out, started, requeued = tmp_path / "out", tmp_path / "started", tmp_path / "requeued"
    (out / "shares").mkdir(parents=True)
    (out / "shares" / "0002-of-0002.json").write_text("of another job")
    array = {"JOB_ID": "7", "ARRAY_TASK_ID": "1", "ARRAY_TASK_COUNT": "2", "ARRAY_TASK_MIN": "1", "ARRAY_TASK_MAX": "2"}
    environment = {
        **os.environ, **{f"SLURM_{name}": value for name, value in array.items()}, "DALLE_ROOT": str(ROOT),
        "DALLE_SETUP": str(tmp_path / "setup"), "STARTED": str(started), "REQUEUED": str(requeued),
        "MAKES": str(out / "shares" / "0001-of-0002.json") if makes else "",
    }  # fmt: skip
    option = "--cache" if batch_file == "overlap.sh" else "--out"
    job = subprocess.Popen([FOLDER / batch_file, "source", option, out], env=environment, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    (out / "shares" / "0002-of-0002.json").write_text("of another job, which goes on")
    job.send_signal(which)
    said = job.communicate(timeout=60)[1].decode()
    assert job.returncode == code, said
    assert requeued.exists() == (code == 75)
    assert ("it is not queued again; give it more time (--time)" in said) == (code == 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch finds the GPU that Slurm gave")
@pytest.mark.parametrize("stage", ["train-dvae", "encode-images", "train-prior", "train-clip", "sample"])
def test_a_job_that_was_given_gpus_stops_where_torch_finds_none(
    stage: str, by_hand: Chain, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "1")
    out, data = ("--out", tmp_path / "out"), ("--data", by_hand.train)
    arguments: dict[str, tuple[object, ...]] = {
        "train-dvae": (by_hand.recipe, *data, *out),
        "encode-images": (by_hand.recipe, *data, "--dvae", by_hand.dvae, "--tokens", tmp_path / "tokens.zarr"),
        "train-prior": (by_hand.recipe, "--tokens", by_hand.tokens, *out),
        "train-clip": (by_hand.recipe, *data, "--tokens", by_hand.tokens, *out),
        "sample": (by_hand.prior, SEEN, *out),
    }
    assert "SLURM_GPUS_ON_NODE 1: Slurm gave this job GPUs, but torch" in call(stage, *arguments[stage]).mistake()


# With Slurm


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    if (reason := missing()) is not None:
        pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    cluster.start()
    yield cluster
    cluster.stop()


def steps(run: Path) -> list[int]:
    file = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.is_file() else []


def wait_for(step: int, run: Path, slurm: Cluster) -> None:
    deadline = time.monotonic() + 900
    while max(steps(run), default=0) < step:
        assert time.monotonic() < deadline, (slurm.ask("squeue"), slurm.said())
        time.sleep(0.05)


@pytest.mark.slow
def test_a_signalled_and_preempted_job_ends_with_the_same_bytes(slurm: Cluster, tmp_path: Path) -> None:
    """Two ranks on two nodes get Slurm's notice of the time limit, and are then preempted by another job."""
    updates, undisturbed, disturbed = 600, tmp_path / "undisturbed", tmp_path / "disturbed"
    store = write_tokens(tmp_path / "tokens.zarr", 80, 48, 400, 4, 16)
    settings = smallest_recipe(tmp_path, None)
    # No checkpoint is due before the end, so each one to resume from was saved because of a signal.
    settings["prior"]["training"] |= {"updates": updates, "save_every": 10**6, "log_every": 10, "validate_every": 100}
    recipe = write_recipe(tmp_path, settings)

    def job(out: Path) -> str:
        return slurm.submit(*TWO_NODES, "train-prior.sh", recipe, "--tokens", store, "--out", out)

    (left_alone,) = slurm.finish(job(undisturbed))
    assert (left_alone["JobState"], left_alone["Restarts"]) == ("COMPLETED", "0"), slurm.said()

    number = job(disturbed)
    wait_for(60, disturbed, slurm)
    slurm.ask("scancel", "--batch", "--signal=USR1", number)
    wait_for(max(steps(disturbed)) + 60, disturbed, slurm)
    urgent = slurm.submit("--partition=high", *TWO_NODES, "--exclusive", "--wrap=sleep 1")
    facts = slurm.finish(urgent, number)
    said = slurm.said()
    assert [each["JobState"] for each in facts] == ["COMPLETED", "COMPLETED"], said
    assert facts[1]["Restarts"] == "2"
    saved = [int(step) for step in re.findall(r"disturbed/step-(\d+) of \d+ updates; exit code 75", said)]
    assert len(saved) == 2
    assert 60 <= saved[0] < saved[1] < updates
    assert said.count("resumes from step-") == 2
    assert said.count("queued again to resume") == 2

    last = f"step-{updates:08d}"
    assert files(disturbed / last) == files(undisturbed / last)
    assert journal_lines(disturbed) == journal_lines(undisturbed)
    losses = [[line["loss"] for line in journal_lines(run) if "loss" in line] for run in (undisturbed, disturbed)]
    assert losses[0][-1] == losses[1][-1] < losses[0][0] - 0.1


@pytest.mark.slow
def test_arrays_fill_one_store_and_feed_rerank(slurm: Cluster, tmp_path: Path) -> None:
    chain = build_chain(tmp_path)
    places, recipe = chain.places, chain.recipe_file

    store = tmp_path / "tokens.zarr"
    texts = slurm.submit("--array=1-2", "tokenize-text.sh", recipe, "--tokens", store)
    images = slurm.submit("--array=1-2", "encode-images.sh", recipe, "--tokens", store)

    lines_in, prompts = tmp_path / "lines", tmp_path / "prompts.txt"
    prompts.write_text(f"{SEEN}\n{HELD_OUT}\n")
    drawn = slurm.submit(
        "--array=1-2", "sample.sh", places.prior, "--captions", prompts, "--out", tmp_path / "drawn", LINES_IN=lines_in
    )
    ranked = slurm.submit(f"--dependency=afterok:{drawn}", "rerank.sh", "--clip", places.clip, LINES_IN=lines_in)

    facts = slurm.finish(texts, images, drawn, ranked)
    assert [each["JobState"] for each in facts] == ["COMPLETED"] * 7, slurm.said()
    alone, shared = TokenReader(places.tokens), TokenReader(store)
    shared.require_complete()
    for name in ("text", "image"):
        rows = range(len(alone))
        assert (shared.read(name, rows) == alone.read(name, rows)).all()

    assert [file.name for file in sorted(lines_in.iterdir())] == ["0001-of-0002.jsonl", "0002-of-0002.jsonl"]
    found, expected = (
        [json.loads(line) for line in file.read_text().splitlines()]
        for file in (tmp_path / "lines.ranked.jsonl", chain.ranked)
    )
    assert len(found) == len(expected) == 8
    same = ("prompt", "index", "log_likelihood", "score", "rank")
    for ours, theirs in zip(found, expected, strict=True):
        assert {key: ours[key] for key in same} == pytest.approx({key: theirs[key] for key in same}, abs=1e-4)
        assert Path(ours["png"]).read_bytes() == Path(theirs["png"]).read_bytes()


@pytest.mark.slow
def test_the_chain_runs_from_the_captions_to_the_report(slurm: Cluster, tmp_path: Path) -> None:
    make_shapes(tmp_path / "shapes", n=40, test_n=8, seed=0, size=32)
    recipe = write_recipe(tmp_path, smallest_recipe(tmp_path / "run", tmp_path / "shapes" / "train"))
    setup = tmp_path / "setup"
    setup.write_text("echo the setup was read\n")
    options = {"ARRAY": "1-2%1", "CAPTIONS": "4", "EVAL": str(tmp_path / "shapes" / "seen"), "DALLE_SETUP": str(setup)}
    submitted = subprocess.run(
        [FOLDER / "chain.sh", recipe, "--set", "sampling.n=2"],
        env={**slurm.environment, **options}, cwd=slurm.folder / "jobs", capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stderr
    jobs = dict(line.split() for line in submitted.stdout.splitlines())
    assert set(jobs) == STAGES
    facts = slurm.finish(*jobs.values())
    said = slurm.said()
    assert {each["JobState"] for each in facts} == {"COMPLETED"}, said
    assert said.count("the setup was read") == len(facts) == 13
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert len((tmp_path / "run" / "ranked.jsonl").read_text().splitlines()) == 8
    assert report["fid"][0]["n_generated"] == 8


@pytest.mark.slow
def test_a_failed_stage_cancels_those_that_need_it(slurm: Cluster, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, smallest_recipe(tmp_path / "run", tmp_path / "nothing"))
    submitted = subprocess.run(
        [FOLDER / "chain.sh", recipe], env=slurm.environment, cwd=slurm.folder / "jobs", capture_output=True, text=True
    )
    assert submitted.returncode == 0, submitted.stderr
    states = {each["JobState"] for each in slurm.finish(*(line.split()[1] for line in submitted.stdout.splitlines()))}
    assert states == {"FAILED", "CANCELLED"}
    assert "no such file or folder" in slurm.said()


@pytest.mark.slow
def test_a_job_with_a_mistake_is_not_requeued(slurm: Cluster, tmp_path: Path) -> None:
    (facts,) = slurm.finish(slurm.submit("train-clip.sh", tmp_path / "none.yaml"))
    assert (facts["JobState"], facts["ExitCode"], facts["Restarts"]) == ("FAILED", "2:0", "0")
    assert f"dalle: {tmp_path}/none.yaml: no such recipe" in slurm.said()
    number = slurm.submit("--array=0-1", "encode-images.sh", "recipe.yaml")
    assert {each["ExitCode"] for each in slurm.finish(number)} == {"2:0"}
    assert "array 0-1: number it from 1" in slurm.said()

"""The journal: JSON lines, TensorBoard and Weights & Biases hold the same points, each once, even after kills."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from helpers.killed_runs import TIMED, finish, kill
from helpers.power_cuts import Disk
from helpers.running import DALLE, ENVIRONMENT, Chain, smallest_recipe, write_recipe
from helpers.token_stores import write_tokens
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from dalle_cli.training.journal import Journal, pictures_of
from dalle_cli.training.throughput import THROUGHPUT_KEYS

FAKE_WANDB = """
import json, os
from pathlib import Path

class Run:
    def __init__(self, file):
        self.file = file
        lines = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
        self.step = max((line["step"] for line in lines), default=-1) + 1
        self.first = self.step

    def log(self, values, step):
        assert step >= self.first, "sent again"
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\\n")

    def finish(self):
        self.file.with_suffix(".finished").touch()

def Image(array):
    return [*array.shape, str(array.dtype)]

def init(**arguments):
    folder = Path(os.environ["FAKE_WANDB"])
    if (folder / "broken").exists():
        raise RuntimeError("api_key not configured (no-tty)\\nmore")
    with (folder / "init.jsonl").open("a") as file:
        file.write(json.dumps(arguments) + "\\n")
    return Run(folder / f"{arguments['id']}.jsonl")
"""


def tensorboard_events(run: Path) -> EventAccumulator:
    """Read the run's folder as TensorBoard does."""
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    found = tensorboard_events(run)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def untimed(found: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """Leave out the points that differ between two runs of the same recipe."""
    return {tag: values for tag, values in found.items() if tag.partition("/")[2] not in TIMED}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def points_of_lines(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard should hold according to the JSON lines."""
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in lines(run):
        part = "train" if "lr" in line else "validation"
        for name, value in line.items():
            if name not in ("step", "seconds"):
                tag = f"{part}/{name.removeprefix('val_')}"
                expected.setdefault(tag, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    return expected


def test_points_after_the_checkpoint_are_dropped_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # TensorBoard reads event files in the order of their names, which end with a count of the process's writers. Runs
    # have a process each; here the count starts at 0, so that its digits sort as numbers do.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    picture = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    for start, stop, offset in ((0, 5, 100.0), (0, 8, 0.0), (6, 10, 0.5), (6, 9, 0.25)):
        journal = Journal(tmp_path, start)  # never closed, as in a process that was killed
        for step in range(start + 1, stop + 1):
            journal.log_training(step, 0.1, {"loss": step + offset})
            if step % 2 == 0:
                journal.log_validation(step, {"loss": 2 * step + offset}, {"grid": picture + step})
        journal.flush()
    losses = [(step, step + (0.0 if step <= 6 else 0.25)) for step in range(1, 10)]
    assert points(tmp_path)["train/loss"] == losses
    assert points(tmp_path)["validation/loss"] == [(step, value + step) for step, value in losses if step % 2 == 0]
    assert points(tmp_path) == points_of_lines(tmp_path)
    images = tensorboard_events(tmp_path).Images("validation/grid")
    assert [image.step for image in images] == [2, 4, 6, 8]
    assert {(i.width, i.height) for i in images} == {(5, 4)}


def test_lines_are_on_the_disk_before_a_checkpoint_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = Disk(monkeypatch)
    with Journal(tmp_path, 0) as journal:
        for step in (1, 2):
            journal.log_training(step, 0.1, {"loss": 1.0})
            assert "content of metrics.jsonl" in disk.lacks(tmp_path)
            journal.flush()
            assert not [lost for lost in disk.lacks(tmp_path) if "metrics.jsonl" in lost]


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    Journal(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'


def test_what_a_killed_process_left_half_written_is_deleted(tmp_path: Path) -> None:
    with Journal(tmp_path, 0) as journal:
        journal.log_validation(1, {"loss": 1.0}, {"grid": torch.zeros(3, 2, 2, dtype=torch.uint8)})
    for left in (".metrics.jsonl.4711", "validation/.grid-00000001.png.4711", ".notes", "validation/.DS_Store"):
        (tmp_path / left).write_text("half")
    with Journal(tmp_path, 1):
        pass
    hidden = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob(".*"))
    assert hidden == [".notes", "validation/.DS_Store"]
    assert (tmp_path / "validation" / "grid-00000001.png").is_file()


def test_a_user_s_picture_among_those_of_validations_is_left_alone(tmp_path: Path) -> None:
    with Journal(tmp_path, 0) as journal:
        for step in (1, 2):
            journal.log_validation(step, {"loss": 1.0}, {"grid": torch.zeros(3, 2, 2, dtype=torch.uint8)})
    for name in ("notes.png", "my-curve.png", "grid-2.png", "grid-00000002.jpg"):
        (tmp_path / "validation" / name).write_text("mine")
    with Journal(tmp_path, 1):
        pass
    left = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert left == ["grid-00000001.png", "grid-00000002.jpg", "grid-2.png", "my-curve.png", "notes.png"]
    assert pictures_of(tmp_path, "grid") == [(1, tmp_path / "validation" / "grid-00000001.png")]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path, 0, writes=False) as journal:
        journal.log_training(1, 0.1, {"loss": 1.0})
        journal.log_validation(1, {"loss": 1.0}, {"grid": torch.zeros(3, 2, 2, dtype=torch.uint8)})
        journal.flush()
    assert list(tmp_path.iterdir()) == []


def test_killed_training_loses_and_repeats_no_point(by_hand: Chain, tmp_path: Path) -> None:
    changes = {"updates": 60, "save_every": 7, "validate_every": 5, "log_every": 3}
    sets = [word for key, value in changes.items() for word in ("--set", f"dvae.training.{key}={value}")]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"

    def command(out: Path) -> list[object]:
        return ["train-dvae", by_hand.recipe, "--data", by_hand.train, "--out", out, *sets]

    finish(command(undisturbed))
    for step in (7, 35):
        folder = killed / f"step-{step:08d}"
        assert kill(command(killed), lambda folder=folder: (folder / "manifest.json").exists(), 0.02)  # type: ignore[misc]
    finish(command(killed))
    # The kills came between lines too: saves are no multiples of log_every.
    assert [line["step"] for line in lines(killed) if "lr" in line] == [1, *range(3, 61, 3)]
    assert points(killed) == points_of_lines(killed)
    assert untimed(points(killed)) == untimed(points(undisturbed))
    assert {tag.partition("/")[0] for tag in points(undisturbed)} == {"train", "validation"}
    for name in ("elbo", "psnr", "ssim", "mse", "codebook_perplexity", "dead_codes"):
        assert [step for step, _ in points(undisturbed)[f"validation/{name}"]] == list(range(5, 61, 5))
    grids = [[(i.step, i.encoded_image_string) for i in tensorboard_events(run).Images("validation/reconstructions")]
             for run in (killed, undisturbed)]  # fmt: skip
    assert grids[0] == grids[1]
    assert [step for step, _ in grids[1]] == list(range(5, 61, 5))


def test_a_run_resumes_between_two_lines_of_its_log(by_hand: Chain, tmp_path: Path, call: Call) -> None:
    command = ("train-dvae", by_hand.recipe, "--data", by_hand.train, "--out", tmp_path / "run",
               "--set", "dvae.training.log_every=5")  # fmt: skip
    assert call(*command, "--set", "dvae.training.updates=2").code == 0
    assert call(*command, "--set", "dvae.training.updates=7").code == 0
    assert [line["step"] for line in lines(tmp_path / "run") if "lr" in line] == [1, 2, 5, 7]


# Weights & Biases


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokens(tmp_path_factory.mktemp("tokens") / "tokens.zarr", 80, 48, 400, 4, 16)


def recipe_of(folder: Path, **training: Any) -> Path:
    settings = smallest_recipe(folder, None)
    settings["prior"]["training"] |= training
    settings["monitoring"] = {"peak_tflops": 0.5}
    return write_recipe(folder, settings)


def test_weights_and_biases_has_what_the_journal_has(store: Path, tmp_path: Path) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "wandb.py").write_text(FAKE_WANDB)
    (tmp_path / "sent").mkdir()
    recipe, out = recipe_of(tmp_path, updates=12, save_every=4, validate_every=6), tmp_path / "run"
    command = [DALLE, "train-prior", recipe, "--tokens", store, "--out", out, "--wandb", "shapes"]
    modules = f"{tmp_path / 'modules'}{os.pathsep}{ENVIRONMENT['PYTHONPATH']}"
    environment = {**ENVIRONMENT, "PYTHONPATH": modules, "FAKE_WANDB": str(tmp_path / "sent")}

    def run(updates: int) -> subprocess.CompletedProcess[str]:
        words = [*map(str, command), "--set", f"prior.training.updates={updates}"]
        words += ["--set", "prior.learning_rate.schedule=constant"]
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=600)

    assert (done := run(10)).returncode == 0, done.stderr
    # The last checkpoint is lost, so updates 9 and 10 are repeated before two more.
    step = out / "step-00000010"
    (step / "manifest.json").unlink()
    assert (done := run(12)).returncode == 0, done.stderr
    assert "resumes from step-00000008" in done.stderr

    inits = [json.loads(line) for line in (tmp_path / "sent" / "init.jsonl").read_text().splitlines()]
    assert len(inits) == 2
    assert len({each["id"] for each in inits}) == 1
    for each in inits:
        assert (each["project"], each["name"], each["resume"]) == ("shapes", "smallest prior", "allow")
        assert each["config"]["stage"] == "prior"
        assert each["config"]["prior"]["model"]["layers"] == 3
    sent = tmp_path / "sent" / f"{inits[0]['id']}.jsonl"
    assert sent.with_suffix(".finished").exists()
    found = [json.loads(line) for line in sent.read_text().splitlines()]
    # The first run validated at its end, update 10. The journal dropped that on resume; W&B takes no point back.
    found = [line for line in found if not (line["step"] == 10 and "validation/loss" in line)]
    expected = []
    for line in lines(out):
        part = "train" if "lr" in line else "validation"
        values = {k.removeprefix("val_"): v for k, v in line.items() if k not in ("step", "seconds")}
        expected.append({"step": line["step"], **{f"{part}/{name}": value for name, value in values.items()}})
    timed = {f"train/{name}" for name in THROUGHPUT_KEYS}
    assert [{k: v for k, v in line.items() if k not in timed} for line in found] == [
        {k: v for k, v in line.items() if k not in timed} for line in expected
    ]
    assert all(timed <= line.keys() for line in found if "train/loss" in line)

    (tmp_path / "sent" / "broken").touch()
    failed = run(14)
    assert failed.returncode == 2
    assert "Traceback" not in failed.stderr
    assert failed.stderr.splitlines()[-1] == (
        "dalle: --wandb shapes: Weights & Biases does not start (api_key not configured (no-tty)); run wandb login, "
        "set WANDB_MODE=offline, or leave --wandb out"
    )


def test_a_missing_wandb_is_named(store: Path, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = call("train-prior", recipe_of(tmp_path), "--tokens", store, "--out", tmp_path / "run", "--wandb", "shapes")
    assert (
        "--wandb shapes: Weights & Biases is not installed; pip install wandb, or leave --wandb out" in done.mistake()
    )
    assert not (tmp_path / "run").exists()

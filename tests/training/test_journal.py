"""What a run leaves for people: JSON lines and TensorBoard hold the same points, each once, whatever was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from helpers.killed_runs import TIMED, finish, kill
from helpers.running import Chain, smallest_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dalle_cli.config.schema import Recipe
from dalle_cli.distributed.device import explain_out_of_memory
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.train import DvaeTask
from dalle_cli.training.journal import Journal
from dalle_cli.training.loop import Run


def board(run: Path) -> EventAccumulator:
    """As TensorBoard reads the run's folder."""
    return EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0, "images": 0}).Reload()


def points(run: Path) -> dict[str, list[tuple[int, float]]]:
    found = board(run)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def untimed(found: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """Without what differs between two runs of the same recipe."""
    return {tag: values for tag, values in found.items() if tag.partition("/")[2] not in TIMED}


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def points_of_lines(run: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard should hold, from the JSON lines."""
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in lines(run):
        part = "train" if "lr" in line else "validation"
        for name, value in line.items():
            if name not in ("step", "seconds"):
                tag = f"{part}/{name.removeprefix('val_')}"
                expected.setdefault(tag, []).append((line["step"], pytest.approx(value, rel=1e-6)))
    return expected


def test_what_a_dead_process_wrote_of_later_updates_is_dropped(tmp_path: Path) -> None:
    picture = torch.arange(3 * 4 * 5, dtype=torch.uint8).view(3, 4, 5)
    for start, stop, offset in ((0, 5, 100.0), (0, 8, 0.0), (6, 10, 0.5), (6, 9, 0.25)):
        journal = Journal(tmp_path, start)  # never closed: the one before it is dead, or hangs
        for step in range(start + 1, stop + 1):
            journal.training(step, 0.1, {"loss": step + offset})
            if step % 2 == 0:
                journal.validation(step, {"loss": 2 * step + offset}, {"grid": picture + step})
        journal.flush()
    losses = [(step, step + (0.0 if step <= 6 else 0.25)) for step in range(1, 10)]
    assert points(tmp_path)["train/loss"] == losses
    assert points(tmp_path)["validation/loss"] == [(step, value + step) for step, value in losses if step % 2 == 0]
    assert points(tmp_path) == points_of_lines(tmp_path)
    images = board(tmp_path).Images("validation/grid")
    assert [image.step for image in images] == [2, 4, 6, 8]
    assert {(i.width, i.height) for i in images} == {(5, 4)}


def test_a_line_cut_short_is_dropped(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    Journal(tmp_path, 2)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 2.0}\n'


def test_one_that_does_not_lead_writes_nothing(tmp_path: Path) -> None:
    with Journal(tmp_path, 0, writes=False) as journal:
        journal.training(1, 0.1, {"loss": 1.0})
        journal.validation(1, {"loss": 1.0}, {"grid": torch.zeros(3, 2, 2, dtype=torch.uint8)})
        journal.flush()
    assert list(tmp_path.iterdir()) == []


def test_killed_training_loses_and_repeats_no_point(by_hand: Chain, tmp_path: Path) -> None:
    changes = {"updates": 60, "save_every": 7, "validate_every": 5, "log_every": 3}
    sets = [word for key, value in changes.items() for word in ("--set", f"dvae.training.{key}={value}")]
    calm, struck = tmp_path / "calm", tmp_path / "struck"

    def command(out: Path) -> list[object]:
        return ["train-dvae", by_hand.recipe, "--data", by_hand.train, "--out", out, *sets]

    finish(command(calm))
    for step in (7, 35):
        folder = struck / f"step-{step:08d}"
        assert kill(command(struck), lambda folder=folder: (folder / "manifest.json").exists(), 0.02)  # type: ignore[misc]
    finish(command(struck))
    # Killed between lines too: updates that are no multiples of log_every.
    assert [line["step"] for line in lines(struck) if "lr" in line] == [1, *range(3, 61, 3)]
    assert points(struck) == points_of_lines(struck)
    assert untimed(points(struck)) == untimed(points(calm))
    assert {tag.partition("/")[0] for tag in points(calm)} == {"train", "validation"}
    for name in ("elbo", "psnr", "ssim", "mse", "codebook_perplexity", "dead_codes"):
        assert [step for step, _ in points(calm)[f"validation/{name}"]] == list(range(5, 61, 5))
    grids = [[(i.step, i.encoded_image_string) for i in board(run).Images("validation/reconstructions")]
             for run in (struck, calm)]  # fmt: skip
    assert grids[0] == grids[1]
    assert [step for step, _ in grids[1]] == list(range(5, 61, 5))


def test_a_run_goes_on_between_two_lines_of_its_log(by_hand: Chain, tmp_path: Path, call: Call) -> None:
    command = ("train-dvae", by_hand.recipe, "--data", by_hand.train, "--out", tmp_path / "run",
               "--set", "dvae.training.log_every=5")  # fmt: skip
    assert call(*command, "--set", "dvae.training.updates=2").code == 0
    assert call(*command, "--set", "dvae.training.updates=7").code == 0
    assert [line["step"] for line in lines(tmp_path / "run") if "lr" in line] == [1, 2, 5, 7]


# A full GPU


def full() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.00 GiB is "
        "free. Of the allocated memory 70.00 GiB is allocated by PyTorch."
    )


@pytest.mark.parametrize("where", ["loss", "validate"])
def test_a_full_gpu_is_one_line_that_says_what_to_lower(
    where: str, by_hand: Chain, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(DvaeTask, where)

    def sometimes(task: DvaeTask, *arguments: Any) -> Any:
        return full() if arguments[-1] >= 8 else whole(task, *arguments)

    monkeypatch.setattr(DvaeTask, where, sometimes)
    done = call("train-dvae", by_hand.recipe, "--data", by_hand.train, "--out", tmp_path / "run",
                "--set", "dvae.training.validate_every=8")  # fmt: skip
    line = done.mistake()
    assert "CUDA out of memory; lower dvae.training.micro_batch, or set dvae.model.checkpoint_resblocks" in line
    assert "nothing saved is lost" in line
    assert (tmp_path / "run" / "step-00000004").is_dir()


def test_other_faults_are_not_taken_for_a_full_gpu(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="another"), explain_out_of_memory(tmp_path, "lower it"):
        raise RuntimeError("another")


def test_a_task_that_gives_too_few_batches_is_no_silent_end(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(smallest_recipe(tmp_path, None))
    stage = recipe.dvae

    class Short(DvaeTask):
        def batches(self, start: int, stop: int) -> Any:
            yield torch.zeros(4, 3, 32, 32, dtype=torch.uint8)

    task = Short(recipe, [0] * 9, DVAE(stage.model))  # type: ignore[arg-type]
    task.validation_pictures = None
    with pytest.raises(ValueError, match="shorter"):
        Run(task, recipe, tmp_path / "out", stage.training, stage.adam, stage.learning_rate, ()).train()

"""Commands killed at random moments and run again end with the same bytes as undisturbed ones."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from helpers.killed_runs import SHARD, SMALL_SHARDS, Command, files, finish, journal_lines, kill
from helpers.running import DALLE, Chain

from dalle_cli.errors import UserError
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.stores.shards import Part
from dalle_cli.stores.tokens import TokenReader

KILLS = 3


def kill_often(
    command: Command, progress: Callable[[], int], most: int, delay: float, program: Sequence[str] = (DALLE,)
) -> list[int]:
    """Kill ``command`` KILLS times, each time further on; return its progress each time, ``most`` being the end.

    The moments are random with the command's name as seed, so that a failure can be repeated.
    """
    rng = random.Random(str(command[0]))
    progressed = []
    for number in range(1, KILLS + 1):
        goal = max(progress() + 1, rng.randint((number - 1) * most // (KILLS + 1), number * most // (KILLS + 1)))
        assert kill(command, lambda goal=goal: progress() >= goal, rng.uniform(0, delay), program)  # type: ignore[misc]
        progressed.append(progress())
    assert progressed[-1] < most, "the last kill came too late to interrupt anything"
    return progressed


def rows_in(store: Path, part: Part | None) -> Callable[[], int]:
    """Return a function that reads the number of committed rows while the store is being written."""

    def rows() -> int:
        try:
            if part:
                return TokenReader(store).part(part).rows
            return int(json.loads((store / "zarr.json").read_text())["attributes"]["rows"])
        except (FileNotFoundError, KeyError, UserError):
            return 0

    return rows


@pytest.mark.parametrize("stage", ["dvae", "prior", "clip"])
def test_killed_training_ends_with_the_same_bytes(by_hand: Chain, tmp_path: Path, stage: str) -> None:
    updates, save_every = 60, 4
    settings = {
        "training.updates": updates,
        "training.save_every": save_every,
        "training.validate_every": 6,  # between saves, so that the plateau's state is resumed
        "learning_rate.peak": 1e-3,
        "learning_rate.schedule": "plateau",
        "learning_rate.warmup_updates": 3,
        "learning_rate.plateau_validations": 1,
    }
    changes = [part for key, value in settings.items() for part in ("--set", f"{stage}.{key}={value}")]
    sources = {"dvae": ["--data", by_hand.train], "prior": ["--tokens", by_hand.tokens]}
    sources["clip"] = [*sources["dvae"], *sources["prior"]]

    def command(out: Path) -> Command:
        return [f"train-{stage}", by_hand.recipe, *sources[stage], *changes, "--out", out]

    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(command(undisturbed))

    def progress() -> int:
        steps = [int(path.parent.name[5:]) for path in killed.glob("step-*/manifest.json")]
        return max(steps, default=0)

    progressed = kill_often(command(killed), progress, updates, delay=0.08)
    assert len(set(progressed)) == KILLS
    finish(command(killed))
    names = sorted(path.name for path in killed.iterdir())
    # Nothing unfinished is left, and the best checkpoint stands beside the newest two.
    steps = sorted({"step-00000056", "step-00000060", open_checkpoint(undisturbed).path.name})
    shown = [] if stage == "prior" else ["validation"]
    assert names == ["metrics.jsonl", *steps, "tensorboard", *shown]
    assert all(files(killed / name) == files(undisturbed / name) for name in [*steps, *shown])

    assert journal_lines(killed) == journal_lines(undisturbed)
    kinds = Counter((line["step"], "lr" in line) for line in journal_lines(killed))
    assert set(kinds.values()) == {1}
    assert sum(trained for _, trained in kinds) == updates


def test_a_finished_run_is_left_alone(by_hand: Chain) -> None:
    before = files(by_hand.prior)
    out = finish(["train-prior", by_hand.recipe, "--tokens", by_hand.tokens, "--out", by_hand.prior])
    assert out == f"{by_hand.prior / 'step-00000012'}\n"
    assert files(by_hand.prior) == before


def test_killed_writers_of_a_token_store_end_with_the_same_bytes(by_hand: Chain, tmp_path: Path) -> None:
    shapes, rows = tmp_path / "shapes", 1500
    finish(["make-shapes", shapes, "--n", rows, "--test-n", 1, "--size", 32, "--seed", 7])
    program = (sys.executable, "-c", SMALL_SHARDS)
    undisturbed, killed = tmp_path / "undisturbed.zarr", tmp_path / "killed.zarr"
    made_by = {"tokenize-text": ["--tokenizer", by_hand.tokenizer], "encode-images": ["--dvae", by_hand.dvae]}
    for name, part in (("tokenize-text", "text"), ("encode-images", "image")):

        def command(out: Path, name: str = name) -> Command:
            return [name, by_hand.recipe, "--data", shapes / "train", *made_by[name], "--tokens", out]

        finish(command(undisturbed), program)
        progressed = kill_often(command(killed), rows_in(killed, part), rows, 0.04, program)
        assert len(set(progressed)) == KILLS
        assert all(row % SHARD == 0 for row in progressed)
        finish(command(killed), program)
        assert rows_in(killed, part)() == rows
        assert files(killed) == files(undisturbed)


def test_killed_sampling_ends_with_the_same_pictures_and_lines(by_hand: Chain, tmp_path: Path) -> None:
    prompts, n = ["a small red star", "a large blue square"], 150
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"

    def command(out: Path) -> Command:
        return ["sample", by_hand.prior, *prompts, "--n", n, "--batch-size", 4, "--out", out]

    lines = finish(command(undisturbed))
    progressed = kill_often(command(killed), rows_in(killed / "samples.zarr", None), len(prompts) * n, delay=0.04)
    assert len(set(progressed)) == KILLS
    assert finish(command(killed)) == lines.replace(str(undisturbed), str(killed))
    assert {name: digest for name, digest in files(killed).items() if not name.endswith(".partial")} == files(
        undisturbed
    )

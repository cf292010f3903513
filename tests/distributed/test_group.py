"""Several gloo ranks on this machine against one process on the same batches."""

from __future__ import annotations

import itertools
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Call
from helpers.killed_runs import TIMED
from helpers.processes import HALF, WHOLE, command, outputs_of, start
from helpers.running import DALLE, ENVIRONMENT, Chain, smallest_recipe
from hypothesis import given
from hypothesis import strategies as st

from dalle_cli.config.schema import Recipe
from dalle_cli.data.batch_order import BatchOrder
from dalle_cli.data.open_source import open_source
from dalle_cli.data.source import Source
from dalle_cli.distributed.group import Group, buckets
from dalle_cli.distributed.launch import Launch, read_launch
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.train import DvaeTask
from dalle_cli.errors import UserError
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.training.loop import Run

TORCHRUN = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def ended() -> Iterator[list[subprocess.Popen[str]]]:
    """A list of processes that are killed when the test is over."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


# The end of a rank

BUSY = """
import atexit
import torch
import torch.distributed as dist
from dalle_cli import app
from dalle_cli.distributed.group import form_process_group

def command():
    form_process_group(torch.device("cpu"), store=dist.HashStore(), rank=0, world_size=1)
    for _ in range(100):
        dist.all_gather([torch.empty(10**6)], torch.ones(10**6), async_op=True)
    print("a result")
    raise SystemExit(3)

atexit.register(print, "a registered function")
app.run_arguments = command
app.main()
"""


def test_a_rank_ends_while_gloo_drops_tensors() -> None:
    """The shutdown of Python itself aborts this process: "terminate called without an active exception"."""
    done = subprocess.run([sys.executable, "-c", BUSY], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (3, "a result\na registered function\n", "")


# The launcher's environment


def test_the_environment_of_torchrun() -> None:
    assert read_launch(TORCHRUN) == Launch(rank=1, size=4, local_rank=1, local_size=None)
    assert not read_launch(TORCHRUN).leads
    assert read_launch({**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}).leads
    assert read_launch({}) == read_launch({"MASTER_ADDR": "somewhere", "LOCAL_RANK": "3"}) == Launch(0, 1, 0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"MASTER_PORT": None}, "MASTER_PORT not set"),
        ({"WORLD_SIZE": None, "MASTER_ADDR": ""}, "WORLD_SIZE and MASTER_ADDR not set"),
        ({"RANK": None}, "RANK not set"),
        ({"RANK": "4"}, "RANK 4, WORLD_SIZE 4"),
        ({"RANK": "-1"}, "RANK -1"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK 2"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT 70000"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE is 'four', not a number"),
    ],
)
def test_a_contradictory_environment_is_refused(
    changes: dict[str, str | None], words: str, call: Call, by_hand: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**TORCHRUN, **changes}.items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    for stage in ("dvae", "prior"):
        assert words in call(f"train-{stage}", by_hand.recipe).mistake()


def test_clip_trains_in_one_process_only(by_hand: Chain, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**TORCHRUN, "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    done = call("train-clip", by_hand.recipe, "--data", by_hand.train, "--tokens", by_hand.tokens)
    assert "runs in one process, not in 4" in done.mistake()


# Parts of a batch


@given(count=st.integers(0, 300), size=st.integers(1, 40))
def test_parts_cover_a_batch_once_and_differ_by_one(count: int, size: int) -> None:
    parts = [list(range(count))[Group(rank, size).part(count)] for rank in range(size)]
    assert list(itertools.chain(*parts)) == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@given(sizes=st.lists(st.integers(0, 9), max_size=30), halves=st.lists(st.booleans(), min_size=30, max_size=30))
def test_buckets_keep_order_types_and_their_size(sizes: list[int], halves: list[bool]) -> None:
    types = [torch.half if half else torch.float for half in halves]
    gradients = [torch.zeros(n, dtype=dtype) for n, dtype in zip(sizes, types, strict=False)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dalle_cli.distributed.group.BUCKET_BYTES", 20)
        found = list(buckets(gradients))
    assert [id(g) for bucket in found for g in bucket] == [id(g) for g in gradients]
    for bucket in found:
        assert len({g.dtype for g in bucket}) == 1
        assert len(bucket) == 1 or sum(g.nbytes for g in bucket) <= 20
    for one, two in itertools.pairwise(found):  # no two buckets could have been one
        assert one[0].dtype != two[0].dtype or sum(g.nbytes for g in [*one, two[0]]) > 20


class Watched:
    """A source that records which rows were read."""

    def __init__(self, source: Source) -> None:
        self.source, self.read = source, list[int]()

    def __len__(self) -> int:
        return len(self.source)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source, name)

    def image_bytes(self, row: int) -> bytes:
        self.read.append(row)
        return self.source.image_bytes(row)


def test_each_rank_reads_only_its_part(by_hand: Chain) -> None:
    values = smallest_recipe(Path("unused"), by_hand.train)
    values["dvae"]["training"]["batch_size"] = 7
    recipe = Recipe.model_validate(values)

    def drawn(group: Group) -> tuple[DvaeTask, list[torch.Tensor], list[int]]:
        source = Watched(open_source(str(by_hand.train)))
        task = DvaeTask(recipe, source, DVAE(recipe.dvae.model), group)
        return task, list(task.batches(2, 4)), source.read

    _, whole, rows = drawn(Group())
    found = [drawn(Group(rank, 3)) for rank in range(3)]
    for step in range(2):
        assert torch.equal(torch.cat([batches[step] for _, batches, _ in found]), whole[step])
    assert [len(batches[0]) for _, batches, _ in found] == [2, 2, 3]
    assert sorted(row for _, _, read in found for row in read) == sorted(rows)
    # A picture's noise depends on its place in the whole batch, and its weight on the whole batch's size.
    task, batches, _ = found[2]
    parts = task.micro_batches(batches[0], 2)
    assert [(first, len(part), share) for (first, part), share in parts] == [(4, 2, 2 / 7), (6, 1, 1 / 7)]
    order = BatchOrder(np.arange(10), 7, 0)
    np.testing.assert_array_equal(BatchOrder(np.arange(10), 7, 0, slice(2, 4)).batch(3)[0], order.batch(3)[0][2:4])


def test_more_ranks_than_samples_are_refused(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(smallest_recipe(tmp_path, None))
    task = DvaeTask(recipe, Watched([0] * 9), DVAE(recipe.dvae.model), Group(0, 5))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"dvae.training.batch_size: 4 samples cannot be shared among 5 ranks"):
        Run(task, recipe, tmp_path / "out").train()
    assert not (tmp_path / "out").exists()


# Two ranks

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    # The ranks have 2 and 3 of 5 samples.
    "gumbel": ("dvae", {"objective.kl_weight": "{start: 2, end: 2, updates: 0}"}),
    "marginal": ("dvae", {"objective.marginal_kl_weight": 50}),
    # Each rank has 3 samples, in micro-batches of 2 and 1. Every validation halves the step size.
    "reinforce": ("dvae", {"objective.estimator": "reinforce", "training.batch_size": 6, "training.micro_batch": 2,
                           "learning_rate.schedule": "plateau", "learning_rate.plateau_validations": 1,
                           "learning_rate.plateau_threshold": 0.9}),
    "prior": ("prior", {"training.micro_batch": 1}),
}  # fmt: skip


@pytest.fixture(scope="module")
def together(by_hand: Chain, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The cases on two ranks, a run begun by one process, one to be resumed by one, and one of unequal recipes."""
    root = tmp_path_factory.mktemp("together")
    commands = [command(by_hand, stage, root / name, changes) for name, (stage, changes) in CASES.items()]
    stage, changes = CASES["gumbel"]
    begun = command(by_hand, stage, root / "one then two", {**changes, "training.updates": HALF})
    subprocess.run([DALLE, *map(str, begun)], env=ENVIRONMENT, check=True, capture_output=True)
    commands.append(command(by_hand, stage, root / "one then two", changes))
    commands.append(command(by_hand, stage, root / "two then one", {**changes, "training.updates": HALF}))
    commands.append([*command(by_hand, "dvae", root / "different", {}), "--set", "seed=RANK"])
    processes = start(commands)
    outputs = outputs_of(processes, 120)
    # The last command differs between the ranks, and both refuse it. Of the others only rank 0 prints anything.
    refused = "dalle: rank 1 of 2: not the recipe or checkpoint of rank 0; start all ranks with the same command"
    assert [process.returncode for process in processes] == [2, 2], outputs[0][1] + outputs[1][1]
    assert outputs[0][0].splitlines() == [
        str(root / name / f"step-{WHOLE:08d}") for name in [*CASES, "one then two"]
    ] + [str(root / "two then one" / f"step-{HALF:08d}")]
    assert outputs[0][1].count("validation after") == 4 * WHOLE // 2 + 2 + 2
    assert outputs[0][1].splitlines()[-1].startswith(refused)
    assert outputs[1][0] == ""
    assert outputs[1][1].startswith(refused)
    assert len(outputs[1][1].splitlines()) == 1
    assert not list((root / "different").iterdir())
    return root


def assert_same_run(found: Path, expected: Path, tolerance: float) -> None:
    """Check for the same weights, EMA weights and metrics, and that the weights moved far, for this to say much."""
    one, other = (open_checkpoint(run, which="last") for run in (expected, found))
    assert one.step == other.step == WHOLE
    began = open_checkpoint(expected / f"step-{HALF:08d}").tensors("raw")
    moved = 0.0
    for kind in ("raw", "ema"):
        weights = other.tensors(kind)
        for name, value in one.tensors(kind).items():
            assert float((value - weights[name]).abs().max()) < tolerance, name
            moved = max(moved, float((value - began[name]).abs().max()))
    assert moved > 400 * tolerance
    lines = [(run / "metrics.jsonl").read_text().splitlines() for run in (expected, found)]
    for ours, theirs in zip(*(map(json.loads, own) for own in lines), strict=True):
        assert ours.keys() == theirs.keys()
        for key in ours.keys() - TIMED - {"grad_norm", "bytes_communicated"}:
            assert theirs[key] == pytest.approx(ours[key], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_equal_one_process(case: str, by_hand: Chain, together: Path, tmp_path: Path, call: Call) -> None:
    stage, changes = CASES[case]
    assert call(*command(by_hand, stage, tmp_path / case, changes)).code == 0
    # Adam magnifies the rounding of a gradient that is nearly zero, which a bias of the score function's estimate has.
    assert_same_run(together / case, tmp_path / case, 3e-6 if case == "reinforce" else 1e-6)
    if case == "reinforce":
        rates = {json.loads(line).get("lr") for line in (together / case / "metrics.jsonl").read_text().splitlines()}
        assert len(rates - {None}) > 2


def test_a_run_resumes_on_another_number_of_ranks(by_hand: Chain, together: Path, tmp_path: Path, call: Call) -> None:
    stage, changes = CASES["gumbel"]
    assert call(*command(by_hand, stage, tmp_path / "undisturbed", changes)).code == 0
    done = call(*command(by_hand, stage, together / "two then one", changes))
    assert "resumes from step-00000004" in done.err
    for name in ("one then two", "two then one"):
        assert_same_run(together / name, tmp_path / "undisturbed", 1e-6)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_a_rank_that_ends_or_hangs_ends_the_other(
    how: signal.Signals, by_hand: Chain, tmp_path: Path, ended: list[subprocess.Popen[str]]
) -> None:
    out = tmp_path / "out"
    words = command(by_hand, "dvae", out, {"training.updates": 100_000, "training.save_every": 10})
    ended += start([words], timeout=5)
    deadline = time.monotonic() + 60
    while not list(out.glob("step-*/manifest.json")):
        assert time.monotonic() < deadline
        assert ended[0].poll() is None
        time.sleep(0.05)
    ended[1].send_signal(how)
    _, error = ended[0].communicate(timeout=30)
    assert ended[0].returncode == 2
    assert "Traceback" not in error
    line = error.splitlines()[-1]
    assert line.startswith("dalle: rank 0 of 2: lost the other ranks (")
    assert "resumes from the last checkpoint" in line
    assert open_checkpoint(out).step >= 10

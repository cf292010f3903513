"""DeepSpeed's engine on several gloo ranks against one process and against FSDP, and runs that change engines."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from helpers.processes import free_ports, start
from helpers.running import ENVIRONMENT
from helpers.sharded_runs import (
    HALF,
    assert_same_run,
    command,
    farthest,
    losses,
    make_inputs,
    run_on_two_ranks,
    run_together,
    train_alone,
)

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Adam, Sharding
from dalle_cli.distributed.deepspeed_engine import Work, deepspeed_config
from dalle_cli.prior.model import build_prior, load_prior
from dalle_cli.stores.checkpoint import open_checkpoint

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is for Linux"),
    pytest.mark.timeout(900),  # the runs are made before the first test
]
RUNS_A_PROCESS = 5
"""Number of runs one after another in a process. After about ten DeepSpeed hangs in a collective; a run of hundreds of
updates does not."""

CLIP = {"adam.clip_norm": 0.5}
"""The gradients' norm is between 1.4 and 3.2, so every update is clipped."""


def by_deepspeed(zero: int, **more: Any) -> dict[str, Any]:
    return {"sharding.engine": "deepspeed", "sharding.zero": zero, **more}


MICRO = {"training.micro_batch": 2}
BEGUN = {"training.updates": HALF}
LOW_RANK = {"powersgd.rank": 2, "powersgd.min_compression": 0, "sharding.node_size": 1}
CLIPPED = {
    "zero 1": by_deepspeed(1, **MICRO),
    "zero 2": by_deepspeed(2, **MICRO),
    "zero 3": by_deepspeed(3, **MICRO),
    "zero 2, offloaded": by_deepspeed(2, **{"sharding.offload": "cpu"}),
    "two nodes": by_deepspeed(3, **{"sharding.node_size": 1}),
}
MORE_CLIPPED = {
    "recomputed": by_deepspeed(3, **{"model.checkpoint_resblocks": True}),
    "zero 3, offloaded": by_deepspeed(3, **{"sharding.offload": "cpu"}, **MICRO),
    "two nodes, full rank": by_deepspeed(
        3, **{"sharding.node_size": 1, "powersgd.rank": 15, "powersgd.min_compression": 0}
    ),
}
"""Settings of runs on two ranks, all of them with CLIP."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("deepspeed"))


@pytest.fixture(scope="module")
def alone(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of one process without DeepSpeed."""
    root = tmp_path_factory.mktemp("alone")
    return {
        "clipped": train_alone(made, root / "clipped", **CLIP),
        "fp32": train_alone(made, root / "fp32"),
    }


def run_all(made: tuple[Path, Path], root: Path, runs: list[tuple[str, dict[str, Any]]]) -> str:
    """Make runs on two ranks, each in its folder in ``root``, and return what the first rank said."""
    said = ""
    for first in range(0, len(runs), RUNS_A_PROCESS):
        some = runs[first : first + RUNS_A_PROCESS]
        said += run_together([command(made, root / name, changes) for name, changes in some], 2)[0]
    return said


@pytest.fixture(scope="module")
def together(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs on two ranks, those that one engine began and the other ends, and one in two parts."""
    root, fsdp = tmp_path_factory.mktemp("together"), {"sharding.zero": 2}
    said = run_all(
        made,
        root,
        [
            *((name, {**changes, **CLIP}) for name, changes in CLIPPED.items()),
            ("zero 3 in parts", {**CLIPPED["zero 3"], **CLIP, **BEGUN}),
            ("zero 3 in parts", {**CLIPPED["zero 3"], **CLIP}),
            ("low rank", by_deepspeed(3, **LOW_RANK)),
            ("low rank by fsdp", {"sharding.zero": 3, **LOW_RANK}),
            ("fsdp, then deepspeed", {**fsdp, **BEGUN}),
            ("fsdp, then deepspeed", by_deepspeed(3)),
            ("deepspeed, then fsdp", by_deepspeed(1, **BEGUN)),
            ("deepspeed, then fsdp", fsdp),
            ("deepspeed, then one", by_deepspeed(2, **BEGUN)),
        ],
    )
    assert "resumes with prior.sharding.engine = 'deepspeed', was 'fsdp'" in said
    return root


@pytest.fixture(scope="module")
def more(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Further runs on two ranks, in bf16 and in two parts."""
    root, fsdp, bf16 = tmp_path_factory.mktemp("more"), {"sharding.zero": 2}, {"precision": "bf16"}
    offloaded = {**CLIPPED["zero 2, offloaded"], **CLIP}
    run_all(
        made,
        root,
        [
            *((name, {**changes, **CLIP}) for name, changes in MORE_CLIPPED.items()),
            ("offloaded", offloaded),
            ("offloaded in parts", {**offloaded, **BEGUN}),
            ("offloaded in parts", offloaded),
            ("low rank", by_deepspeed(3, **LOW_RANK)),
            ("low rank in parts", by_deepspeed(3, **LOW_RANK, **BEGUN)),
            ("low rank in parts", by_deepspeed(3, **LOW_RANK)),
            ("bf16", by_deepspeed(2, **bf16)),
            ("bf16 by fsdp, then deepspeed", {**fsdp, **bf16, **BEGUN}),
            ("bf16 by fsdp, then deepspeed", by_deepspeed(3, **bf16)),
            ("bf16 by deepspeed, then fsdp", by_deepspeed(3, **bf16, **BEGUN)),
            ("bf16 by deepspeed, then fsdp", {**fsdp, **bf16}),
        ],
    )
    return root


@pytest.mark.parametrize("case", CLIPPED)
def test_two_ranks_equal_one_process(case: str, alone: dict[str, Path], together: Path) -> None:
    assert_same_run(together / case, alone["clipped"])


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE_CLIPPED)
def test_two_ranks_equal_one_process_in_more_ways(case: str, alone: dict[str, Path], more: Path) -> None:
    assert_same_run(more / case, alone["clipped"])


def test_clipping_was_triggered(together: Path) -> None:
    lines = [json.loads(line) for line in (together / "zero 2" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["grad_norm"] > CLIP["adam.clip_norm"] for line in lines if "grad_norm" in line)
    assert {line["skipped_updates"] for line in lines if "skipped_updates" in line} == {0.0}


def assert_same_bytes(parts: Path, whole: Path) -> None:
    assert open_checkpoint(parts).files == open_checkpoint(whole).files
    assert losses(parts) == losses(whole)


def test_a_resumed_run_ends_with_the_same_bytes(together: Path) -> None:
    assert_same_bytes(together / "zero 3 in parts", together / "zero 3")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["offloaded", "low rank"])
def test_a_run_with_more_state_resumes_to_the_same_bytes(case: str, more: Path) -> None:
    assert_same_bytes(more / f"{case} in parts", more / case)


@pytest.mark.parametrize("case", ["fsdp, then deepspeed", "deepspeed, then fsdp"])
def test_a_run_resumes_under_the_other_engine(case: str, alone: dict[str, Path], together: Path) -> None:
    assert_same_run(together / case, alone["fp32"])


def test_a_run_of_deepspeed_ends_in_one_process(
    made: tuple[Path, Path], alone: dict[str, Path], together: Path, call: Call, tmp_path: Path
) -> None:
    shutil.copytree(together / "deepspeed, then one", tmp_path / "run")
    done = call(*command(made, tmp_path / "run", {}))
    assert done.code == 0, done.err
    assert "resumes with prior.sharding.engine = 'fsdp', was 'deepspeed'" in done.err
    assert_same_run(tmp_path / "run", alone["fp32"])
    ours, theirs = load_prior(open_checkpoint(together / "zero 1")), load_prior(open_checkpoint(alone["clipped"]))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))


@pytest.mark.slow
def test_in_bf16_all_engines_stay_close_to_one_another(alone: dict[str, Path], more: Path) -> None:
    """DeepSpeed keeps 32-bit weights, and FSDP rounds them stochastically."""
    whole = losses(alone["fp32"])
    for case in ("bf16", "bf16 by fsdp, then deepspeed", "bf16 by deepspeed, then fsdp"):
        found = losses(more / case)
        assert max(abs(a - b) for a, b in zip(found, whole, strict=True)) < 2e-2
    saved = open_checkpoint(more / "bf16").tensors("raw")["resblocks.0.qkv.weight"]
    assert saved.dtype == torch.float32
    moments = open_checkpoint(more / "bf16 by deepspeed, then fsdp").moments()
    assert moments.read("exp_avg_sq.resblocks.0.qkv.weight").dtype == torch.uint16
    assert float(moments.read("step.resblocks.0.qkv.weight")) == 2 * HALF


def test_low_rank_equals_that_of_fsdp(together: Path, made: tuple[Path, Path]) -> None:
    """Nodes of one rank have whole matrices as shards, so both engines compress the same ones."""
    ours, theirs = together / "low rank", together / "low rank by fsdp"
    assert max(abs(a - b) for a, b in zip(losses(ours), losses(theirs), strict=True)) < 1e-5
    assert farthest(open_checkpoint(ours), open_checkpoint(theirs)) < 1e-4
    sent = [
        [json.loads(line).get("bytes_between_nodes") for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (ours, theirs)
    ]
    # FSDP holds gains and biases of resblocks whole on all ranks, and counts their sum apart.
    prior = build_prior(load_recipe(made[0]))
    small = sum(p.numel() for name, p in prior.named_parameters() if name.startswith("resblocks.") and p.dim() == 1)
    assert [a - 4 * small for a in sent[0] if a] == [b for b in sent[1] if b]


def test_each_rank_writes_about_half(together: Path) -> None:
    found = open_checkpoint(together / "zero 2").path
    sizes = [(found / f"model-0000{i}-of-00002.safetensors").stat().st_size for i in (1, 2)]
    assert max(sizes) < 0.7 * sum(sizes)


BROKEN = """
from dalle_cli.prior.train import deepspeed_prior

engine, prior = deepspeed_prior(recipe, group)

def update(number, broken):
    engine.begin_micro_batch(last=True)
    engine.backward(loss_of(engine.engine) * (torch.nan if broken and group.rank == 1 else 1.0))
    engine.collect_gradients(number)
    return {key: float(value) for key, value in engine.own_optimizer.step(1e-3).items()}

def state():
    kept = {name: engine.read(name).clone() for name in engine.names}
    for name in engine.names:
        kept |= {f"{key}.{name}": value.clone() for key, value in engine.own_optimizer.moments(name).items()}
    reducer = engine.between_nodes.reducer
    return kept | {key: value.clone() for key, value in (reducer.state_dict() if reducer else {}).items()}

lines = [update(0, False)]
before = state()
lines.append(update(1, True))
after = state()
lines.append(update(2, False))
later = state()
same = before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
moved = any(not torch.equal(after[key], later[key]) for key in after)
rates = [group["lr"] for group in engine.engine.optimizer.param_groups]
decays = [(group["weight_decay"], group["betas"]) for group in engine.engine.optimizer.param_groups]
print(json.dumps({"lines": lines, "same": same, "moved": moved, "errors": [k for k in before if "error" in k],
                  "rates": rates, "decays": decays, "clip": engine.engine.gradient_clipping()}))
"""


@pytest.mark.parametrize("more", [{}, LOW_RANK], ids=["one node", "two nodes with PowerSGD"])
def test_a_nan_on_one_rank_changes_nothing_on_any(more: dict[str, Any], made: tuple[Path, Path]) -> None:
    changes = {**by_deepspeed(3), **more, "adam.clip_norm": 0.25, "adam.weight_decay": 0.125}
    for found in run_on_two_ranks(BROKEN, made, {f"prior.{key}": value for key, value in changes.items()}):
        assert [line["skipped"] for line in found["lines"]] == [0, 1, 0]
        assert found["lines"][2]["skipped_updates"] == 1
        assert found["same"]
        assert found["moved"]
        assert bool(found["errors"]) == bool(more)
        # Learning rate, weight decay and clipping, read back from DeepSpeed.
        assert found["rates"] == [1e-3, 1e-3]
        assert found["decays"] == [[0.125, [0.9, 0.96]], [0.0, [0.9, 0.96]]]
        assert found["clip"] == 0.25


@pytest.mark.parametrize(
    "sent",
    [pytest.param(signal.SIGKILL, id="killed"), pytest.param(signal.SIGSTOP, id="hanging", marks=pytest.mark.slow)],
)
def test_a_lost_rank_ends_the_others(sent: signal.Signals, made: tuple[Path, Path], tmp_path: Path) -> None:
    out = tmp_path / "run"
    processes = start([command(made, out, {**by_deepspeed(2), "training.updates": 10_000})], timeout=40)
    waited = time.monotonic() + 200
    while not (out / f"step-{HALF:08d}").exists():
        assert processes[0].poll() is None
        assert time.monotonic() < waited
        time.sleep(0.2)
    os.kill(processes[1].pid, sent)
    errors = processes[0].communicate(timeout=200)[1]
    processes[1].kill()
    processes[1].communicate()
    assert processes[0].returncode == 2
    line = errors.splitlines()[-1]
    assert line.startswith("dalle: rank 0 of 2: lost the other ranks")
    assert "training resumes from the last checkpoint" in line


def test_the_launcher_of_deepspeed_starts_ranks(
    made: tuple[Path, Path], alone: dict[str, Path], tmp_path: Path
) -> None:
    """The launcher adds --local_rank before the command."""
    (port,) = free_ports(1)
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)]
    words = [*launcher, "--module", "dalle_cli", *map(str, command(made, tmp_path / "run", by_deepspeed(2)))]
    environment = {**ENVIRONMENT, "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 1 x 2 ranks" in done.stderr
    assert_same_run(tmp_path / "run", alone["fp32"])


@pytest.mark.slow
def test_four_ranks_as_two_nodes(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Uncompressed, two nodes of two equal one process; low ranks train as those of FSDP do.

    The second MLP matrix is in flat pieces here and along its columns under FSDP, so that factors differ.
    """
    even = {"model.heads": 4, "model.d_head": 4, "model.d_model": 16}
    nodes = {**even, "sharding.node_size": 2}
    low = {**nodes, "powersgd.rank": 2, "powersgd.min_compression": 0}
    runs: dict[str, dict[str, Any]] = {
        "whole": by_deepspeed(3, **nodes),
        "low rank": by_deepspeed(3, **low),
        "low rank by fsdp": {"sharding.zero": 3, **low},
    }
    run_together([command(made, tmp_path / name, changes) for name, changes in runs.items()], 4)
    alone = train_alone(made, tmp_path / "alone", **even)
    assert_same_run(tmp_path / "whole", alone)
    ours, theirs = losses(tmp_path / "low rank"), losses(tmp_path / "low rank by fsdp")
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.01 * ours[0]
    assert ours[-1] < ours[0]
    assert max(abs(a - b) for a, b in zip(ours, losses(alone), strict=True)) > 1e-4


@pytest.mark.slow
def test_offloading_to_nvme_equals_host_memory(made: tuple[Path, Path], tmp_path: Path) -> None:
    """The matrices are large enough to be swapped; a run in two parts ends with the same bytes."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("libaio is not installed")
    (tmp_path / "disk").mkdir()
    large = {"model.layers": 2, "model.heads": 8, "model.d_head": 48, "model.d_model": 384}
    host = by_deepspeed(3, **large, **{"sharding.offload": "cpu"})
    disk = {**host, "sharding.offload": "nvme", "sharding.nvme_path": tmp_path / "disk"}
    half = {**disk, "training.updates": HALF}
    for name, changes in (("host", host), ("disk", disk), ("parts", half), ("parts", disk)):
        words = [sys.executable, "-m", "dalle_cli", *map(str, command(made, tmp_path / name, changes))]
        done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert list((tmp_path / "disk").rglob("exp_avg*.swp"))
    files = [open_checkpoint(tmp_path / name).files for name in ("host", "disk", "parts")]
    assert files[0] == files[1] == files[2]


def test_stdout_has_the_checkpoint_alone(made: tuple[Path, Path], tmp_path: Path) -> None:
    """One process, which no launcher started, offloads."""
    changes = {**by_deepspeed(3, **{"sharding.offload": "cpu"}), "training.updates": 2}
    words = [sys.executable, "-m", "dalle_cli", *map(str, command(made, tmp_path / "run", changes))]
    done = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{tmp_path / 'run' / 'step-00000002'}\n"
    assert "[INFO]" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({"sharding.offload": "nvme"}, "offload nvme needs engine: deepspeed, zero: 3 and an nvme_path"),
        ({"sharding.engine": "deepspeed"}, "engine deepspeed is for ZeRO, and zero is 0; set zero: 1, 2 or 3"),
        ({**by_deepspeed(3), "precision": "fp16"}, "is for sharding.engine fsdp; set the engine to fsdp, or"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(
    changes: dict[str, Any], mend: str, made: tuple[Path, Path], tmp_path: Path, call: Call
) -> None:
    done = call(*command(made, tmp_path / "run", changes))
    assert mend in done.mistake()
    assert not (tmp_path / "run").exists()


def test_a_missing_deepspeed_is_named(
    made: tuple[Path, Path], tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    done = call(*command(made, tmp_path / "run", by_deepspeed(2)))
    assert "prior.sharding.engine: deepspeed cannot be imported" in done.mistake()


def test_what_deepspeed_is_told() -> None:
    sharding = Sharding(engine="deepspeed", zero=3, offload="nvme", nvme_path="/disk")
    found = deepspeed_config(sharding, Adam(clip_norm=4.0), Work(2, 8), torch.device("cpu"), 1000)
    zero = found["zero_optimization"]
    assert zero["stage"] == 3
    assert zero["offload_optimizer"] == {"device": "nvme", "pin_memory": False, "nvme_path": "/disk"}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": False}
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (2, 8)
    assert found["gradient_clipping"] == 4.0
    two = deepspeed_config(Sharding(engine="deepspeed", zero=2, offload="cpu"), Adam(clip_norm=None), Work(1, 1),
                           torch.device("cuda"), 1000)  # fmt: skip
    assert two["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in two["zero_optimization"]
    assert two["gradient_clipping"] == 0.0

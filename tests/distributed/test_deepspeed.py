"""DeepSpeed's engine on several gloo ranks: offloading, runs that change engines, PowerSGD, launchers and lost ranks.

``test_sharded_engines.py`` compares its stages with FSDP's.
"""

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
from helpers.processes import free_ports, outputs_of, start
from helpers.running import ENVIRONMENT, Chain
from helpers.sharded_runs import (
    CLIP,
    HALF,
    assert_same_bytes,
    assert_same_run,
    command,
    losses,
    run_all,
    run_on_ranks,
    run_together,
    train_alone,
)

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Adam, PriorSettings, Sharding
from dalle_cli.distributed.deepspeed_engine import Work, deepspeed_config
from dalle_cli.distributed.group import Group
from dalle_cli.errors import UserError
from dalle_cli.planning.memory import Machines
from dalle_cli.planning.traffic import between_machines
from dalle_cli.prior.counts import count_parameters
from dalle_cli.prior.model import build_prior, load_prior
from dalle_cli.prior.train import refuse_unsupported
from dalle_cli.stores.checkpoint import open_checkpoint

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is for Linux"),
    pytest.mark.timeout(900),  # the runs are made before the first test
]


def by_deepspeed(zero: int, **more: Any) -> dict[str, Any]:
    return {"sharding.engine": "deepspeed", "sharding.zero": zero, **more}


MICRO = {"training.micro_batch": 2}
BEGUN = {"training.updates": HALF}
LOW_RANK = {"powersgd.rank": 2, "powersgd.min_compression": 0, "sharding.node_size": 1}
OFFLOADED = {
    "zero 2, offloaded": by_deepspeed(2, **{"sharding.offload": "cpu"}, **MICRO),
    "zero 3, offloaded": by_deepspeed(3, **{"sharding.offload": "cpu"}, **MICRO),
}


@pytest.fixture(scope="module")
def together(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs on two ranks, and those that one engine began and the other ends."""
    root, fsdp = tmp_path_factory.mktemp("together"), {"sharding.zero": 2}
    runs: list[tuple[str, dict[str, Any]]] = [
        *OFFLOADED.items(),
        ("fsdp, then deepspeed", {**fsdp, **BEGUN}),
        ("fsdp, then deepspeed", by_deepspeed(3)),
        ("low rank by fsdp", {"sharding.zero": 3, **LOW_RANK}),
        ("low rank", by_deepspeed(3, **LOW_RANK)),
        ("deepspeed, then fsdp", by_deepspeed(1, **BEGUN)),
        ("deepspeed, then fsdp", fsdp),
    ]
    said = run_all(made, root, [(name, {**CLIP, **changes}) for name, changes in runs])
    assert "resumes with prior.sharding.engine = 'deepspeed', was 'fsdp'" in said
    return root


@pytest.fixture(scope="module")
def more(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Further runs on two ranks, in bf16 and in two parts."""
    root, fsdp, bf16 = tmp_path_factory.mktemp("more"), {"sharding.zero": 2}, {"precision": "bf16"}
    offloaded = OFFLOADED["zero 2, offloaded"]
    full_rank = {**LOW_RANK, "powersgd.rank": 15}
    runs: list[tuple[str, dict[str, Any]]] = [
        ("two nodes, full rank", by_deepspeed(3, **full_rank)),
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
    ]
    run_all(made, root, [(name, {**CLIP, **changes}) for name, changes in runs])
    return root


@pytest.mark.parametrize("case", OFFLOADED)
def test_offloading_to_host_memory_changes_nothing(case: str, alone: Path, together: Path) -> None:
    assert_same_run(together / case, alone)


@pytest.mark.slow
def test_powersgd_of_full_rank_changes_nothing(alone: Path, more: Path) -> None:
    assert_same_run(more / "two nodes, full rank", alone)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["offloaded", "low rank"])
def test_a_run_with_more_state_resumes_to_the_same_bytes(case: str, more: Path) -> None:
    assert_same_bytes(more / f"{case} in parts", more / case)


@pytest.mark.parametrize("case", ["fsdp, then deepspeed", "deepspeed, then fsdp"])
def test_a_run_resumes_under_the_other_engine(case: str, alone: Path, together: Path) -> None:
    assert_same_run(together / case, alone)


def test_what_deepspeed_trained_is_exported_and_sampled(by_hand: Chain, call: Call, tmp_path: Path) -> None:
    """A finished prior trains on under DeepSpeed, and its export draws the samples that the run draws."""
    run = shutil.copytree(by_hand.prior, tmp_path / "prior")
    sets = ["--set", "prior.sharding.engine=deepspeed", "--set", "prior.sharding.zero=2"]
    words = ["train-prior", by_hand.recipe, "--tokens", by_hand.tokens, "--out", run, "--extend", 8, *sets]
    done = subprocess.run([sys.executable, "-m", "dalle_cli", *map(str, words)], env=ENVIRONMENT, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert call("export", run, tmp_path / "exported", "--checkpoint", "last").code == 0
    trained, exported = open_checkpoint(run, which="last"), open_checkpoint(tmp_path / "exported", "prior")
    assert trained.recipe().prior.sharding.engine == "deepspeed"
    averaged = dict(load_prior(exported).named_parameters())
    assert {name: p.shape for name, p in averaged.items()} == {n: v.shape for n, v in trained.tensors("ema").items()}
    assert all(torch.equal(averaged[name], value) for name, value in trained.tensors("ema").items())
    beside = ("--dvae", by_hand.dvae, "--tokenizer", by_hand.tokenizer)
    drawn = [
        call("sample", prior, "a red circle", "--n", 2, *beside, "--out", tmp_path / name, *options)
        for name, prior, options in (("a", run, ["--checkpoint", "last"]), ("b", tmp_path / "exported", []))
    ]
    assert [each.code for each in drawn] == [0, 0], drawn[0].err + drawn[1].err
    pictures = [[Path(line["png"]).read_bytes() for line in each.lines] for each in drawn]
    assert len(pictures[0]) == 2
    assert pictures[0] == pictures[1]


@pytest.mark.slow
def test_in_bf16_all_engines_stay_close_to_one_another(alone: Path, more: Path) -> None:
    """DeepSpeed keeps 32-bit weights, and FSDP rounds them stochastically."""
    whole = losses(alone)
    for case in ("bf16", "bf16 by fsdp, then deepspeed", "bf16 by deepspeed, then fsdp"):
        found = losses(more / case)
        assert max(abs(a - b) for a, b in zip(found, whole, strict=True)) < 2e-2
    saved = open_checkpoint(more / "bf16").tensors("raw")["resblocks.0.qkv.weight"]
    assert saved.dtype == torch.float32
    moments = open_checkpoint(more / "bf16 by deepspeed, then fsdp").moments()
    assert moments.read("exp_avg_sq.resblocks.0.qkv.weight").dtype == torch.uint16
    assert float(moments.read("step.resblocks.0.qkv.weight")) == 2 * HALF


def sent_between_nodes(run: Path) -> list[int]:
    """Return the bytes of each update."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["bytes_between_nodes"] for line in lines if "bytes_between_nodes" in line]


def test_low_rank_equals_that_of_fsdp(together: Path) -> None:
    """Nodes of one rank have whole matrices as shards, so both engines compress the same ones.

    FSDP holds gains and biases of resblocks whole on all ranks and counts their sum apart, as ``dalle plan`` does.
    """
    ours, theirs = together / "low rank", together / "low rank by fsdp"
    assert_same_run(ours, theirs)
    for run in (ours, theirs):
        recipe = open_checkpoint(run).recipe()
        planned = between_machines(recipe.prior, count_parameters(recipe), Machines(1, 2, 0)).a_process
        assert set(sent_between_nodes(run)) == {planned.sent}


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
groups = engine.engine.optimizer.param_groups

def decay(name):
    flat = engine._places[name].flat
    return groups[engine._zero.sub_group_to_group_id[flat] if recipe.prior.sharding.zero == 3 else flat]["weight_decay"]

print(json.dumps({"lines": lines, "same": same, "moved": moved, "errors": [k for k in before if "error" in k],
                  "rates": [group["lr"] for group in groups], "betas": [group["betas"] for group in groups],
                  "decays": {name: decay(name) for name in engine.names if engine._places[name].numel},
                  "clip": engine.engine.gradient_clipping()}))
"""


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(by_deepspeed(1), id="zero 1", marks=pytest.mark.slow),
        pytest.param(OFFLOADED["zero 2, offloaded"], id="zero 2, offloaded"),
        pytest.param(by_deepspeed(3), id="zero 3", marks=pytest.mark.slow),
        pytest.param(by_deepspeed(3, **LOW_RANK), id="two nodes with PowerSGD"),
    ],
)
def test_a_nan_on_one_rank_changes_nothing_on_any(changes: dict[str, Any], made: tuple[Path, Path]) -> None:
    """Learning rate, weight decay and clipping are read back from DeepSpeed too."""
    sets = {**changes, "adam.clip_norm": 0.25, "adam.weight_decay": 0.125}
    ranks = run_on_ranks(BROKEN, made, {f"prior.{key}": value for key, value in sets.items()})
    for found in ranks:
        assert [line["skipped"] for line in found["lines"]] == [0, 1, 0]
        assert found["lines"][2]["skipped_updates"] == 1
        assert found["same"]
        assert found["moved"]
        assert bool(found["errors"]) == ("powersgd.rank" in changes)
        assert found["rates"] == [1e-3, 1e-3]
        assert found["betas"] == [[0.9, 0.96]] * 2
        assert found["clip"] == 0.25
    prior = build_prior(load_recipe(made[0]))
    expected = {name: 0.125 if name in prior.decayed_parameters() else 0.0 for name, _ in prior.named_parameters()}
    assert ranks[0]["decays"] | ranks[1]["decays"] == expected


def test_nodes_that_start_apart_are_refused(made: tuple[Path, Path], tmp_path: Path) -> None:
    changes = by_deepspeed(3, **{"sharding.node_size": 1})
    processes = start([[*command(made, tmp_path / "run", changes), "--set", "seed=RANK"]])
    for process in processes:
        errors = process.communicate(timeout=200)[1]
        assert process.returncode == 2, errors
        assert "Traceback" not in errors
        assert "dalle: rank 1 of 2: not the weights of rank 0; start all ranks with the same command" in errors
    assert not list(tmp_path.rglob("step-*"))


@pytest.mark.parametrize(
    "sent",
    [pytest.param(signal.SIGKILL, id="killed"), pytest.param(signal.SIGSTOP, id="hanging", marks=pytest.mark.slow)],
)
def test_a_lost_rank_ends_the_others(sent: signal.Signals, made: tuple[Path, Path], tmp_path: Path) -> None:
    """The run then resumes, and ends with the bytes of one that nothing disturbed."""
    out = tmp_path / "run"
    processes = start([command(made, out, {**by_deepspeed(2), "training.updates": 10_000})], timeout=40)
    waited = time.monotonic() + 200
    while not (out / f"step-{HALF:08d}").exists():
        assert processes[0].poll() is None
        assert time.monotonic() < waited
        time.sleep(0.05)
    os.kill(processes[1].pid, sent)
    errors = processes[0].communicate(timeout=200)[1]
    processes[1].kill()
    processes[1].communicate()
    assert processes[0].returncode == 2
    line = errors.splitlines()[-1]
    assert line.startswith("dalle: rank 0 of 2: lost the other ranks")
    assert "rank 1 does not answer: it ended or hangs" in line
    assert "training resumes from the last checkpoint" in line
    saved = open_checkpoint(out, which="last").step
    whole = {**by_deepspeed(2), "training.updates": saved + HALF}
    said = run_together([command(made, folder, whole) for folder in (out, tmp_path / "whole")], 2)[0]
    assert f"resumes from step-{saved:08d}" in said
    assert_same_bytes(out, tmp_path / "whole")


def launched_as(launcher: str, port: int) -> list[str]:
    """Return the words before those of the command with which ``launcher`` starts two ranks."""
    deepspeed = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    module = ["--module", "dalle_cli"]
    return {
        "deepspeed": [*deepspeed, *module],
        "deepspeed --no_local_rank": [*deepspeed, "--no_local_rank", *module],
        "torchrun": [*torchrun, *module],
        "--gpus": [sys.executable, "-m", "dalle_cli"],
    }[launcher]


@pytest.mark.parametrize(
    "launcher",
    [
        "deepspeed",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("deepspeed --no_local_rank", "torchrun", "--gpus")),
    ],
)
def test_launchers_start_ranks(launcher: str, made: tuple[Path, Path], alone: Path, tmp_path: Path) -> None:
    """DeepSpeed's own adds --local_rank before the command."""
    (port,) = free_ports(1)
    words = [*launched_as(launcher, port), *map(str, command(made, tmp_path / "run", {**by_deepspeed(2), **CLIP}))]
    environment = {**ENVIRONMENT, "DS_ACCELERATOR": "cpu", "LOCAL_SIZE": "2"}
    if launcher in ("torchrun", "--gpus"):
        words += ["--gpus", "2"] if launcher == "--gpus" else []
        environment = ENVIRONMENT
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "on 1 x 2 ranks" in done.stderr
    assert_same_run(tmp_path / "run", alone)


@pytest.mark.slow
def test_two_tasks_of_srun_are_ranks(made: tuple[Path, Path], alone: Path, tmp_path: Path) -> None:
    """Slurm's variables alone tell each process its rank."""
    (port,) = free_ports(1)
    words = [sys.executable, "-m", "dalle_cli", *map(str, command(made, tmp_path / "run", {**by_deepspeed(2), **CLIP}))]
    tasks = []
    for rank in range(2):
        variables = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NTASKS": 2, "SLURM_NODEID": 0}
        variables |= {"SLURM_STEP_ID": 0, "SLURM_STEP_TASKS_PER_NODE": 2, "MASTER_PORT": port}
        environment = {**ENVIRONMENT, **{name: str(value) for name, value in variables.items()}}
        environment["MASTER_ADDR"] = "127.0.0.1"
        tasks.append(
            subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    errors = [error for _, error in outputs_of(tasks, 280)]
    assert [task.returncode for task in tasks] == [0, 0], errors
    assert "on 1 x 2 ranks" in errors[0]
    assert_same_run(tmp_path / "run", alone)


EVEN = {"model.heads": 4, "model.d_head": 4, "model.d_model": 16}
"""Sizes of a model that two ranks share evenly, except for the 401 rows of text logits."""
TWO_BY_TWO = {**EVEN, "sharding.zero": 3, "sharding.node_size": 2}
RANKS = {"whole": 0, "full rank": 32, "low rank": 2}
"""Ranks of PowerSGD, of which each of two shards has half: 16 is the shorter side of the largest shards."""
BOUNDED = {"adam.eps": 1e-4}
"""Adam divides by a gradient's size, which magnifies the rounding of gradients near zero, such as those of keys; this
bounds it. With 1e-8, single weights differed by up to 9e-5 after 20 updates, although losses agreed to 1e-6."""


def of_rank(rank: int, engine: str) -> dict[str, Any]:
    """Return the settings of two nodes of two ranks."""
    return {**TWO_BY_TWO, "sharding.engine": engine, "powersgd.rank": rank, "powersgd.min_compression": 0}


@pytest.mark.slow
def test_four_ranks_as_two_nodes(made: tuple[Path, Path], tmp_path: Path) -> None:
    """Uncompressed or of full rank, two nodes of two equal one process; low ranks train alike under both engines.

    The second MLP matrix is in flat pieces here and along its columns under FSDP, so that its factors differ. Each
    update sends the bytes that ``dalle plan`` expects.
    """
    cases = [
        (f"{name} by {engine}", of_rank(RANKS[name], engine)) for name in RANKS for engine in ("fsdp", "deepspeed")
    ]
    run_all(made, tmp_path, [(name, {**changes, **BOUNDED}) for name, changes in cases], count=4)
    alone = train_alone(made, tmp_path / "alone", **EVEN, **BOUNDED)
    for name in ("whole", "full rank"):
        for engine in ("fsdp", "deepspeed"):
            assert_same_run(tmp_path / f"{name} by {engine}", alone)
    ours, theirs = losses(tmp_path / "low rank by deepspeed"), losses(tmp_path / "low rank by fsdp")
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 0.01 * ours[0]
    assert ours[-1] < ours[0]
    assert max(abs(a - b) for a, b in zip(ours, losses(alone), strict=True)) > 1e-4
    for name, _ in cases:
        recipe = open_checkpoint(tmp_path / name).recipe()
        planned = between_machines(recipe.prior, count_parameters(recipe), Machines(2, 2, 0)).a_process
        assert set(sent_between_nodes(tmp_path / name)) == {planned.sent}, name


GRADIENTS = """
from dalle_cli.prior.model import LossModule, build_prior
from dalle_cli.prior.train import deepspeed_prior, shard_prior

alone = build_prior(recipe)
whole = LossModule(alone)(text, torch.full((8,), 48), image, 188.0)
((whole.text + group.size * whole.image) / 2).backward()  # each rank takes the mean of its own images
theirs, _ = shard_prior(recipe, group)
theirs.begin_micro_batch(last=True)
theirs.backward(loss_of(theirs.loss))
theirs.collect_gradients(0)
ours, prior = deepspeed_prior(recipe, group)
from deepspeed.utils import safe_get_local_grad  # which would have printed on stdout
ours.begin_micro_batch(last=True)
ours.backward(loss_of(ours.engine))
ours.collect_gradients(0)
matrices, found = alone.decayed_parameters(), {}
for name, parameter in alone.named_parameters():
    expected, place = parameter.grad, ours._places[name]
    by_fsdp = theirs.parameters[name].grad
    by_deepspeed = safe_get_local_grad(prior.get_parameter(name))[: place.numel].flatten()
    parts = {
        "fsdp": by_fsdp - theirs.slab(name).of(expected),
        "deepspeed": by_deepspeed - expected.flatten()[place.start : place.start + place.numel],
    }
    found[name] = {engine: float(part.abs().max() / expected.abs().max()) for engine, part in parts.items()}
    if name in matrices:  # whose shards are of one size
        found[name]["apart"] = float((by_fsdp.flatten() - by_deepspeed).abs().max())
        found[name]["size"] = float(by_fsdp.abs().max())
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("case", RANKS)
def test_gradients_of_four_ranks_are_those_of_one_process(case: str, made: tuple[Path, Path]) -> None:
    """Low ranks change the matrices alone, and under both engines alike those that both split along their rows."""
    sets = {f"prior.{key}": value for key, value in of_rank(RANKS[case], "deepspeed").items()}
    for found in run_on_ranks(GRADIENTS, made, sets, count=4):
        second = {name for name in found if name.endswith("out.weight") and int(name.split(".")[1]) % 2}
        assert len(second) == 3
        for name, differences in found.items():
            compressed = case == "low rank" and "apart" in differences
            for engine in ("fsdp", "deepspeed"):
                assert (differences[engine] < 2e-6) != compressed, (name, differences)
            if compressed:
                assert differences["size"] > 1e-5
                assert (differences["apart"] < 1e-9) == (name not in second), (name, differences)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_offloading_to_nvme_changes_nothing(count: int, made: tuple[Path, Path], tmp_path: Path) -> None:
    """The matrices are large enough to be swapped; a run in two parts ends with the same bytes."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible():
        pytest.skip("libaio is not installed")
    (tmp_path / "disk").mkdir()
    large = {"model.layers": 2, "model.heads": 8, "model.d_head": 48, "model.d_model": 384, **CLIP, **MICRO, **BOUNDED}
    large["learning_rate.peak"] = 1e-3
    none = by_deepspeed(3, **large)
    host = {**none, "sharding.offload": "cpu"}
    disk = {**host, "sharding.offload": "nvme", "sharding.nvme_path": tmp_path / "disk"}
    runs = {"none": none, "host": host, "disk": disk}
    commands = [command(made, tmp_path / name, changes) for name, changes in runs.items()]
    commands += [command(made, tmp_path / "parts", changes) for changes in ({**disk, **BEGUN}, disk)]
    run_together(commands, count)
    assert list((tmp_path / "disk").rglob("exp_avg*.swp"))
    assert_same_run(tmp_path / "disk", tmp_path / "none")
    for name in ("host", "parts"):
        assert_same_bytes(tmp_path / name, tmp_path / "disk")


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


def test_few_stages_on_several_nodes_are_refused() -> None:
    stage = PriorSettings(sharding=Sharding(engine="deepspeed", zero=2))
    refuse_unsupported(stage, Group(0, 4, local_size=4))
    with pytest.raises(UserError, match=r"prior.sharding.zero: several nodes under DeepSpeed need stage 3, not 2; set"):
        refuse_unsupported(stage, Group(0, 4, local_size=2))


def test_what_nvme_needs_is_named(
    made: tuple[Path, Path], tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed

    changes = by_deepspeed(3, **{"sharding.offload": "nvme", "sharding.nvme_path": tmp_path / "disk"})
    assert f"{tmp_path / 'disk'}: there is no such folder" in call(*command(made, tmp_path / "run", changes)).mistake()
    (tmp_path / "disk").mkdir()
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "async_io", False)
    assert (
        "nvme needs libaio, which DeepSpeed does not find" in call(*command(made, tmp_path / "run", changes)).mistake()
    )


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
    on_disk = {"device": "nvme", "pin_memory": False, "nvme_path": "/disk"}
    assert zero["offload_optimizer"] == {**on_disk, "buffer_count": 4}
    assert zero["offload_param"] == {"device": "cpu", "pin_memory": False}
    assert (found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]) == (2, 8)
    assert found["gradient_clipping"] == 4.0
    two = deepspeed_config(Sharding(engine="deepspeed", zero=2, offload="cpu"), Adam(clip_norm=None), Work(1, 1),
                           torch.device("cuda"), 1000)  # fmt: skip
    assert two["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert "offload_param" not in two["zero_optimization"]
    assert two["gradient_clipping"] == 0.0

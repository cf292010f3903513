"""ZeRO on several gloo ranks against one process on the same batches, and runs that resume on other ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from helpers.sharded_runs import (
    HALF,
    assert_same_run,
    command,
    losses,
    make_inputs,
    run_on_two_ranks,
    run_together,
    train_alone,
)

from dalle_cli.config.load import load_recipe
from dalle_cli.precision.gradient_scaling import BACKOFF, START
from dalle_cli.prior.model import build_prior
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.stores.tensor_files import TensorFiles

TWO = {
    "zero 1": {"sharding.zero": 1, "training.micro_batch": 2},
    "zero 2": {"sharding.zero": 2, "training.micro_batch": 2},
    "zero 3": {"sharding.zero": 3, "training.micro_batch": 2},
    "recomputed": {"sharding.zero": 3, "model.checkpoint_resblocks": True},
    "two nodes": {"sharding.zero": 3, "sharding.node_size": 1},
    "fp16": {"sharding.zero": 3, "precision": "fp16"},
    "bf16": {"sharding.zero": 2, "precision": "bf16", "training.micro_batch": 2},
}
"""Settings of runs on two ranks. In 32 bit, losses and weights equal those of one process to 1e-5."""
IN_16_BIT = 1e-2
"""Tolerance in 16 bit, where stochastic rounding has other noise for other shards."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return make_inputs(tmp_path_factory.mktemp("engine"))


@pytest.fixture(scope="module")
def alone(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of one process, in each precision."""
    root = tmp_path_factory.mktemp("alone")
    return {kind: train_alone(made, root / kind, precision=kind) for kind in ("fp32", "fp16", "bf16")}


@pytest.fixture(scope="module")
def together(made: tuple[Path, Path], alone: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs on two ranks, and those that one of the two began."""
    root = tmp_path_factory.mktemp("together")
    commands = [command(made, root / name, changes) for name, changes in TWO.items()]
    begun = {"training.updates": HALF}
    commands.append(command(made, root / "one then two", {"sharding.zero": 2}))
    commands.append(command(made, root / "three then one", {"sharding.zero": 3, **begun}))
    commands.append(command(made, root / "three then one", {"sharding.zero": 1}))
    commands.append(command(made, root / "two then one", {"sharding.zero": 3, **begun}))
    commands.append(command(made, root / "fp16 in parts", {"sharding.zero": 3, "precision": "fp16", **begun}))
    commands.append(command(made, root / "fp16 in parts", {"sharding.zero": 3, "precision": "fp16"}))
    first = open_checkpoint(alone["fp32"] / f"step-{HALF:08d}").path
    (root / "one then two").mkdir()
    (root / "one then two" / first.name).symlink_to(first)
    errors = run_together(commands, 2)
    assert "resumes with prior.sharding.zero = 1, was 3" in errors[0]
    return root


@pytest.mark.parametrize("case", [case for case in TWO if "16" not in case])
def test_two_ranks_equal_one_process(case: str, alone: dict[str, Path], together: Path) -> None:
    assert_same_run(together / case, alone["fp32"])


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_two_ranks_in_16_bit_stay_close_to_one_process(precision: str, alone: dict[str, Path], together: Path) -> None:
    ours, theirs = losses(alone[precision]), losses(together / precision)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < IN_16_BIT
    ours_state, theirs_state = (
        open_checkpoint(run).trainer_state() for run in (alone[precision], together / precision)
    )
    assert ours_state["scales"] == theirs_state["scales"]
    found = open_checkpoint(together / precision)
    assert (
        found.tensors("raw")["resblocks.0.qkv.weight"].dtype
        == {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    )
    assert found.moments().read("exp_avg_sq.resblocks.0.qkv.weight").dtype == torch.uint16


def test_each_rank_writes_its_own_file(together: Path) -> None:
    found = open_checkpoint(together / "zero 3")
    names = sorted(path.name for path in found.path.iterdir() if path.is_file())
    assert names == [
        "ema-00001-of-00002.safetensors", "ema-00002-of-00002.safetensors", "ema.index.json", "manifest.json",
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.index.json", "recipe.yaml",
    ]  # fmt: skip
    whole = sum(tensor.nbytes for tensor in found.tensors("raw").values())
    sizes = [file.stat().st_size for file in TensorFiles(found.path, "model").files()]
    assert max(sizes) < 0.6 * whole
    assert found.identity


def test_only_the_first_node_writes(together: Path) -> None:
    assert [file.name for file in TensorFiles(open_checkpoint(together / "two nodes").path, "model").files()] == [
        "model-00001-of-00001.safetensors"
    ]


def test_a_run_resumes_on_other_ranks_and_stages(
    made: tuple[Path, Path], alone: dict[str, Path], together: Path, call: Call
) -> None:
    assert_same_run(together / "three then one", alone["fp32"])
    begun = sum(json.loads(line)["step"] <= HALF for line in (alone["fp32"] / "metrics.jsonl").read_text().splitlines())
    assert_same_run(together / "one then two", alone["fp32"], first=begun)
    done = call(*command(made, together / "two then one", {}))
    assert done.code == 0
    assert "resumes with prior.sharding.zero = 0, was 3" in done.err
    assert_same_run(together / "two then one", alone["fp32"])


def test_in_16_bit_a_run_resumed_on_as_many_ranks_ends_with_the_same_bytes(together: Path) -> None:
    whole, parts = (open_checkpoint(together / name) for name in ("fp16", "fp16 in parts"))
    assert whole.files == parts.files
    assert losses(whole.path.parent) == losses(parts.path.parent)


TWO_NODES = {"prior.sharding.zero": 3, "prior.sharding.node_size": 1}
LOW_RANK = {"prior.powersgd.rank": 2, "prior.powersgd.min_compression": 0}
OVERFLOW = """
from dalle_cli.prior.train import shard_prior
from dalle_cli.training.updates import AdamUpdates

engine, prior = shard_prior(recipe, group)
updates = AdamUpdates(engine, set(prior.decayed_parameters()), recipe.prior.adam)

def update(number, overflows):
    updates.zero_grad()
    engine.begin_micro_batch(last=True)
    engine.backward(loss_of(engine.loss))
    if overflows and group.rank == 1:
        prior.resblocks[1].get_parameter("out.weight").grad.to_local()[0, 0] = torch.inf
    engine.collect_gradients(number)
    values = updates.step(1e-3)
    engine.release_gathered()
    return {name: float(value) for name, value in values.items()}

def state():
    kept = {name: engine.read(name).clone() for name in engine.names}
    return kept | {key: value.clone() for key, value in engine.between_nodes.reducer.state_dict().items()}

def changed(one, other):
    assert one.keys() == other.keys()
    return [key for key in one if not torch.equal(one[key], other[key])]

update(0, False)
before = state()
skipped, after = update(1, True)["skipped"], state()
exponents = engine.scaling.scales.exponents.tolist()
update(2, False)
later = state()
print(json.dumps({"skipped": skipped, "changed": changed(before, after), "later": changed(after, later),
                  "all": list(before), "exponents": exponents}))
"""


@pytest.mark.parametrize("skip", ["update", "resblock"])
def test_an_infinity_on_one_node_leaves_error_buffers_alone(skip: str, made: tuple[Path, Path]) -> None:
    """The paper skips the whole update, and clears no error buffer that is finite (appendix E.2, step 12)."""
    changes = {**TWO_NODES, **LOW_RANK, "prior.precision": "fp16", "prior.skip": skip}
    for found in run_on_two_ranks(OVERFLOW, made, changes):
        own = {key for key in found["all"] if ".1." in key}
        assert {"resblocks.1.out.weight", "error.resblocks.1.out.weight", "factor.resblocks.1.out.weight"} <= own
        assert set(found["changed"]) == (set() if skip == "update" else set(found["all"]) - own)
        assert 0 < found["skipped"] < 1 if skip == "resblock" else found["skipped"] == 1
        assert set(found["later"]) == set(found["all"])
        assert found["exponents"] == [START + 2, START + 1 - BACKOFF, *[START + 2] * 4]


LARGE = """
from dalle_cli.distributed.engine import Replicated
from dalle_cli.precision.gradient_scaling import HIGHEST
from dalle_cli.prior.model import build_prior
from dalle_cli.prior.train import set_precision, shard_prior

if recipe.prior.sharding.zero:
    engine, prior = shard_prior(recipe, group)
    engine.begin_micro_batch(last=True)
    engine.backward(loss_of(engine.loss))
    gradients = [prior.get_parameter(name).grad for name in engine.names]
    gradients = [g.to_local() if hasattr(g, "to_local") else g for g in gradients]
else:
    prior = build_prior(recipe)
    engine = Replicated(prior, group, set_precision(prior, recipe.prior, group.size))
    engine.begin_micro_batch(last=True)
    large = engine.forward(lambda: {"loss": sum((p.float() * 40_000).sum() for p in prior.parameters())})
    engine.backward(large["loss"])
    gradients = []  # which are summed already
for gradient in gradients:
    gradient.fill_(40_000)
engine.scaling.scales.exponents.fill_(HIGHEST)
engine.collect_gradients(0)
found = {name: [float(v) for v in parameter.grad.aminmax()] for name, parameter in engine.parameters.items()}
scales = engine.scaling.values().tolist()
factors = {name: scales[engine.scaling.scale_index(p)] for name, p in engine.parameters.items()}
print(json.dumps({"found": found, "factors": factors}))
"""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        TWO_NODES,
        TWO_NODES | LOW_RANK,
    ],
    ids=["replicated", "two nodes", "two nodes with PowerSGD"],
)
def test_gradients_in_16_bit_are_averaged_since_their_sum_overflows(
    changes: dict[str, Any], made: tuple[Path, Path]
) -> None:
    for printed in run_on_two_ranks(LARGE, made, {"prior.precision": "fp16", **changes}):
        found, factors = printed["found"], printed["factors"]
        assert any(name.startswith("resblocks.") for name in found)
        for name, extremes in found.items():
            scaled = name.startswith("resblocks.")
            # PowerSGD rounds its factors to 16 bit.
            assert extremes == pytest.approx([40_000 if scaled else 80_000] * 2, rel=5e-3), name
            assert factors[name] == (2.0**24 if scaled else 1.0)


INITIALISE = """
import resource
from dalle_cli.prior.train import shard_prior

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
made, _ = shard_prior(recipe, group)
own = sum(p.nbytes for p in made.parameters.values())
row = float(group.sum(made.parameters["image_row"].sum()))
print(json.dumps({"peak": peak() - before, "own": own, "row": row}))
"""


@pytest.mark.slow
def test_no_rank_ever_holds_the_whole_model(made: tuple[Path, Path]) -> None:
    """A rank's peak memory is its half of the model plus one whole parameter at a time."""
    model = {"layers": 12, "heads": 16, "d_head": 64, "d_model": 1024}
    changes = {f"prior.model.{key}": value for key, value in model.items()}
    changes |= {"prior.sharding.zero": 3, "tokenizer.vocab_size": 2000}
    found = run_on_two_ranks(INITIALISE, made, changes)
    recipe = load_recipe(made[0], [f"{key}={value}" for key, value in changes.items()])
    with torch.device("meta"):
        prior = build_prior(recipe)
    whole = sum(parameter.nbytes for parameter in prior.parameters())
    largest = max(parameter.nbytes for parameter in prior.parameters())
    for each in found:
        assert each["own"] < 0.51 * whole
        assert each["peak"] < each["own"] + 2 * largest + 50e6 < 0.75 * whole
    row = dict(prior.initial_values(recipe.seed))["image_row"]
    assert found[0]["row"] == pytest.approx(float(row.sum()), rel=1e-4)


@pytest.mark.slow
def test_four_ranks_as_two_nodes(made: tuple[Path, Path], alone: dict[str, Path], tmp_path: Path) -> None:
    """Uncompressed, two nodes equal one process. With PowerSGD the loss falls, and a resumed run has the same bytes."""
    nodes = {"sharding.zero": 3, "sharding.node_size": 2}
    low = {**nodes, "powersgd.rank": 2, "powersgd.min_compression": 0}
    half = {**low, "precision": "fp16", "training.ema_every": 3}
    commands = [
        command(made, tmp_path / "whole", nodes),
        command(made, tmp_path / "low rank", low),
        command(made, tmp_path / "in parts", {**low, "training.updates": HALF}),
        command(made, tmp_path / "in parts", low),
        command(made, tmp_path / "fp16", half),
        command(made, tmp_path / "fp16 in parts", {**half, "training.updates": HALF}),
        command(made, tmp_path / "fp16 in parts", half),
        command(made, tmp_path / "more nodes", {**low, "training.updates": HALF}),
        command(made, tmp_path / "more nodes", {**low, "sharding.node_size": 1}),
    ]
    run_together(commands, 4)
    assert_same_run(tmp_path / "whole", alone["fp32"])
    for parts, whole in (("in parts", "low rank"), ("fp16 in parts", "fp16")):
        assert open_checkpoint(tmp_path / parts).files == open_checkpoint(tmp_path / whole).files
    saved = open_checkpoint(tmp_path / "fp16")
    factors, errors = saved.own_state(3, 4), saved.errors()
    assert factors
    assert errors is not None
    assert {key.partition(".")[0] for key in factors} == {"factor"}
    matrices = build_prior(saved.recipe()).decayed_parameters()
    assert {name: value.shape for name, value in errors.all().items()} == {n: p.shape for n, p in matrices.items()}
    assert {value.dtype for value in [*factors.values(), *errors.all().values()]} == {torch.uint16}
    assert losses(tmp_path / "low rank")[-1] < losses(tmp_path / "low rank")[0] - 0.1
    assert losses(tmp_path / "more nodes")[-1] == pytest.approx(losses(tmp_path / "low rank")[-1], abs=0.1)
    assert losses(tmp_path / "fp16")[-1] == pytest.approx(losses(tmp_path / "low rank")[-1], abs=0.1)
    last = [json.loads(line) for line in (tmp_path / "low rank" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["bytes_between_nodes"] > 0 for line in last if "loss" in line)

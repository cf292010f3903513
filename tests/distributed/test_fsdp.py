"""FSDP's engine in 16 bit, its memory, and PowerSGD between its nodes, on several gloo ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.sharded_runs import (
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
from dalle_cli.precision.gradient_scaling import BACKOFF, START
from dalle_cli.prior.model import build_prior
from dalle_cli.stores.checkpoint import open_checkpoint

IN_TWO = {
    "fp16": {"sharding.zero": 3, "precision": "fp16"},
    "bf16": {"sharding.zero": 2, "precision": "bf16", "training.micro_batch": 2},
}
"""Settings of runs on two ranks in 16 bit; ``test_sharded_engines.py`` has those in 32 bit."""
IN_16_BIT = 1e-2
"""Tolerance in 16 bit, where stochastic rounding has other noise for other shards."""


@pytest.fixture(scope="module")
def alone(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The runs of one process, in each precision."""
    root = tmp_path_factory.mktemp("alone")
    return {kind: train_alone(made, root / kind, precision=kind) for kind in IN_TWO}


@pytest.fixture(scope="module")
def together(made: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs on two ranks, one of them in two parts too."""
    root = tmp_path_factory.mktemp("together")
    begun = {**IN_TWO["fp16"], "training.updates": HALF}
    run_all(made, root, [*IN_TWO.items(), ("fp16 in parts", begun), ("fp16 in parts", IN_TWO["fp16"])])
    return root


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


def test_in_16_bit_a_run_resumed_on_as_many_ranks_ends_with_the_same_bytes(together: Path) -> None:
    assert_same_bytes(together / "fp16 in parts", together / "fp16")


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
    for found in run_on_ranks(OVERFLOW, made, changes):
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
    for printed in run_on_ranks(LARGE, made, {"prior.precision": "fp16", **changes}):
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
    found = run_on_ranks(INITIALISE, made, changes)
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
def test_four_ranks_as_two_nodes(made: tuple[Path, Path], tmp_path: Path) -> None:
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
    assert_same_run(tmp_path / "whole", train_alone(made, tmp_path / "alone"))
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

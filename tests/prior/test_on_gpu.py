"""Tests of what prepares a prior for a GPU, on a CPU: a compiler's backend without code generation stands in for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from helpers.flex import allow_backward_on_cpu
from helpers.sharded_runs import make_inputs, run_on_ranks
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from dalle_cli.config.schema import PriorModel, PriorSettings
from dalle_cli.prior.model import AttentionResblock, Prior, PriorLoss
from dalle_cli.prior.on_gpu import speed_up
from dalle_cli.prior.train import set_precision

CPU, EAGER = torch.device("cpu"), "aot_eager"
TEXT, CODES, GRID = 5, 7, 4


@pytest.fixture(autouse=True)
def nothing_compiled() -> None:
    torch._dynamo.reset()


def small(**settings: Any) -> Prior:
    model = PriorModel(
        layers=5,
        heads=2,
        d_head=8,
        d_model=16,
        grid=GRID,
        conv_kernel=3,
        layout="row, column, conv, full, row",
        **settings,
    )
    return Prior(model, TEXT, 11, CODES, seed=1)


def loss_of(prior: Prior) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(11, (3, TEXT), generator=generator)
    image = torch.randint(CODES, (3, GRID**2), generator=generator)
    found: PriorLoss = prior.loss(text, torch.tensor([5, 2, 0]), image)
    return found.text + found.image


def loss_and_gradients(prior: Prior) -> list[Tensor]:
    loss = loss_of(prior)
    return [loss.detach(), *torch.autograd.grad(loss, list(prior.parameters()))]


@pytest.mark.parametrize(
    ("precision", "checkpointed"),
    [
        ("fp32", True),
        ("bf16", False),
        ("fp16", True),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("fp32", False), ("bf16", True), ("fp16", False))),
    ],
)
def test_a_prior_for_a_gpu_is_the_same(precision: Any, checkpointed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    allow_backward_on_cpu(monkeypatch)
    plain = small(checkpoint_resblocks=checkpointed)
    fast = copy.deepcopy(plain)
    for prior in (plain, fast):
        set_precision(prior, PriorSettings(precision=precision), replicas=1)
    speed_up(fast, "auto", CPU, EAGER)
    assert all(block.compiled_branch for block in fast.resblocks)
    assert [block.flex is not None for block in fast.resblocks if isinstance(block, AttentionResblock)] == [True] * 5
    for found, wanted in zip(loss_and_gradients(fast), loss_and_gradients(plain), strict=True):
        tolerance = 1e-5 if precision == "fp32" else 0.03
        assert (found.float() - wanted.float()).abs().max() <= tolerance * wanted.float().abs().max() + 1e-7


def test_the_same_code_serves_all_blocks_of_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    allow_backward_on_cpu(monkeypatch)
    prior, graphs = small(), []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    speed_up(prior, "auto", CPU, count)
    made = len(graphs)
    for _ in range(2):
        loss_and_gradients(prior)
    with torch.no_grad():
        loss_of(prior)  # which runs the plain code
    assert made <= 5  # four kinds of attention and the MLP
    assert len(graphs) == 2 * made  # once more for batches of 3, in place of the trial's one stream


def test_nothing_is_compiled_where_the_recipe_says_off() -> None:
    prior = small()
    speed_up(prior, "off", CPU, EAGER)
    assert not any(block.compiled_branch for block in prior.resblocks)


def fails(*_: Any) -> Any:
    raise RuntimeError("no such kernel\nand a long trace")


def changed_by(change: Callable[[Tensor], Tensor], *, backward_only: bool = False) -> Callable[..., Any]:
    """Return a backend whose code gives floating numbers that are ``change`` of the right ones."""

    def compiler(graph: Any, _: Any) -> Callable[..., Any]:
        def run(*values: Any) -> Any:
            found = graph.forward(*values)
            return [change(v) if isinstance(v, Tensor) and v.is_floating_point() else v for v in found]

        return make_boxed_func(run)

    plain = unchanged if backward_only else compiler
    return aot_autograd(fw_compiler=plain, bw_compiler=compiler)


def unchanged(graph: Any, _: Any) -> Callable[..., Any]:
    return make_boxed_func(graph.forward)


WRONG = [
    (fails, "no such kernel"),
    (changed_by(lambda value: 2 * value), "of the largest value"),
    (changed_by(lambda value: 0 * value, backward_only=True), "of the largest value"),
    (changed_by(lambda value: value * torch.nan, backward_only=True), "it is off by nan of the largest value"),
]
"""Backends that fail, and those whose results, or gradients alone, are wrong; why they are not used."""


@pytest.mark.parametrize(("backend", "reason"), WRONG)
def test_what_fails_or_is_wrong_is_not_used(backend: Any, reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    """flex_attention refuses a backward pass on a CPU, so it is not used here either."""
    prior = small()
    wanted = loss_and_gradients(prior)
    speed_up(prior, "auto", CPU, backend)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5 + 4, lines
    assert sum(reason in line for line in lines) == 5, lines
    assert sum("by flex_attention: not used here" in line for line in lines) == 4
    for found, value in zip(loss_and_gradients(prior), wanted, strict=True):
        assert torch.equal(found, value)


COMPARE = """
import warnings
import torch.nn.attention.flex_attention as flex
from dalle_cli.distributed.fsdp import Sharded
from dalle_cli.prior.on_gpu import speed_up
from dalle_cli.prior.train import shard_prior

flex._validate_device = lambda *_: None
found = []
for fast in (False, True):
    engine, prior = shard_prior(recipe, group)
    if fast:
        speed_up(prior, "auto", group.device, "aot_eager")
        assert all(block.compiled_branch for block in prior.resblocks)
    for last in (False, True):
        engine.begin_micro_batch(last)
        loss = loss_of(engine.loss)
        engine.backward(loss)
    engine.collect_gradients(0)
    found.append([loss.detach(), *(engine.parameters[name].grad for name in engine.names)])
    engine.release_gathered()
errors = [float((a.float() - b.float()).abs().max()) for a, b in zip(*found, strict=True) if a.numel()]
print(json.dumps({"compared": len(errors), "largest": max(errors)}))
"""


@pytest.mark.parametrize(
    "changes", [pytest.param({"zero": 2}, marks=pytest.mark.slow), {"zero": 3, "checkpointed": True}]
)
def test_shards_compute_the_same(changes: dict[str, Any], tmp_path: Path) -> None:
    settings = {
        "prior.sharding.zero": changes["zero"],
        "prior.model.checkpoint_resblocks": str(changes.get("checkpointed", False)).lower(),
    }
    for found in run_on_ranks(COMPARE, make_inputs(tmp_path), settings):
        assert found["compared"] > 20
        assert found["largest"] < 1e-5

"""Tests of replicas, whose gradients DistributedDataParallel sums during the backward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.sharded_runs import make_inputs, run_on_ranks

REDUCE = """
import copy
from functools import partial
import torch.nn.attention.flex_attention as flex
from dalle_cli.distributed import engine as module
from dalle_cli.distributed.engine import Replicated
from dalle_cli.prior.on_gpu import speed_up
from dalle_cli.prior.model import LossModule, build_prior
from dalle_cli.prior.train import set_precision

prior = build_prior(recipe)
scaling = set_precision(prior, recipe.prior, 2)
alone = copy.deepcopy(prior)
if recipe.name == "compiled":
    flex._validate_device = lambda *_: None
    speed_up(prior, "auto", group.device, "aot_eager")
# Many buckets, as large models have.
module.DistributedDataParallel = partial(module.DistributedDataParallel, bucket_cap_mb=0.01)
engine = Replicated(prior, group, scaling)
names, sent = {parameter: name for name, parameter in prior.named_parameters()}, []
reduce = engine._sum_bucket
engine._sum_bucket = lambda bucket: sent.append([names[p] for p in bucket.parameters()]) or reduce(bucket)
passes, orders = [], []
for _ in range(2):
    sent.clear()
    for parameter in prior.parameters():
        parameter.grad = None
    for last in (False, True):
        engine.begin_micro_batch(last)
        engine.backward(engine.forward(lambda: {"loss": loss_of(LossModule(prior))})["loss"])
    engine.collect_gradients(0)
    orders.append(list(sent))
    passes.append([parameter.grad.clone() for parameter in prior.parameters()])
for _ in range(2):
    loss_of(LossModule(alone)).backward()
pairs = list(zip(prior.parameters(), alone.parameters(), strict=True))
if scaling is not None:
    group.average_in_place([b.grad for a, b in pairs if scaling.scales_gradient_of(a)])
group.sum_in_place([b.grad for a, b in pairs if scaling is None or not scaling.scales_gradient_of(a)])
scale = max(float(b.grad.abs().max()) for a, b in pairs)
error = max(float((a.grad.float() - b.grad.float()).abs().max()) for a, b in pairs)
same = all(torch.equal(one, other) for one, other in zip(*passes, strict=True))
print(json.dumps({"scaled": scaling is not None, "error": error / scale, "same": same, "orders": orders}))
"""


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("plain", "fp32"),
        ("compiled", "fp16"),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("plain", "fp16"), ("compiled", "fp32"))),
    ],
)
def test_replicas_sum_or_average_their_gradients(name: str, precision: str, tmp_path: Path) -> None:
    """Gradients summed during the backward pass are those that are summed after it, in every update alike.

    The last parameters, whose gradients come first, are sent first, after a pass of zeros that settles the buckets.
    """
    changes = {"prior.precision": precision, "name": name}
    for found in run_on_ranks(REDUCE, make_inputs(tmp_path), changes):
        assert found["scaled"] == (precision == "fp16")
        assert found["error"] < (1e-6 if precision == "fp32" and name == "plain" else 2e-3)
        assert found["same"]
        first, second = found["orders"]
        # The first one begins with the pass of zeros, in buckets of its own.
        assert first[-len(second) :] == second
        assert len(second) > 2
        order = [name for bucket in second for name in bucket]
        assert order.index("image_head.weight") < order.index("resblocks.2.out.weight") < order.index("text_embedding")
        assert "text_embedding" in [*second[-1], *second[-2]]  # a bucket has one type

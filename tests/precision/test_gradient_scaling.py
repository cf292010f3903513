"""Gradient scaling of each resblock: the autograd mechanism, the rule of the scales, and updates."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dalle_cli.config.schema import PriorModel
from dalle_cli.precision.adam import Adam16
from dalle_cli.precision.gradient_scaling import HIGHEST, LOWEST, GradientScales, GradientScaling, scaled_residual
from dalle_cli.prior.model import Prior

TEXT, VOCAB, GRID = 5, 11, 4


def small(layers: int = 4, checkpointing: bool = False) -> Prior:
    model = PriorModel(
        layers=layers, heads=2, d_head=8, d_model=16, grid=GRID, conv_kernel=3, checkpoint_resblocks=checkpointing
    )
    prior = Prior(model, TEXT, VOCAB, VOCAB)
    with torch.no_grad():
        for parameter in prior.parameters():  # at std 0.02 resblocks do next to nothing
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return prior


def backward(prior: Prior, share: float = 1.0) -> dict[str, Tensor]:
    """Return the parameters' gradients for one batch, still scaled."""
    generator = torch.Generator().manual_seed(3)
    text = torch.randint(VOCAB, (4, TEXT), generator=generator)
    image = torch.randint(VOCAB, (4, GRID**2), generator=generator)
    prior.zero_grad()
    found = prior.loss(text, torch.arange(4) + 1, image)
    (share * (found.text / 8 + found.image * 7 / 8)).backward()
    return {name: p.grad.clone() for name, p in prior.named_parameters() if p.grad is not None}


def scaled_by(prior: Prior, scale: Callable[[int], float]) -> None:
    for i, block in enumerate(prior.resblocks):
        block.gradient_scale = scale(i)


def unscaled(prior: Prior, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    def scale(name: str) -> float:
        return prior.resblocks[int(name.split(".")[1])].gradient_scale if name.startswith("resblocks.") else 1.0

    return {name: gradient.float() / scale(name) for name, gradient in gradients.items()}


# The mechanism


def test_a_gradient_below_float16s_range_survives() -> None:
    """Y = x + w x in closed form: dy/dw = x, dy/dx = 1 + w, under an incoming gradient of 2^-30."""
    incoming, x_value, w_value = 2.0**-30, 1.5, 0.25

    def gradients(scale: float | None) -> tuple[float, float]:
        x = torch.tensor([x_value], requires_grad=True)
        w = nn.Parameter(torch.tensor([w_value], dtype=torch.float16))
        y = x + x.half() * w if scale is None else scaled_residual(lambda x: x.half() * w, x, scale)
        y.backward(torch.tensor([incoming]))
        return x.grad.item(), w.grad.float().item() / (scale or 1.0)

    assert gradients(None) == (incoming, 0.0)  # float16's least number is 2^-24
    assert gradients(2.0**20) == (incoming * (1 + w_value), incoming * x_value)


def test_two_blocks_that_no_common_scale_serves() -> None:
    """Two gradients are 42 octaves apart, two more than float16's numbers span.

    dL/da is 2^28 times the incoming gradient, a sum over the stream, and dL/db is 2^-14 times it.
    """

    def gradients(first: float, second: float) -> tuple[float, set[float]]:
        x = torch.full((2**14,), 2.0**14)
        a = nn.Parameter(torch.zeros((), dtype=torch.float16))
        b = nn.Parameter(torch.zeros(2**14, dtype=torch.float16))
        x = scaled_residual(lambda x: x.half() * a, x, first)
        x = scaled_residual(lambda x: (x * 2.0**-28).half() * b, x, second)
        x.backward(torch.full((2**14,), 2.0**-20))
        return a.grad.float().item() / first, set((b.grad.float() / second).tolist())

    exact = (2.0**8, {2.0**-34})
    assert gradients(2.0**2, 2.0**20) == exact
    assert all(gradients(2.0**k, 2.0**k) != exact for k in range(-20, 50))


def test_in_32_bit_powers_of_two_change_no_bit() -> None:
    reference = backward(small())
    for exponent in (-5, 13, 40):
        prior = small()
        scaled_by(prior, lambda i, e=exponent: 2.0 ** (e + i))
        found = unscaled(prior, backward(prior))
        assert all(torch.equal(found[name], reference[name]) for name in reference)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 4e-3), (torch.bfloat16, 4e-2)])
def test_in_16_bit_gradients_are_those_of_32(dtype: torch.dtype, error: float) -> None:
    """The weights are the same, rounded ones; without scales a loss this small would underflow in float16."""
    prior = small().cast_resblocks(dtype)
    exact = small()
    exact.load_state_dict(prior.state_dict())
    share = 2.0**-24
    reference = backward(exact, share)
    matrices = set(prior.decayed_parameters())
    unaided = backward(prior, share)
    if dtype == torch.float16:
        lost = [(unaided[name] == 0).float().mean().item() for name in matrices]
        assert sum(lost) / len(lost) > 0.5
    scaled_by(prior, lambda i: 2.0 ** (28 + i % 3))
    found = backward(prior, share)
    assert all(found[name].dtype == (dtype if name in matrices else torch.float32) for name in found)
    for name, gradient in unscaled(prior, found).items():
        assert (gradient - reference[name]).norm() <= error * reference[name].norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_checkpointing_changes_no_bit(dtype: torch.dtype) -> None:
    found = []
    for checkpointing in (False, True):
        prior = small(checkpointing=checkpointing).cast_resblocks(dtype)
        scaled_by(prior, lambda i: 2.0**13 + i)
        found.append(backward(prior))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_overflows_in_a_block_stays_there(checkpointing: bool) -> None:
    x = torch.ones(3, requires_grad=True)
    w = nn.Parameter(torch.tensor([1.0, 1.0, 6e4], dtype=torch.float16))

    def block(x: Tensor) -> Tensor:
        return scaled_residual(lambda x: (x.half() * 2**-10) * w, x, 2.0**14)

    y = checkpoint(block, x, use_reentrant=False) if checkpointing else block(x)
    y.backward(torch.ones(3))
    assert w.grad.tolist() == [16.0, 16.0, 16.0]
    # 2^14 * 6e4 is beyond float16: on the way out it counts as zero, and the identity path goes on.
    assert x.grad.tolist() == [1 + 2**-10, 1 + 2**-10, 1.0]


def test_values_are_those_of_an_unscaled_block() -> None:
    prior = small().cast_resblocks(torch.float16)
    ids, image = torch.zeros(2, TEXT, dtype=torch.long), torch.zeros(2, GRID**2, dtype=torch.long)
    before = prior(ids, image)
    scaled_by(prior, lambda i: 3.0**i)
    assert torch.equal(prior(ids, image), before)


# The rule


@settings(max_examples=20)
@given(st.integers(1, 1000), st.floats(0, 0.2), st.integers(0, 2**32), st.sampled_from([1, 3, 125]))
def test_scales_follow_the_papers_words(replicas: int, overflows: float, seed: int, window: int) -> None:
    scales = GradientScales(2, replicas, window)
    generator = torch.Generator().manual_seed(seed)
    expected = [replicas * 2.0**13] * 2
    divided: list[int | None] = [None, None]
    for update in range(1500):
        finite = (torch.rand(2, generator=generator) >= overflows).tolist()
        for i in range(2):
            if finite[i]:
                expected[i] *= 2 ** (1 / 1000)
            elif divided[i] is None or update - divided[i] >= window:
                expected[i], divided[i] = expected[i] / math.sqrt(2), update
            expected[i] = min(max(expected[i], replicas * 2.0**7), replicas * 2.0**24)
        scales.update(torch.tensor(finite))
        if update % 250 == 0:
            restored = GradientScales(2, replicas, window)
            restored.load_state_dict(scales.state_dict())
            scales = restored
    assert scales.values().tolist() == pytest.approx(expected, rel=1e-9)


def test_bounds_and_state() -> None:
    scales = GradientScales(3, replicas=4)
    for _ in range(12_000):
        scales.update(torch.tensor([True, False, True]))
    assert scales.values().tolist() == [4 * 2.0**24, 4 * 2.0**7, 4 * 2.0**24]
    assert scales.at_bounds() == 3
    more = GradientScales(3, replicas=8)
    more.load_state_dict(scales.state_dict())
    assert more.values()[0] == 8 * 2.0**24  # the exponents are independent of M
    with pytest.raises(ValueError, match="has 3 scales, not 2"):
        GradientScales(2).load_state_dict(scales.state_dict())


# An update


def optimizer_of(prior: Prior) -> Adam16:
    matrices = prior.decayed_parameters()
    rest = [p for name, p in prior.named_parameters() if name not in matrices]
    groups = [{"params": list(matrices.values()), "packed": True, "weight_decay": 0.1}, {"params": rest}]
    return Adam16(groups, lr=1e-2)


@pytest.mark.parametrize("clip_norm", [0.5, 100.0])
def test_an_update_is_that_of_torch_in_32_bit(clip_norm: float) -> None:
    prior, reference = small(), small()
    scaling = GradientScaling(list(prior.resblocks), GradientScales(8))
    optimizer = Adam16([{"params": list(prior.parameters())}], lr=1e-2, weight_decay=0.1)
    backward(prior)
    backward(reference)
    found = scaling.step(optimizer, clip_norm)
    norm = nn.utils.clip_grad_norm_(reference.parameters(), clip_norm)
    torch.optim.AdamW(reference.parameters(), lr=1e-2, betas=(0.9, 0.96), weight_decay=0.1).step()
    assert found["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    assert (found["skipped"], found["scales_at_bounds"]) == (0, 0)
    assert found["log2_scale_min"] == found["log2_scale_max"] == 13
    assert math.log2(prior.resblocks[0].gradient_scale) == pytest.approx(13.001)
    for ours, theirs in zip(prior.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("skip", ["resblock", "update"])
def test_a_nonfinite_gradient_skips(skip: str) -> None:
    prior = small().cast_resblocks(torch.float16)
    blocks = list(prior.resblocks)
    scaling = GradientScaling(blocks, GradientScales(8), skip=skip)
    optimizer = optimizer_of(prior)
    backward(prior)
    scaling.step(optimizer, 4.0)
    backward(prior)
    blocks[3].get_parameter("out.bias").grad[0] = math.inf
    clean = unscaled(prior, {n: p.grad for n, p in prior.named_parameters() if not n.startswith("resblocks.3.")})
    before = {name: p.detach().clone() for name, p in prior.named_parameters()}
    moments = copy.deepcopy({name: optimizer.state[p] for name, p in prior.named_parameters()})
    found = scaling.step(optimizer, 4.0)

    def stands(name: str, parameter: Tensor) -> bool:
        state = optimizer.state[parameter]
        same = [torch.equal(state[key], moments[name][key]) for key in state]
        assert torch.equal(parameter, before[name]) == all(same) or not any(same)
        return all(same)

    still = {name for name, p in prior.named_parameters() if stands(name, p)}
    own = {name for name in before if name.startswith("resblocks.3.")}
    assert still == (own if skip == "resblock" else set(before))
    sizes = {name: p.numel() for name, p in prior.named_parameters()}
    assert found["skipped"] == pytest.approx(sum(sizes[n] for n in still) / sum(sizes.values()))
    norm = math.sqrt(sum(g.double().square().sum().item() for g in clean.values()))
    assert found["grad_norm"] == pytest.approx(norm if skip == "resblock" else 0.0, rel=1e-4)
    moved = [13.002] * 8
    moved[3] = 13.001 - 0.5
    assert [math.log2(block.gradient_scale) for block in blocks] == pytest.approx(moved)


@pytest.mark.parametrize("skip", ["resblock", "update"])
@pytest.mark.parametrize("broken", ["resblocks.3.out.bias", "resblocks.3.out.weight", "image_head.weight"])
def test_what_a_device_decides_needs_no_look(skip: str, broken: str) -> None:
    """Updates by factors that the host does not look at are those by factors that it knows."""

    def train(looks: bool) -> dict[str, Tensor]:
        prior = small().cast_resblocks(torch.float16)
        scaling = GradientScaling(list(prior.resblocks), GradientScales(8), skip=skip)
        optimizer = optimizer_of(prior)
        for update in range(4):
            backward(prior)
            if update in (1, 2):
                prior.get_parameter(broken).grad.view(-1)[0] = math.nan
            if looks:
                scaling.step(optimizer, 4.0)
            else:
                decision = scaling.decide(scaling.squares(scaling.gradients(prior.parameters())), 4.0)
                factors = decision.factors.unbind()
                optimizer.step(factors={p: factors[scaling.scale_index(p)] for p in prior.parameters()})
        optimizer.settle()
        found = {name: p.detach() for name, p in prior.named_parameters()}
        for name, parameter in prior.named_parameters():
            found |= {f"{key}.{name}": value for key, value in optimizer.state[parameter].items()}
        return found

    known, found = train(looks=True), train(looks=False)
    assert known.keys() == found.keys()
    assert [name for name in known if not torch.equal(known[name], found[name])] == []
    skipped = {name for name in known if name.startswith("step.") and known[name] == 2}
    own = {name for name in known if name.startswith("step.resblocks.3.")}
    every = {name for name in known if name.startswith("step.")}
    assert skipped == (own if skip == "resblock" and broken.startswith("resblocks.") else every)


@settings(max_examples=100)
@given(
    st.lists(st.floats(1e-30, 1e30) | st.sampled_from([math.inf, math.nan, 0.0]), min_size=5, max_size=5),
    st.sampled_from([None, 0.5, 4.0, 1e20]),
    st.sampled_from(["resblock", "update"]),
    st.lists(st.integers(LOWEST, HIGHEST), min_size=4, max_size=4),
)
def test_a_decision_is_that_of_plain_arithmetic(
    squares: list[float], clip_norm: float | None, skip: str, exponents: list[int]
) -> None:
    scales = GradientScales(4, replicas=6)
    scales.exponents.copy_(torch.tensor(exponents))
    scaling = GradientScaling(list(small().resblocks)[:4], scales, skip=skip, averaged_over=3)
    decision = scaling.decide(torch.tensor(squares, dtype=torch.float64), clip_norm)

    factors, finite = [2 * 2 ** (e / 1000) for e in exponents] + [1.0], [math.isfinite(s) for s in squares]
    skips_all = not finite[-1] or (skip == "update" and not all(finite))
    used = [each and not skips_all for each in finite]
    norm = math.sqrt(sum(s / f**2 for s, f, use in zip(squares, factors, used, strict=True) if use))
    clip = 1.0 if clip_norm is None else min(1.0, clip_norm / (norm + 1e-6))
    assert decision.norm.item() == pytest.approx(norm, rel=1e-14)
    expected = [clip / f if use else 0.0 for f, use in zip(factors, used, strict=True)]
    assert decision.factors.tolist() == pytest.approx(expected, rel=1e-14)


def test_a_nonfinite_gradient_outside_the_resblocks_skips_everything() -> None:
    prior = small()
    scaling = GradientScaling(list(prior.resblocks), GradientScales(8))
    backward(prior)
    prior.image_head.weight.grad[0, 0] = math.nan
    before = copy.deepcopy(prior.state_dict())
    assert scaling.step(optimizer_of(prior), None)["skipped"] == 1
    assert all(torch.equal(value, before[name]) for name, value in prior.state_dict().items())
    assert math.log2(scaling.scales.values()[0]) == pytest.approx(13.001)  # no scale is to blame


def test_one_common_scale() -> None:
    prior = small()
    scaling = GradientScaling(list(prior.resblocks), GradientScales(1), skip="update")
    backward(prior)
    prior.resblocks[0].get_parameter("out.bias").grad[0] = math.nan
    assert scaling.step(optimizer_of(prior), None)["skipped"] == 1
    assert {float(block.gradient_scale) for block in prior.resblocks} == {2.0**12.5}
    with pytest.raises(ValueError, match="2 scales for 8 resblocks"):
        GradientScaling(list(prior.resblocks), GradientScales(2))


def test_ranks_with_parts_of_the_gradients_come_to_one_decision() -> None:
    """Under ZeRO each rank has some of each tensor, or none of it."""
    prior = small().cast_resblocks(torch.float16)
    whole = GradientScaling(list(prior.resblocks), GradientScales(8, replicas=2))
    backward(prior)
    gradients = list(whole.gradients(prior.parameters()))
    parts = [[(i, g.flatten()[rank::3]) for i, g in gradients if rank < 2 or g.dim() == 2] for rank in range(3)]
    parts[2] += [(i, g.flatten()[2::3]) for i, g in gradients if g.dim() != 2]
    total = sum(whole.squares(part) for part in parts)
    assert torch.allclose(total, whole.squares(gradients), rtol=1e-5)
    assert whole.squares([]).tolist() == [0.0] * 9
    decision = whole.decide(total, 4.0)
    exact = unscaled(prior, {name: p.grad for name, p in prior.named_parameters()})
    before = [2 * 2.0**13] * 8 + [1.0]
    norm = math.sqrt(sum(g.double().square().sum().item() for g in exact.values()))
    clip = min(1.0, 4.0 / norm)
    # ``unscaled`` divided by the scales of the next update, 2^(1/1000) larger.
    assert decision.norm.item() == pytest.approx(norm, rel=1e-3)
    assert decision.factors.tolist() == pytest.approx([clip / scale for scale in before], rel=1e-3)


def test_micro_batches_add_up() -> None:
    prior = small().cast_resblocks(torch.float16)
    scaled_by(prior, lambda i: 2.0**13)
    once = backward(prior)
    prior.zero_grad()
    for _ in range(4):
        before = {name: p.grad for name, p in prior.named_parameters()}
        added = backward(prior, 0.25)
        for name, parameter in prior.named_parameters():
            parameter.grad = added[name] if before[name] is None else before[name] + added[name]
    for name, parameter in prior.named_parameters():
        assert torch.allclose(parameter.grad, once[name], rtol=1e-2, atol=1e-2), name

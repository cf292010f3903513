"""Adam with 16-bit moments and parameters, against torch's AdamW and closed forms."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from dalle_cli.precision import adam
from dalle_cli.precision.adam import MAX_VARIANCE, Adam16
from dalle_cli.precision.formats import MEAN, VARIANCE


def drawn(*shape: int, seed: int = 0, size: float = 1.0) -> Tensor:
    return size * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_in_32_bit_it_is_torchs_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adam, "CHUNK", 7)
    settings = {"lr": 1e-2, "betas": (0.9, 0.96), "eps": 1e-8, "weight_decay": 0.3}
    ours, theirs = nn.Parameter(drawn(5, 4)), nn.Parameter(drawn(5, 4))
    optimizer, reference = Adam16([ours], **settings), torch.optim.AdamW([theirs], **settings)
    for step in range(40):
        gradient = drawn(5, 4, seed=step, size=0.1)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        optimizer.step()
        reference.step()
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)
    assert optimizer.state[ours]["exp_avg"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_follows_32(dtype: torch.dtype) -> None:
    """Adam16 follows AdamW to a quadratic's minimum, to the precision of the type."""
    start, target = drawn(4000, size=0.1), drawn(4000, seed=9, size=0.1)
    ours, theirs = nn.Parameter(start.to(dtype)), nn.Parameter(start.clone())
    optimizer = Adam16([{"params": [ours], "packed": True}], lr=2e-3)
    reference = torch.optim.AdamW([theirs], lr=2e-3, betas=(0.9, 0.96), weight_decay=0.0)
    for step in range(100):
        noise = drawn(4000, seed=step, size=1e-2)
        ours.grad, theirs.grad = (ours.float() - target + noise).to(dtype), theirs.detach() - target + noise
        optimizer.step()
        reference.step()
    apart = (ours.float() - theirs).square().mean().sqrt()
    unit = torch.finfo(dtype).eps * 0.1
    assert apart < 4 * unit, apart / unit
    assert (start - theirs).square().mean().sqrt() > 50 * apart


def test_moments_are_those_of_float32_but_for_a_last_bit() -> None:
    parameter, gradient = nn.Parameter(torch.zeros(3000)), drawn(3000) * drawn(3000, seed=1, size=8).exp2()
    optimizer = Adam16([parameter], betas=(0.9, 0.96), packed=True)
    parameter.grad = gradient
    optimizer.step()
    state = optimizer.state[parameter]
    mean, variance = 0.1 * gradient, (0.04 * gradient.square()).clamp(max=MAX_VARIANCE)
    for form, codes, exact in ((MEAN, state["exp_avg"], mean), (VARIANCE, state["exp_avg_sq"], variance)):
        assert codes.dtype == torch.uint16
        assert ((codes.int() - form.encode(exact).int()).abs() <= 1).all()
    variances = VARIANCE.decode(state["exp_avg_sq"])
    assert variances.max() <= MAX_VARIANCE * (1 + 2**-9)
    assert (variances > MAX_VARIANCE * 0.99).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_below_half_a_unit_are_made_on_average(dtype: torch.dtype) -> None:
    parameter = nn.Parameter(torch.full((20_000,), 0.75, dtype=dtype))
    rate, steps = torch.finfo(dtype).eps / 100, 100
    assert torch.equal(parameter - rate, parameter)  # rounding to nearest would lose such a step
    optimizer = Adam16([parameter], lr=rate, packed=True)
    for _ in range(steps):
        parameter.grad = torch.full_like(parameter, 0.01)
        optimizer.step()  # of a constant gradient Adam's step is the step size
    moved = 0.75 - parameter.double().mean().item()
    assert moved == pytest.approx(rate * steps, rel=0.02)


def test_slow_averages_do_not_stall() -> None:
    """The variance falls on average, though with beta2 = 0.999 by at most half a last bit an update."""
    parameter = nn.Parameter(torch.zeros(20_000))
    optimizer = Adam16([parameter], betas=(0.99, 0.999), packed=True)
    for step in range(301):
        parameter.grad = torch.full((20_000,), 1e-3 if step == 0 else 0.0)
        optimizer.step()
    state = optimizer.state[parameter]
    variance = VARIANCE.decode(state["exp_avg_sq"]).double().mean().item()
    assert variance == pytest.approx(1e-3 * 1e-6 * 0.999**300, rel=5e-3)
    assert MEAN.decode(state["exp_avg"]).double().mean().item() == pytest.approx(1e-2 * 1e-3 * 0.99**300, rel=5e-3)


def test_factors_undo_scales() -> None:
    scaled, plain = nn.Parameter(drawn(50)), nn.Parameter(drawn(50))
    first, second = Adam16([scaled], packed=True, seed=3), Adam16([plain], packed=True, seed=3)
    for step in range(5):
        scaled.grad, plain.grad = drawn(50, seed=step) * 2.0**20, drawn(50, seed=step)
        first.step(factors={scaled: 2.0**-20})
        second.step()
    assert torch.equal(scaled, plain)


def test_factors_that_only_a_device_knows_make_the_same_updates() -> None:
    """A factor of 0 changes nothing, even with a gradient that is not finite, and later updates draw the same noise."""
    skips = [(1, 0), (0, 1), (1, 1), (0, 0), (0, 0), (1, 1)]  # whether each of two scales' gradients are used

    def train(on_device: bool) -> list[dict[str, Tensor]]:
        parameters = [nn.Parameter(drawn(30).half()), nn.Parameter(drawn(40).bfloat16()), nn.Parameter(drawn(6))]
        groups = [{"params": parameters[:2], "packed": True, "weight_decay": 0.1}, {"params": parameters[2:]}]
        optimizer, seen = Adam16(groups, lr=1e-2, seed=5), []
        for step, used in enumerate(skips):
            factors: dict[Tensor, Tensor | float] = {}
            for i, parameter in enumerate(parameters):
                scale, use = 2.0**i, used[i % 2]
                parameter.grad = (drawn(*parameter.shape, seed=10 * step + i) * scale).to(parameter.dtype)
                parameter.grad[0] = parameter.grad[0] if use else math.nan
                factor = use / scale
                factors[parameter] = torch.tensor(factor, dtype=torch.float64) if on_device else factor
            optimizer.step(factors=factors)
            states = optimizer.state_dict()["state"]
            for i, parameter in enumerate(parameters):
                state = {"weights": parameter, **states.get(i, {"step": torch.tensor(0.0)})}
                seen.append({name: value.detach().clone() for name, value in state.items()})
        return seen

    known, found = train(on_device=False), train(on_device=True)
    for step, used in enumerate(skips):
        for i in range(3):
            ours, theirs = found[3 * step + i], known[3 * step + i]
            assert all(torch.equal(ours[name], value) for name, value in theirs.items())
            if step > 0:
                before = found[3 * (step - 1) + i]
                same = [torch.equal(ours[name], value) for name, value in before.items()]
                assert not any(same) if used[i % 2] else all(same)
    assert [int(each["step"]) for each in found[-3:]] == [3, 3, 3]


def test_a_restored_state_dict_continues_with_the_same_bytes() -> None:
    def gradients(step: int) -> list[Tensor]:
        return [drawn(30, seed=step).half(), drawn(6, seed=100 + step)]

    def build() -> tuple[list[nn.Parameter], Adam16]:
        parameters = [nn.Parameter(drawn(30).half()), nn.Parameter(drawn(6))]
        groups = [{"params": parameters[:1], "packed": True, "weight_decay": 0.1}, {"params": parameters[1:]}]
        return parameters, Adam16(groups, seed=5)

    def train(parameters: list[nn.Parameter], optimizer: Adam16, steps: range) -> None:
        for step in steps:
            for parameter, gradient in zip(parameters, gradients(step), strict=True):
                parameter.grad = gradient
            optimizer.step()

    straight, optimizer = build()
    train(straight, optimizer, range(10))
    first, optimizer = build()
    train(first, optimizer, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    second, other = build()
    for parameter, value in zip(second, first, strict=True):
        parameter.data.copy_(value.data)
    other.load_state_dict(saved)
    assert other.state[second[0]]["exp_avg"].dtype == torch.uint16
    train(second, other, range(4, 10))
    assert all(torch.equal(a, b) for a, b in zip(straight, second, strict=True))
    assert not torch.equal(straight[0], first[0])


def test_bytes_of_a_parameter() -> None:
    """Weight, gradient and moments take 8 bytes in 16 bit and 16 in 32 bit."""

    def bytes_of(parameter: nn.Parameter, packed: bool) -> float:
        parameter.grad = torch.ones_like(parameter)
        optimizer = Adam16([parameter], packed=packed)
        optimizer.step()
        moments = sum(state.nbytes for state in optimizer.state[parameter].values() if state.dim())
        return (parameter.nbytes + parameter.grad.nbytes + moments) / parameter.numel()

    assert bytes_of(nn.Parameter(torch.zeros(1000, dtype=torch.float16)), packed=True) == 8
    assert bytes_of(nn.Parameter(torch.zeros(1000)), packed=False) == 16


def test_parameters_without_gradient_and_their_moments_stay() -> None:
    still, moving = nn.Parameter(drawn(4)), nn.Parameter(drawn(4))
    optimizer = Adam16([still, moving])
    still.grad = moving.grad = torch.ones(4)
    optimizer.step()
    before, state = still.detach().clone(), {k: v.clone() for k, v in optimizer.state[still].items()}
    still.grad = None
    optimizer.step()
    assert torch.equal(still, before)
    assert all(torch.equal(optimizer.state[still][k], v) for k, v in state.items())
    assert optimizer.state[moving]["step"] == 2
    assert math.isfinite(moving.sum().item())

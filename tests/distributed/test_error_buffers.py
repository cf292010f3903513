"""What PowerSGD keeps between updates: 1-6-9 codes against the numbers they stand for, and drifts against sums."""

from __future__ import annotations

import pytest
import torch

import dalle_cli.distributed.error_buffers as kept_module
from dalle_cli.distributed.error_buffers import Kept
from dalle_cli.randomness import torch_generator

CPU = torch.device("cpu")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch_generator(0, "kept"))


def read(kept: Kept, key: str, *shape: int) -> torch.Tensor:
    found = kept.read(key, shape, CPU)
    assert found is not None
    return found


@pytest.mark.parametrize("on_host", [False, True])
def test_what_has_nine_bits_comes_back_as_it_was(on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of nine bits behind the leading one, from 2^-59 to just below 16, and zero."""
    monkeypatch.setattr(kept_module, "CHUNK", 7)
    values = torch.cat([torch.arange(-1023, 1024) / 64, torch.tensor([0.0, 2.0**-59, -(2.0**-30)])]).view(-1, 5)
    kept = Kept(on_host)
    for noise in (None, torch_generator(0, "noise")):
        kept.write("error.a", values, packed=True, noise=noise)
        assert torch.equal(read(kept, "error.a", *values.shape), values)
    (codes,) = kept.tensors().values()
    assert codes.dtype == torch.uint16
    assert codes.nbytes == 2 * values.numel()


def test_rounded_to_the_nearest_or_at_random_without_bias() -> None:
    values, kept = drawn(40, 50), Kept()
    step = 2.0 ** (values.abs().log2().floor() - 9)
    kept.write("q", values, packed=True)
    assert ((read(kept, "q", 40, 50) - values).abs() <= step / 2).all()
    total, times = torch.zeros(40, 50), 400
    for i in range(times):
        kept.write("e", values, packed=True, noise=torch_generator(0, i))
        off = read(kept, "e", 40, 50) - values
        assert (off.abs() < step).all()
        total += off
    # Each is off by less than a step; a mean of so many by their root less, at five standard deviations.
    assert ((total / times).abs() < 5 * 0.5 * step / times**0.5).all()


def test_what_is_less_than_half_a_step_adds_up_nevertheless() -> None:
    """An error feedback's drift: 1 and, time after time, an eighth of the distance to the next code."""
    start, less, times = torch.ones(2000), 2.0**-12, 400
    at_random, nearest = Kept(), Kept()
    for kept in (at_random, nearest):
        kept.write("e", start, packed=True)
    for i in range(times):
        at_random.write("e", read(at_random, "e", 2000) + less, packed=True, noise=torch_generator(0, "drift", i))
        nearest.write("e", read(nearest, "e", 2000) + less, packed=True)
    assert read(at_random, "e", 2000).mean() == pytest.approx(1 + times * less, rel=1e-3)
    assert torch.equal(read(nearest, "e", 2000), start)


def test_32_bit_are_kept_as_they_are() -> None:
    values, kept = drawn(3, 4), Kept()
    kept.write("e", values, packed=False)
    assert read(kept, "e", 3, 4) is values  # what is changed in it is changed in what is kept
    again = Kept(on_host=True)
    again.load(kept.tensors())
    assert torch.equal(read(again, "e", 3, 4), values)
    values.zero_()
    assert read(again, "e", 3, 4).abs().max() > 0
    with pytest.raises(ValueError, match=r"PowerSGD's e is \(3, 4\), its shard and rank make it \(4, 3\)"):
        kept.read("e", (4, 3), CPU)
    again.forget(["e", "other"])
    assert again.read("e", (3, 4), CPU) is None
    assert not again.tensors()


def test_a_state_of_another_kind_gives_way() -> None:
    kept = Kept()
    kept.load({"e": torch.ones(4)})
    kept.write("e", torch.full((4,), 2.0), packed=True)
    assert kept.tensors()["e"].dtype == torch.uint16
    assert torch.equal(read(kept, "e", 4), torch.full((4,), 2.0))

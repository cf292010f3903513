"""Error buffers: 1-6-9 codes against the numbers they stand for, and stochastic rounding against exact sums."""

from __future__ import annotations

import pytest
import torch

from dalle_cli.distributed import error_buffers
from dalle_cli.distributed.error_buffers import ErrorBuffers
from dalle_cli.randomness import torch_generator

CPU = torch.device("cpu")


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch_generator(0, "kept"))


def read(buffers: ErrorBuffers, key: str, *shape: int) -> torch.Tensor:
    found = buffers.read(key, shape, CPU)
    assert found is not None
    return found


@pytest.mark.parametrize("on_host", [False, True])
def test_numbers_of_nine_bits_are_stored_exactly(on_host: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers have nine bits behind the leading one, from 2^-59 to just below 16, or are zero."""
    monkeypatch.setattr(error_buffers, "CHUNK", 7)
    values = torch.cat([torch.arange(-1023, 1024) / 64, torch.tensor([0.0, 2.0**-59, -(2.0**-30)])]).view(-1, 5)
    buffers = ErrorBuffers(on_host)
    for noise in (None, torch_generator(0, "noise")):
        buffers.write("error.a", values, packed=True, noise=noise)
        assert torch.equal(read(buffers, "error.a", *values.shape), values)
    (codes,) = buffers.state_dict().values()
    assert codes.dtype == torch.uint16
    assert codes.nbytes == 2 * values.numel()


def test_rounding_is_to_nearest_or_stochastic_without_bias() -> None:
    values, buffers = drawn(40, 50), ErrorBuffers()
    step = 2.0 ** (values.abs().log2().floor() - 9)
    buffers.write("q", values, packed=True)
    assert ((read(buffers, "q", 40, 50) - values).abs() <= step / 2).all()
    total, times = torch.zeros(40, 50), 400
    for i in range(times):
        buffers.write("e", values, packed=True, noise=torch_generator(0, i))
        off = read(buffers, "e", 40, 50) - values
        assert (off.abs() < step).all()
        total += off
    # Each error is below a step, and that of the mean smaller by the root of their number; five standard deviations.
    assert ((total / times).abs() < 5 * 0.5 * step / times**0.5).all()


def test_small_changes_add_up_with_stochastic_rounding() -> None:
    """To 1, an eighth of the distance to the next code is added many times."""
    start, less, times = torch.ones(2000), 2.0**-12, 400
    at_random, nearest = ErrorBuffers(), ErrorBuffers()
    for buffers in (at_random, nearest):
        buffers.write("e", start, packed=True)
    for i in range(times):
        at_random.write("e", read(at_random, "e", 2000) + less, packed=True, noise=torch_generator(0, "drift", i))
        nearest.write("e", read(nearest, "e", 2000) + less, packed=True)
    assert read(at_random, "e", 2000).mean() == pytest.approx(1 + times * less, rel=1e-3)
    assert torch.equal(read(nearest, "e", 2000), start)


def test_32_bit_tensors_are_stored_without_a_copy() -> None:
    values, buffers = drawn(3, 4), ErrorBuffers()
    buffers.write("e", values, packed=False)
    assert read(buffers, "e", 3, 4) is values  # what is changed in it is changed in what is buffers
    again = ErrorBuffers(on_host=True)
    again.load_state_dict(buffers.state_dict())
    assert torch.equal(read(again, "e", 3, 4), values)
    values.zero_()
    assert read(again, "e", 3, 4).abs().max() > 0
    with pytest.raises(ValueError, match=r"PowerSGD's e is \(3, 4\), its shard and rank make it \(4, 3\)"):
        buffers.read("e", (4, 3), CPU)
    again.clear(["e", "other"])
    assert again.read("e", (3, 4), CPU) is None
    assert not again.state_dict()


def test_a_loaded_tensor_of_another_type_is_replaced() -> None:
    buffers = ErrorBuffers()
    buffers.load_state_dict({"e": torch.ones(4)})
    buffers.write("e", torch.full((4,), 2.0), packed=True)
    assert buffers.state_dict()["e"].dtype == torch.uint16
    assert torch.equal(read(buffers, "e", 4), torch.full((4,), 2.0))

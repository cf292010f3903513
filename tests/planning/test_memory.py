"""Tests of the memory of the training state, against sizes counted by hand."""

from __future__ import annotations

from helpers.prior_recipes import tiny_prior

from dalle_cli.config.schema import Recipe
from dalle_cli.planning.fit import check_fit
from dalle_cli.planning.memory import Machines, StatePart, training_state
from dalle_cli.prior.counts import count_parameters


def sizes(recipe: Recipe, gpus: int = 4) -> dict[str, tuple[int, str]]:
    found = training_state(recipe.prior, count_parameters(recipe), Machines(gpus, 1, 0))
    return {name: (part.each, part.place) for name, part in found.items()}


def test_bytes_under_each_stage_of_zero() -> None:
    """Count the parameters of D = 16 and 2 layers by hand.

    Matrices have 12 * 256 * 2 = 6144, gains and biases of the resblocks 13 * 16 * 2 = 416, and all else (408 + 8 + 64 +
    4 + 4) * 16 + 2 * 16 + 17 * (401 + 64) = 15,745 parameters. In mixed precision these are 6144 * 2 = 12,288 bytes,
    416 * 4 = 1664 bytes that every rank holds, and 62,980 bytes.
    """
    alone, four = 12_288 + 1664 + 62_980, 1664 + (12_288 + 62_980) // 4
    ema = 4 * (6144 + 416 + 15_745)
    ema_of_four = 1664 + (4 * (6144 + 15_745)) // 4
    whole = {"weights": alone, "gradients": alone, "moments": 2 * alone, "EMA weights": ema}
    split = {"weights": four, "gradients": four, "moments": 2 * four, "EMA weights": ema_of_four}
    bf16 = {"prior__precision": "bf16"}
    assert sizes(tiny_prior(**bf16)) == {name: (size, "device") for name, size in whole.items()}
    for zero in (1, 2, 3):
        found = sizes(tiny_prior(**bf16, prior__sharding__zero=zero))
        assert found == {name: (size, "device") for name, size in split.items()}
        assert sizes(tiny_prior(**bf16, prior__sharding__zero=zero), gpus=1) == sizes(tiny_prior(**bf16))
    offloaded = sizes(tiny_prior(**bf16, prior__sharding__zero=3, prior__sharding__offload="cpu"))
    assert offloaded == {name: (size, "cpu") for name, size in split.items()}
    in_32 = 4 * (6144 + 416 + 15_745)
    assert sizes(tiny_prior()) == {
        "weights": (in_32, "device"),
        "gradients": (in_32, "device"),
        "moments": (2 * in_32, "device"),
        "EMA weights": (in_32, "device"),
    }
    assert StatePart(0, 10, shards=4).each == 3  # rounded up


def test_bytes_under_deepspeed() -> None:
    """All is in 32 bit: 4 * 22,305 = 89,220 bytes for the weights; see above for the number of parameters."""
    whole, quarter = 89_220, 22_305

    def by_deepspeed(zero: int, offload: str, gpus: int, **more: int) -> dict[str, tuple[int, str]]:
        sharding = {"engine": "deepspeed", "zero": zero, "offload": offload, "nvme_path": "/disk"}
        settings = {f"prior__sharding__{key}": value for key, value in sharding.items()}
        settings |= {f"prior__{key}": value for key, value in more.items()}
        found = sizes(tiny_prior(**settings, prior__precision="bf16"), gpus)
        assert found.pop("bucket of gradients") == (whole, "device")
        return found

    summed = {"training__micro_batch": 4}
    assert by_deepspeed(2, "cpu", 1, **summed) == {
        **by_deepspeed(2, "cpu", gpus=1),
        "gradients to update with": (whole, "cpu"),
    }
    assert by_deepspeed(2, "cpu", gpus=1) == {
        "weights": (whole, "cpu"),
        "weights to compute with": (whole, "device"),
        "gradients": (whole, "cpu"),
        "moments": (2 * whole, "cpu"),
        "EMA weights": (whole, "cpu"),
    }
    assert by_deepspeed(3, "none", gpus=4) == {
        "weights": (quarter, "device"),
        "weights to compute with": (quarter, "device"),
        "gradients": (quarter, "device"),
        "moments": (2 * quarter, "device"),
        "EMA weights": (quarter, "device"),
    }
    assert by_deepspeed(1, "none", gpus=4) == {
        "weights": (quarter, "device"),
        "weights to compute with": (whole, "device"),
        "gradients": (whole, "device"),
        "moments": (2 * quarter, "device"),
        "EMA weights": (quarter, "device"),
    }
    on_host = by_deepspeed(3, "cpu", gpus=4)
    assert {place for _, place in on_host.values()} == {"cpu"}
    assert sum(size for size, _ in on_host.values()) == 7 * quarter
    on_disk = by_deepspeed(3, "nvme", gpus=4)
    # Four of the larger group's parts.
    assert on_disk.pop("buffers of the disk") == (4 * 4 * ((15_745 + 416) // 4), "cpu")
    for name in ("EMA weights", "gradients", "weights to compute with"):
        assert on_disk.pop(name) == (quarter, "cpu")
    assert {place for _, place in on_disk.values()} == {"nvme"}
    assert sum(size for size, _ in on_disk.values()) == 4 * quarter


def test_bytes_of_powersgd() -> None:
    """Rank 8 over 4 shards is rank 2 per shard; right factors have (16 + 16 + 16 + 16) * 2 values a layer."""
    recipe = tiny_prior(prior__sharding__zero=3, prior__powersgd__rank=8)
    counts = count_parameters(recipe)
    parts = training_state(recipe.prior, counts, Machines(4, 2, 0))
    assert parts["PowerSGD error buffers"].each == 4 * 12 * 256 * 2 // 4
    assert parts["PowerSGD factors"].each == 4 * 64 * 2 * 2
    assert "PowerSGD error buffers" not in training_state(recipe.prior, counts, Machines(4, 1, 0))


def test_state_on_the_host_takes_no_memory_of_the_gpu() -> None:
    """EMA weights that are updated rarely, and PowerSGD's state, can be on the host; without GPUs nothing moves."""
    settings = {"prior__sharding__zero": 3, "prior__powersgd__rank": 8, "prior__precision": "fp16"}
    on_gpu = tiny_prior(**settings)
    on_host = tiny_prior(**settings, prior__training__ema_every=2, prior__powersgd__offload="cpu")
    counts, machines = count_parameters(on_gpu), Machines(4, 2, 10**9)
    parts, moved = (training_state(recipe.prior, counts, machines) for recipe in (on_gpu, on_host))
    names = {"EMA weights", "PowerSGD error buffers", "PowerSGD factors"}
    assert {name for name, part in moved.items() if part.place == "cpu"} == names
    assert {part.place for part in parts.values()} == {"device"}
    assert {name: part.each for name, part in moved.items()} == {name: part.each for name, part in parts.items()}
    saved = check_fit(on_gpu, counts, machines).peak - check_fit(on_host, counts, machines).peak
    assert saved == sum(parts[name].each for name in names)
    # Half of the bytes in 32 bit.
    assert parts["PowerSGD error buffers"].each == 2 * 12 * 256 * 2 // 4
    on_cpu = training_state(on_host.prior, counts, Machines(4, 2, 10**9, on_cpu=True))
    assert {part.place for part in on_cpu.values()} == {"device"}

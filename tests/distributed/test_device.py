"""Devices: choosing one changes nothing, preparing keeps memory; the matmul library is chosen by the processor."""

from __future__ import annotations

import platform
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from helpers.running import ENVIRONMENT

from dalle_cli.config.schema import Recipe
from dalle_cli.distributed import device
from dalle_cli.distributed.device import explain_out_of_memory, fast_matmul, matmul_library
from dalle_cli.distributed.group import join_group
from dalle_cli.errors import UserError

AMD = {"cpu_name": "AMD EPYC", "avx512_f": True, "amx_tile": False}


@pytest.fixture
def _settings_restored() -> object:
    before = torch.backends.mkldnn.matmul.fp32_precision
    yield
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.usefixtures("_settings_restored")
def test_fast_products_are_not_rounded() -> None:
    a, b = (torch.randn(256, 256, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    exact = a.double() @ b.double()
    with fast_matmul() as library:
        assert library in ("MKL", "oneDNN")
        assert (a @ b - exact).abs().max() < 1e-6 * 256
        assert (torch.bmm(a[None], b[None])[0] - exact).abs().max() < 1e-6 * 256


@pytest.mark.usefixtures("_settings_restored")
@pytest.mark.parametrize("other", [{"cpu_name": "Intel Xeon"}, {"avx512_f": False}, {"amx_tile": True}])
def test_other_processors_keep_the_default(monkeypatch: pytest.MonkeyPatch, other: dict[str, object]) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD | other)
    assert matmul_library() == "MKL"
    with fast_matmul() as library:
        assert library == "MKL"


@pytest.mark.usefixtures("_settings_restored")
def test_asking_for_the_library_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
    assert matmul_library() == "oneDNN"


@pytest.mark.usefixtures("_settings_restored")
def test_a_product_that_rounds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
    monkeypatch.setattr(device, "rounds_to_bfloat16", lambda: True)
    with fast_matmul() as library:
        assert library == "MKL"


def test_rounding_is_detected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not device.rounds_to_bfloat16()
    real = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: real(a.bfloat16().float(), b.bfloat16().float()))
    assert device.rounds_to_bfloat16()


@pytest.mark.usefixtures("_settings_restored")
def test_the_setting_is_restored_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: AMD)
    with pytest.raises(KeyError), fast_matmul():
        raise KeyError


# Which device


def test_a_job_that_was_given_gpus_does_not_start_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    assert device.choose_device() == torch.device("cpu")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "2")
    with pytest.raises(UserError, match=r"SLURM_GPUS_ON_NODE 2: .* finds none on"):
        device.choose_device()


def test_a_driver_that_torch_cannot_use_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    monkeypatch.setattr(device, "_NVIDIA_DRIVER", tmp_path / "version")
    device._warn_of_driver.cache_clear()
    device.choose_device()
    assert capsys.readouterr().err == ""
    (tmp_path / "version").touch()
    assert device.choose_device() == device.choose_device() == torch.device("cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no GPU is used: this machine has an NVIDIA driver")
    assert "install a torch for the driver's version of CUDA" in line


def test_the_recipe_or_the_environment_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    monkeypatch.delenv("DALLE_DEVICE", raising=False)
    for cuda, mps, wanted in ((True, True, "cuda:0"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=cuda: found)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda found=mps: found)
        assert str(device.choose_device()) == wanted
        assert str(device.choose_device("cpu")) == "cpu"
        monkeypatch.setenv("DALLE_DEVICE", "cpu")
        assert str(device.choose_device()) == "cpu"
        if mps:
            assert str(device.choose_device("mps")) == "mps"  # the recipe's word counts for more
        monkeypatch.delenv("DALLE_DEVICE")
    with pytest.raises(UserError, match=r"^device: torch .* finds no GPU of Apple's here; set it to auto"):
        device.choose_device("mps")
    monkeypatch.setenv("DALLE_DEVICE", "cuda")
    with pytest.raises(UserError, match=r"^DALLE_DEVICE: torch .* finds no GPU by CUDA on .*; set it to auto"):
        device.choose_device()
    monkeypatch.setenv("DALLE_DEVICE", "gpu")
    with pytest.raises(UserError, match=r"^DALLE_DEVICE: is 'gpu'; set it to one of auto, cuda, mps, cpu"):
        device.choose_device()


def test_what_apples_gpus_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    mps = torch.device("mps")
    for precision in ("bf16", "fp16"):
        with pytest.raises(UserError, match=rf"dvae\.precision: {precision} is not for Apple's GPUs yet; set fp32"):
            device.require_precision("dvae.precision", precision, mps)
    device.require_precision("dvae.precision", "fp32", mps)
    assert device.device_for_doubles(mps) == torch.device("cpu")
    assert device.device_for_doubles(torch.device("cuda", 1)) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="device: 2 processes cannot share Apple's GPU"), join_group("mps"):
        pass


def test_a_card_without_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    for supported in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, found=supported: found)
        refusal = pytest.raises(UserError, match=r"prior\.precision: Tesla V100 cannot compute in bf16")
        with nullcontext() if supported else refusal:
            device.require_precision("prior.precision", "bf16", gpu)
        device.require_precision("prior.precision", "fp16", gpu)


@pytest.mark.parametrize("kind", ["cuda", "mps"])
def test_int8_is_for_cpus(kind: str) -> None:
    with pytest.raises(UserError, match=r"sampling\.precision: int8 is for CPUs; set bf16 or fp32"):
        device.require_precision("sampling.precision", "int8", torch.device(kind))
    device.require_precision("sampling.precision", "int8", torch.device("cpu"))


@pytest.mark.usefixtures("_settings_restored")
def test_tf32_is_a_setting() -> None:
    for wanted in (True, False):
        device.use_settings(Recipe(tf32=wanted))
        precisions = {torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision}
        assert precisions == {"tf32" if wanted else "ieee"}


# The allocator

PROGRAM = """
import resource, sys, torch
from dalle_cli.distributed.device import choose_device, prepare_process
torch.cuda.is_available = lambda: False
device = choose_device()
assert device == torch.device("cpu")
if sys.argv[1] == "prepared":
    prepare_process(device)
def work():
    x = torch.ones(12_000_000)  # 48 MB
    return float((x + 1).relu_()[7])
for _ in range(5):
    work()
def mapped():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()
print(sorted(mapped() for _ in range(11))[5])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left alone")
def test_a_prepared_process_reuses_freed_memory() -> None:
    def fresh_bytes(how: str) -> int:
        """Return the bytes that the system maps for a round of two tensors of 48 MB, the median of eleven."""
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, how], env=ENVIRONMENT, capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert fresh_bytes("prepared") < 5_000_000 < 90_000_000 < fresh_bytes("chosen")


# Memory


def test_other_errors_are_not_taken_for_a_full_gpu(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="another"), explain_out_of_memory(tmp_path, "lower it"):
        raise RuntimeError("another")

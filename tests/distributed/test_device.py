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
    device.choose_device()
    assert capsys.readouterr().err == ""
    (tmp_path / "version").touch()
    assert device.choose_device() == torch.device("cpu")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("no GPU is used: this machine has an NVIDIA driver")
    assert "install a torch for the driver's version of CUDA" in line


def test_a_card_without_bf16_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    for supported in (False, True):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, found=supported: found)
        refusal = pytest.raises(UserError, match=r"prior\.precision: Tesla V100 cannot compute in bf16")
        with nullcontext() if supported else refusal:
            device.require_precision("prior.precision", "bf16", gpu)
        device.require_precision("prior.precision", "fp16", gpu)


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

"""The memory that sampling takes: estimates against measured peaks, and that more samples take no more."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.running import DALLE, ENVIRONMENT
from helpers.untrained import make_untrained

from dalle_cli.config.load import load_recipe
from dalle_cli.sampling.batch_size import MEMORY_SHARE, MemoryNeed, cgroup_headroom, free_memory

QUICKSTART = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"

PEAK = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from dalle_cli.dvae.encode import decode_tokens
from dalle_cli.dvae.model import DVAE
from dalle_cli.prior.decode import Decoder
from dalle_cli.prior.model import Prior
from dalle_cli.config.schema import DvaeModel, PriorModel, SamplingSettings
from dalle_cli.sampling.draw import sample_images
from dalle_cli.sampling.batch_size import sampling_need

what, layout, samples, guided = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "guided"

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in status if "VmHWM" in line))

def draw(count):
    ids = torch.arange(16)[None]
    settings = SamplingSettings(guidance=2.0 if guided else 1.0)
    sample_images(decoder, ids, torch.rand(1, count, 64, dtype=torch.float64), settings, empty=ids[0])

def decode(count):
    decode_tokens(dvae, torch.zeros(count, 8, 8, dtype=torch.long), 0.1)

with torch.inference_mode():
    prior = Prior(PriorModel(layers=8, heads=4, d_head=64, d_model=256, grid=8, layout=layout), 16, 32, 2048)
    decoder, dvae = Decoder(prior), DVAE(DvaeModel(n_hid=48, n_init=16, codebook_size=2048)).eval()
    dvae.to(memory_format=torch.channels_last)
    run = {"draw": draw, "decode": decode}[what]
    run(1)
    before = peak()
    run(samples)
need = sampling_need(decoder, dvae, guided)
told = replace(need, picture=0).peak(samples, samples) if what == "draw" else need.picture * samples
print(peak() - before, told)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("what", "layout", "samples", "guided"),
    [
        ("draw", "full ...", 128, ""),
        ("draw", "row ...", 256, ""),
        ("draw", "paper", 128, "guided"),
        ("decode", "paper", 64, ""),
    ],
)
def test_the_estimate_is_near_what_is_taken(what: str, layout: str, samples: int, guided: str) -> None:
    command = [sys.executable, "-c", PEAK, what, layout, str(samples), guided]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT)
    taken, told = map(int, done.stdout.split())
    assert taken > 40 * 2**20  # the run is large enough to measure
    assert told / 2 < taken < told * 1.25


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="a child's peak memory is read with wait4")
def test_512_samples_of_a_caption_take_no_more_memory_than_64(tmp_path: Path) -> None:
    recipe = load_recipe(QUICKSTART, [f"run={tmp_path}", "threads=1"])
    places = make_untrained(recipe, tmp_path)

    def peak(n: int) -> int:
        """Return the peak memory of the command, in bytes, in a process of its own."""
        command = [DALLE, "sample", places.prior, "a small red star", "--n", str(n)]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=ENVIRONMENT)
        _, status, usage = os.wait4(child.pid, 0)
        assert child.stderr is not None
        assert status == 0, child.stderr.read()
        assert len(list(places.samples.glob("*/*.png"))) >= n
        return usage.ru_maxrss * 1024

    fewer = peak(64)
    # Two runs of the same command differ by some 3 %.
    assert peak(512) - fewer < 0.05 * fewer


def test_a_power_of_two_that_fits() -> None:
    sizes = {"cache": 100, "step": 20, "draw": 30, "text": 1000, "prefill": 500, "captions_prefilled": 4}
    sizes |= {"picture": 10, "pictures_decoded": 8}
    need = MemoryNeed(**sizes, sequences=1)
    assert need.peak(8, 8) == 1000 + 8 * 130
    assert need.peak(8, 4) == 2 * 1000 + 8 * 130
    assert need.peak(1, 512) == 1000 + 500  # reading the caption takes more than one sample
    for free in (1, 10**4, 10**5, 10**6, 10**9, None):
        for most in (1, 64, 100, 512):
            found = need.fitting_samples(free, 512, most)
            assert found & (found - 1) == 0
            assert 1 <= found <= most
            if free is not None and found > 1:
                assert need.peak(found, 512) <= MEMORY_SHARE * free
            if free is not None and 2 * found <= most:
                assert need.peak(2 * found, 512) > MEMORY_SHARE * free
            if free is None:
                assert 2 * found > most
    guided = MemoryNeed(**sizes, sequences=2)
    assert guided.peak(8, 8) == 2 * need.peak(8, 8)
    pictures = MemoryNeed(1, 1, 1, 1, 1, 1, picture=10**6, pictures_decoded=8, sequences=1)
    assert pictures.peak(64, 64) == pictures.peak(8, 64) == 8 * 10**6


def test_free_memory_of_this_machine() -> None:
    found = free_memory(torch.device("cpu"))
    assert found is None or 2**20 < found < 2**50


def test_limits_of_control_groups(tmp_path: Path) -> None:
    def group(path: Path, files: dict[str, str]) -> None:
        path.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (path / name).write_text(content)

    mounted, memberships = tmp_path / "cgroup", tmp_path / "self"
    stat = "anon 5\ninactive_file 30\n"
    group(mounted / "job_1" / "step_0", {"memory.max": "max\n", "memory.current": "7\n", "memory.stat": stat})
    group(mounted / "job_1", {"memory.max": "1000\n", "memory.current": "400\n", "memory.stat": stat})
    group(mounted / "memory" / "box", {
        "memory.limit_in_bytes": "100\n", "memory.usage_in_bytes": "150\n", "memory.stat": "total_inactive_file 10\n",
    })  # fmt: skip
    memberships.write_text("0::/job_1/step_0\n")
    assert list(cgroup_headroom(memberships, mounted)) == [630]
    memberships.write_text("4:memory:/box\n3:cpuset:/\n0::/\n")
    assert list(cgroup_headroom(memberships, mounted)) == [0]
    assert list(cgroup_headroom(tmp_path / "none", mounted)) == []

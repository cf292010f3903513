"""Tests of planned peaks against the allocator's peaks in real training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import planned_peaks
from helpers.peak_memory import peak_bytes
from helpers.prior_recipes import sized_prior
from helpers.processes import free_ports, outputs_of
from helpers.running import ENVIRONMENT
from helpers.token_stores import write_tokens

from dalle_cli.config.schema import Recipe
from dalle_cli.planning import peaks
from dalle_cli.planning.activations import Activations
from dalle_cli.planning.fit import check_fit
from dalle_cli.planning.memory import Machines
from dalle_cli.planning.peaks import phase_peaks
from dalle_cli.prior import attention
from dalle_cli.prior.counts import count_parameters
from dalle_cli.prior.train import train_prior

TESTS = Path(__file__).parents[1]
ALONE = Machines(1, 1, 0, on_cpu=True)
SIZES = {"square": (3, 4, 32, 8, 16, 16), "wide": (2, 4, 64, 4, 32, 8), "long": (3, 2, 32, 16, 48, 4)}
"""Layers, heads, d_head, grid, text positions and batch size of three priors."""


def measured_and_planned(folder: Path, recipe: Recipe, on_cpu: bool = True) -> tuple[int, int]:
    model = recipe.prior.model
    store = write_tokens(folder / "t.zarr", 80, recipe.tokenizer.text_length, 400, model.grid, 64)
    measured = peak_bytes(lambda: train_prior(recipe, store, folder / "run"))
    return measured, check_fit(recipe, count_parameters(recipe), Machines(1, 1, 0, on_cpu)).peak


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES)
def test_planned_peak_is_the_measured_one(size: str, precision: str, checkpointed: bool, tmp_path: Path) -> None:
    settings = {"prior__precision": precision, "prior__model__checkpoint_resblocks": checkpointed}
    measured, planned = measured_and_planned(tmp_path, sized_prior(*SIZES[size], **settings))
    assert planned == pytest.approx(measured, rel=0.1)


def test_planned_peak_of_micro_batches(tmp_path: Path) -> None:
    recipe = sized_prior(*SIZES["square"], prior__training__micro_batch=4, prior__precision="bf16")
    measured, planned = measured_and_planned(tmp_path, recipe)
    assert planned == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("phase", "recipe"),
    [
        ("update", sized_prior(1, 8, 32, 4, 8, 2, prior__precision="bf16")),
        ("validation", sized_prior(2, 4, 32, 8, 16, 1, data__holdout=0.9)),
    ],
    ids=["update", "validation"],
)
def test_planned_peak_of_other_phases(phase: str, recipe: Recipe, tmp_path: Path) -> None:
    assert check_fit(recipe, count_parameters(recipe), ALONE).peak_phase == phase
    measured, planned = measured_and_planned(tmp_path, recipe)
    assert planned == pytest.approx(measured, rel=0.1)


def test_attention_without_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = sized_prior(2, 4, 8, 16, 64, 16)
    monkeypatch.setattr(attention, "CHUNK", 2**62)
    measured, planned = measured_and_planned(tmp_path, recipe)
    assert planned == pytest.approx(measured, rel=0.1)


def test_a_gpu_stores_no_attention_weights() -> None:
    """flex_attention stores what dense attention stores, and its column attention a copy in another order besides."""
    of = {
        layout: Activations(sized_prior(2, 4, 8, 32, 64, 16, prior__model__layout=layout), 16, on_cpu=False).resblocks()
        for layout in ("row ...", "column ...", "conv ...", "full ...")
    }
    assert of["row ..."] == of["conv ..."] == of["full ..."]
    assert of["column ..."][0].saved > of["row ..."][0].saved
    assert of["column ..."][0].forward > of["row ..."][0].forward
    on_cpu = Activations(sized_prior(2, 4, 8, 32, 64, 16, prior__model__layout="row ..."), 16, on_cpu=True).resblocks()
    assert of["row ..."][0].saved < on_cpu[0].saved


def test_replicas_keep_their_gradients() -> None:
    """DistributedDataParallel holds gradients in buckets, which stay through the passes of the next update."""
    one, both = sized_prior(2, 4, 32, 8, 64, 8), sized_prior(2, 4, 32, 8, 64, 16)
    counts = count_parameters(one)
    alone = check_fit(one, counts, ALONE).phases["forward and backward pass"]
    two = check_fit(both, counts, Machines(2, 1, 0, on_cpu=True)).phases["forward and backward pass"]
    assert 0 < two - alone <= 4 * counts.total


def test_two_machines_with_powersgd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines of one rank each: the update takes the most, because of PowerSGD's sums and factors."""
    shards = {"prior__sharding__zero": 3, "prior__sharding__node_size": 1, "prior__powersgd__rank": 64}
    recipes = [sized_prior(2, 8, 32, 4, 8, 2, **shards, prior__precision=precision) for precision in ("fp16", "fp32")]
    store, (port, _) = write_tokens(tmp_path / "t.zarr", 80, 8, 400, 4, 64), free_ports(2)
    argument = json.dumps([recipe.model_dump(mode="json") for recipe in recipes])
    processes = []
    for rank in range(2):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}}
        command = [sys.executable, "-m", "helpers.planned_peaks", argument, str(store), str(tmp_path / "run")]
        processes.append(subprocess.Popen(command, cwd=TESTS, env=environment, stdout=subprocess.PIPE, text=True))
    measured = [json.loads(out.splitlines()[-1]) for out, _ in outputs_of(processes, 600)]
    monkeypatch.setattr(peaks, "ADAM_CHUNK", planned_peaks.CHUNK)
    monkeypatch.setattr(peaks, "ERROR_CHUNK", planned_peaks.CHUNK)
    for i, recipe in enumerate(recipes):
        planned = check_fit(recipe, count_parameters(recipe), Machines(1, 2, 0, on_cpu=True))
        assert planned.peak_phase == "update"
        for of_rank in measured:
            assert planned.peak == pytest.approx(of_rank[i], rel=0.1)


DEEPSPEED: dict[str, tuple[int, str, dict[str, int]]] = {
    "zero 2, offloaded": (2, "cpu", {}),
    "zero 2, offloaded, micro-batches": (2, "cpu", {"prior__training__micro_batch": 1}),
    "zero 3": (3, "none", {}),
    "zero 3, offloaded": (3, "cpu", {}),
}
"""ZeRO stage, place to offload to and other settings."""


@pytest.fixture(scope="module")
def by_deepspeed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, int]]:
    """The measured and planned peaks of one process: of its own memory, and of what it offloads to host memory."""
    if sys.platform != "linux":
        pytest.skip("DeepSpeed is for Linux")
    folder, recipes = tmp_path_factory.mktemp("deepspeed"), {}
    for name, (zero, offload, more) in DEEPSPEED.items():
        sharding = {"engine": "deepspeed", "zero": zero, "offload": offload}
        settings = {f"prior__sharding__{key}": value for key, value in sharding.items()}
        recipes[name] = sized_prior(4, 8, 32, 4, 8, 2, **settings, **more)
    store = write_tokens(folder / "t.zarr", 80, 8, 400, 4, 64)
    argument = json.dumps([recipe.model_dump(mode="json") for recipe in recipes.values()])
    command = [sys.executable, "-m", "helpers.planned_peaks", argument, str(store), str(folder / "run")]
    environment = {**ENVIRONMENT, "MASTER_PORT": "1"}  # one process needs no port
    done = subprocess.run(command, cwd=TESTS, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    planned = [check_fit(recipe, count_parameters(recipe), ALONE) for recipe in recipes.values()]
    measured = json.loads(done.stdout.splitlines()[-1])
    return {name: (peak, fit.peak + fit.on_host) for name, peak, fit in zip(recipes, measured, planned, strict=True)}


@pytest.mark.parametrize("case", DEEPSPEED)
def test_planned_peak_under_deepspeed(case: str, by_deepspeed: dict[str, tuple[int, int]]) -> None:
    measured, planned = by_deepspeed[case]
    assert planned == pytest.approx(measured, rel=0.1)


def test_gathered_weights_and_gradients_by_stage_of_zero() -> None:
    """Stage 3 holds fewer whole weights than 1 and 2; stage 1 holds whole gradients over several micro-batches."""
    recipes = {zero: sized_prior(8, 4, 32, 4, 8, 16, prior__sharding__zero=zero) for zero in (1, 2, 3)}
    counts, machines = count_parameters(recipes[1]), Machines(4, 1, 0)
    once = {
        zero: phase_peaks(recipe, counts, machines, 1, accumulates=False).passes for zero, recipe in recipes.items()
    }
    more = {zero: phase_peaks(recipe, counts, machines, 1, accumulates=True).passes for zero, recipe in recipes.items()}
    matrices = 4 * counts.effective
    assert once[1] == once[2]
    assert once[3] < once[2] - matrices // 2
    gradients = matrices + 4 * (counts.other - counts.small)
    assert more[1] - more[2] == gradients - gradients // 4

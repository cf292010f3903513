"""dalle plan, the start that refuses what cannot fit, and the dry run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import planned_peaks
from helpers.peak_memory import peak_bytes
from helpers.processes import free_ports
from helpers.running import ENVIRONMENT
from helpers.token_stores import write_tokens
from typer.testing import CliRunner

import dalle_cli.planning.fits_here as this_machine
import dalle_cli.planning.peaks as peaks_module
import dalle_cli.prior.attention as attention
from dalle_cli.app import app
from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Recipe
from dalle_cli.errors import UserError
from dalle_cli.planning.cost import Assumptions, saving
from dalle_cli.planning.memory import Held, Machines, held
from dalle_cli.planning.peaks import peaks
from dalle_cli.planning.plan import fit, mend, plan, would_fit
from dalle_cli.planning.traffic import between_machines, compression_table
from dalle_cli.planning.units import parse_bytes, parse_rate
from dalle_cli.prior.counts import count_flops, count_parameters
from dalle_cli.prior.model import build_prior
from dalle_cli.prior.train import train_prior
from dalle_cli.stores.held_out import split_holdout
from dalle_cli.training.throughput import training_flops

RECIPES = Path(__file__).parents[2] / "recipes"
LARGE = [RECIPES / f"{name}.yaml" for name in ("1b", "2.8b", "5.6b", "12b")]
GB = 10**9
ALONE = Machines(1, 1, 0, on_cpu=True)


def tiny(**changes: Any) -> Recipe:
    """Two layers of d = 16, T = 8 and S = 16 positions; ``changes`` by dotted key, with __ for the dot."""
    values = Recipe().model_dump()
    settings = {
        "image_size": 32, "threads": 1, "tokenizer.vocab_size": 400, "tokenizer.text_length": 8,
        "dvae.model.codebook_size": 64, "prior.model.layers": 2, "prior.model.heads": 2, "prior.model.d_head": 8,
        "prior.model.d_model": 16, "prior.model.grid": 4, "prior.training.batch_size": 16, "prior.training.updates": 2,
    } | {key.replace("__", "."): value for key, value in changes.items()}  # fmt: skip
    for key, value in settings.items():
        block = values
        *path, name = key.split(".")
        for part in path:
            block = block[part]
        block[name] = value
    return Recipe.model_validate(values)


def sized(layers: int, heads: int, d_head: int, grid: int, text: int, batch: int, **changes: Any) -> Recipe:
    sizes = {
        "prior__model__layers": layers, "prior__model__heads": heads, "prior__model__d_head": d_head,
        "prior__model__d_model": heads * d_head, "prior__model__grid": grid, "image_size": 8 * grid,
        "tokenizer__text_length": text, "prior__training__batch_size": batch,
    }  # fmt: skip
    return tiny(**sizes, **changes)


# Parameters


@pytest.mark.parametrize("file", LARGE, ids=lambda file: file.stem)
def test_parameters_are_those_of_the_model_and_of_the_closed_form(file: Path) -> None:
    recipe = load_recipe(file)
    counts, model = count_parameters(recipe), recipe.prior.model
    with torch.device("meta"):
        prior = build_prior(recipe)
    assert counts.total == sum(p.numel() for p in prior.parameters())
    assert counts.effective == 12 * model.d_model**2 * model.layers
    # Gain and bias of two norms, biases of 3d, d, 4d and d.
    assert counts.small == 13 * model.d_model * model.layers


# What each process holds


def hand(recipe: Recipe, gpus: int = 4) -> dict[str, tuple[int, str]]:
    found = held(recipe.prior, count_parameters(recipe), Machines(gpus, 1, 0))
    return {name: (part.each, part.place) for name, part in found.items()}


def test_bytes_of_the_zero_stages_by_hand() -> None:
    """D = 16, 2 layers: 12 * 256 * 2 = 6144 in matrices, 13 * 16 * 2 = 416 in gains and biases; outside of resblocks
    (408 + 8 + 64 + 4 + 4) * 16 + 2 * 16 + 17 * (401 + 64) = 15,745. In 16 bit 6144 * 2 = 12,288 bytes, in 32 bit
    416 * 4 = 1664 whole on each process and 62,980.
    """
    alone, four = 12_288 + 1664 + 62_980, 1664 + (12_288 + 62_980) // 4
    average = 4 * (6144 + 416 + 15_745)
    average_of_four = 1664 + (4 * (6144 + 15_745)) // 4
    whole = {"weights": alone, "gradients": alone, "moments": 2 * alone, "average": average}
    split = {"weights": four, "gradients": four, "moments": 2 * four, "average": average_of_four}
    bf16 = {"prior__precision": "bf16"}
    assert hand(tiny(**bf16)) == {name: (size, "device") for name, size in whole.items()}
    for zero in (1, 2, 3):
        found = hand(tiny(**bf16, prior__sharding__zero=zero))
        assert found == {name: (size, "device") for name, size in split.items()}
        assert hand(tiny(**bf16, prior__sharding__zero=zero), gpus=1) == hand(tiny(**bf16))
    offloaded = hand(tiny(**bf16, prior__sharding__zero=3, prior__sharding__offload="cpu"))
    assert offloaded == {name: (size, "cpu") for name, size in split.items()}
    in_32 = 4 * (6144 + 416 + 15_745)
    assert hand(tiny()) == {
        "weights": (in_32, "device"),
        "gradients": (in_32, "device"),
        "moments": (2 * in_32, "device"),
        "average": (in_32, "device"),
    }
    assert Held(0, 10, shards=4).each == 3  # rounded up


def test_what_zero_brings_together_by_stage() -> None:
    """Stage 3 holds fewer weights whole than 1 and 2; 1 holds whole gradients where an update takes several passes."""
    recipes = {zero: sized(8, 4, 32, 4, 8, 16, prior__sharding__zero=zero) for zero in (0, 1, 2, 3)}
    counts, machines = count_parameters(recipes[0]), Machines(4, 1, 0)
    once = {zero: peaks(recipe, counts, machines, 1, accumulates=False).passes for zero, recipe in recipes.items()}
    more = {zero: peaks(recipe, counts, machines, 1, accumulates=True).passes for zero, recipe in recipes.items()}
    matrices = 4 * counts.effective
    assert once[1] == once[2]
    assert once[3] < once[2] - matrices // 2
    gradients = matrices + 4 * sum(counts.others)
    assert more[1] - more[2] == gradients - gradients // 4


def test_powersgds_state_by_hand() -> None:
    """Rank 8 of 4 shards is 2 a shard. Of a layer the shards are (12, 16), (4, 16), (16, 16), (4, 64); factors have 56,
    40, 64 and 136 numbers, fewer than each, so all go through factors. Right ones are (16 + 16 + 16 + 64) * 2.
    """
    recipe = tiny(prior__sharding__zero=3, prior__powersgd__rank=8)
    counts = count_parameters(recipe)
    parts = held(recipe.prior, counts, Machines(4, 2, 0))
    assert parts["PowerSGD's errors"].each == 4 * 12 * 256 * 2 // 4
    assert parts["PowerSGD's factors"].each == 4 * 112 * 2 * 2
    assert "PowerSGD's errors" not in held(recipe.prior, counts, Machines(4, 1, 0))
    traffic = between_machines(recipe.prior, counts, Machines(4, 2, 0))
    others = sum(-(-number // 4) for number in counts.others)
    assert traffic.whole == 4 * (12 * 256 * 2 // 4 + others)
    assert traffic.sent == 4 * (2 * (56 + 40 + 64 + 136) + others)
    assert traffic.on_link(traffic.sent) == 4 * traffic.sent + 4 * counts.small  # 2 (2 - 1) / 2 = 1
    half = tiny(prior__sharding__zero=3, prior__powersgd__rank=8, prior__precision="fp16")
    traffic = between_machines(half.prior, counts, Machines(4, 2, 0))
    assert traffic.whole == 2 * 12 * 256 * 2 // 4 + 4 * others
    assert traffic.sent == 2 * 2 * (56 + 40 + 64 + 136) + 4 * others
    # A matrix whose factors save less than asked for goes whole, in 32 bit: here that of (4, 16).
    picky = tiny(
        prior__sharding__zero=3, prior__powersgd__rank=8, prior__precision="fp16", prior__powersgd__min_compression=1.7
    )
    traffic = between_machines(picky.prior, counts, Machines(4, 2, 0))
    assert traffic.sent == 2 * 2 * (56 + 64 + 136) + 2 * 4 * 64 + 4 * others


# The plan against the allocator

SIZES = {"square": (3, 4, 32, 8, 16, 16), "wide": (2, 4, 64, 4, 32, 8), "long": (3, 2, 32, 16, 48, 4)}
"""Layers, heads, d_head, grid, text positions, batch."""


def measured_and_planned(folder: Path, recipe: Recipe, on_cpu: bool = True) -> tuple[int, int]:
    model = recipe.prior.model
    store = write_tokens(folder / "t.zarr", 80, recipe.tokenizer.text_length, 400, model.grid, 64)
    measured = peak_bytes(lambda: train_prior(recipe, store, folder / "run"))
    return measured, fit(recipe, count_parameters(recipe), Machines(1, 1, 0, on_cpu)).peak


@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("size", SIZES)
def test_the_plan_is_the_measured_peak_of_real_training(
    size: str, precision: str, checkpointed: bool, tmp_path: Path
) -> None:
    settings = {"prior__precision": precision, "prior__model__checkpoint_resblocks": checkpointed}
    measured, planned = measured_and_planned(tmp_path, sized(*SIZES[size], **settings))
    assert planned == pytest.approx(measured, rel=0.1)


def test_also_with_micro_batches_an_update_that_takes_the_most_and_validation(tmp_path: Path) -> None:
    parts = sized(*SIZES["square"], prior__training__micro_batch=4, prior__precision="bf16")
    measured, planned = measured_and_planned(tmp_path / "parts", parts)
    assert planned == pytest.approx(measured, rel=0.1)

    update = sized(1, 8, 32, 4, 8, 2, prior__precision="bf16")
    assert fit(update, count_parameters(update), ALONE).peak_phase == "update"
    measured, planned = measured_and_planned(tmp_path / "update", update)
    assert planned == pytest.approx(measured, rel=0.1)

    validation = sized(2, 4, 32, 8, 16, 1, data__holdout=0.9)
    assert fit(validation, count_parameters(validation), ALONE).peak_phase == "validation"
    measured, planned = measured_and_planned(tmp_path / "validation", validation)
    assert planned == pytest.approx(measured, rel=0.1)


def test_attention_that_is_not_cut_in_parts_as_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = sized(2, 4, 8, 16, 64, 16)
    counts = count_parameters(recipe)
    monkeypatch.setattr(attention, "CHUNK", 2**20)
    in_parts = fit(recipe, counts, ALONE).peak
    assert fit(recipe, counts, Machines(1, 1, 0)).peak > 1.1 * in_parts
    monkeypatch.setattr(attention, "CHUNK", 2**62)
    measured, planned = measured_and_planned(tmp_path, recipe, on_cpu=False)
    assert planned == pytest.approx(measured, rel=0.1)


def test_two_machines_with_powersgd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes, a machine each. The update takes the most, by PowerSGD's sums and factors."""
    shards = {"prior__sharding__zero": 3, "prior__sharding__node_size": 1, "prior__powersgd__rank": 64}
    recipes = [sized(2, 8, 32, 4, 8, 2, **shards, prior__precision=precision) for precision in ("fp16", "fp32")]
    store, (port, _) = write_tokens(tmp_path / "t.zarr", 80, 8, 400, 4, 64), free_ports(2)
    told = json.dumps([recipe.model_dump(mode="json") for recipe in recipes])
    processes = []
    for rank in range(2):
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {**ENVIRONMENT, "MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}}
        command = [sys.executable, planned_peaks.__file__, told, str(store), str(tmp_path / "run")]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    measured = [json.loads(process.communicate(timeout=600)[0].splitlines()[-1]) for process in processes]
    monkeypatch.setattr(peaks_module, "ADAM_CHUNK", planned_peaks.CHUNK)
    monkeypatch.setattr(peaks_module, "KEPT_CHUNK", planned_peaks.CHUNK)
    for place, recipe in enumerate(recipes):
        planned = fit(recipe, count_parameters(recipe), Machines(1, 2, 0, on_cpu=True))
        assert planned.peak_phase == "update"
        for own in measured:
            assert planned.peak == pytest.approx(own[place], rel=0.1)


def test_what_waits_on_the_host_leaves_the_gpu() -> None:
    """The average, where it moves every few updates, and PowerSGD's state; where a process has no GPU all is one."""
    nodes = {"prior__sharding__zero": 3, "prior__powersgd__rank": 8, "prior__precision": "fp16"}
    here = tiny(**nodes)
    there = tiny(**nodes, prior__training__ema_every=2, prior__powersgd__offload="cpu")
    counts, machines = count_parameters(here), Machines(4, 2, 10**9)
    parts, moved = held(here.prior, counts, machines), held(there.prior, counts, machines)
    waits = {"average", "PowerSGD's errors", "PowerSGD's factors"}
    assert {name for name, part in moved.items() if part.place == "cpu"} == waits
    assert {part.place for part in parts.values()} == {"device"}
    assert {name: part.each for name, part in moved.items()} == {name: part.each for name, part in parts.items()}
    less = fit(here, counts, machines).peak - fit(there, counts, machines).peak
    assert less == sum(parts[name].each for name in waits)
    # In 16 bit half of what 32 take.
    assert parts["PowerSGD's errors"].each == 2 * 12 * 256 * 2 // 4
    on_cpu = held(there.prior, counts, Machines(4, 2, 10**9, on_cpu=True))
    assert {part.place for part in on_cpu.values()} == {"device"}


def test_the_paper_s_machines_hold_the_largest_prior() -> None:
    """12e9 parameters on GPUs of 16 GB, by what waits on the host; without either it does not fit."""
    machines = Machines(8, 128, 16 * GB)
    recipe = load_recipe(RECIPES / "12b.yaml")
    counts = count_parameters(recipe)
    found = fit(recipe, counts, machines)
    assert found.fits
    assert 8 * found.in_place("cpu") < 100 * GB
    for override in ("prior.training.ema_every=1", "prior.powersgd.offload=none"):
        without = load_recipe(RECIPES / "12b.yaml", [override])
        assert not fit(without, counts, machines).fits
    # What is proposed for it as it was before is what the recipe says.
    bare = load_recipe(RECIPES / "12b.yaml", ["prior.training.ema_every=1", "prior.powersgd.offload=none"])
    assert mend(bare, counts, machines).settings == {
        "prior.training.ema_every": 25,
        "prior.powersgd.offload": "cpu",
    }


def test_what_a_checkpoint_takes() -> None:
    """By hand: weights, average and moments once, errors and factors of each process; two machines of four."""
    recipe = tiny(prior__sharding__zero=3, prior__powersgd__rank=8, prior__training__save_every=5)
    counts, machines = count_parameters(recipe), Machines(4, 2, 10**9)
    found, numbers = saving(recipe.prior, counts, machines), 6144 + 416 + 15_745
    assert found.model == 4 * numbers * (1 + 1 + 2)
    assert found.own == 4 * (12 * 256 * 2 // 4 + 112 * 2 * 2)
    assert found.whole == found.model + 8 * found.own
    assert found.first_machine == found.model + 4 * found.own
    assert found.seconds(1000.0) == found.first_machine / 1000
    assert found.share(1000.0, 2.0) == pytest.approx(found.seconds(1000.0) / (found.seconds(1000.0) + 10))
    drawn = tiny(prior__sharding__zero=3, prior__powersgd__rank=8, prior__powersgd__warm_start=False)
    assert saving(drawn.prior, counts, machines).own == 4 * 12 * 256 * 2 // 4
    assert saving(recipe.prior, counts, Machines(4, 1, 10**9)).own == 0


# Time and traffic


@pytest.mark.parametrize("layout", ["paper", "full, row"])
def test_operations_are_those_that_a_counter_sees(layout: str) -> None:
    recipe = sized(6 if layout == "paper" else 2, 2, 16, 8, 16, 4, prior__model__layout=layout)
    with torch.device("meta"):
        prior = build_prior(recipe)
        text, image = torch.zeros(1, 16, dtype=torch.long), torch.zeros(1, 64, dtype=torch.long)

    def forward() -> None:
        hidden = prior(text, image)
        prior.text_logits(hidden)
        prior.image_logits(hidden)

    found = count_flops(recipe, count_parameters(recipe))
    assert found.model == training_flops(forward)
    assert found.executed == found.model


def test_time_and_cost_by_hand() -> None:
    recipe = tiny(prior__model__checkpoint_resblocks=True, prior__training__updates=3600, prior__sharding__zero=3)
    machines = Machines(2, 4, 10**9)
    found = plan(recipe, machines, Assumptions(peak_flops=1e6, share=0.5, interconnect=8e3, price=2.0))
    flops = count_flops(recipe, count_parameters(recipe))
    assert flops.executed == 3 * flops.heads + 4 * (flops.matrices + flops.attention)
    compute = 2 * flops.executed / 0.5e6  # 16 samples of 8 processes
    link = found["between_machines"]["a_machine_on_the_link"]["sent"]
    assert found["time"]["compute_seconds"] == pytest.approx(compute)
    assert found["time"]["step_seconds"] == pytest.approx(compute + link / 1e3)
    step = found["time"]["step_seconds"]
    assert found["time"]["tokens_per_second"] == pytest.approx(16 * 24 / step)
    assert found["time"]["gpu_hours"] == pytest.approx(8 * step)  # 3600 updates
    assert found["time"]["cost"] == pytest.approx(16 * step)
    text = " ".join(found["assumptions"])
    for said in ("1e-06 TFLOP/s", "50% of that", "8e-06 Gbit/s", "costs 2 an hour", "10% of memory"):
        assert said in text


def test_the_papers_table_comes_out_of_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)
    rows = compression_table(None)
    assert [(row["d_model"], row["rank"], round(100 * float(row["paper"]))) for row in rows] == [
        (1920, 512, 83),
        (2688, 640, 85),
        (3968, 896, 86),
    ]
    assert [f"{float(row['effective_parameters']) / 1e9:.1f}" for row in rows] == ["2.8", "5.5", "12.1"]
    for row in rows:
        d, r = int(row["d_model"]), int(row["rank"]) / 8
        # Shards of (3d/8, d), (d/8, d), (4d/8, d), (d/8, 4d).
        sides = (3 / 8 + 1) + (1 / 8 + 1) + (4 / 8 + 1) + (1 / 8 + 4)
        assert row["shards"] == pytest.approx(1 - r * sides * d / (12 / 8 * d**2))
        # Of 16-bit gradients factors are in 16 bit; what is none of the resblocks' matrices crosses whole, in 32.
        counts = count_parameters(load_recipe(RECIPES / f"{row['recipe']}.yaml"))
        low, whole = 2 * counts.effective, 4 * sum(counts.others)
        assert row["bytes"] == pytest.approx(float(row["shards"]) * low / (low + whole), rel=1e-3)


# What to change


def test_named_settings_make_it_fit() -> None:
    recipe = load_recipe(RECIPES / "1b.yaml")
    counts, machines = count_parameters(recipe), Machines(8, 1, 16 * GB)
    assert not fit(recipe, counts, machines).fits
    found = mend(recipe, counts, machines)
    assert found.fit.fits
    assert found.settings
    overrides = [option.removeprefix("--set ") for option in found.options()]
    changed = load_recipe(RECIPES / "1b.yaml", overrides)
    again = plan(changed, machines, Assumptions())
    assert again["memory"]["fits"]
    assert again["change"] is None
    assert again["memory"]["peak"] == found.fit.peak
    # As few as do: without one of them it does not fit, nor with a larger micro-batch.
    for override in overrides:
        fewer = load_recipe(RECIPES / "1b.yaml", [other for other in overrides if other != override])
        assert not fit(fewer, counts, machines).fits
    size = changed.prior.training.micro_batch
    assert size is not None
    assert not fit(load_recipe(RECIPES / "1b.yaml", [*overrides, f"prior.training.micro_batch={2 * size}"]), counts,
                   machines).fits  # fmt: skip


def test_where_no_setting_does_larger_machines_are_named() -> None:
    recipe = load_recipe(RECIPES / "12b.yaml", ["prior.powersgd.rank=0", "prior.sharding.offload=cpu"])
    counts = count_parameters(recipe)
    found = mend(recipe, counts, Machines(1, 1, 4 * GB))
    assert found.machines.gpus > 1 or not found.fit.fits
    assert found.settings["prior.training.micro_batch"] == 1
    larger = would_fit(recipe, counts, 80 * GB)
    assert larger is not None
    assert larger.fit.fits
    assert larger.machines.nodes == 1


def test_too_many_processes_and_odd_groups_are_refused() -> None:
    counts = count_parameters(tiny())
    with pytest.raises(UserError, match="16 samples cannot be shared among 32 processes"):
        fit(tiny(), counts, Machines(8, 4, GB))
    with pytest.raises(UserError, match=r"node_size: 4 processes are no multiple of 3"):
        fit(tiny(prior__sharding__zero=1, prior__sharding__node_size=3), counts, Machines(4, 1, GB))
    with pytest.raises(UserError, match="16 samples are no multiple of the 3 processes"):
        fit(tiny(prior__sharding__zero=1), counts, Machines(3, 1, GB))


# The command


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "140"})


def test_the_command_prints_json_and_tables() -> None:
    machine = ("--gpus-per-node", 8, "--nodes", 128, "--gpu-memory", "16GB", "--interconnect", "100Gbit")
    done = invoke("plan", RECIPES / "12b.yaml", *machine, "--json", "--price", 1.5)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    recipe = load_recipe(RECIPES / "12b.yaml")
    assert found == json.loads(
        json.dumps(plan(recipe, Machines(8, 128, 16 * GB), Assumptions(interconnect=1e11, price=1.5)))
    )
    assert found["parameters"]["effective"] == found["parameters"]["closed_form_effective"] == 12_092_178_432
    done = invoke("plan", RECIPES / "12b.yaml", *machine)
    for expected in (
        "128 x 8 GPUs = 1,024",
        "12.29e9",
        "PowerSGD's errors",
        "Saved by PowerSGD",
        "125 TFLOP/s",
        ": fits",
        "every 2,000 updates",
    ):
        assert expected in done.stdout
    table = invoke("plan", RECIPES / "12b.yaml", "--table")
    assert table.exit_code == 0
    assert "85.9%" in table.stdout
    assert "12.09e9" in table.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu-memory", "16"], "--gpu-memory 16: write bytes, such as 16GB"),
        (["--gpu-memory", "0GB"], "--gpu-memory 0GB"),
        (["--gpu-memory", "16Gbit"], "--gpu-memory 16Gbit"),
        (["--interconnect", "100GB"], "--interconnect 100GB: write bits a second, such as 100Gbit"),
        (["--interconnect", "-1Gbit"], "--interconnect -1Gbit"),
        (["--disk", "1Gbit"], "--disk 1Gbit: write bytes, such as"),
        (["--share", "1.5"], "--share 1.5: give a number above 0 and up to 1"),
        (["--share", "nan"], "--share nan"),
        (["--peak-tflops", "0"], "--peak-tflops 0: give a number above 0"),
        (["--nodes", "1024"], "cannot be shared among 8192 processes"),
    ],
)
def test_bad_values_are_told(arguments: list[str], said: str) -> None:
    done = invoke("plan", RECIPES / "1b.yaml", *arguments)
    assert isinstance(done.exception, UserError)
    assert said in str(done.exception)


def test_a_plan_of_nothing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = invoke("plan", "--nodes", 2)
    assert isinstance(done.exception, UserError)
    assert "name a recipe" in str(done.exception)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no recipe there has prior\.powersgd\.rank"):
        compression_table(None)
    assert invoke("plan", "--gpus-per-node", 0, RECIPES / "1b.yaml").exit_code == 2


def test_units() -> None:
    assert [parse_bytes(text, "--x") for text in ("16GB", "1.5kB", "80 GiB", "7B")] == [16 * GB, 1500, 80 * 2**30, 7]
    assert [parse_rate(text, "--x") for text in ("100Gbit", "50Mbit/s", "1.5Tbit")] == [1e11, 5e7, 1.5e12]


# Starting


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of 25 GB without a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(this_machine, "total_memory", lambda _: 25 * GB)


@pytest.mark.usefixtures("machine")
def test_what_cannot_fit_is_refused_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = invoke("train-prior", RECIPES / "12b.yaml")
    assert isinstance(done.exception, UserError)
    lines = str(done.exception).splitlines()
    assert len(lines) == 3
    assert not list(tmp_path.iterdir())
    for said in ("recipe 12b", "12.29e9 parameters", "weights 25.0 GB, gradients 25.0 GB, moments 50.0 GB", "25.0 GB"):
        assert said in lines[0]
    assert "GPUs of 80.0 GB would fit" in lines[1]
    assert "--set prior.training.micro_batch=" in lines[1]
    with pytest.raises(UserError, match=r"here would fit, with \d+\.\d GB: --set prior.training.micro_batch="):
        train_prior(load_recipe(RECIPES / "1b.yaml"), tmp_path / "t.zarr", tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("machine")
def test_processes_of_a_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "8", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "0"}
    for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    recipe = load_recipe(RECIPES / "1b.yaml", ["prior.training.micro_batch=1"])
    with pytest.raises(UserError, match=r"in each of 8 processes .*there are 6\.2 GB"):
        train_prior(recipe, tmp_path / "t.zarr", tmp_path / "run")


@pytest.mark.usefixtures("machine")
def test_a_dry_run_looks_at_everything_and_writes_nothing(tmp_path: Path) -> None:
    store = write_tokens(tmp_path / "t.zarr", 80, 256, 400, 32, 64)
    before = sorted(tmp_path.rglob("*"))
    small = ("--set", "prior.model.layers=2", "--set", "prior.model.heads=2", "--set", "prior.model.d_model=128")
    fitting = (*small, "--set", "prior.training.micro_batch=1", "--set", "data.holdout=0.25",
               "--set", "dvae.model.codebook_size=64")  # fmt: skip
    start = ("train-prior", RECIPES / "1b.yaml", "--dry-run", "--out", tmp_path / "run")
    held_out = len(split_holdout(np.arange(80), 0.25, 0)[1])
    done = invoke(*start, *fitting, "--tokens", store)
    assert done.exit_code == 0, done.output
    assert "Plan for the prior of 1b" in done.stdout
    assert f"{80 - held_out} to train, {held_out} held out" in done.stdout
    done = invoke(*start, *fitting, "--tokens", tmp_path / "nowhere.zarr")
    assert done.exit_code == 0
    assert "not there yet" in done.stdout
    # It ends as the real start would, after the plan is printed.
    done = invoke(*start, "--tokens", tmp_path / "nowhere.zarr")
    assert isinstance(done.exception, UserError)
    assert "recipe 1b" in str(done.exception)
    assert "DOES NOT FIT" in done.stdout
    done = invoke(*start, *small, "--tokens", store)
    assert isinstance(done.exception, UserError)
    assert "codebook_size = 64, the recipe says 8192" in str(done.exception)
    assert sorted(tmp_path.rglob("*")) == before

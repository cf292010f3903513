"""Tests of the traffic between machines, against bytes counted by hand and the paper's table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from helpers.prior_recipes import tiny_prior

from dalle_cli.config.load import load_recipe
from dalle_cli.errors import UserError
from dalle_cli.planning.memory import Machines
from dalle_cli.planning.traffic import Traffic, between_machines, compression_table
from dalle_cli.prior.counts import count_parameters

RECIPES = Path(__file__).parents[2] / "recipes"


def test_bytes_between_two_machines_of_four_ranks() -> None:
    """Count the values that a rank sends for the two layers by hand.

    The shards of a layer are (12, 16), (4, 16), (16, 16) and (16, 16). Their factors of rank 2 have 56, 40, 64 and 64
    values, fewer than the shards, so all are compressed.
    """
    recipe, machines = tiny_prior(prior__sharding__zero=3, prior__powersgd__rank=8), Machines(4, 2, 0)
    counts = count_parameters(recipe)
    others = sum(-(-rows // 4) * columns for rows, columns in counts.others)
    found = between_machines(recipe.prior, counts, machines)
    handed, link = found.a_process, found.a_machine_on_the_link
    assert handed.whole == 4 * (12 * 256 * 2 // 4 + others)
    assert handed.sent == 4 * (2 * (56 + 40 + 64 + 64) + others)
    assert link.sent == 4 * handed.sent + 4 * counts.small  # 2 (2 - 1) / 2 = 1
    half = tiny_prior(prior__sharding__zero=3, prior__powersgd__rank=8, prior__precision="fp16")
    handed = between_machines(half.prior, counts, machines).a_process
    assert handed.whole == 2 * 12 * 256 * 2 // 4 + 4 * others
    assert handed.sent == 2 * 2 * (56 + 40 + 64 + 64) + 4 * others
    # A matrix whose factors save less than min_compression is sent whole, in 32 bit: here that of (4, 16).
    picky = tiny_prior(
        prior__sharding__zero=3, prior__powersgd__rank=8, prior__precision="fp16", prior__powersgd__min_compression=1.7
    )
    handed = between_machines(picky.prior, counts, machines).a_process
    assert handed.sent == 2 * 2 * (56 + 64 + 64) + 2 * 4 * 64 + 4 * others


def test_bytes_between_two_machines_of_two_ranks() -> None:
    """Count the shards of the first rank by hand; see ``test_memory.py`` for the shapes.

    Of the 401 rows of text logits FSDP gives it 201, and DeepSpeed half of the numbers. Under DeepSpeed it also has
    half of the resblocks' 416 gains and biases, and all gradients are in 32 bit.
    """

    def planned(**changes: Any) -> Traffic:
        recipe = tiny_prior(prior__sharding__zero=3, **changes)
        return between_machines(recipe.prior, count_parameters(recipe), Machines(2, 2, 0))

    others = (408 + 8 + 64 + 4 + 4) * 8 + 16 + 401 * 8 + 201 + 64 * 8 + 32
    fsdp = planned()
    assert fsdp.a_process.whole == fsdp.a_process.sent == 4 * (6144 // 2 + others + 8)
    assert fsdp.a_machine_on_the_link.whole == 2 * fsdp.a_process.whole + 4 * 416
    for precision in ("fp32", "bf16"):
        deepspeed = planned(prior__sharding__engine="deepspeed", prior__precision=precision)
        assert deepspeed.a_process.whole == 4 * (6144 // 2 + others + 416 // 2)
        assert deepspeed.a_machine_on_the_link.whole == 2 * deepspeed.a_process.whole


def test_compression_of_the_recipes_is_the_paper_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)
    rows = compression_table(None)
    assert [(row.d_model, row.rank, round(100 * row.paper)) for row in rows] == [
        (1920, 512, 83),
        (2688, 640, 85),
        (3968, 896, 86),
    ]
    assert [f"{row.effective_parameters / 1e9:.1f}" for row in rows] == ["2.8", "5.5", "12.1"]
    for row in rows:
        d, r = row.d_model, row.rank / 8
        # Shards of (3d/8, d), (d/8, d), (4d/8, d), (d, 4d/8).
        sides = (3 / 8 + 1) + (1 / 8 + 1) + (4 / 8 + 1) + (1 + 4 / 8)
        assert row.shards == pytest.approx(1 - r * sides * d / (12 / 8 * d**2))
        # Factors of 16-bit gradients are sent in 16 bit, all but the resblocks' matrices whole in 32 bit.
        counts = count_parameters(load_recipe(RECIPES / f"{row.recipe}.yaml"))
        low, whole = 2 * counts.effective, 4 * (counts.other - counts.small)
        assert row.bytes == pytest.approx(row.shards * low / (low + whole), rel=1e-3)


def test_the_table_of_all_recipes_is_the_same_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [row.recipe for row in compression_table(None)] == ["2.8b", "5.6b", "12b"]


def test_a_table_of_recipes_without_powersgd_is_refused() -> None:
    with pytest.raises(UserError, match=r"no shipped recipe has prior\.powersgd\.rank"):
        compression_table(None, ["prior.powersgd.rank=0"])

"""Tests of the traffic between machines, against bytes counted by hand and the paper's table."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.prior_recipes import tiny_prior

from dalle_cli.config.load import load_recipe
from dalle_cli.errors import UserError
from dalle_cli.planning.memory import Machines
from dalle_cli.planning.traffic import between_machines, compression_table
from dalle_cli.prior.counts import count_parameters

RECIPES = Path(__file__).parents[2] / "recipes"


def test_bytes_between_two_machines_of_four_ranks() -> None:
    """Count the values that a rank sends for the two layers by hand.

    The shards of a layer are (12, 16), (4, 16), (16, 16) and (16, 16). Their factors of rank 2 have 56, 40, 64 and 64
    values, fewer than the shards, so all are compressed.
    """
    recipe, machines = tiny_prior(prior__sharding__zero=3, prior__powersgd__rank=8), Machines(4, 2, 0)
    counts = count_parameters(recipe)
    others = sum(-(-number // 4) for number in counts.others)
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
        low, whole = 2 * counts.effective, 4 * sum(counts.others)
        assert row.bytes == pytest.approx(row.shards * low / (low + whole), rel=1e-3)


def test_the_table_of_all_recipes_is_the_same_in_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [row.recipe for row in compression_table(None)] == ["2.8b", "5.6b", "12b"]


def test_a_table_of_recipes_without_powersgd_is_refused() -> None:
    with pytest.raises(UserError, match=r"no shipped recipe has prior\.powersgd\.rank"):
        compression_table(None, ["prior.powersgd.rank=0"])

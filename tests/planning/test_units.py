"""Tests of sizes and rates as people write them."""

from __future__ import annotations

from dalle_cli.planning.units import parse_bytes, parse_rate


def test_units() -> None:
    sizes = [parse_bytes(text, "--x") for text in ("16GB", "1.5kB", "80 GiB", "7B")]
    assert sizes == [16 * 10**9, 1500, 80 * 2**30, 7]
    assert [parse_rate(text, "--x") for text in ("100Gbit", "50Mbit/s", "1.5Tbit")] == [1e11, 5e7, 1.5e12]

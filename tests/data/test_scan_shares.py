"""A scan in shares comes to what one scan finds, in whatever order the shares are counted."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from helpers.running import Chain
from helpers.running import run as dalle

from dalle_cli.config.schema import DataSettings, Filters
from dalle_cli.data.open_source import open_source
from dalle_cli.data.scan import scan
from dalle_cli.data.scan_shares import scan_share
from dalle_cli.errors import UserError
from dalle_cli.stores.shards import Shard

SETTINGS = DataSettings(filters=Filters(min_words=6))


@pytest.mark.parametrize("order", list(itertools.permutations((1, 2, 3)))[::2])
def test_shares_add_up_to_the_whole(order: tuple[int, ...], by_hand: Chain, tmp_path: Path) -> None:
    source = open_source(str(by_hand.train))
    found = [scan_share(source, SETTINGS, 32, Shard(i, 3), tmp_path, workers=1) for i in order]
    assert found[:2] == [None, None]
    assert found[2] == scan(source, SETTINGS, 32, workers=1)


def test_a_share_is_not_counted_twice(by_hand: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(by_hand.train))
    for i in (1, 2):
        whole = scan_share(source, SETTINGS, 32, Shard(i, 2), tmp_path, workers=1)
    monkeypatch.setattr("dalle_cli.data.scan_shares.count_samples", None)
    assert scan_share(source, SETTINGS, 32, Shard(1, 2), tmp_path, workers=1) == whole


def test_shares_that_do_not_belong_together_are_refused(by_hand: Chain, tmp_path: Path) -> None:
    source = open_source(str(by_hand.train))
    scan_share(source, SETTINGS, 32, Shard(1, 2), tmp_path, workers=1)
    with pytest.raises(UserError, match="holds shares of another number than 3; delete it"):
        scan_share(source, SETTINGS, 32, Shard(1, 3), tmp_path, workers=1)
    with pytest.raises(UserError, match=r"0001-of-0002.json: was made with other filters; make all"):
        scan_share(source, DataSettings(filters=Filters(min_words=5)), 32, Shard(2, 2), tmp_path, workers=1)
    file = tmp_path / "0001-of-0002.json"
    for text in ("", "[]", file.read_text().replace('"usable"', '"unusable"'), file.read_text()[:-9]):
        file.write_text(text)
        with pytest.raises(UserError, match=r"is damaged \(\w+\); delete it and make share 1/2 again"):
            scan_share(source, SETTINGS, 32, Shard(1, 2), tmp_path, workers=1)


def test_the_command(by_hand: Chain, tmp_path: Path) -> None:
    arguments = ("scan", by_hand.train, "--workers", 1)
    assert "--shard needs --out" in dalle(*arguments, "--shard", "1/2").mistake()
    first = dalle(*arguments, "--shard", "2/2", "--out", tmp_path / "shares")
    assert (first.code, first.out) == (0, "")
    assert "share 2/2 is counted; still to be counted: 1/2" in first.err
    last = dalle(*arguments, "--shard", "1/2", "--out", tmp_path / "shares")
    assert last.code == 0, last.err
    whole = dalle(*arguments, "--out", tmp_path / "whole")
    assert (tmp_path / "shares" / "scan.json").read_text() == (tmp_path / "whole" / "scan.json").read_text()
    tables = [done.err[done.err.index("usable") :] for done in (last, whole)]
    assert tables[0] == tables[1]

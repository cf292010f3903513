"""Results of shares come back as they were written, or are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import TypeAdapter

from dalle_cli.errors import UserError
from dalle_cli.stores.shards import Shard
from dalle_cli.stores.share_files import ShareFiles

KIND = TypeAdapter(dict[str, list[float]])


def test_results_come_back(tmp_path: Path) -> None:
    files = ShareFiles(tmp_path / "shares", 2, {"source": "s"}, KIND)
    assert files.read() == {Shard(1, 2): None, Shard(2, 2): None}
    files.write(Shard(2, 2), {"x": [0.1, 1e-9]})
    assert files.read() == {Shard(1, 2): None, Shard(2, 2): {"x": [0.1, 1e-9]}}


def test_other_and_damaged_shares_are_refused(tmp_path: Path) -> None:
    files = ShareFiles(tmp_path, 2, {"source": "s"}, KIND)
    files.write(Shard(1, 2), {"x": [0.5]})
    with pytest.raises(UserError, match="holds shares of another number than 3; delete it, or keep to that number"):
        ShareFiles(tmp_path, 3, {"source": "s"}, KIND)
    with pytest.raises(UserError, match="was made with other source; make all shares alike"):
        ShareFiles(tmp_path, 2, {"source": "t"}, KIND).read()
    file = tmp_path / "0001-of-0002.json"
    text = file.read_text()
    for damaged in ("", "[]", text.replace("0.5", "0.25"), text.replace("[0.5]", "0.5"), text[:-9], "[" * 10**5):
        file.write_text(damaged)
        with pytest.raises(UserError, match=r"is damaged \(\w+\); delete it and make share 1/2 again"):
            files.read()

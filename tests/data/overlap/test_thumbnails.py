from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from dalle_cli.data.overlap.hashes import SIDE
from dalle_cli.data.overlap.thumbnails import ThumbnailFiles, records_of
from dalle_cli.errors import UserError


def test_files_are_read_as_one_array(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    every = rng.integers(0, 256, (30, SIDE, SIDE, 3), dtype=np.uint8)
    files, begins = [], [0, 7, 7, 8, 30]
    for number, (begin, end) in enumerate(pairwise(begins)):
        files.append((tmp_path / str(number), end - begin))
        files[-1][0].write_bytes(records_of(every[begin:end]))
    read = ThumbnailFiles(files)
    assert len(read) == 30
    for rows in (slice(0, 30), slice(5, 9), slice(29, 40), slice(3, 3), *(rng.integers(30, size=40) for _ in range(5))):
        np.testing.assert_array_equal(read[rows], every[rows])
    assert read[np.empty(0, np.int64)].shape == (0, SIDE, SIDE, 3)
    files[3][0].write_bytes(records_of(every[8:29]))
    assert len(read[slice(0, 29)]) == 29
    with pytest.raises(UserError, match="3: is shorter than it was; delete it"):
        read[slice(0, 30)]
    files[0][0].unlink()
    with pytest.raises(UserError, match="0: is gone; run the command that made it again"):
        read[slice(0, 30)]


def test_any_damage_of_a_thumbnail_is_noticed(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    file, every = tmp_path / "some.thumbnails", rng.integers(0, 256, (3, SIDE, SIDE, 3), dtype=np.uint8)
    whole = records_of(every)
    size = len(whole) // 3
    zeros = whole[:size] + bytes(size) + whole[2 * size :]  # what a power cut can leave of a file that grew
    flips = [whole[:at] + bytes([whole[at] ^ 1 << int(rng.integers(8))]) + whole[at + 1 :]
             for at in rng.integers(size, 2 * size, 20)]  # fmt: skip
    for content in (zeros, *flips):
        file.write_bytes(content)
        read = ThumbnailFiles([(file, 3)])
        np.testing.assert_array_equal(read[np.array([2, 0])], every[[2, 0]])
        with pytest.raises(UserError, match="thumbnails: is damaged; delete it and run again"):
            read[slice(0, 3)]

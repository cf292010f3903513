from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from collections import Counter, namedtuple
from pathlib import Path

import pytest
from helpers.pictures import write_sample
from PIL import Image

from dalle_cli.config.schema import DataSettings
from dalle_cli.data.open_source import open_source
from dalle_cli.data.picture_loader import TrainingPictures, consecutive_pictures
from dalle_cli.data.source import Source
from dalle_cli.data.workers import explain_lost_workers
from dalle_cli.errors import UserError
from dalle_cli.stores.row_set import RowSet


def test_training_draws_replacements_evenly(tmp_path: Path) -> None:
    """After 150 filtered samples in a row come 20 good ones, which are all seen about equally often."""
    for i in range(170):
        write_sample(tmp_path, f"{i:03d}", Image.new("RGB", (100, 20) if i < 150 else (20, 20)), "x")
    pictures = TrainingPictures(
        open_source(tmp_path),
        RowSet.full(170),
        16,
        DataSettings(crop=False),
        seed=0,
        batch_size=170,
        flip=False,
        workers=0,
    )
    seen: Counter[int] = Counter()
    for _, rows, _, replaced in pictures.batches(0, 4):
        seen.update(rows.tolist())
        assert replaced == pytest.approx(150 / 170)
    assert min(seen) >= 150
    assert sum(seen.values()) == 680
    assert max(seen.values()) < 3 * min(seen.values())  # 34 on average
    again = [batch.rows.tolist() for batch in pictures.batches(3, 4)]
    assert again == [batch.rows.tolist() for batch in pictures.batches(3, 4)]


def two_pictures(folder: Path) -> Source:
    for name in ("a", "b"):
        write_sample(folder, name, Image.new("RGB", (40, 40)))
    return open_source(str(folder))


def endless(source: Source) -> TrainingPictures:
    return TrainingPictures(source, RowSet.full(2), 32, DataSettings(), 0, 2, flip=False, workers=2)


def test_too_little_shared_memory_is_said_before_it_kills_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = two_pictures(tmp_path)
    batch = 2 * 32 * 32 * 3
    usage = namedtuple("usage", "total used free")
    for free, enough in ((10 * batch, True), (10 * batch - 1, False)):  # 4 of each worker, one taken and one coming
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: usage(free, 0, free))
        if enough:
            batches = endless(source).batches(0, 1)
            assert next(batches).pictures.shape == (2, 32, 32, 3)
            batches.close()  # type: ignore[attr-defined]
            continue
        with pytest.raises(
            UserError, match=r"/dev/shm: has 0 MB free.*docker run --shm-size 1g.*training.workers to 0"
        ):
            next(endless(source).batches(0, 1))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 0))
    with pytest.raises(UserError, match="/dev/shm"):
        next(consecutive_pictures(source, range(2), block=1, image_size=32, data=DataSettings(), seed=0, workers=1))
    alone = consecutive_pictures(source, range(2), block=1, image_size=32, data=DataSettings(), seed=0, workers=0)
    assert [block.keys for block in alone] == [["a"], ["b"]]


def test_a_killed_worker_is_one_line(tmp_path: Path) -> None:
    batches = endless(two_pictures(tmp_path)).batches(0, 10_000)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid or 0, signal.SIGKILL)
    with pytest.raises(UserError, match="a worker process that loads pictures was lost"), explain_lost_workers():
        for _ in batches:
            pass
    assert not multiprocessing.active_children()


def test_a_worker_that_hangs_is_not_waited_for_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = two_pictures(tmp_path)
    monkeypatch.setattr("dalle_cli.data.picture_loader.PATIENCE", 2)
    monkeypatch.setattr(type(source), "image_bytes", lambda *_: time.sleep(10_000))
    began = time.monotonic()
    with pytest.raises(UserError, match="timed out after 2 seconds"):
        next(endless(source).batches(0, 1))
    assert time.monotonic() - began < 60
    assert not multiprocessing.active_children()

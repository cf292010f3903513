from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from helpers.pictures import write_sample
from PIL import Image

from dalle_cli.config.schema import DataSettings
from dalle_cli.data.open_source import open_source
from dalle_cli.data.picture_loader import TrainingPictures


def test_training_draws_replacements_evenly(tmp_path: Path) -> None:
    """After 150 filtered samples in a row come 20 good ones, which are all seen about equally often."""
    for i in range(170):
        write_sample(tmp_path, f"{i:03d}", Image.new("RGB", (100, 20) if i < 150 else (20, 20)), "x")
    pictures = TrainingPictures(
        open_source(tmp_path),
        np.arange(170),
        16,
        DataSettings(crop=False),
        seed=0,
        batch_size=170,
        flip=False,
        workers=0,
    )
    seen: Counter[int] = Counter()
    for _, rows, _ in pictures.batches(0, 4):
        seen.update(rows.tolist())
    assert min(seen) >= 150
    assert sum(seen.values()) == 680
    assert max(seen.values()) < 3 * min(seen.values())  # 34 on average
    again = [rows.tolist() for _, rows, _ in pictures.batches(3, 4)]
    assert again == [rows.tolist() for _, rows, _ in pictures.batches(3, 4)]

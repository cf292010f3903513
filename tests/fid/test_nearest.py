"""Near-duplicates by features, against two loops over all pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers.generated_pictures import noise
from helpers.scorers import ColourScorer

from dalle_cli.data.open_source import open_source
from dalle_cli.fid import nearest
from dalle_cli.fid.features import clip_features
from dalle_cli.fid.nearest import find_nearest

NEAR = 0.995


def write(folder: Path, seeds: range) -> Path:
    folder.mkdir()
    for seed in seeds:
        noise(seed).save(folder / f"{seed:02d}.png")
        (folder / f"{seed:02d}.txt").write_text("a caption")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "broken.txt").write_text("a caption")
    return folder


def cosines(one: range, other: range) -> np.ndarray:
    """Return the cosines of the pictures' mean colours."""
    means = [np.array([np.asarray(noise(seed)).mean(axis=(0, 1)) for seed in seeds]) for seeds in (one, other)]
    unit = [mean / np.linalg.norm(mean, axis=1, keepdims=True) for mean in means]
    product: np.ndarray = unit[0] @ unit[1].T
    return product


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest, "BLOCK", 7)


def test_between_two_sources(tmp_path: Path) -> None:
    first, second = range(30), range(20, 60)  # ten pictures are in both
    a, b = (open_source(str(write(tmp_path / name, seeds))) for name, seeds in (("a", first), ("b", second)))
    features = clip_features(ColourScorer())
    found = find_nearest(a, b, features, tmp_path / "cache", max_pixels=10**6, threshold=NEAR)
    wanted = cosines(first, second)
    near = [i for i in range(30) if wanted[i].max() >= NEAR]
    assert 10 < len(near) < 30
    assert [(a.key(m.row), b.key(m.other)) for m in found.matches] == [
        (f"{first[i]:02d}", f"{second[int(wanted[i].argmax())]:02d}") for i in near
    ]
    assert [m.similarity for m in found.matches] == pytest.approx([wanted[i].max() for i in near], abs=2e-3)
    assert found.others == (wanted.max(axis=0) >= NEAR).sum()
    assert found.incomparable == 1
    assert '"distance"' not in found.to_json_lines()


def test_within_one_source_no_two_that_stay_are_near(tmp_path: Path) -> None:
    source = open_source(str(write(tmp_path / "a", range(60))))
    found = find_nearest(source, None, clip_features(ColourScorer()), tmp_path / "c", max_pixels=10**6, threshold=NEAR)
    wanted, stays, repeats = cosines(range(60), range(60)), [], {}
    for i in range(60):
        near = [j for j in stays if wanted[i, j] >= NEAR]
        if near:
            repeats[f"{i:02d}"] = f"{max(near, key=lambda j: wanted[i, j]):02d}"
        else:
            stays.append(i)
    assert len(repeats) > 10
    assert {source.key(m.row): source.key(m.other) for m in found.matches} == repeats
    assert found.others == len(set(repeats.values()))

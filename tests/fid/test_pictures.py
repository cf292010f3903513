from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.ndimage
import torch
from PIL import Image, ImageFilter

from dalle_cli.fid.pictures import gaussian_blur, open_pictures


def test_a_folder_of_pictures_is_read_in_order_of_its_paths(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name, shade in (("b.png", 20), ("a.png", 10), ("deep/c.PNG", 30)):
        Image.fromarray(np.full((40, 60, 3), shade, np.uint8)).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a caption")
    dataset = open_pictures(str(tmp_path), 16)
    assert [int(dataset[i].float().mean()) for i in range(len(dataset))] == [10, 20, 30]
    assert dataset[0].shape == (3, 16, 16)
    assert dataset[0].dtype == torch.uint8


def test_a_manifest_and_the_lines_of_samples_are_told_apart(tmp_path: Path) -> None:
    for name, shade in (("a.png", 10), ("b.png", 20)):
        Image.fromarray(np.full((16, 16, 3), shade, np.uint8)).save(tmp_path / name)
    manifest, samples = tmp_path / "list.jsonl", tmp_path / "samples.jsonl"
    manifest.write_text("".join(json.dumps({"path": name, "caption": "grey"}) + "\n" for name in ("b.png", "a.png")))
    samples.write_text(json.dumps({"prompt": "grey", "png": str(tmp_path / "a.png")}) + "\n")
    for spec, shades in ((manifest, [20, 10]), (samples, [10])):
        dataset = open_pictures(str(spec), 16)
        assert [int(dataset[i].float().mean()) for i in range(len(dataset))] == shades


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, height, width), dtype=np.uint8)


@pytest.mark.parametrize("radius", [0.5, 1, 2, 4, 8, 20])
def test_it_is_scipys_gaussian_filter_rounded(radius: float) -> None:
    x = picture(40, 56)
    expected = np.stack([scipy.ndimage.gaussian_filter(c.astype(float), radius, mode="nearest") for c in x])
    blurred = gaussian_blur(torch.from_numpy(x), radius)
    assert blurred.dtype == torch.uint8
    # Half a level is what rounding may take.
    assert np.abs(blurred.numpy() - expected).max() <= 0.501
    batch = gaussian_blur(torch.from_numpy(np.stack([x, x[::-1].copy()])), radius)
    assert torch.equal(batch[0], blurred)
    assert torch.equal(batch[1].flip(0), blurred)


def test_its_radius_is_pillows() -> None:
    """Pillow approximates the same filter by three boxes: alike inside, where the radius would show at once."""
    x = picture(96, 96)
    for radius in (2, 4, 8):
        image = Image.fromarray(x.transpose(1, 2, 0))
        pillow = np.asarray(image.filter(ImageFilter.GaussianBlur(radius))).transpose(2, 0, 1).astype(float)
        difference = np.abs(gaussian_blur(torch.from_numpy(x), radius).numpy() - pillow)
        other = np.abs(gaussian_blur(torch.from_numpy(x), 1.25 * radius).numpy() - pillow)
        assert difference.mean() < 1
        assert difference.mean() < 0.6 * other.mean()


def test_nothing_is_blurred_at_0_and_mistakes_are_refused() -> None:
    x = torch.from_numpy(picture(9, 7))
    assert torch.equal(gaussian_blur(x, 0), x)
    one_colour = torch.full((3, 5, 6), 77, dtype=torch.uint8)
    assert torch.equal(gaussian_blur(one_colour, 8), one_colour)
    with pytest.raises(ValueError, match="radius"):
        gaussian_blur(x, -1)
    with pytest.raises(TypeError):
        gaussian_blur(x.float(), 1)

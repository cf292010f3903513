from __future__ import annotations

import numpy as np
from helpers.near_duplicates import cropped, drawing, jpeg, photo, thumbnails
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn

from dalle_cli.data.overlap.hashes import (
    BIT_THRESHOLD,
    COMPARISON_SIDE,
    CUTS,
    INTERVALS,
    SIDE,
    VIEWS,
    comparable,
    hashes,
    similarity,
    similarity_of_view,
    view_hashes,
)


def test_a_hash_is_the_signs_of_the_low_frequencies() -> None:
    # Compared with scipy's DCT.
    small = thumbnails([photo(seed) for seed in range(20)])
    for picture, found in zip(small, hashes(small), strict=True):
        grey = picture @ np.array([0.299, 0.587, 0.114])
        whitened = dctn(grey, norm=None)[:8, :8] * np.hypot(*np.meshgrid(np.arange(8), np.arange(8)))
        bits = (whitened > BIT_THRESHOLD * np.sqrt(np.mean(whitened**2))).ravel()
        assert int(found) == int("".join("1" if bit else "0" for bit in bits), 2)


def test_a_view_has_the_hash_of_the_cropped_picture() -> None:
    # A few bits may differ, since a thumbnail of the crop is not made of the same pixels.
    images = [photo(seed, 320, 320) for seed in range(6)]
    distances = []
    views = view_hashes(thumbnails(images))
    assert views.shape == (6, VIEWS)
    assert (views[:, 0] == hashes(thumbnails(images))).all()
    for view in range(0, VIEWS, 7):
        (top, bottom), (left, right) = (INTERVALS[i] for i in divmod(view, len(INTERVALS)))
        crops = [cropped(image, left, top, right, bottom) for image in images]
        distances += np.bitwise_count(hashes(thumbnails(crops)) ^ views[:, view]).tolist()
    assert max(distances) <= 4
    assert np.mean(distances) < 1.5


def test_symmetric_drawings_hash_the_same_under_noise() -> None:
    # Half of a symmetric picture's frequencies are 0, and their bits must not depend on the noise.
    plain = Image.new("RGB", (200, 200), "white")
    plain.paste((200, 30, 30), (60, 60, 140, 140))
    rng = np.random.default_rng(0)
    noisy = [np.asarray(plain) + rng.normal(0, 6, (200, 200, 3)) for _ in range(20)]
    found = hashes(thumbnails([plain, *(Image.fromarray(n.clip(0, 255).astype(np.uint8)) for n in noisy)]))
    assert np.bitwise_count(found ^ found[0]).max() <= 1


def naive_similarity(whole: NDArray[np.uint8], cut: NDArray[np.uint8], view: int) -> float:
    """Compute the similarity from area averages pixel by pixel, gradients and their cosine."""

    def shrunk(picture: NDArray[np.uint8], vertical: tuple[float, float], horizontal: tuple[float, float]) -> NDArray:
        out = np.zeros((COMPARISON_SIDE, COMPARISON_SIDE, 3))
        weights = []
        for start, end in (vertical, horizontal):
            edges = (start + (1 - start - end) * np.arange(COMPARISON_SIDE + 1) / COMPARISON_SIDE) * SIDE
            weights.append(
                [
                    [max(0.0, min(edges[i + 1], p + 1) - max(edges[i], p)) for p in range(SIDE)]
                    for i in range(COMPARISON_SIDE)
                ]
            )
        for y, row in enumerate(weights[0]):
            for x, column in enumerate(weights[1]):
                area = np.outer(row, column)
                out[y, x] = (picture * area[..., None]).sum((0, 1)) / area.sum()
        return out

    def gradients(picture: NDArray) -> NDArray:
        return np.concatenate([np.diff(picture, axis=0).ravel(), np.diff(picture, axis=1).ravel()])

    vertical, horizontal = (INTERVALS[i] for i in divmod(view, len(INTERVALS)))
    a, b = gradients(shrunk(whole, vertical, horizontal)), gradients(shrunk(cut, (0, 0), (0, 0)))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_similarity_is_the_best_views_cosine_of_gradients() -> None:
    a = thumbnails([photo(1), photo(2), drawing(3)])
    b = thumbnails([cropped(photo(1), 0.05, 0, 0, 0.025), photo(4), jpeg(drawing(3))])
    for view in (0, 5, 38, 80):
        expected = [naive_similarity(one, two, view) for one, two in zip(a, b, strict=True)]
        np.testing.assert_allclose(similarity_of_view(a, b, np.full(3, view)), expected, atol=1e-4)
    best = np.max([similarity_of_view(a, b, np.full(3, view)) for view in range(VIEWS)], axis=0)
    np.testing.assert_allclose(similarity(a, b), best, atol=1e-5)
    assert similarity(a, b)[0] > 0.95
    assert similarity(a, b)[1] < 0.5
    assert similarity(a, b)[2] > 0.9
    np.testing.assert_allclose(similarity(a, a), 1, atol=1e-5)


def test_one_colour_is_not_comparable() -> None:
    grain = np.random.default_rng(0).normal(30, 20, (300, 300, 3)).clip(0, 255).astype(np.uint8)
    found = comparable(thumbnails([Image.new("RGB", (50, 50), "red"), Image.fromarray(grain), photo(0)]))
    assert found.tolist() == [False, False, True]


def test_cuts_are_the_documented_ones() -> None:
    assert CUTS == (0.0, 0.025, 0.05)
    assert len(INTERVALS) == 9
    assert VIEWS == 81

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
from helpers.scorers import ColourScorer
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorInceptionV3

from dalle_cli.errors import UserError
from dalle_cli.fid import metrics as fid
from dalle_cli.fid.features import CLIP_EXTRACTOR, Extracted, Features, clip_features, inception
from dalle_cli.fid.metrics import (
    FrechetTo,
    check_counts,
    compare,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    resampled,
)
from dalle_cli.fid.pictures import open_pictures


def normal(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(seed + 99).normal(size=(d, d)) / d**0.5
    return torch.from_numpy((rng.normal(size=(n, d)) @ mixing * scale + shift).astype(np.float32))


def pictures(n: int, seed: int = 0, size: int = 16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (n, size, size, 3), dtype=np.uint8)


class ArrayPictures(Dataset[Tensor]):
    """Pictures in memory: (n, H, W, 3) uint8."""

    def __init__(self, pictures: np.ndarray) -> None:
        self.pictures = torch.from_numpy(pictures).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tensor:
        return self.pictures[index]


def evaluate(
    generated: ArrayPictures, reference: ArrayPictures, features: Features, batch_size: int = 64
) -> dict[str, Any]:
    check_counts(len(generated), len(reference))
    one, other = (features.extract(pictures, batch_size=batch_size) for pictures in (generated, reference))
    return compare(one, other, features)


@pytest.mark.parametrize(("n", "m", "d"), [(400, 300, 16), (50, 60, 8), (10, 12, 24)])
def test_fid_is_the_frechet_distance_by_a_matrix_square_root(n: int, m: int, d: int) -> None:
    a, b = normal(n, d, 1), normal(m, d, 2, scale=1.5, shift=0.3)
    x, y = a.double().numpy(), b.double().numpy()
    s, t = (np.cov(z, rowvar=False) for z in (x, y))
    # sqrt(S) T sqrt(S) is symmetric, so its root is real also where S T has no unique one.
    half = scipy.linalg.sqrtm(s + 1e-12 * np.eye(d)).real
    root = np.sqrt(np.clip(np.linalg.eigvalsh(half @ t @ half), 0, None)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s) + np.trace(t) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-4)
    assert FrechetTo(b)(a) == pytest.approx(expected, rel=1e-4)
    if min(n, m) > d:
        plain = np.trace(scipy.linalg.sqrtm(s @ t).real)
        assert root == pytest.approx(plain, rel=1e-6)


def test_fid_of_two_gaussians_has_its_closed_form() -> None:
    base = np.random.default_rng(0).normal(size=(4000, 6))
    base = (base - base.mean(0)) @ np.linalg.inv(np.linalg.cholesky(np.cov(base, rowvar=False))).T
    first, second = np.array([1, 2, 3, 1, 0.5, 2.0]), np.array([2, 2, 1, 0.1, 0.5, 1.0])
    mean = np.array([0.5, 0, -1, 0, 0, 2])
    # Diagonal covariances: the sum of (mean difference)^2 + (difference of deviations)^2.
    expected = (mean**2).sum() + ((first - second) ** 2).sum()
    a, b = torch.from_numpy(base * first), torch.from_numpy(base * second + mean)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert FrechetTo(b)(a) == pytest.approx(expected, rel=1e-9)
    assert FrechetTo(a)(a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)


def test_kid_is_the_unbiased_cubic_mmd() -> None:
    a, b = normal(40, 5, 1), normal(40, 5, 2, shift=0.5)
    x, y = a.double().numpy(), b.double().numpy()

    def kernel(u: np.ndarray, v: np.ndarray) -> float:
        return float((u @ v / 5 + 1) ** 3)

    within = sum(kernel(z[i], z[j]) for z in (x, y) for i in range(40) for j in range(40) if i != j) / (40 * 39)
    across = sum(kernel(u, v) for u in x for v in y) / 40**2
    figures = kernel_distance(a, b)
    assert figures["kid_mean"] == pytest.approx(within - 2 * across, rel=1e-9)
    assert (figures["kid_subset_size"], figures["kid_subsets"], figures["kid_std"]) == (40, 1, None)


def test_kid_subsets_follow_the_counts_and_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = normal(30, 5, 1), normal(80, 5, 2)
    figures = kernel_distance(a, b, seed=1)
    assert (figures["kid_subset_size"], figures["kid_subsets"]) == (30, 100)
    assert figures["kid_std"] > 0
    assert kernel_distance(a, b, seed=1) == figures != kernel_distance(a, b, seed=2)
    monkeypatch.setattr(fid, "KID_SUBSETS", 2)
    assert kernel_distance(normal(1200, 3, 1), normal(1100, 3, 2))["kid_subset_size"] == 1000


def test_inception_score_of_closed_forms() -> None:
    certain = torch.eye(7).repeat(20, 1) * 1000
    mean, std, splits = inception_score(certain)
    assert mean == pytest.approx(7)
    assert (std, splits) == (None, 1)
    assert inception_score(torch.zeros(50, 7))[0] == pytest.approx(1)
    assert inception_score(certain[:1].repeat(50, 1))[0] == pytest.approx(1)
    # Half the pictures certain of class 0, half undecided: by hand.
    mixed = torch.tensor([[1000.0, 0.0]] * 10 + [[0.0, 0.0]] * 10)
    by_hand = np.exp(0.5 * np.log(1 / 0.75) + 0.5 * (0.5 * np.log(0.5 / 0.75) + 0.5 * np.log(0.5 / 0.25)))
    assert inception_score(mixed)[0] == pytest.approx(by_hand)
    mean, std, splits = inception_score(torch.randn(3000, 5, generator=torch.Generator().manual_seed(0)))
    assert splits == 3
    assert std is not None
    assert mean > 1


def test_inception_score_is_the_exponential_of_the_mean_divergence() -> None:
    logits = np.random.default_rng(0).normal(size=(60, 9)) * 3
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    divergence = (p * (np.log(p) - np.log(p.mean(axis=0)))).sum(axis=1)
    assert inception_score(torch.from_numpy(logits))[0] == pytest.approx(np.exp(divergence.mean()), rel=1e-9)


@pytest.mark.parametrize(("n", "m"), [(30, 45), (45, 30), (4, 60)])
def test_precision_and_recall_by_counting_neighbours(n: int, m: int) -> None:
    a, b = normal(n, 4, 1), normal(m, 4, 2, scale=1.3, shift=0.6)

    def share_within(inner: Tensor, outer: Tensor) -> float:
        x, y = inner.double().numpy(), outer.double().numpy()
        reach = [sorted(float(np.linalg.norm(u - v)) for j, v in enumerate(y) if j != i)[2] for i, u in enumerate(y)]
        return float(np.mean([any(np.linalg.norm(u - v) <= r for v, r in zip(y, reach, strict=True)) for u in x]))

    found = precision_recall(a, b)
    assert found["precision"] == pytest.approx(share_within(a, b), abs=1e-6)
    assert found["recall"] == pytest.approx(share_within(b, a), abs=1e-6)
    p = share_within(a, b)
    assert found["precision_error"] == pytest.approx((p * (1 - p) / n) ** 0.5, abs=1e-6)
    assert set(precision_recall(a[:3], b).values()) == {None}


def test_bootstrap_sets_are_whole_captions_and_their_spread_is_the_means() -> None:
    groups = np.repeat(np.arange(5), [1, 3, 2, 2, 1])
    for rows in resampled(9, groups, 20, seed=3):
        drawn = groups[rows]
        # As many captions as there are, each with all of its pictures as often as it was drawn.
        times = {g: (drawn == g).sum() / (groups == g).sum() for g in set(drawn.tolist())}
        assert all(value == int(value) for value in times.values())
        assert sum(times.values()) == 5
    # With equal spreads, FID is nearly the squared difference of means, 5 in one dimension: its deviation is known.
    reference = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    generated = torch.randn(400, 2, generator=torch.Generator().manual_seed(1)) + torch.tensor([5.0, 0.0])
    features = Features("f", None, "vector", None, "s", torch.device("cpu"), "f")  # type: ignore[arg-type]
    found = compare(Extracted(generated, None), Extracted(reference, None), features, bootstrap=200)
    assert found["fid_error"] == pytest.approx(2 * 5 / 400**0.5, rel=0.15)
    pairs = np.arange(400) // 2
    doubled = generated[pairs]
    clustered = compare(Extracted(doubled, None), Extracted(reference, None), features, bootstrap=200, groups=pairs)
    assert clustered["fid_error"] == pytest.approx(2 * 5 / 200**0.5, rel=0.15)


def test_clip_features_go_through_torch_fidelity_unchanged() -> None:
    scorer = ColourScorer()
    generated, reference = ArrayPictures(pictures(12, 1)), ArrayPictures(pictures(20, 2))
    result = evaluate(generated, reference, clip_features(scorer, ["red", "green", "blue"]), batch_size=5)
    peer = torch_fidelity.calculate_metrics(
        input1=generated,
        input2=reference,
        feature_extractor=CLIP_EXTRACTOR,
        scorer=scorer,
        class_captions=["red", "green", "blue"],
        fid=True,
        kid=True,
        isc=True,
        kid_subset_size=12,
        isc_splits=1,
        rng_seed=0,
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert result["fid"] == pytest.approx(peer["frechet_inception_distance"], rel=1e-3)
    assert result["kid_mean"] == pytest.approx(peer["kernel_inception_distance_mean"], rel=1e-3)
    assert result["clip_is"] == pytest.approx(peer["inception_score_mean"], rel=1e-9)
    assert result["features"] == "clip-image colours"
    assert "inception_score" not in result
    assert (result["n_generated"], result["n_reference"], result["feature_dimensions"]) == (12, 20, 3)


def test_clip_features_have_unit_mean_square_and_classes_are_similarities() -> None:
    images = pictures(6)
    extracted = clip_features(ColourScorer(), ["green", "blue"]).extract(ArrayPictures(images))
    means = images.mean(axis=(1, 2))
    unit = means / np.linalg.norm(means, axis=1, keepdims=True)
    np.testing.assert_allclose(extracted.vectors.numpy(), unit * 3**0.5, rtol=1e-5)
    assert extracted.logits is not None
    np.testing.assert_allclose(extracted.logits.numpy(), 10 * unit[:, 1:], rtol=1e-5)
    some = extracted.rows([4, 1])
    assert len(some) == 2
    assert torch.equal(some.vectors, extracted.vectors[[4, 1]])
    assert clip_features(ColourScorer()).extract(ArrayPictures(images)).logits is None
    with pytest.raises(ValueError, match="two or more"):
        clip_features(ColourScorer(), ["red"])


def test_too_few_pictures_are_refused_or_warned_of() -> None:
    features = clip_features(ColourScorer())
    with pytest.raises(UserError, match="generated pictures: 1 given"):
        evaluate(ArrayPictures(pictures(1)), ArrayPictures(pictures(9)), features)
    with pytest.raises(UserError, match="reference pictures: 0 given"):
        evaluate(ArrayPictures(pictures(2)), ArrayPictures(pictures(0)), features)
    few = evaluate(ArrayPictures(pictures(3)), ArrayPictures(pictures(9)), features)
    assert any("3 generated pictures for 3 feature dimensions: the cov" in warning for warning in few["warnings"])
    assert any("precision and recall need more than 3" in w for w in few["warnings"])
    assert few["precision"] is None
    assert evaluate(ArrayPictures(pictures(9, 1)), ArrayPictures(pictures(9)), features)["warnings"] == []
    assert "clip_is" not in few


def test_no_output_is_shared_between_features() -> None:
    one = Extracted(normal(9, 3, 0), None)
    features = clip_features(ColourScorer())
    compare(one, one, features)["warnings"].append("x")
    assert features.warnings == []


# --- Inception-v3 ---


class _Blank(FeatureExtractorInceptionV3):  # type: ignore[misc]
    """The network before any weights are loaded."""

    def load_state_dict(self, *_: object, **__: object) -> None:
        return None


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random file of the published layout."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    torch.manual_seed(0)
    network = _Blank("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty)
    path = tmp_path_factory.mktemp("inception") / "random.pth"
    torch.save(network.state_dict(), path)
    return path


def test_inception_measures_with_the_file_that_is_given(weights: Path) -> None:
    features: Features = inception(weights)
    assert features.name.startswith("inception-v3-compat sha256:")
    generated, reference = ArrayPictures(pictures(3, 1)), ArrayPictures(pictures(4, 2))
    result = evaluate(generated, reference, features)
    peer = torch_fidelity.calculate_metrics(
        input1=generated,
        input2=reference,
        feature_extractor_weights_path=str(weights),
        fid=True,
        kid=True,
        isc=True,
        kid_subset_size=3,
        isc_splits=1,
        rng_seed=0,
        cuda=False,
        save_cpu_ram=True,
        verbose=False,
    )
    assert result["fid"] == pytest.approx(peer["frechet_inception_distance"], rel=1e-3)
    assert result["kid_mean"] == pytest.approx(peer["kernel_inception_distance_mean"], rel=1e-2, abs=1e-6)
    assert result["inception_score"] == pytest.approx(peer["inception_score_mean"], rel=1e-6)
    assert result["feature_dimensions"] == 2048
    assert any("not the published" in w for w in result["warnings"])
    assert any("singular" in w for w in result["warnings"])


def test_inception_files_that_will_not_do_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.pth do not exist.*weights-inception-2015-12-05-6726825d.pth"):
        inception(tmp_path / "absent.pth")
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not fit"):
        inception(tmp_path / "other.pth")
    sprung = tmp_path / "sprung"
    torch.save(_Trap(sprung), tmp_path / "trap.pth")
    with pytest.raises(UserError, match="cannot be read as tensors"):
        inception(tmp_path / "trap.pth")
    assert not sprung.exists()


def test_without_a_network_the_inception_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    with pytest.raises(UserError, match=r"no route to host.*weights-inception-2015-12-05-6726825d.pth"):
        inception()


class _Trap:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


# --- folders ---


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


@pytest.mark.parametrize("workers", [False, True])
def test_a_broken_picture_is_named_in_one_line(tmp_path: Path, workers: bool) -> None:
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    features = clip_features(ColourScorer())
    with pytest.raises(UserError, match=r"b\.png") as caught:
        features.extract(open_pictures(str(tmp_path), 16), workers=workers)
    assert "\n" not in str(caught.value)

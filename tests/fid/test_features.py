from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_fidelity
from helpers.generated_pictures import noise, write_folder
from helpers.scorers import CLASSES, ColourScorer
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torch_fidelity import FeatureExtractorInceptionV3
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from dalle_cli.errors import UserError
from dalle_cli.fid import features as features_module
from dalle_cli.fid.features import ClipExtractor, Features, cached_features, clip_features, inception
from dalle_cli.fid.metrics import compare
from dalle_cli.fid.pictures import open_pictures, survey


@pytest.fixture(scope="module")
def features() -> Features:
    return clip_features(ColourScorer(), CLASSES)


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


class RegisteredClip(ClipExtractor):
    """The extractor as torch-fidelity's own evaluation makes it, by a name in its registry."""

    def __init__(self, name: str, layers: Sequence[str], *, scorer: ColourScorer, **_: Any) -> None:
        super().__init__(scorer, layers, CLASSES)

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return {"isc": "logits", "fid": "vector", "kid": "vector"}[metric]

    @staticmethod
    def can_be_compiled() -> bool:
        return False


class FileMaker:
    """An object whose unpickling makes a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.target,)


def test_clip_features_have_the_figures_of_torch_fidelity(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = ColourScorer()
    generated, reference = ArrayPictures(pictures(12, 1)), ArrayPictures(pictures(20, 2))
    features = clip_features(scorer, CLASSES)
    result = compare(*(features.extract(side, batch_size=5) for side in (generated, reference)))
    monkeypatch.setitem(FEATURE_EXTRACTORS_REGISTRY, "registered-clip", RegisteredClip)
    peer = torch_fidelity.calculate_metrics(
        input1=generated,
        input2=reference,
        feature_extractor="registered-clip",
        scorer=scorer,
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
    assert result.fid == pytest.approx(peer["frechet_inception_distance"], rel=1e-3)
    assert result.kid_mean == pytest.approx(peer["kernel_inception_distance_mean"], rel=1e-3)
    assert result.score == pytest.approx(peer["inception_score_mean"], rel=1e-9)
    assert (features.name, features.score_name) == ("clip-image colours", "clip_is")
    assert (result.n_generated, result.n_reference, result.feature_dimensions) == (12, 20, 3)


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


def test_features_are_cached_by_content(features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features_module, "CHUNK", 4)
    real = open_pictures(str(write_folder(tmp_path / "real", 10)), 8)
    cache = tmp_path / "cache"
    first = cached_features(real, survey(real).digests, features, cache).whole()
    np.testing.assert_array_equal(first.vectors.numpy(), features.extract(real).vectors.numpy())
    assert len(list(cache.iterdir())) == 3
    # The cache knows files by their content, wherever they lie and whatever their names.
    (tmp_path / "real").rename(tmp_path / "moved")
    for file in sorted((tmp_path / "moved").iterdir()):
        file.rename(file.with_name(f"x{file.name}"))
    moved = open_pictures(str(tmp_path / "moved"), 8)
    digests = survey(moved).digests
    with monkeypatch.context() as patched:
        patched.setattr(Features, "extract", None)
        again = cached_features(moved, digests, features, cache).whole()
    assert again.logits is not None
    assert first.logits is not None
    np.testing.assert_array_equal(again.logits.numpy(), first.logits.numpy())
    blurred = cached_features(moved, digests, features, cache, blur=2).whole()
    assert len(list(cache.iterdir())) == 6
    assert (blurred.vectors != first.vectors).any()
    other = clip_features(ColourScorer(), CLASSES[:2])
    assert cached_features(moved, digests, other, cache).whole().logits.shape[1] == 2  # type: ignore[union-attr]
    # A damaged file of the cache is made again, and so is the chunk of a picture that has changed.
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:20])
    np.testing.assert_array_equal(cached_features(moved, digests, features, cache).whole().vectors, first.vectors)
    rng = np.random.default_rng(0)
    for flip in range(30):
        file = sorted(cache.iterdir())[flip % 6]
        flipped = bytearray(file.read_bytes())
        flipped[-1 - int(rng.integers(min(len(flipped), 60)))] ^= 1 << int(rng.integers(8))
        file.write_bytes(flipped)
        for blur, wanted in ((0, first), (2, blurred)):
            found = cached_features(moved, digests, features, cache, blur=blur).whole()
            assert torch.equal(found.vectors, wanted.vectors)
            assert wanted.logits is not None
            assert found.logits is not None
            assert torch.equal(found.logits, wanted.logits)
    noise(77).save(tmp_path / "moved" / "x009.png")
    changed = cached_features(moved, survey(moved).digests, features, cache).whole()
    assert (changed.vectors != first.vectors).any(dim=1).tolist() == [False] * 9 + [True]


def test_some_rows_of_cached_features_are_those_of_the_whole(
    features: Features, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "CHUNK", 4)
    real = open_pictures(str(write_folder(tmp_path / "real", 10)), 8)
    kept = cached_features(real, survey(real).digests, features, tmp_path / "cache")
    whole = features.extract(real)
    rows = np.array([9, 0, 3, 4, 0, 8])
    some = kept.rows(rows)
    assert len(kept) == 10
    assert torch.equal(some.vectors, whole.vectors[rows])
    assert some.logits is not None
    assert whole.logits is not None
    assert torch.equal(some.logits, whole.logits[rows])
    kept.files[1].unlink()
    assert len(kept.rows(np.array([0, 9]))) == 2
    with pytest.raises(UserError, match=r"safetensors: cannot be read .*run the same command again"):
        kept.whole()


class _Blank(FeatureExtractorInceptionV3):  # type: ignore[misc]
    """The network without weights loaded."""

    def load_state_dict(self, *_: object, **__: object) -> None:
        return None


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of random weights in the published layout."""
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
    result = compare(features.extract(generated), features.extract(reference))
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
    assert result.fid == pytest.approx(peer["frechet_inception_distance"], rel=1e-3)
    assert result.kid_mean == pytest.approx(peer["kernel_inception_distance_mean"], rel=1e-2, abs=1e-6)
    assert result.score == pytest.approx(peer["inception_score_mean"], rel=1e-6)
    assert result.feature_dimensions == 2048
    assert features.score_name == "inception_score"
    (warning,) = features.warnings
    assert "not the published" in warning


def test_inception_files_that_will_not_do_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.pth do not exist.*weights-inception-2015-12-05-6726825d.pth"):
        inception(tmp_path / "absent.pth")
    torch.save({"fc.bias": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="does not fit"):
        inception(tmp_path / "other.pth")
    made = tmp_path / "made"
    torch.save(FileMaker(made), tmp_path / "trap.pth")
    with pytest.raises(UserError, match="cannot be read as tensors"):
        inception(tmp_path / "trap.pth")
    assert not made.exists()


def test_without_a_network_the_inception_file_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fails)
    with pytest.raises(UserError, match=r"no route to host.*weights-inception-2015-12-05-6726825d.pth"):
        inception()


@pytest.mark.parametrize("workers", [False, True])
def test_a_broken_picture_is_named_in_one_line(tmp_path: Path, workers: bool) -> None:
    Image.fromarray(pictures(1)[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no picture")
    features = clip_features(ColourScorer())
    with pytest.raises(UserError, match=r"b\.png") as caught:
        features.extract(open_pictures(str(tmp_path), 16), workers=workers)
    assert "\n" not in str(caught.value)

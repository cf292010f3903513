"""Scorers by CLIP: published ones as open_clip itself computes them, our own, and refusals of what does not fit."""

from __future__ import annotations

import json
import pickle
import socket
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from huggingface_hub import constants as hub
from PIL import Image
from safetensors.torch import save_file

from dalle_cli import pretrained
from dalle_cli.clip.model import build_clip, clip_text_ids, pixels
from dalle_cli.clip.published import OpenClipScorer
from dalle_cli.clip.scorer import Scorer
from dalle_cli.clip.scoring import OwnScorer
from dalle_cli.config.schema import ClipModel
from dalle_cli.errors import UserError

NAME = "tiny-for-tests"
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
CAPTIONS = ["a red star", "a blue circle above a green square", ""]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random model of open_clip's layout and its weights in a folder."""
    folder = tmp_path_factory.mktemp("published")
    (folder / f"{NAME}.json").write_text(json.dumps(CONFIG))
    open_clip.add_model_config(folder / f"{NAME}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(NAME).eval()
    torch.save(model.state_dict(), folder / "weights.pt")
    torch.save(
        {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}},
        folder / "epoch.pt",
    )
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": {}}))
    return model, folder


def pictures(n: int, *sizes: tuple[int, int]) -> list[np.ndarray]:
    rng = np.random.default_rng(n)
    return [rng.integers(0, 256, (*sizes[i % len(sizes)], 3), dtype=np.uint8) for i in range(n)]


@pytest.mark.parametrize("file", ["weights.pt", "epoch.pt", "open_clip_model.safetensors"])
def test_a_local_file_scores_as_open_clip_itself(published: tuple[Any, Path], file: str) -> None:
    model, folder = published
    scorer: Scorer = OpenClipScorer(NAME, str(folder / file))
    images = pictures(5, (40, 60), (32, 32), (90, 50))
    transform = open_clip.image_transform(32, is_train=False)
    with torch.no_grad():
        expected_images = model.encode_image(torch.stack([transform(Image.fromarray(x)) for x in images]))
        expected_text = model.encode_text(open_clip.SimpleTokenizer()(CAPTIONS))
    expected_images = expected_images / expected_images.norm(dim=1, keepdim=True)
    expected_text = expected_text / expected_text.norm(dim=1, keepdim=True)
    torch.testing.assert_close(scorer.image_features(images), expected_images)
    torch.testing.assert_close(scorer.text_features(CAPTIONS), expected_text)
    assert scorer.logit_scale == pytest.approx(1 / 0.07)
    assert scorer.name.startswith(f"open_clip {NAME}/{file} sha256:")


def test_a_local_folder_names_model_and_weights(published: tuple[Any, Path]) -> None:
    _, folder = published
    by_file = OpenClipScorer(NAME, str(folder / "weights.pt"))
    by_folder = OpenClipScorer("whatever", f"local-dir:{folder}")
    torch.testing.assert_close(by_folder.text_features(CAPTIONS), by_file.text_features(CAPTIONS))


class Trap:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path(self.target),)  # type: ignore[return-value]

    def __init__(self, target: Path) -> None:
        self.target = str(target)


def test_a_pickle_that_would_run_code_is_refused(published: tuple[Any, Path], tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"state_dict": Trap(sprung)}, tmp_path / "trap.pt")
    with (tmp_path / "bare.pt").open("wb") as file:
        pickle.dump(Trap(sprung), file)
    for name in ("trap.pt", "bare.pt"):
        with pytest.raises(UserError, match=rf"{name} is no weights file of {NAME}"):
            OpenClipScorer(NAME, str(tmp_path / name))
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))
    assert sprung.exists(), "the trap is one"


@pytest.mark.parametrize(
    ("model", "pretrained", "words"),
    [
        ("ViT-B32", "openai", "no model 'ViT-B32'; near names: ViT-B-32"),
        ("ViT-B-32", "laion2b_s34b", "near names: laion2b_s34b_b79k"),
        ("ViT-B-32", "zzzz", "some that exist: "),
        ("ViT-B-32", "missing/weights.pt", "missing/weights.pt does not exist"),
        ("ViT-S-32", "openai", "no weights for ViT-S-32"),
        ("any", "local-dir:missing", "local-dir:missing cannot be loaded"),
    ],
)
def test_mistakes_are_named(model: str, pretrained: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        OpenClipScorer(model, pretrained)
    assert "\n" not in str(caught.value)


def test_another_models_weights_are_refused(published: tuple[Any, Path], tmp_path: Path) -> None:
    model, _ = published
    state = {name: value for name, value in model.state_dict().items() if "resblocks.1" not in name}
    torch.save(state, tmp_path / "less.pt")
    with pytest.raises(UserError, match="is no weights file of"):
        OpenClipScorer(NAME, str(tmp_path / "less.pt"))


def test_without_a_network_the_file_to_provide_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_address(*_: object) -> None:
        raise OSError("no such host")

    monkeypatch.setattr(socket, "getaddrinfo", no_address)
    monkeypatch.setattr(pretrained, "getproxies", dict)
    with pytest.raises(UserError, match=r"\(no network\).*laion/CLIP-ViT-B-32.*safetensors") as caught:
        OpenClipScorer("ViT-B-32", "laion2b_s34b_b79k", cache_dir=str(tmp_path))
    assert "'laion2b_s34b_b79k'" in str(caught.value)
    with pytest.raises(UserError, match=r"hf-hub:some/model cannot be fetched \(no network\)"):
        OpenClipScorer("any", "hf-hub:some/model", cache_dir=str(tmp_path))
    assert not hub.HF_HUB_OFFLINE


class WordLengths:
    """A stand-in for the encoder of captions: a word's token is its length."""

    cut = 0

    def encode(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, length = np.zeros((len(captions), 6), np.int64), np.zeros(len(captions), np.int64)
        for row, caption in enumerate(captions):
            words = caption.split()[:6]
            ids[row, : len(words)] = [len(word) for word in words]
            length[row] = len(words)
        return ids, length


def test_own_scorer_is_the_model_on_its_own_tokens_and_sizes() -> None:
    settings = ClipModel(
        embed_dim=16,
        patch_size=8,
        vision_width=32,
        vision_layers=1,
        text_width=32,
        text_layers=1,
        head_width=16,
    )
    model = build_clip(settings, 16, 6, 40, seed=5)

    scorer: Scorer = OwnScorer(model, WordLengths(), 16, name="clip runs/x")  # type: ignore[arg-type]
    batch = np.stack(pictures(300, (16, 16)))
    captions = ["a bb ccc", "dddd"] * 100
    ids, length = map(torch.from_numpy, WordLengths().encode(captions))
    with torch.no_grad():
        text = model.encode_text(clip_text_ids(ids, length, 40))
        image = model.encode_image(pixels(torch.from_numpy(batch)))
    torch.testing.assert_close(scorer.text_features(captions), text / text.norm(dim=1, keepdim=True))
    torch.testing.assert_close(scorer.image_features(batch), image / image.norm(dim=1, keepdim=True))
    torch.testing.assert_close(scorer.image_features(list(batch[:3])), scorer.image_features(batch[:3]))
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 255
    white = np.full((16, 16, 3), 255, np.uint8)
    torch.testing.assert_close(scorer.image_features([wide]), scorer.image_features([white]))
    with pytest.raises(ValueError, match="nothing to score"):
        scorer.text_features([])

"""CLIPs that score how well a picture matches a caption: our own, or a published one through open_clip."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import open_clip
import torch
from huggingface_hub import constants as hub
from numpy.typing import NDArray
from open_clip.model import CLIP
from PIL import Image, ImageOps
from torch import Tensor

from dalle_cli.clip.model import clip_text_ids, pixels
from dalle_cli.clip.train import load_clip
from dalle_cli.config.run_folders import run_of
from dalle_cli.distributed.device import use_settings
from dalle_cli.errors import UserError
from dalle_cli.pretrained import first_line, no_waiting_for_a_network, quiet, weights_hash
from dalle_cli.stores.checkpoint import Which, check_belongs, open_stage
from dalle_cli.stores.files import sha256_file
from dalle_cli.text.bpe import Tokenizer
from dalle_cli.text.encode import CaptionEncoder

Pictures = Sequence[NDArray[np.uint8]] | NDArray[np.uint8]
"""Pictures (H, W, 3) uint8 in a list (sizes may differ), or one array (n, H, W, 3)."""

BATCH = 128
_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".npz")
_SCHEMAS = ("hf-hub:", "local-dir:")


class Scorer(Protocol):
    """A CLIP for reranking and evaluation. Its features are unit vectors, float32, on the CPU."""

    @property
    def name(self) -> str:
        """Name of the model, for outputs with its scores."""
        ...

    @property
    def identity(self) -> str:
        """Hash of the weights and the picture preprocessing, for caches of features."""
        ...

    @property
    def logit_scale(self) -> float:
        """Learned factor that turns cosine similarities into logits."""
        ...

    @property
    def captions_cut(self) -> int:
        """Number of captions cut so far to the model's number of tokens; 0 if unknown."""
        ...

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Return the unit vectors of n captions, (n, d)."""
        ...

    def prepare(self, picture: NDArray[np.uint8]) -> Tensor:
        """Prepare a picture (H, W, 3) for ``prepared_features``; safe to call from several threads."""
        ...

    def prepared_features(self, prepared: Sequence[Tensor]) -> Tensor:
        """Return the unit vectors of n prepared pictures, (n, d), computed as one batch."""
        ...

    def image_features(self, pictures: Pictures) -> Tensor:
        """Return the unit vectors of n pictures, (n, d), computed in batches."""
        ...


class OwnScorer:
    """Our own CLIP; pictures of other sizes than ``image_size`` are cropped and resized."""

    def __init__(self, model: CLIP, encoder: CaptionEncoder, image_size: int, *, name: str = "clip") -> None:
        self.model = model.eval()
        self.encoder = encoder
        self.image_size = image_size
        self.name = name

    @property
    def captions_cut(self) -> int:
        return self.encoder.cut

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach().exp())

    @torch.inference_mode()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        end_of_text = self.model.vocab_size - 1
        device = self.model.logit_scale.device
        features = []
        for chunk in _chunks(captions):
            ids, length = map(torch.from_numpy, self.encoder.encode(list(chunk)))
            ids = clip_text_ids(ids, length, end_of_text).to(device)
            features.append(self.model.encode_text(ids, normalize=True).float().cpu())
        return _joined(features)

    def prepare(self, picture: NDArray[np.uint8]) -> Tensor:
        # from_numpy needs a contiguous, writable array; np.require copies others.
        return torch.from_numpy(np.require(self._sized(picture), requirements=["C", "W"]))

    @torch.inference_mode()
    def prepared_features(self, prepared: Sequence[Tensor]) -> Tensor:
        batch = pixels(torch.stack(list(prepared)).to(self.model.logit_scale.device))
        features: Tensor = self.model.encode_image(batch, normalize=True).float().cpu()
        return features

    def image_features(self, pictures: Pictures) -> Tensor:
        return _joined([self.prepared_features([*map(self.prepare, chunk)]) for chunk in _chunks(pictures)])

    @cached_property
    def identity(self) -> str:
        return weights_hash(self.model, str(self.image_size))

    def _sized(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        size = (self.image_size, self.image_size)
        if picture.shape == (*size, 3):
            return picture
        return np.asarray(ImageOps.fit(Image.fromarray(picture), size, Image.Resampling.BICUBIC))


class OpenClipScorer:
    """A published CLIP.

    Weights are read as tensors only; a file with other objects is refused. A weights file does not name the activation
    it was trained with: OpenAI's weights need a model name that ends in ``-quickgelu``.

    Args:
        model_name: one of open_clip's names, such as ``ViT-B-32``, or model and weights at once as
            ``hf-hub:owner/name`` or ``local-dir:folder`` (also accepted as ``pretrained``).
        pretrained: a tag of that model, such as ``laion2b_s34b_b79k``, or the path of a weights file.
        device: device to compute on.
        cache_dir: folder of downloaded weights; None for open_clip's own.

    Raises:
        UserError: the name or tag is unknown, the file is missing or does not fit, or weights cannot be downloaded.
    """

    captions_cut = 0
    """Always 0, since open_clip's tokenizers do not count the captions they cut."""

    def __init__(self, model_name: str, pretrained: str, *, device: str = "cpu", cache_dir: str | None = None) -> None:
        if pretrained.startswith(_SCHEMAS):
            model_name = pretrained
        options: dict[str, Any] = {}
        if not model_name.startswith(_SCHEMAS):
            model_name = model_name.replace("/", "-")
            _check_names(model_name, pretrained)
            options = {"pretrained": pretrained, **_file_preprocessing(model_name, pretrained)}
        with quiet(), no_waiting_for_a_network():
            try:
                # Other loaders of open_clip keep random weights instead of raising.
                self.model, self.preprocess = open_clip.create_model_from_pretrained(
                    model_name, device=device, cache_dir=cache_dir, weights_only=True, **options
                )
            except Exception as error:
                raise UserError(_cannot_load(model_name, pretrained, error)) from error
            try:
                self.tokenizer = open_clip.get_tokenizer(model_name, cache_dir=cache_dir)
            except Exception as error:
                raise UserError(
                    f"the tokenizer of open_clip model {model_name} cannot be loaded ({first_line(error)}); "
                    "fetch it once with a network, or choose a model with open_clip's own BPE: ViT-B-32"
                ) from error
        self.model.eval()
        self.device = device
        self.name = _scorer_name(model_name, pretrained)

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach().exp())

    @torch.inference_mode()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        features = []
        for chunk in _chunks(captions):
            ids = self.tokenizer(list(chunk)).to(self.device)
            features.append(self.model.encode_text(ids, normalize=True).float().cpu())
        return _joined(features)

    def prepare(self, picture: NDArray[np.uint8]) -> Tensor:
        prepared: Tensor = self.preprocess(Image.fromarray(picture))
        return prepared

    @torch.inference_mode()
    def prepared_features(self, prepared: Sequence[Tensor]) -> Tensor:
        batch = torch.stack(list(prepared)).to(self.device)
        features: Tensor = self.model.encode_image(batch, normalize=True).float().cpu()
        return features

    def image_features(self, pictures: Pictures) -> Tensor:
        return _joined([self.prepared_features([*map(self.prepare, chunk)]) for chunk in _chunks(pictures)])

    @cached_property
    def identity(self) -> str:
        return weights_hash(self.model, re.sub(" at 0x[0-9a-f]+", "", repr(self.preprocess)))


def load_scorer(
    clip: str | None,
    pretrained: str | None,
    tokenizer: Path | None,
    beside: Path,
    device: torch.device | str = "cpu",
    which: Which = "best",
) -> Scorer:
    """Load the scorer for a command's options ``--clip``, ``--pretrained`` and ``--tokenizer``.

    By default this is the CLIP of the run that has ``beside``, such as a sample, with the tokenizer of its run.

    Raises:
        UserError: there is no such CLIP, or the tokenizer is not the one it was trained with.
    """
    if clip is not None and (pretrained is not None or clip.startswith(_SCHEMAS)):
        return OpenClipScorer(clip, pretrained or "", device=str(device))
    folder = Path(clip) if clip is not None else run_of(beside).clip
    if not folder.exists():
        raise UserError(
            f"{folder}: no CLIP there; train one with dalle train-clip, or give --clip MODEL --pretrained TAG|FILE"
        )
    checkpoint = open_stage(folder, "clip", which)
    bpe = Tokenizer.load(tokenizer or run_of(checkpoint.path).tokenizer)
    check_belongs(checkpoint, "tokenizer", bpe.identity, bpe.name)
    recipe = checkpoint.recipe()
    use_settings(recipe)
    # The end of the path, such as quickstart/clip/step-00001050, is the same from every folder and on every machine.
    name = f"{Path(*checkpoint.path.resolve().parts[-3:])} sha256:{checkpoint.identity[:12]}"
    encoder = CaptionEncoder(bpe, recipe.tokenizer)
    return OwnScorer(load_clip(checkpoint).to(device), encoder, recipe.image_size, name=name)


def _chunks(items: Sequence[Any] | NDArray[np.uint8]) -> Iterator[Sequence[Any] | NDArray[np.uint8]]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))


def _joined(features: list[Tensor]) -> Tensor:
    if not features:
        raise ValueError("nothing to score: no captions or pictures were given")
    return torch.cat(features)


def _check_names(model_name: str, pretrained: str) -> None:
    names = open_clip.list_models()
    if model_name not in names:
        raise UserError(f"open_clip has no model {model_name!r}{_near(model_name, names)}")
    if open_clip.is_pretrained_cfg(model_name, pretrained) or os.path.isfile(pretrained):
        return
    if os.sep in pretrained or pretrained.endswith(_WEIGHT_SUFFIXES):
        raise UserError(f"weights file {pretrained} does not exist; give the path of {model_name}'s weights")
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    if not tags:
        raise UserError(f"open_clip lists no weights for {model_name}, nor {pretrained!r}; give a weights file's path")
    raise UserError(f"open_clip model {model_name} has no weights {pretrained!r}{_near(pretrained, tags)}")


def _near(word: str, known: list[str]) -> str:
    lower = {name.lower(): name for name in known}
    near = [lower[name] for name in difflib.get_close_matches(word.lower(), lower, n=5, cutoff=0.4)]
    return f"; near names: {', '.join(near)}" if near else f"; some that exist: {', '.join(sorted(known)[:5])}"


def _file_preprocessing(model_name: str, pretrained: str) -> dict[str, Any]:
    """Return the picture preprocessing for a weights file: the model's published one, if all its tags agree."""
    if open_clip.is_pretrained_cfg(model_name, pretrained):
        return {}
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    keys = ("mean", "std", "interpolation", "resize_mode")
    preparations = {tuple(open_clip.get_pretrained_cfg(model_name, tag).get(key) for key in keys) for tag in tags}
    if len(preparations) != 1:
        return {}
    return {f"image_{key}": value for key, value in zip(keys, preparations.pop(), strict=True) if value is not None}


def _cannot_load(model_name: str, pretrained: str, error: Exception) -> str:
    reason = "no network" if hub.HF_HUB_OFFLINE else first_line(error)
    if model_name.startswith("local-dir:"):
        return (
            f"{model_name} cannot be loaded ({first_line(error)}); give a folder that holds "
            "open_clip_config.json and the weights"
        )
    if model_name.startswith("hf-hub:"):
        return f"{model_name} cannot be fetched ({reason}); provide its files in a folder: local-dir:FOLDER"
    if not open_clip.is_pretrained_cfg(model_name, pretrained):
        return (
            f"{pretrained} is no weights file of {model_name} ({first_line(error)}); give a .safetensors "
            "file or a PyTorch file that holds only that model's state dict"
        )
    config = open_clip.get_pretrained_cfg(model_name, pretrained)
    place = config.get("hf_hub") or os.path.basename(config.get("url", ""))
    file = f"{place}open_clip_model.safetensors" if place.endswith("/") else place
    return (
        f"weights {pretrained!r} of {model_name} cannot be fetched ({reason}); provide the file {file} "
        f"and give its path in place of {pretrained!r}"
    )


def _scorer_name(model_name: str, pretrained: str) -> str:
    if model_name.startswith(_SCHEMAS):
        return f"open_clip {model_name}"
    if open_clip.is_pretrained_cfg(model_name, pretrained):
        return f"open_clip {model_name}/{pretrained}"
    return f"open_clip {model_name}/{Path(pretrained).name} sha256:{sha256_file(Path(pretrained))[:12]}"

"""Scorers: how well a picture matches a caption, by our own CLIP or by a published one through open_clip."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
import open_clip
import torch
from huggingface_hub import constants as hub
from numpy.typing import NDArray
from open_clip.model import CLIP
from PIL import Image, ImageOps
from torch import Tensor

from dalle_cli.clip.model import clip_text_ids, pixels
from dalle_cli.errors import UserError
from dalle_cli.stores.files import sha256_file

Pictures = Sequence[NDArray[np.uint8]] | NDArray[np.uint8]
"""Pictures (H, W, 3) uint8, in a list (sizes may differ) or as one array (n, H, W, 3)."""

Tokenize = Callable[[list[str]], tuple[NDArray[np.integer[Any]], NDArray[np.integer[Any]]]]
"""Captions -> BPE ids (n, text_length) and token counts (n,)."""

BATCH = 128
_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".npz")
_SCHEMAS = ("hf-hub:", "local-dir:")


class Scorer(Protocol):
    """What reranking and evaluation ask of a CLIP. Features are unit vectors, float32, on the CPU."""

    @property
    def name(self) -> str:
        """Which model this is, for the outputs that carry its scores."""
        ...

    @property
    def identity(self) -> str:
        """Hash of the weights and of how pictures are prepared, for what is kept of its features."""
        ...

    @property
    def logit_scale(self) -> float:
        """The learned factor that turns cosine similarities into logits."""
        ...

    def text_features(self, captions: Sequence[str]) -> Tensor:
        """(n, d) unit vectors of n captions."""
        ...

    def prepare(self, picture: NDArray[np.uint8]) -> Tensor:
        """A picture (H, W, 3) as ``prepared_features`` takes it; may be called in several threads at once."""
        ...

    def prepared_features(self, prepared: Sequence[Tensor]) -> Tensor:
        """(n, d) unit vectors of n pictures, measured as one batch."""
        ...

    def image_features(self, pictures: Pictures) -> Tensor:
        """(n, d) unit vectors of n pictures, in batches."""
        ...


class OwnScorer:
    """Scores by a CLIP of our own; pictures of other sizes than its own are cropped and resized."""

    def __init__(self, model: CLIP, tokenize: Tokenize, image_size: int, *, name: str = "clip") -> None:
        self.model = model.eval()
        self.tokenize = tokenize
        self.image_size = image_size
        self.name = name

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach().exp())

    @torch.inference_mode()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        end_of_text = self.model.vocab_size - 1
        device = self.model.logit_scale.device
        features = []
        for chunk in _chunks(captions):
            ids, length = (torch.from_numpy(np.asarray(a, np.int64)) for a in self.tokenize(list(chunk)))
            ids = clip_text_ids(ids, length, end_of_text).to(device)
            features.append(self.model.encode_text(ids, normalize=True).float().cpu())
        return _joined(features)

    def prepare(self, picture: NDArray[np.uint8]) -> Tensor:
        # Copied only where torch could not write to it.
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
        return _weights_hash(self.model, str(self.image_size))

    def _sized(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        size = (self.image_size, self.image_size)
        if picture.shape == (*size, 3):
            return picture
        return np.asarray(ImageOps.fit(Image.fromarray(picture), size, Image.Resampling.BICUBIC))


class OpenClipScorer:
    """Scores by a published CLIP.

    ``model_name`` is one of open_clip's names and ``pretrained`` a tag of it, such as ``ViT-B-32`` and
    ``laion2b_s34b_b79k``, or the path of a weights file of that model. A ``hf-hub:owner/name`` or
    ``local-dir:folder``, as either argument, names model and weights at once.

    A file does not say which activation it was trained with: for OpenAI's weights take the ``-quickgelu``
    name. Weights are read as tensors only; a file that holds other objects is refused. Raises UserError for
    an unknown name or tag, a missing or unfit file, and for weights that cannot be fetched.
    """

    def __init__(self, model_name: str, pretrained: str, *, device: str = "cpu", cache_dir: str | None = None) -> None:
        if pretrained.startswith(_SCHEMAS):
            model_name = pretrained
        options: dict[str, Any] = {}
        if not model_name.startswith(_SCHEMAS):
            model_name = model_name.replace("/", "-")
            _check_names(model_name, pretrained)
            options = {"pretrained": pretrained, **_file_preprocessing(model_name, pretrained)}
        with _quiet(), _no_waiting_for_a_network():
            try:
                # Of open_clip's loaders only this one refuses to go on with random weights.
                self.model, self.preprocess = open_clip.create_model_from_pretrained(
                    model_name, device=device, cache_dir=cache_dir, weights_only=True, **options
                )
            except Exception as error:
                raise UserError(_cannot_load(model_name, pretrained, error)) from error
            try:
                self.tokenizer = open_clip.get_tokenizer(model_name, cache_dir=cache_dir)
            except Exception as error:
                raise UserError(
                    f"the tokenizer of open_clip model {model_name} cannot be loaded ({_first_line(error)}); "
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
        return _weights_hash(self.model, re.sub(" at 0x[0-9a-f]+", "", repr(self.preprocess)))


def _weights_hash(model: torch.nn.Module, preparation: str) -> str:
    digest = hashlib.sha256(preparation.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _chunks(items: Sequence[Any] | NDArray[np.uint8]) -> Iterator[Sequence[Any] | NDArray[np.uint8]]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))


def _joined(features: list[Tensor]) -> Tensor:
    if not features:
        raise ValueError("nothing to score: no captions or pictures were given")
    return torch.cat(features)


@contextmanager
def _quiet() -> Iterator[None]:
    """open_clip logs an error before it raises it; ours says the same in one line."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def _no_waiting_for_a_network() -> Iterator[None]:
    """Where the hub's host has no address, let its client use its cache or fail, not retry for a minute."""
    before = hub.HF_HUB_OFFLINE
    try:
        if not getproxies():
            socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, None)
    except OSError:
        hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before


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
    return f"; near names: {', '.join(near)}" if near else f"; some there are: {', '.join(sorted(known)[:5])}"


def _file_preprocessing(model_name: str, pretrained: str) -> dict[str, Any]:
    """How pictures are to be prepared for a weights file: as for the model's tags, where these agree."""
    if open_clip.is_pretrained_cfg(model_name, pretrained):
        return {}
    tags = open_clip.list_pretrained_tags_by_model(model_name)
    keys = ("mean", "std", "interpolation", "resize_mode")
    ways = {tuple(open_clip.get_pretrained_cfg(model_name, tag).get(key) for key in keys) for tag in tags}
    if len(ways) != 1:
        return {}
    return {f"image_{key}": value for key, value in zip(keys, ways.pop(), strict=True) if value is not None}


def _cannot_load(model_name: str, pretrained: str, error: Exception) -> str:
    reason = "no network" if hub.HF_HUB_OFFLINE else _first_line(error)
    if model_name.startswith("local-dir:"):
        return (
            f"{model_name} cannot be loaded ({_first_line(error)}); give a folder that holds "
            "open_clip_config.json and the weights"
        )
    if model_name.startswith("hf-hub:"):
        return f"{model_name} cannot be fetched ({reason}); provide its files in a folder: local-dir:FOLDER"
    if not open_clip.is_pretrained_cfg(model_name, pretrained):
        return (
            f"{pretrained} is no weights file of {model_name} ({_first_line(error)}); give a .safetensors "
            "file or a PyTorch file that holds only that model's state dict"
        )
    config = open_clip.get_pretrained_cfg(model_name, pretrained)
    place = config.get("hf_hub") or os.path.basename(config.get("url", ""))
    file = f"{place}open_clip_model.safetensors" if place.endswith("/") else place
    return (
        f"weights {pretrained!r} of {model_name} cannot be fetched ({reason}); provide the file {file} "
        f"and give its path in place of {pretrained!r}"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200].rstrip(".: ")


def _scorer_name(model_name: str, pretrained: str) -> str:
    if model_name.startswith(_SCHEMAS):
        return f"open_clip {model_name}"
    if open_clip.is_pretrained_cfg(model_name, pretrained):
        return f"open_clip {model_name}/{pretrained}"
    return f"open_clip {model_name}/{Path(pretrained).name} sha256:{sha256_file(Path(pretrained))[:12]}"

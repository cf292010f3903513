"""A published CLIP, through open_clip, that scores how well a picture matches a caption."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
from huggingface_hub import constants as hub
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from dalle_cli.clip.scorer import SCHEMAS, ModelScorer
from dalle_cli.errors import UserError
from dalle_cli.pretrained import first_line, no_waiting_for_a_network, quiet, weights_hash
from dalle_cli.stores.files import sha256_file

_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors", ".npz")


class OpenClipScorer(ModelScorer):
    """A published CLIP; ``captions_cut`` is always 0, since open_clip's tokenizers do not count what they cut.

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

    def __init__(self, model_name: str, pretrained: str, *, device: str = "cpu", cache_dir: str | None = None) -> None:
        if pretrained.startswith(SCHEMAS):
            model_name = pretrained
        options: dict[str, Any] = {}
        if not model_name.startswith(SCHEMAS):
            model_name = model_name.replace("/", "-")
            _check_names(model_name, pretrained)
            options = {"pretrained": pretrained, **_file_preprocessing(model_name, pretrained)}
        with quiet(), no_waiting_for_a_network():
            try:
                # Other loaders of open_clip keep random weights instead of raising.
                model, self.preprocess = open_clip.create_model_from_pretrained(
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
        super().__init__(model, _scorer_name(model_name, pretrained))

    @cached_property
    def identity(self) -> str:
        return weights_hash(self.model, re.sub(" at 0x[0-9a-f]+", "", repr(self.preprocess)))

    def token_ids(self, captions: Sequence[str]) -> Tensor:
        ids: Tensor = self.tokenizer(list(captions))
        return ids

    def prepare(self, picture: NDArray[np.uint8]) -> Tensor:
        prepared: Tensor = self.preprocess(Image.fromarray(picture))
        return prepared

    def pixels(self, prepared: Tensor) -> Tensor:
        return prepared


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
    if model_name.startswith(SCHEMAS):
        return f"open_clip {model_name}"
    if open_clip.is_pretrained_cfg(model_name, pretrained):
        return f"open_clip {model_name}/{pretrained}"
    return f"open_clip {model_name}/{Path(pretrained).name} sha256:{sha256_file(Path(pretrained))[:12]}"

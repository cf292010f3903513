"""The interface of CLIPs that score how well a picture matches a caption, and what all of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from open_clip.model import CLIP

Pictures = Sequence[NDArray[np.uint8]] | NDArray[np.uint8]
"""Pictures (H, W, 3) uint8 in a list (sizes may differ), or one array (n, H, W, 3)."""

BATCH = 128
"""Number of captions or pictures that are computed at once."""
SCHEMAS = ("hf-hub:", "local-dir:")
"""Beginnings of names that give a published model and its weights at once."""


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


class ModelScorer(ABC):
    """A scorer with a model of open_clip's classes, which computes captions and pictures in batches."""

    def __init__(self, model: CLIP, name: str) -> None:
        self.model = model.eval()
        self.name = name

    @property
    @abstractmethod
    def identity(self) -> str:
        """Hash of the weights and the picture preprocessing."""

    @property
    def captions_cut(self) -> int:
        return 0

    @property
    def logit_scale(self) -> float:
        return float(self.model.logit_scale.detach().exp())

    @property
    def device(self) -> torch.device:
        """The device that the model computes on."""
        device: torch.device = self.model.logit_scale.device
        return device

    @abstractmethod
    def token_ids(self, captions: Sequence[str]) -> Tensor:
        """Return the rows of token ids that the model reads, (n, L), on any device."""

    @abstractmethod
    def prepare(self, picture: NDArray[np.uint8]) -> Tensor:
        """Prepare a picture (H, W, 3) for ``prepared_features``; safe to call from several threads."""

    @abstractmethod
    def pixels(self, prepared: Tensor) -> Tensor:
        """Return what the model reads, (n, 3, H, W), of n prepared pictures."""

    @torch.inference_mode()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        parts = (self.token_ids(part).to(self.device) for part in _batches(captions))
        return _joined([self.model.encode_text(ids, normalize=True).float().cpu() for ids in parts])

    @torch.inference_mode()
    def prepared_features(self, prepared: Sequence[Tensor]) -> Tensor:
        batch = self.pixels(torch.stack(list(prepared)).to(self.device))
        features: Tensor = self.model.encode_image(batch, normalize=True).float().cpu()
        return features

    def image_features(self, pictures: Pictures) -> Tensor:
        return _joined([self.prepared_features([*map(self.prepare, part)]) for part in _batches(pictures)])


def _batches(items: Any) -> Iterator[Any]:
    return (items[start : start + BATCH] for start in range(0, len(items), BATCH))


def _joined(features: list[Tensor]) -> Tensor:
    if not features:
        raise ValueError("nothing to score: no captions or pictures were given")
    return torch.cat(features)

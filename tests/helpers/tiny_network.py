"""A tiny vision network in a folder of timm's format."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from timm.models import save_for_hf
from torch import nn


def write_tiny_network(folder: Path, seed: int = 0) -> nn.Module:
    """Write a network with random weights and statistics into ``folder``; return it in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = timm.create_model("test_efficientnet", num_classes=0)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
    save_for_hf(network, folder, model_config={"num_classes": 0})
    return network.eval()

"""Files laid out like OpenAI's released dVAE, from modules of our own that claim to be of the package ``dall_e``.

The modules are written from the description of the architecture, so that an import can be compared with what they
compute.
"""

from __future__ import annotations

import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ATTRIBUTES_OF_TORCH_1_7 = {
    "training", "_parameters", "_buffers", "_non_persistent_buffers_set", "_backward_hooks", "_forward_hooks",
    "_forward_pre_hooks", "_state_dict_hooks", "_load_state_dict_pre_hooks", "_modules",
}  # fmt: skip


class Conv2d(nn.Module):
    def __init__(self, n_in: int, n_out: int, kw: int) -> None:
        super().__init__()
        self.n_in, self.n_out, self.kw, self.use_float16 = n_in, n_out, kw, True
        self.device, self.requires_grad = torch.device("cpu"), False
        self.w = nn.Parameter(torch.randn(n_out, n_in, kw, kw) * 1.5 / (n_in * kw * kw) ** 0.5)
        self.b = nn.Parameter(torch.randn(n_out) / 10)

    def forward(self, x: Tensor) -> Tensor:
        side = (self.kw - 1) // 2
        return F.conv2d(F.pad(x, (side, side, side, side)), self.w, self.b)


class _Block(nn.Module):
    kernels: tuple[int, ...]

    def __init__(self, n_in: int, n_out: int, n_layers: int) -> None:
        super().__init__()
        self.n_in, self.n_out, self.n_layers, self.n_hid = n_in, n_out, n_layers, n_out // 4
        self.device, self.requires_grad = None, False
        self.post_gain = n_layers**-2
        self.id_path = nn.Identity() if n_in == n_out else Conv2d(n_in, n_out, 1)
        sides = [n_in, self.n_hid, self.n_hid, self.n_hid, n_out]
        self.res_path = nn.Sequential()
        for i, kw in enumerate(self.kernels, start=1):
            self.res_path.add_module(f"relu_{i}", nn.ReLU())
            self.res_path.add_module(f"conv_{i}", Conv2d(sides[i - 1], sides[i], kw))

    def forward(self, x: Tensor) -> Tensor:
        return self.post_gain * self.res_path(x) + self.id_path(x)


class EncoderBlock(_Block):
    kernels = (3, 3, 3, 1)


class DecoderBlock(_Block):
    kernels = (1, 3, 3, 3)


def _blocks(
    kind: type[_Block], n_in: int, widths: list[int], blocks: int, between: nn.Module, name: str
) -> OrderedDict:
    groups: OrderedDict[str, nn.Module] = OrderedDict()
    for k, width in enumerate(widths, start=1):
        group = nn.Sequential()
        for i in range(1, blocks + 1):
            group.add_module(f"block_{i}", kind(n_in, width, 4 * blocks))
            n_in = width
        if k < 4:
            group.add_module(name, between)
        groups[f"group_{k}"] = group
    return groups


class Encoder(nn.Module):
    def __init__(self, n_hid: int, n_blk_per_group: int, vocab_size: int) -> None:
        super().__init__()
        self.n_hid, self.n_blk_per_group, self.vocab_size, self.input_channels = n_hid, n_blk_per_group, vocab_size, 3
        self.device, self.requires_grad, self.use_mixed_precision = torch.device("cpu"), False, True
        widths = [n_hid, 2 * n_hid, 4 * n_hid, 8 * n_hid]
        groups = _blocks(EncoderBlock, n_hid, widths, n_blk_per_group, nn.MaxPool2d(kernel_size=2), "pool")
        output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(8 * n_hid, vocab_size, 1)))
        self.blocks = nn.Sequential(OrderedDict(input=Conv2d(3, n_hid, 7), **groups, output=output))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


class Decoder(nn.Module):
    def __init__(self, n_hid: int, n_init: int, n_blk_per_group: int, vocab_size: int) -> None:
        super().__init__()
        self.n_hid, self.n_init, self.n_blk_per_group, self.vocab_size = n_hid, n_init, n_blk_per_group, vocab_size
        self.output_channels = 3
        self.device, self.requires_grad, self.use_mixed_precision = torch.device("cpu"), False, True
        widths = [8 * n_hid, 4 * n_hid, 2 * n_hid, n_hid]
        upsample = nn.Upsample(scale_factor=2, mode="nearest")
        groups = _blocks(DecoderBlock, n_init, widths, n_blk_per_group, upsample, "upsample")
        output = nn.Sequential(OrderedDict(relu=nn.ReLU(), conv=Conv2d(n_hid, 6, 1)))
        self.blocks = nn.Sequential(OrderedDict(input=Conv2d(vocab_size, n_init, 1), **groups, output=output))

    def forward(self, z: Tensor) -> Tensor:
        return self.blocks(z)


PLACES = {
    "dall_e.encoder": (Encoder, EncoderBlock),
    "dall_e.decoder": (Decoder, DecoderBlock),
    "dall_e.utils": (Conv2d,),
}


@contextmanager
def _pretending() -> Iterator[None]:
    """Put the classes into the modules that the pickle will name, for the duration of the context."""
    names = {"dall_e": types.ModuleType("dall_e")}
    for place, classes in PLACES.items():
        module = names[place] = types.ModuleType(place)
        module.__file__ = __file__
        for found in classes:
            setattr(module, found.__name__, found)
            found.__module__ = place
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
        for classes in PLACES.values():
            for found in classes:
                found.__module__ = __name__


def released(
    n_hid: int = 8, n_init: int = 6, blocks: int = 2, vocab: int = 64, seed: int = 0
) -> tuple[Encoder, Decoder]:
    """Return the two modules with random weights, large enough that each affects the output."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Encoder(n_hid, blocks, vocab).eval(), Decoder(n_hid, n_init, blocks, vocab).eval()


def as_torch_1_7(module: nn.Module) -> None:
    """Undo later changes to torch's modules: new attributes, and plain dictionaries in place of ordered ones."""
    newer = set(nn.Module().__dict__) - ATTRIBUTES_OF_TORCH_1_7 | {"recompute_scale_factor"}
    for part in module.modules():
        for name in newer & set(part.__dict__):
            del part.__dict__[name]
        for name in ("_parameters", "_buffers", "_modules"):
            part.__dict__[name] = OrderedDict(part.__dict__[name])


def save(module: object, path: Path, *, legacy: bool = False) -> Path:
    """Write ``module`` by ``torch.save``, as a zip archive or as the stream of torch before 1.6."""
    with _pretending(), warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.save(module, path, _use_new_zipfile_serialization=not legacy)
    return path

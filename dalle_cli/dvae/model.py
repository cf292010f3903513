"""The dVAE's encoder and decoder (Ramesh et al. 2021, arXiv 2102.12092, appendix A.1).

Both are convolutional ResNets of 4 groups of bottleneck resblocks. Parameters are named and shaped as in the dVAE that
OpenAI released (``blocks.group_1.block_1.res_path.conv_1.w``), so that its weights load by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dalle_cli.config.schema import DvaeModel
from dalle_cli.randomness import torch_generator

GROUPS = 4
CHANNELS = 3


class Conv2d(nn.Module):
    """A convolution that keeps height and width, with parameters ``w`` (out, in, k, k), k odd, and ``b`` (out,).

    With ``float32`` it computes in 32 bit under any autocast and with parameters of any type. This is for results that
    are logits, codebook vectors or parameters of a density.
    """

    def __init__(self, n_in: int, n_out: int, kernel: int, *, float32: bool = False) -> None:
        super().__init__()
        self.padding = kernel // 2
        self.float32 = float32
        self.w = nn.Parameter(torch.empty(n_out, n_in, kernel, kernel))
        self.b = nn.Parameter(torch.empty(n_out))

    def forward(self, x: Tensor) -> Tensor:
        if not self.float32:
            return F.conv2d(x, self.w, self.b, padding=self.padding)
        with torch.autocast(x.device.type, enabled=False):
            return F.conv2d(x.float(), self.w.float(), self.b.float(), padding=self.padding)


class Resblock(nn.Module):
    """``id_path(x) + post_gain * res_path(x)``; the residual path has a quarter of the output's width.

    Args:
        n_in: input channels.
        n_out: output channels.
        kernels: sides of the residual path's four convolutions.
        n_layers: number of resblocks in the whole network. With post_gain = 1 / n_layers^2, the network is close to its
            identity path at initialization.
        recomputed: recompute the block's activations in the backward pass instead of storing them.
    """

    def __init__(
        self, n_in: int, n_out: int, kernels: tuple[int, int, int, int], n_layers: int, *, recomputed: bool = False
    ) -> None:
        super().__init__()
        self.recomputed = recomputed
        self.post_gain = 1 / n_layers**2
        self.id_path: nn.Module = Conv2d(n_in, n_out, 1) if n_in != n_out else nn.Identity()
        self.res_path = nn.Sequential()
        widths = [n_in, *[max(1, n_out // 4)] * 3, n_out]
        for i, kernel in enumerate(kernels):
            self.res_path.add_module(f"relu_{i + 1}", nn.ReLU())
            self.res_path.add_module(f"conv_{i + 1}", Conv2d(widths[i], widths[i + 1], kernel))

    def forward(self, x: Tensor) -> Tensor:
        if self.recomputed and torch.is_grad_enabled():
            return checkpoint(self._forward, x, use_reentrant=False, preserve_rng_state=False)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.res_path(x)
        identity: Tensor = self.id_path(x)
        return identity + self.post_gain * residual


def _group(settings: DvaeModel, n_in: int, n_out: int, kernels: tuple[int, int, int, int]) -> nn.Sequential:
    group, blocks = nn.Sequential(), settings.blocks_per_group
    for i in range(blocks):
        first = n_in if i == 0 else n_out
        block = Resblock(first, n_out, kernels, GROUPS * blocks, recomputed=settings.checkpoint_resblocks)
        group.add_module(f"block_{i + 1}", block)
    return group


def _output(n_in: int, n_out: int) -> nn.Sequential:
    output = nn.Sequential()
    output.add_module("relu", nn.ReLU())
    output.add_module("conv", Conv2d(n_in, n_out, 1, float32=True))
    return output


def initialise(network: nn.Module, seed: int, name: str) -> None:
    """Initialize every convolution of ``network``: weights normal with variance 1 / fan_in, biases zero.

    Each weight is drawn on the CPU from its own random stream (seed, name, its path), so that the values depend neither
    on the device nor on the order of the modules. Parameters on the meta device are skipped.
    """
    for path, module in network.named_modules():
        if isinstance(module, Conv2d) and not module.w.is_meta:
            generator = torch_generator(seed, "initial weights", name, path)
            noise = torch.randn(module.w.shape, generator=generator, device="cpu")
            with torch.no_grad():
                module.w.copy_(noise / math.sqrt(module.w[0].numel()))
                module.b.zero_()


class Encoder(nn.Module):
    """The network from images to logits over the codebook, one position for f x f pixels; f is the downsampling."""

    def __init__(self, settings: DvaeModel, seed: int = 0) -> None:
        super().__init__()
        width, self.downsampling = settings.n_hid, settings.downsampling
        self.compiled: Callable[[Tensor], Tensor] | None = None
        """A faster ``plain`` for training, where batches have one size."""
        pools = self.downsampling.bit_length() - 1
        self.blocks = nn.Sequential()
        self.blocks.add_module("input", Conv2d(CHANNELS, width, 7))
        for k in range(GROUPS):
            group = _group(settings, width * 2 ** max(0, k - 1), width * 2**k, (3, 3, 3, 1))
            if k < pools:
                group.add_module("pool", nn.MaxPool2d(2))
            self.blocks.add_module(f"group_{k + 1}", group)
        self.blocks.add_module("output", _output(width * 2 ** (GROUPS - 1), settings.codebook_size))
        initialise(self, seed, "dvae encoder")

    def forward(self, x: Tensor) -> Tensor:
        """Map pixels (B, 3, H, W) in (eps, 1 - eps), see ``phi``, to float32 logits (B, K, H / f, W / f)."""
        return self.compiled(x) if self.compiled and torch.is_grad_enabled() else self.plain(x)

    def plain(self, x: Tensor) -> Tensor:
        """Compute ``forward`` without a compiler."""
        f = self.downsampling
        if x.ndim != 4 or x.shape[1] != CHANNELS or x.shape[2] % f or x.shape[3] % f:
            raise ValueError(f"the encoder takes (B, 3, H, W), H and W multiples of {f}, not {tuple(x.shape)}")
        stem = cast(Conv2d, self.blocks.get_submodule("input"))
        logits: Tensor = self.blocks(x.to(stem.w.dtype))
        return logits


class Decoder(nn.Module):
    """The network from codes, relaxed or hard, to the logit-Laplace parameters of every pixel, f x f for a code."""

    def __init__(self, settings: DvaeModel, seed: int = 0) -> None:
        super().__init__()
        width = settings.n_hid
        self.codebook_size = settings.codebook_size
        self.compiled: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None
        """A faster ``plain`` for training, where batches have one size."""
        self.blocks = nn.Sequential()
        self.blocks.add_module("input", Conv2d(settings.codebook_size, settings.n_init, 1, float32=True))
        n_in, pools = settings.n_init, settings.downsampling.bit_length() - 1
        if pools == GROUPS:
            self.blocks.add_module("upsample", nn.Upsample(scale_factor=2, mode="nearest"))
        for k in range(GROUPS):
            n_out = width * 2 ** (GROUPS - 1 - k)
            group = _group(settings, n_in, n_out, (1, 3, 3, 3))
            if GROUPS - 1 - pools <= k < GROUPS - 1:
                group.add_module("upsample", nn.Upsample(scale_factor=2, mode="nearest"))
            self.blocks.add_module(f"group_{k + 1}", group)
            n_in = n_out
        self.blocks.add_module("output", _output(width, 2 * CHANNELS))
        initialise(self, seed, "dvae decoder")
        if settings.codebook_std is not None:
            with torch.no_grad():
                self.codebook.w.mul_(settings.codebook_std * math.sqrt(settings.codebook_size))

    @property
    def codebook(self) -> Conv2d:
        """The 1 x 1 convolution whose K columns, plus its bias, are the vectors of the codes."""
        return cast(Conv2d, self.blocks.get_submodule("input"))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Map codes (B, K, h, w), one-hot or relaxed, to mu and ln b, each (B, 3, f h, f w), float32, unbounded."""
        return self.compiled(z) if self.compiled and torch.is_grad_enabled() else self.plain(z)

    def plain(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``forward`` without a compiler."""
        if z.ndim != 4 or z.shape[1] != self.codebook_size:
            raise ValueError(f"the decoder takes (B, {self.codebook_size}, h, w), not {tuple(z.shape)}")
        return self._decode(self.codebook(z))

    def decode_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``forward`` of the one-hot codes of ``tokens`` (B, h, w) int64 by an embedding lookup."""
        if tokens.ndim != 3:
            raise ValueError(f"tokens are (B, h, w), not {tuple(tokens.shape)}")
        vectors = F.embedding(tokens, self.codebook.w[:, :, 0, 0].t().float()) + self.codebook.b.float()
        return self._decode(vectors.permute(0, 3, 1, 2))

    def _decode(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        hidden = vectors.to(self.codebook.w.dtype)
        for name, block in self.blocks.named_children():
            if name != "input":
                hidden = block(hidden)
        mu, ln_b = hidden.chunk(2, dim=1)
        return mu, ln_b


class DVAE(nn.Module):
    """Encoder and decoder; ``seed`` determines the initial weights."""

    def __init__(self, settings: DvaeModel, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = Encoder(settings, seed)
        self.decoder = Decoder(settings, seed)

    def encode_tokens(self, x: Tensor) -> Tensor:
        """Map pixels (B, 3, H, W) in (eps, 1 - eps) to the likeliest codes, (B, H / f, W / f) int64."""
        logits: Tensor = self.encoder(x)
        return logits.argmax(dim=1)

    def decode_tokens(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Map tokens (B, h, w) int64 to mu and ln b, each (B, 3, f h, f w)."""
        return self.decoder.decode_tokens(tokens)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Map pixels (B, 3, H, W) in (eps, 1 - eps) to mu and ln b of their hard codes, each (B, 3, H, W)."""
        return self.decode_tokens(self.encode_tokens(x))

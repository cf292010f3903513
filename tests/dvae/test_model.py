"""The dVAE's architecture: sizes, names of the released weights, initial values and its two ways of decoding."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.dvae_models import EPS, SMALL, pictures
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.config.schema import DvaeModel
from dalle_cli.dvae.model import DVAE, Conv2d, Resblock
from dalle_cli.dvae.objective import (
    encoder_input,
)
from dalle_cli.randomness import torch_generator


def conv_parameters(n_in: int, n_out: int, kernel: int) -> int:
    return n_out * (n_in * kernel**2 + 1)


def parameters_by_hand(n_hid: int, n_init: int, blocks: int, codes: int) -> tuple[int, int]:
    """The two networks' sizes from the description: groups of bottleneck blocks, 1x1 where widths change."""

    def group(n_in: int, n_out: int, kernels: tuple[int, ...]) -> int:
        total = 0
        for block in range(blocks):
            first = n_in if block == 0 else n_out
            inner = n_out // 4
            total += conv_parameters(first, inner, kernels[0]) + conv_parameters(inner, n_out, kernels[3])
            total += 2 * conv_parameters(inner, inner, 3)
            total += conv_parameters(first, n_out, 1) if first != n_out else 0
        return total

    widths = [n_hid, 2 * n_hid, 4 * n_hid, 8 * n_hid]
    encoder = conv_parameters(3, n_hid, 7) + conv_parameters(8 * n_hid, codes, 1)
    encoder += sum(group(a, b, (3, 3, 3, 1)) for a, b in zip([n_hid, *widths], widths, strict=False))
    decoder = conv_parameters(codes, n_init, 1) + conv_parameters(n_hid, 6, 1)
    mirrored = widths[::-1]
    decoder += sum(group(a, b, (1, 3, 3, 3)) for a, b in zip([n_init, *mirrored], mirrored, strict=False))
    return encoder, decoder


@pytest.mark.parametrize("settings", [DvaeModel(), SMALL])
def test_parameter_counts(settings: DvaeModel) -> None:
    with torch.device("meta"):
        model = DVAE(settings)
    counts = tuple(sum(p.numel() for p in net.parameters()) for net in (model.encoder, model.decoder))
    assert counts == parameters_by_hand(
        settings.n_hid, settings.n_init, settings.blocks_per_group, settings.codebook_size
    )


def test_names_and_shapes_of_the_released_weights() -> None:
    with torch.device("meta"):
        model = DVAE(DvaeModel())
    encoder = {name: tuple(value.shape) for name, value in model.encoder.state_dict().items()}
    decoder = {name: tuple(value.shape) for name, value in model.decoder.state_dict().items()}
    for name, shape in {
        "blocks.input.w": (256, 3, 7, 7),
        "blocks.group_1.block_1.res_path.conv_1.w": (64, 256, 3, 3),
        "blocks.group_1.block_2.res_path.conv_4.w": (256, 64, 1, 1),
        "blocks.group_2.block_1.id_path.w": (512, 256, 1, 1),
        "blocks.group_4.block_2.res_path.conv_3.b": (512,),
        "blocks.output.conv.w": (8192, 2048, 1, 1),
    }.items():
        assert encoder[name] == shape
    for name, shape in {
        "blocks.input.w": (128, 8192, 1, 1),
        "blocks.group_1.block_1.id_path.w": (2048, 128, 1, 1),
        "blocks.group_1.block_1.res_path.conv_1.w": (512, 128, 1, 1),
        "blocks.group_1.block_1.res_path.conv_4.w": (2048, 512, 3, 3),
        "blocks.group_4.block_1.id_path.w": (256, 512, 1, 1),
        "blocks.output.conv.b": (6,),
    }.items():
        assert decoder[name] == shape
    assert "blocks.group_1.block_1.id_path.w" not in encoder  # 256 in, 256 out
    assert "blocks.group_1.block_2.id_path.w" not in decoder
    assert len(encoder) == 2 * (2 + 8 * 4 + 3)
    assert len(decoder) == 2 * (2 + 8 * 4 + 4)
    modules = {name for name, _ in model.named_modules()}
    assert {"encoder.blocks.group_3.pool", "decoder.blocks.group_3.upsample"} <= modules
    assert not {"encoder.blocks.group_4.pool", "decoder.blocks.group_4.upsample"} & modules


def reference(net: torch.nn.Module, x: Tensor, blocks: int, resize: str) -> Tensor:
    """Both networks by functional calls on the state dict, from the description of the architecture."""
    weights = net.state_dict()

    def conv(name: str, value: Tensor) -> Tensor:
        kernel = weights[f"{name}.w"]
        return F.conv2d(value, kernel, weights[f"{name}.b"], padding=kernel.shape[-1] // 2)

    x = conv("blocks.input", x)
    for k in range(1, 5):
        for i in range(1, blocks + 1):
            block = f"blocks.group_{k}.block_{i}"
            residual = x
            for j in range(1, 5):
                residual = conv(f"{block}.res_path.conv_{j}", residual.clamp_min(0))
            identity = conv(f"{block}.id_path", x) if f"{block}.id_path.w" in weights else x
            x = identity + residual / (4 * blocks) ** 2
        if k < 4 and resize == "pool":
            x = F.max_pool2d(x, 2)
        elif k < 4:
            x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    return conv("blocks.output.conv", x.clamp_min(0))


@pytest.mark.parametrize("blocks", [1, 2])
def test_networks_are_the_described_ones(blocks: int) -> None:
    model = DVAE(SMALL.model_copy(update={"blocks_per_group": blocks}), seed=3)
    x = encoder_input(pictures(2, 24), EPS)
    logits = model.encoder(x)
    assert logits.shape == (2, 16, 3, 3)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, reference(model.encoder, x, blocks, "pool"))
    soft = logits.softmax(dim=1)
    mu, ln_b = model.decoder(soft)
    assert mu.shape == ln_b.shape == x.shape
    expected = reference(model.decoder, soft, blocks, "upsample")
    torch.testing.assert_close(torch.cat([mu, ln_b], dim=1), expected)


def test_post_gain() -> None:
    model = DVAE(SMALL.model_copy(update={"blocks_per_group": 2}))
    gains = {module.post_gain for module in model.modules() if isinstance(module, Resblock)}
    assert gains == {1 / 64}
    assert sum(isinstance(module, Resblock) for module in model.modules()) == 16


def test_decoding_tokens_is_decoding_their_one_hot_codes_with_the_same_gradients() -> None:
    model = DVAE(SMALL)
    torch.nn.init.normal_(model.decoder.codebook.b, generator=torch_generator(0, "bias"))
    tokens = torch.randint(0, 16, (2, 2, 3), generator=torch_generator(0, "tokens"))
    one_hot = F.one_hot(tokens, 16).permute(0, 3, 1, 2).float()
    gradients = []
    outputs = []
    for mu, ln_b in (model.decode_tokens(tokens), model.decoder(one_hot)):
        outputs.append(torch.cat([mu, ln_b], dim=1))
        model.zero_grad()
        outputs[-1].square().mean().backward()
        gradients.append(model.decoder.codebook.w.grad)
    torch.testing.assert_close(outputs[0], outputs[1])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_encode_tokens_and_forward() -> None:
    model = DVAE(SMALL)
    x = encoder_input(pictures(2), EPS)
    tokens = model.encode_tokens(x)
    assert tokens.shape == (2, 2, 2)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, model.encoder(x).argmax(dim=1))
    assert torch.equal(model(x)[0], model.decode_tokens(tokens)[0])


@pytest.mark.parametrize("codebook_std", [None, 0.5])
def test_initial_weights_have_variance_one_over_fan_in_and_follow_the_seed(codebook_std: float | None) -> None:
    settings = DvaeModel(n_hid=32, n_init=64, blocks_per_group=1, codebook_size=256, codebook_std=codebook_std)
    model, same, other = DVAE(settings, seed=1), DVAE(settings, seed=1), DVAE(settings, seed=2)
    for name, module in model.named_modules():
        if isinstance(module, Conv2d):
            fan_in = math.prod(module.w.shape[1:])
            if codebook_std is not None and module is model.decoder.codebook:
                fan_in = round(codebook_std**-2)
            spread = 5 / math.sqrt(2 * module.w.numel())
            assert float(module.w.detach().std()) * math.sqrt(fan_in) == pytest.approx(1, abs=spread), name
            assert not module.b.any()
            assert torch.equal(module.w, same.get_submodule(name).w)
            assert not torch.equal(module.w, other.get_submodule(name).w)


def test_codebook_side_stays_in_32_bit_under_autocast() -> None:
    model = DVAE(SMALL)
    x = encoder_input(pictures(1), EPS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model.encoder(x)
        mu, _ = model.decoder(logits.softmax(dim=1))
    assert logits.dtype == mu.dtype == torch.float32
    torch.testing.assert_close(logits, model.encoder(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize("shape", [(1, 3, 12, 16), (1, 1, 16, 16), (3, 16, 16)])
def test_encoder_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="multiples of 8"):
        DVAE(SMALL).encoder(torch.zeros(shape))


def test_decoder_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match="decoder takes"):
        DVAE(SMALL).decoder(torch.zeros(1, 15, 2, 2))
    with pytest.raises(ValueError, match="tokens are"):
        DVAE(SMALL).decode_tokens(torch.zeros(4, dtype=torch.long))


@pytest.mark.parametrize("side", [4, 8, 16])
def test_a_token_stands_for_a_patch_of_the_given_side(side: int) -> None:
    """The grid follows ``downsampling``; the weights, and so their names and number, do not."""
    model = DVAE(SMALL.model_copy(update={"downsampling": side}))
    x = torch.rand(2, 3, 32, 48) * (1 - 2 * EPS) + EPS
    tokens = model.encode_tokens(x)
    assert tokens.shape == (2, 32 // side, 48 // side)
    mu, ln_b = model.decode_tokens(tokens)
    assert mu.shape == ln_b.shape == x.shape
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    assert shapes == {name: weight.shape for name, weight in DVAE(SMALL).state_dict().items()}
    with pytest.raises(ValueError, match=f"multiples of {side}"):
        model.encoder(torch.rand(1, 3, side // 2, side))

"""The dVAE's architecture, its names, its two ways of decoding, and the objective."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_cli.config.schema import DvaeModel, Recipe
from dalle_cli.dvae.model import DVAE, Conv2d, Resblock
from dalle_cli.dvae.objective import (
    DvaeLoss,
    LossSettings,
    ValidationMetrics,
    bounded_ln_b,
    codebook_perplexity,
    dead_codes,
    dvae_loss,
    encoder_input,
    logit_laplace_log_prob,
    merge_metrics,
    reconstruct,
    validation_metrics,
)
from dalle_cli.dvae.train import DvaeTask
from dalle_cli.randomness import torch_generator

SMALL = DvaeModel(n_hid=8, n_init=6, blocks_per_group=1, codebook_size=16)
EPS = 0.1
FLOOR = -4.0


def pictures(n: int, side: int = 16) -> Tensor:
    """Return (n, side, side, 3) uint8 noise."""
    generator = torch_generator(0, "pictures")
    return torch.randint(0, 256, (n, 3, side, side), generator=generator, dtype=torch.uint8).permute(0, 2, 3, 1)


def loss_of(model: DVAE, pixels: Tensor, **changes: object) -> DvaeLoss:
    settings = {
        "kl_weight": 1.0,
        "marginal_kl_weight": 0.0,
        "ln_b_floor": FLOOR,
        "temperature": 1.0,
        "eps": EPS,
        "estimator": "gumbel",
        "reinforce_samples": 2,
    }
    generator = changes.pop("generator", torch_generator(0, "loss"))
    return dvae_loss(model, pixels, LossSettings(**{**settings, **changes}), generator)  # type: ignore[arg-type]


def metrics_of(model: DVAE, pixels: Tensor, first: int = 0) -> ValidationMetrics:
    noise = [torch_generator(0, "validation", first + i) for i in range(len(pixels))]
    return validation_metrics(model, pixels, EPS, FLOOR, noise)


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


def test_initial_weights_have_variance_one_over_fan_in_and_follow_the_seed() -> None:
    settings = DvaeModel(n_hid=32, n_init=64, blocks_per_group=1, codebook_size=256)
    model, same, other = DVAE(settings, seed=1), DVAE(settings, seed=1), DVAE(settings, seed=2)
    for name, module in model.named_modules():
        if isinstance(module, Conv2d):
            # The codebook's input is one-hot: one of its K columns makes the output, and they are drawn half as large.
            fan_in = 4 if module is model.decoder.codebook else math.prod(module.w.shape[1:])
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


@pytest.mark.parametrize("estimator", ["gumbel", "reinforce"])
def test_loss_is_nll_and_weighted_kl_per_value(estimator: str) -> None:
    model = DVAE(SMALL)
    # So confident that every sample, relaxed or hard, is the argmax: the loss is then known without noise.
    with torch.no_grad():
        model.encoder.get_submodule("blocks.output.conv").w.mul_(1e5)
    pixels = pictures(2, 24)
    x = encoder_input(pixels, EPS)
    mu, ln_b = (output.detach() for output in model(x))
    nll = -logit_laplace_log_prob(x, mu, bounded_ln_b(ln_b, FLOOR)).sum() / (2 * 3 * 24 * 24)
    kl = 2 * 9 * math.log(16) / (2 * 3 * 24 * 24)
    parts = loss_of(model, pixels, estimator=estimator, kl_weight=6.6, temperature=0.1)
    assert float(parts.recon_nll) == pytest.approx(float(nll), rel=1e-4)
    assert float(parts.kl) == pytest.approx(kl, rel=1e-3)
    assert float(parts.kl_per_position) == pytest.approx(math.log(16), rel=1e-3)
    assert float(parts.kl) == pytest.approx(float(parts.kl_per_position) / 192, rel=1e-6)
    assert float(parts.loss.detach()) == pytest.approx(float(nll) + 6.6 * kl, rel=1e-4)
    assert float(parts.elbo) == pytest.approx(-float(nll) - kl, rel=1e-4)


@pytest.mark.parametrize("estimator", ["gumbel", "reinforce"])
def test_every_parameter_gets_a_finite_gradient_that_repeats(estimator: str) -> None:
    model = DVAE(SMALL)
    seen = []
    for _ in range(2):
        model.zero_grad()
        loss_of(model, pictures(4), estimator=estimator).loss.backward()
        gradients = [parameter.grad for parameter in model.parameters()]
        seen.append([gradient.clone() for gradient in gradients if gradient is not None])
    assert len(seen[0]) == len(list(model.parameters()))
    assert all(torch.isfinite(gradient).all() and gradient.any() for gradient in seen[0])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


@pytest.mark.parametrize("estimator", ["gumbel", "reinforce"])
def test_a_few_updates_fit_two_flat_pictures(estimator: str) -> None:
    pixels = torch.stack([torch.full((8, 8, 3), 30), torch.full((8, 8, 3), 220)]).to(torch.uint8)
    model = DVAE(SMALL)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)  # at 3e-3 some processors' rounding ends in one code
    before = metrics_of(model, pixels).summary()
    for update in range(400):
        optimizer.zero_grad()
        parts = loss_of(
            model,
            pixels,
            estimator=estimator,
            kl_weight=0.0,
            reinforce_samples=8,
            temperature=max(1 - update / 300, 0.1),
            generator=torch_generator(0, "fit", update),
        )
        parts.loss.backward()
        optimizer.step()
    after = metrics_of(model, pixels).summary()
    assert after["recon_nll"] < before["recon_nll"] - 1
    assert after["psnr"] > 20  # one code for both pictures could not pass 8.6 dB
    assert after["codebook_perplexity"] == pytest.approx(2)


def test_validation_metrics_by_hand_and_merged() -> None:
    model = DVAE(SMALL)
    pixels = pictures(3)
    whole = metrics_of(model, pixels)
    rebuilt = reconstruct(model(encoder_input(pixels, EPS))[0], EPS).detach()
    for i in range(3):
        mse = float(((rebuilt[i] / 255 - pixels[i].permute(2, 0, 1).float() / 255) ** 2).mean())
        assert float(whole.mse[i]) == pytest.approx(mse, rel=1e-4)
        assert float(whole.psnr[i]) == pytest.approx(10 * math.log10(1 / mse), rel=1e-4)
    assert int(whole.counts.sum()) == 3 * 4
    assert whole.counts.shape == (16,)
    parts = merge_metrics([metrics_of(model, pixels[:1]), metrics_of(model, pixels[1:], first=1)])
    assert parts.summary() == pytest.approx(whole.summary(), rel=1e-4)


def test_perplexity_and_dead_codes() -> None:
    assert codebook_perplexity(torch.tensor([5, 5, 0, 5, 5])) == pytest.approx(4)
    assert codebook_perplexity(torch.tensor([0, 9])) == pytest.approx(1)
    assert codebook_perplexity(torch.tensor([1, 3])) == pytest.approx(4 / 3**0.75)
    assert codebook_perplexity(torch.zeros(4, dtype=torch.long)) == 0
    assert dead_codes(torch.tensor([5, 0, 0, 1])) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_resblocks_give_the_same_bits_and_keep_less(dtype: torch.dtype) -> None:
    kept, losses, gradients = [], [], []
    for recomputed in (False, True):
        model = DVAE(SMALL.model_copy(update={"checkpoint_resblocks": recomputed, "blocks_per_group": 2}))
        saved: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: Tensor, saved: dict[int, torch.UntypedStorage] = saved) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
        ):
            loss = loss_of(model, pictures(2, 32)).loss
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        kept.append(sum(storage.nbytes() for place, storage in saved.items() if place not in weights))
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert torch.equal(*losses)
    assert len(gradients[0]) == len(list(DVAE(SMALL.model_copy(update={"blocks_per_group": 2})).parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < 0.7 * kept[0]


def test_bf16_is_the_convolutions_alone() -> None:
    """Under the training's autocast: what each convolution gives, and that all else is what it is in 32 bit."""
    recipe = Recipe.model_validate(
        {
            "image_size": 32,
            "dvae": {"precision": "bf16", "model": SMALL.model_dump(), "training": {"updates": 1, "batch_size": 2}},
            "prior": {"model": {"grid": 4}},
        }
    )
    model = DVAE(SMALL)
    task = DvaeTask(recipe, _Nothing(), model)
    types: dict[str, set[torch.dtype]] = {"float32": set(), "free": set()}
    outputs: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, Conv2d):

            def seen(module: torch.nn.Module, _: object, output: Tensor, name: str = name) -> None:
                types["float32" if module.float32 else "free"].add(output.dtype)
                outputs[name] = output.detach()

            module.register_forward_hook(seen)
    pixels = pictures(2, 32)
    values = task.loss((0, pixels), 7)
    assert types == {"float32": {torch.float32}, "free": {torch.bfloat16}}
    assert {value.dtype for value in values.values()} == {torch.float32}
    values["loss"].backward()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    # From the outputs on, in 32 bit and by other means.
    mu, ln_b = outputs["decoder.blocks.output.conv"].chunk(2, dim=1)
    nll = -logit_laplace_log_prob(encoder_input(pixels, EPS), mu, bounded_ln_b(ln_b, FLOOR)).mean()
    assert float(values["recon_nll"]) == pytest.approx(float(nll), rel=1e-6)
    q = outputs["encoder.blocks.output.conv"].softmax(dim=1)
    kl = (q * (q * 16).log()).sum(dim=1).mean()
    assert float(values["kl_per_position"]) == pytest.approx(float(kl), rel=1e-4)
    whole = DvaeTask(recipe.model_copy(update={"dvae": recipe.dvae.model_copy(update={"precision": "fp32"})}),
                     _Nothing(), model).loss((0, pixels), 7)  # fmt: skip
    assert values["loss"].item() != whole["loss"].item()
    assert values["loss"].item() == pytest.approx(whole["loss"].item(), abs=0.02)


def test_example_images_are_originals_beside_what_their_codes_decode_to() -> None:
    blocks = {
        "dvae": {"model": SMALL.model_dump()},
        "prior": {"model": {"grid": 2}},
        "clip": {"model": {"patch_size": 8}},
    }
    recipe = Recipe.model_validate({"image_size": 16, **blocks})
    task = DvaeTask(recipe, _Nothing(), DVAE(SMALL))
    task.validation_images = pictures(3)
    with torch.no_grad():
        (grid,) = task.example_images().values()
        rebuilt = reconstruct(task.model(encoder_input(pictures(3), EPS))[0], EPS)
    assert grid.dtype == torch.uint8
    assert grid.shape == (3, 2 * 18 + 2, 4 * 18 + 2)
    for place, (original, copy) in enumerate(zip(pictures(3), rebuilt, strict=True)):
        top, left = 2 + place // 2 * 18, 2 + place % 2 * 36
        assert torch.equal(grid[:, top : top + 16, left : left + 16], original.permute(2, 0, 1))
        right = grid[:, top : top + 16, left + 18 : left + 34].float()
        assert float((right - copy).abs().max()) <= 0.5
    task.validation_images = None
    assert task.example_images() == {}


class _Nothing:
    """A source that is never read."""

    name, format, skipped = "nothing", "none", []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return 10

"""Training the dVAE: the objective's gradients, validation metrics and examples."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from helpers.dvae_models import EPS, SMALL, pictures
from torch import Tensor

from dalle_cli.config.schema import Recipe
from dalle_cli.dvae.model import DVAE, Conv2d
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
from dalle_cli.dvae.train import DvaeTask, compile_networks
from dalle_cli.randomness import torch_generator

FLOOR = -4.0


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


def test_compiled_networks_train_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    """A backend without code generation stands in for a GPU's compiler."""
    torch._dynamo.reset()
    plain, compiled, failed = (DVAE(SMALL, seed=1) for _ in range(3))
    compile_networks(compiled, 16, torch.float32, torch.device("cpu"), backend="aot_eager")
    compile_networks(failed, 16, torch.float32, torch.device("cpu"), backend=no_backend)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("train-dvae: encoder and decoder by torch.compile: not used here (no such compiler")
    gradients = []
    for model in (plain, compiled, failed):
        loss = loss_of(model, pictures(3)).loss
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    for wanted, found, other in zip(*gradients, strict=True):
        assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max() + 1e-8
        assert torch.equal(other, wanted)


def no_backend(*_: object) -> Callable[..., object]:
    raise RuntimeError("no such compiler\nand a long trace")

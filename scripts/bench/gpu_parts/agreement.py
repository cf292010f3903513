"""Results on the GPU against those on the CPU, on small models."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from prior_parts.model import ModelSizes, build_prior
from prior_parts.step import training_loss
from torch import Tensor, nn

from dalle_cli.config.layout import AttentionKind
from dalle_cli.config.schema import DvaeModel, PriorSettings, Recipe, SamplingSettings
from dalle_cli.distributed.device import use_settings
from dalle_cli.distributed.engine import Replicated
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.objective import LossSettings, dvae_loss
from dalle_cli.prior.attention import attend
from dalle_cli.prior.decode import Decoder
from dalle_cli.prior.flex_attention import FlexAttention
from dalle_cli.prior.model import AttentionResblock, Prior
from dalle_cli.prior.on_gpu import speed_up
from dalle_cli.prior.train import set_precision
from dalle_cli.sampling.draw import sample_images
from dalle_cli.training.state import TrainingState
from dalle_cli.transfers import send
from gpu_parts.row import Row

KINDS: tuple[AttentionKind, ...] = ("row", "column", "conv", "full")
TEXT, GRID, CODES, WORDS = 16, 8, 64, 100
UPDATES = 50
LOSS = LossSettings(
    kl_weight=1.0,
    marginal_kl_weight=0.0,
    temperature=1.0,
    eps=0.1,
    ln_b_floor=-4.0,
    estimator="gumbel",
    reinforce_samples=2,
)


def measure(device: str, tiny: bool) -> Iterator[Row]:
    """Yield the differences between the device and the CPU; products are in full 32 bit."""
    use_settings(Recipe(tf32=False))
    for kind in KINDS:
        yield Row(
            f"{kind} attention, output and gradient, largest error", _attention(kind, device, tiny), "", None, 1e-3
        )
        if device == "cuda":  # flex_attention has no backward pass on a CPU
            error = _attention(kind, device, tiny, by_flex=True)
            yield Row(f"{kind} attention by flex_attention, the same", error, "", None, 1e-3)
    yield from _prior(device)
    yield from _sped_up(device)
    if device == "cuda":
        yield _waits(device)
    yield from _dvae(device)
    yield from _fp16(device)
    yield from _resumed(device)


def _attention(kind: AttentionKind, device: str, tiny: bool, by_flex: bool = False) -> float:
    grid, text = (GRID, TEXT) if tiny else (32, 256)
    qkv = torch.randn(2, text + grid * grid, 3, 4, 32, generator=torch.Generator().manual_seed(0))

    def output_and_gradient(x: Tensor, by_flex: bool = False) -> list[Tensor]:
        x.requires_grad_()
        out = FlexAttention(kind, text, grid, 5, x.device)(x) if by_flex else attend(kind, x, text, grid, 5)
        return [out.detach(), torch.autograd.grad(out.square().sum(), x)[0]]

    pairs = zip(output_and_gradient(qkv.to(device), by_flex), output_and_gradient(qkv.double()), strict=True)
    return max(_error(found, wanted) for found, wanted in pairs)


def _small_prior() -> Prior:
    sizes = ModelSizes(4, heads=4, d_head=16, grid=GRID, text_length=TEXT, text_vocab=WORDS, image_vocab=CODES)
    return build_prior(sizes, layout="row, column, conv, full", conv_kernel=5)


def _tokens(batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(WORDS, (batch, TEXT), generator=generator)
    image = torch.randint(CODES, (batch, GRID * GRID), generator=generator)
    return text.to(device), torch.full((batch,), TEXT, device=device), image.to(device)


def _prior(device: str) -> Iterator[Row]:
    ours = _small_prior()
    theirs = copy.deepcopy(ours).to(device)
    for prior, place in ((ours, "cpu"), (theirs, device)):
        training_loss(prior, *_tokens(4, place))().backward()  # type: ignore[no-untyped-call]
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    yield Row("prior, gradients, largest relative error", max(_error(b.grad, a.grad) for a, b in pairs), "", None, 1e-3)
    uniforms = torch.rand(1, 8, GRID * GRID, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    drawn = []
    for prior, place in ((ours, "cpu"), (theirs, device)):
        decoder = Decoder(prior.eval().requires_grad_(False), "fp32")
        text = _tokens(1, place)[0]
        drawn.append(sample_images(decoder, text, uniforms.to(place), SamplingSettings(batch_size=8))[0].cpu())
    same = float((drawn[0] == drawn[1]).float().mean())
    yield Row("sampled tokens that are the CPU's (one that differs changes the rest)", same, "", 0.9)


def _sped_up(device: str) -> Iterator[Row]:
    """Compare the ways that training takes on a GPU with the plain ones; a CPU tries them without generated code."""
    plain = _small_prior().to(device)
    fast = copy.deepcopy(plain)
    speed_up(fast, "auto", torch.device(device), "inductor" if device == "cuda" else "aot_eager")
    for prior in (plain, fast):
        training_loss(prior, *_tokens(4, device))().backward()  # type: ignore[no-untyped-call]
    blocks = list(fast.resblocks)
    compiled = sum(block.compiled_branch is not None for block in blocks) / len(blocks)
    yield Row("resblocks that training compiles", compiled, "", 1)
    attention = [block for block in blocks if isinstance(block, AttentionResblock)]
    by_flex = sum(block.flex is not None for block in attention) / len(attention)
    yield Row("resblocks of attention by flex_attention", by_flex, "", 1 if device == "cuda" else None)
    pairs = zip(plain.parameters(), fast.parameters(), strict=True)
    error = max(_error(b.grad, a.grad) for a, b in pairs)
    yield Row("the prior by both, gradients, largest relative error", error, "", None, 1e-3)


def _waits(device: str) -> Row:
    """Count the times that an update of the prior in 32 bit waits for the GPU."""
    prior, stage = _small_prior().to(device), PriorSettings()
    state = TrainingState(Replicated(prior), stage, set(prior.decayed_parameters()))
    text, length, image = _tokens(8, "cpu")

    def update() -> None:
        state.optimizer.zero_grad()
        found = prior.loss(send(text, torch.device(device)), length, send(image, torch.device(device)))
        (found.text + found.image).backward()  # type: ignore[no-untyped-call]
        state.optimizer.step(1e-3)

    update()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        update()
        torch.cuda.set_sync_debug_mode("default")
    waits = sum("called a synchronizing" in str(each.message) for each in seen)
    return Row("waits for the GPU in an update", waits, "", None, 0)


def _dvae(device: str) -> Iterator[Row]:
    ours = DVAE(DvaeModel(n_hid=16, n_init=16, blocks_per_group=1, codebook_size=CODES))
    theirs = copy.deepcopy(ours).to(device)
    pictures = torch.randint(256, (2, 32, 32, 3), generator=torch.Generator().manual_seed(3)).to(torch.uint8)
    logits = []
    for model, place in ((ours, "cpu"), (theirs, device)):
        x = pictures.to(place).permute(0, 3, 1, 2).float() / 255 * 0.8 + 0.1
        logits.append(model.encoder(x))
        mu, _ = model.decoder.decode_tokens(torch.zeros(2, 4, 4, dtype=torch.long, device=place))
        (logits[-1].square().mean() + mu.square().mean()).backward()
    yield Row("dVAE, logits, largest relative error", _error(logits[1], logits[0]), "", None, 1e-3)
    pairs = zip(ours.parameters(), theirs.parameters(), strict=True)
    yield Row("dVAE, gradients, largest relative error", max(_error(b.grad, a.grad) for a, b in pairs), "", None, 1e-2)
    generators = [torch.Generator(device).manual_seed(row) for row in range(2)]
    found = dvae_loss(theirs, pictures.to(device), LOSS, generators)
    yield Row("dVAE, loss is finite", float(found.loss.isfinite()), "", 1)


def _fp16(device: str) -> Iterator[Row]:
    prior, stage = _small_prior(), PriorSettings(precision="fp16")
    scaling = set_precision(prior, stage, 1)
    prior.to(device)
    state = TrainingState(Replicated(prior, scaling=scaling), stage, set(prior.decayed_parameters()))
    losses, skipped = [], 0.0
    for _ in range(UPDATES):
        state.optimizer.zero_grad()
        loss = training_loss(prior, *_tokens(8, device))()
        loss.backward()  # type: ignore[no-untyped-call]
        skipped += float(state.optimizer.step(1e-3)["skipped"] > 0)
        losses.append(float(loss))
    yield Row(
        f"float16 with gradient scales: fall of the loss in {UPDATES} updates", losses[0] - losses[-1], "nats", 0.5
    )
    yield Row("the same: updates skipped", skipped, "", None, UPDATES // 5)


def _resumed(device: str) -> Iterator[Row]:
    """Train with half the updates and then with all of them, and compare the weights with those of one run."""
    if missing := [name for name in ("zarr", "tensorboard") if importlib.util.find_spec(name) is None]:
        yield Row(f"a stopped and resumed run is not tried, without {', '.join(missing)}", 0.0)
        return
    from helpers.sharded_runs import HALF, make_inputs, train_alone

    from dalle_cli.stores.checkpoint import open_checkpoint

    with tempfile.TemporaryDirectory() as root:
        made = make_inputs(Path(root))
        whole = train_alone(made, Path(root) / "whole")
        train_alone(made, Path(root) / "parts", **{"training.updates": HALF})
        parts = train_alone(made, Path(root) / "parts")
        same = open_checkpoint(whole).files == open_checkpoint(parts).files
    yield Row(f"a run on {device} that was stopped and resumed ends with the same bytes", float(same), "", 1)


def _error(found: Tensor | nn.Parameter | None, wanted: Tensor | nn.Parameter | None) -> float:
    """Return the largest difference relative to the largest value."""
    assert found is not None
    assert wanted is not None
    a, b = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))

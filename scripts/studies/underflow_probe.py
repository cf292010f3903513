"""Train and probe a deep prior in float16, with no scale, one scale or one scale per resblock.

Two things are compared with float32. *Training* runs priors from the same seed on the same batches. The scales follow
the paper's rule (appendix D), except that a single common scale may shrink at every overflow, as a loss scaler does.
*Probes* take the gradients of one batch at the first and last weights of the float32 run. There, each scale has the
value that the rule reaches in the long run: the largest power of two at which nothing overflows.

The variant ``all fp16, one scale`` keeps everything but the heads in float16, like ``model.half()`` with a loss scale.
The other float16 variants keep the residual stream, embeddings, gains and biases in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from dalle_cli.config.schema import PriorModel, PriorObjective, PriorSettings
from dalle_cli.precision.adam import Adam16
from dalle_cli.precision.gradient_scaling import HIGHEST, LOWEST, GradientScales, GradientScaling
from dalle_cli.prior.model import Prior, Resblock
from dalle_cli.prior.train import read_tokens
from dalle_cli.progress import log, progress
from dalle_cli.randomness import numpy_generator
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.stores.usable_rows import usable_rows

ALL_HALF = "all fp16, one scale"
VARIANTS = ("fp32", "plain fp16", ALL_HALF, "one scale", "scale per resblock")
OCTAVE = 1000
"""Steps of a scale's exponent that double it."""
STRETCHED_END = 1024.0
"""Root mean square at the end of the residual stream of a stretched prior."""
Line = dict[str, float]
Tokens = tuple[Tensor, Tensor, Tensor]
"""Captions (B, T), their lengths (B,), image tokens (B, S), all int64."""


@dataclass(frozen=True)
class Study:
    """Sizes of the priors, and settings of their training.

    ``replicas`` is the simulated number M of data-parallel replicas. Each divides the loss by M, as in the paper, so
    that its gradients are M times smaller. Their gradients are summed as if all replicas had the same batch.

    ``growth`` above 1 makes the untrained prior harder to train in float16: its residual stream grows by that factor
    from resblock to resblock, so that the gradients shrink by about as much.
    """

    layers: int = 48
    heads: int = 2
    d_head: int = 16
    grid: int = 8
    text_length: int = 16
    text_vocab: int = 64
    image_vocab: int = 64
    batch_size: int = 8
    replicas: int = 1024
    updates: int = 300
    learning_rate: float = 1e-3
    warmup: int = 50
    seed: int = 0
    growth: float = 1.0

    def prior(self, variant: str = "fp32") -> Prior:
        """Return the untrained prior in the number formats of ``variant``."""
        model = PriorModel.of_heads(
            layers=self.layers, heads=self.heads, d_head=self.d_head, grid=self.grid, conv_kernel=3
        )
        prior = Prior(model, self.text_length, self.text_vocab, self.image_vocab, seed=self.seed)
        if variant == ALL_HALF:
            prior.half()
            for head in (prior.text_head, prior.image_head):
                head.float()
            return prior
        return prior if variant == "fp32" else prior.cast_resblocks(torch.float16)


@torch.no_grad()
def stretch(prior: Prior, growth: float, tokens: Tokens) -> None:
    """Scale embeddings and resblock outputs so that the residual stream grows ``growth``-fold with each resblock.

    Its root mean square on ``tokens`` ends at STRETCHED_END, which float16 can represent.
    """
    text, length, image = tokens

    def embedded() -> Tensor:
        return torch.cat([prior.embed_text(prior.with_padding(text, length)), prior.embed_image(image)], dim=1)

    def size(x: Tensor) -> float:
        return float(x.square().mean().sqrt())

    factor = STRETCHED_END / growth ** len(prior.resblocks) / size(embedded())
    for embedding in prior.parameters(recurse=False):
        embedding.mul_(factor)
    x = embedded()
    for block in _blocks(prior):
        block.get_parameter("out.weight").mul_(math.sqrt(growth**2 - 1) * size(x) / size(block.branch(x)))
        x = block(x)


def synthetic_tokens(study: Study, step: int) -> Tokens:
    """Return the batch of an update.

    Captions are random. An image's first token equals the first token of its caption. Nine times in ten, each further
    token is the image of the one before under a fixed permutation of the codebook; otherwise it is random. With 64
    codes, learning this lowers the loss of an image token from 4.16 to 0.73 nats.
    """
    permutation = numpy_generator(study.seed, "underflow", "permutation").permutation(study.image_vocab)
    rng = numpy_generator(study.seed, "underflow", "batch", step)
    text = rng.integers(study.text_vocab, size=(study.batch_size, study.text_length))
    image = rng.integers(study.image_vocab, size=(study.batch_size, study.grid**2))
    follows = rng.random(image.shape) < 0.9
    image[:, 0] = text[:, 0] % study.image_vocab
    for i in range(1, image.shape[1]):
        image[:, i] = np.where(follows[:, i], permutation[image[:, i - 1]], image[:, i])
    return torch.from_numpy(text), torch.full((len(text),), study.text_length), torch.from_numpy(image)


def stored_tokens(reader: TokenReader, study: Study) -> Callable[[int], Tokens]:
    """Return a function that reads a batch of random rows of a token store, without BPE dropout."""
    rows = np.asarray(usable_rows(reader))

    def batch(step: int) -> Tokens:
        chosen = numpy_generator(study.seed, "underflow", "rows", step).choice(rows, study.batch_size)
        tokens = read_tokens(reader, np.sort(chosen))
        return tokens.text, tokens.length, tokens.image

    return batch


class Found(NamedTuple):
    """Results of a study."""

    training: dict[str, list[Line]]
    """Figures of each update, by variant: the loss before it, the gradient norm and the share of skipped parameters."""
    blocks: list[dict[str, Any]]
    """Rows of ``probe``, with an entry ``weights`` that is "start" or "end"."""


def run_study(study: Study, batch: Callable[[int], Tokens]) -> Found:
    """Train and probe all variants on the batches that ``batch`` returns for each update."""
    log(f"underflow: {2 * study.layers} resblocks, d_model {study.heads * study.d_head}")
    start = study.prior()
    if study.growth > 1:
        stretch(start, study.growth, batch(0))
    initial = start.state_dict()
    runs = {name: _train(study, name, initial, batch) for name in VARIANTS}
    probe_batch = batch(study.updates)
    rows = []
    for moment, weights in (("start", initial), ("end", runs["fp32"][1])):
        rows += [{"weights": moment, **row} for row in probe(study, weights, probe_batch)]
    return Found({name: lines for name, (lines, _) in runs.items()}, rows)


def _train(
    study: Study, name: str, initial: Mapping[str, Tensor], batch: Callable[[int], Tokens]
) -> tuple[list[Line], dict[str, Tensor]]:
    """Train one variant and return the figures of each update and the final weights."""
    prior = study.prior(name)
    prior.load_state_dict(initial)
    scaling = _scaling(prior, name, study.replicas)
    decayed = prior.decayed_parameters()
    rest = [p for n, p in prior.named_parameters() if n not in decayed]
    adam = PriorSettings().adam
    optimizer = Adam16(
        [
            {"params": list(decayed.values()), "weight_decay": adam.weight_decay, "packed": name != "fp32"},
            {"params": rest},
        ],
        betas=(adam.beta1, adam.beta2),
        eps=adam.eps,
        seed=study.seed,
    )
    lines = []
    with progress(name, study.updates, "updates") as bar:
        for step in range(study.updates):
            for group in optimizer.param_groups:
                group["lr"] = study.learning_rate * min(1.0, (step + 1) / study.warmup)
            loss = _backward(prior, batch(step), scaling)
            squares = scaling.squares(scaling.gradients(prior.parameters())) * study.replicas**2
            decision = scaling.decide(squares, adam.clip_norm)
            summed = replace(decision, factors=decision.factors * study.replicas)
            skipped = scaling.apply(optimizer, summed)
            lines.append({"loss": loss, "grad_norm": float(decision.norm), "skipped": float(skipped)})
            bar.advance(1, f"loss {loss:.4f}")
    return lines, {key: value.float() for key, value in prior.state_dict().items()}


def probe(study: Study, weights: Mapping[str, Tensor], tokens: Tokens) -> list[dict[str, Any]]:
    """Measure each resblock's gradients with each variant at the same ``weights``.

    Returns:
        A row for each resblock and variant. ``log2_scale`` is the log2 of the resblock's scale. ``entering_log2_...``
        are quantiles of the log2 of the nonzero gradients that enter the resblock in one replica, without the scale.
        ``lost`` and ``subnormal`` are the shares of those that the cast to float16 makes zero or subnormal.
        ``matrix_zeros`` is the share of zeros among the gradients of the resblock's matrices. ``matrix_error`` is the
        norm of their difference from float32's, relative to the norm of float32's.
    """
    # Round the weights to float16 for all variants, so that they differ in arithmetic only.
    rounded = {name: value.half() for name, value in weights.items()}
    rows: list[dict[str, Any]] = []
    exact: list[Observed] = []
    for name in VARIANTS:
        prior = study.prior(name)
        prior.load_state_dict(rounded)
        scaling = _scaling(prior, name, study.replicas)
        _settle(prior, scaling, tokens)
        observed = _observe(prior, tokens, scaling)
        exact = exact or observed
        for i, (found, wanted) in enumerate(zip(observed, exact, strict=True)):
            entering = found.entering[wanted.entering != 0]
            cast = (entering * found.scale).to(torch.float32 if name == "fp32" else torch.float16).abs()
            exponents = found.entering[found.entering != 0].abs().log2()
            quantiles = torch.tensor([0.05, 0.5, 0.95])
            low, middle, high = exponents.quantile(quantiles).tolist() if len(exponents) else [math.nan] * 3
            rows.append(
                {
                    "resblock": i,
                    "variant": name,
                    "log2_scale": math.log2(found.scale),
                    "entering_log2_p05": low,
                    "entering_log2_p50": middle,
                    "entering_log2_p95": high,
                    "lost": _share(cast == 0),
                    "subnormal": _share((cast > 0) & (cast < torch.finfo(cast.dtype).smallest_normal)),
                    "matrix_zeros": _share(found.matrices == 0),
                    "matrix_error": float((found.matrices - wanted.matrices).norm() / wanted.matrices.norm()),
                }
            )
    return rows


@dataclass
class _Whole:
    """A whole prior as one block of gradient scaling, whose scale multiplies the loss."""

    prior: Prior
    gradient_scale: Tensor | float | None = None

    def parameters(self) -> Iterator[nn.Parameter]:
        return self.prior.parameters()


def _scaling(prior: Prior, name: str, replicas: int) -> GradientScaling:
    if name == ALL_HALF:
        return GradientScaling([_Whole(prior)], GradientScales(1, replicas, window=1), skip="update")
    blocks = _blocks(prior)
    if name == "one scale":
        return GradientScaling(blocks, GradientScales(1, replicas, window=1), skip="update")
    if name == "scale per resblock":
        return GradientScaling(blocks, GradientScales(len(blocks), replicas), skip="resblock")
    return GradientScaling([], GradientScales(0, replicas))


def _settle(prior: Prior, scaling: GradientScaling, tokens: Tokens) -> None:
    """Lower each scale from its largest value until nothing overflows."""
    scales = scaling.scales
    scales.exponents.fill_(HIGHEST)
    while True:
        scaling.assign_scales()
        _backward(prior, tokens, scaling)
        finite = scaling.squares(scaling.gradients(prior.parameters())).isfinite().tolist()
        lowered = [i for i in range(len(scales)) if not finite[i] and scales.exponents[i] > LOWEST]
        if not lowered:
            return
        for i in lowered:
            scales.exponents[i] -= OCTAVE


class Observed(NamedTuple):
    """Gradients of a resblock in one replica, without the scale, flattened and in float32."""

    entering: Tensor
    """Gradients with respect to the resblock's output."""
    matrices: Tensor
    """Gradients with respect to the resblock's matrices."""
    scale: float


def _observe(prior: Prior, tokens: Tokens, scaling: GradientScaling) -> list[Observed]:
    entering: dict[Resblock, Tensor] = {}

    def watch(block: Resblock, _: Any, output: Tensor) -> None:
        output.register_hook(lambda gradient: entering.update({block: gradient.flatten().float()}))

    hooks = [block.register_forward_hook(watch) for block in _blocks(prior)]
    _backward(prior, tokens, scaling)
    for hook in hooks:
        hook.remove()
    loss_scale, observed = _loss_scale(scaling), []
    for block in _blocks(prior):
        scale = float(block.gradient_scale or loss_scale)
        matrices = [p.grad.flatten().float() for p in block.parameters() if p.dim() == 2 and p.grad is not None]
        observed.append(Observed(entering[block] / loss_scale, torch.cat(matrices) / scale, scale))
    return observed


def _blocks(prior: Prior) -> list[Resblock]:
    return cast(list[Resblock], list(prior.resblocks))


def _loss_scale(scaling: GradientScaling) -> float:
    whole = [block.gradient_scale or 1.0 for block in scaling.blocks if isinstance(block, _Whole)]
    return float(whole[0]) if whole else 1.0


def _backward(prior: Prior, tokens: Tokens, scaling: GradientScaling) -> float:
    """Compute the gradients of one replica, and return the loss."""
    prior.zero_grad()
    found, weight = prior.loss(*tokens), PriorObjective().text_weight
    loss = weight * found.text + (1 - weight) * found.image
    (loss * (_loss_scale(scaling) / scaling.scales.replicas)).backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def _share(which: Tensor) -> float:
    return float(which.float().mean()) if which.numel() else 0.0

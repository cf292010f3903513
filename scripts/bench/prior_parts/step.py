"""Time a training step (forward, backward, clipping, AdamW) against dalle-pytorch and as a share of the matmul peak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dalle_cli.prior.model import Prior
from prior_parts.model import ModelSizes, build_prior
from prior_parts.naive import make_naive, naive_loss
from prior_parts.peer import build_peer
from prior_parts.timing import SIDE, Contender, libraries, median_seconds, slow_in_bf16, square_matmul

Log = Callable[[str], None]
GOALS = {1: 2.6, 4: 3.0}
"""Goals for the speed-up over dalle-pytorch, by batch size."""
SHARE_GOAL = 0.8
"""Goal for the share of the fp32 matmul peak."""
PEER = "dalle-pytorch"
NAIVE = "masked attention, all logits"


@dataclass(frozen=True)
class Sizes(ModelSizes):
    """Sizes of the model, batch sizes and the number of timed rounds. Captions have no padding."""

    layers: int = 4
    batches: tuple[int, ...] = (1, 4)
    rounds: int = 5

    @property
    def tokens(self) -> int:
        return self.text_length + self.grid**2


def measure(sizes: Sizes, peer: Any | None, device: str, log: Log) -> dict[str, Any]:
    """Return rows with milliseconds, tokens per second and the share of the peak, and our speed-ups."""
    rows: list[dict[str, Any]] = []
    ratios: list[dict[str, Any]] = []
    names = libraries() if device == "cpu" else ("GPU",)
    for batch in sizes.batches:
        contenders, flops, peaks = _contenders(sizes, batch, peer, device, names)
        seconds_of = median_seconds(contenders, sizes.rounds, device)
        rates = {name: 2 * SIDE**3 / seconds_of[name] for name in peaks}
        rows += [
            {"batch": batch, "name": name, "ms": seconds_of[name] * 1e3, "gflops": rate / 1e9}
            for name, rate in rates.items()
        ]
        for name in flops:
            rate = flops[name] / seconds_of[name]
            row = {
                "batch": batch,
                "name": name,
                "ms": seconds_of[name] * 1e3,
                "tokens_per_second": batch * sizes.tokens / seconds_of[name],
                "gflops": rate / 1e9,
            }
            for peak in rates:
                if peak.startswith("bf16") == ("bf16" in name):
                    row[f"share of {peak}"] = rate / rates[peak]
            if name == f"dalle fp32, {names[0]}":
                row["share_goal"] = SHARE_GOAL
            rows.append(row)
        for row in rows[-len(rates) - len(flops) :]:
            log("step  " + "  ".join(f"{k} {v:.3g}" if isinstance(v, float) else str(v) for k, v in row.items()))
        if peer is not None:
            for name in flops:
                if name.startswith("dalle "):
                    ratio = {"batch": batch, "ours": name, "peer": PEER, "ratio": seconds_of[PEER] / seconds_of[name]}
                    if name == f"dalle fp32, {names[0]}":
                        ratio["goal"] = GOALS.get(batch)
                    ratios.append(ratio)
    return {"sizes": asdict(sizes), "rows": rows, "ratios": ratios}


def build_ours(sizes: Sizes, **settings: object) -> Prior:
    """Return a prior whose layers alternate row and column attention, like those of ``build_training_peer``."""
    return build_prior(sizes, layout="row, column ...", **settings)


def build_training_peer(sizes: Sizes, peer: Any) -> nn.Module:
    """Return dalle-pytorch's model without its token shift, which ours lacks.

    It keeps rotary embeddings, because its row attention fails without them.
    """
    return build_peer(sizes, peer, attn_types=("axial_row", "axial_col"), shift_tokens=False)


def draw_batch(sizes: Sizes, batch: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return random captions (B, T), their lengths (B,) and images (B, S)."""
    text = torch.randint(1, sizes.text_vocab, (batch, sizes.text_length), device=device)
    image = torch.randint(sizes.image_vocab, (batch, sizes.grid**2), device=device)
    return text, torch.full((batch,), sizes.text_length, device=device), image


def training_loss(prior: Prior, text: Tensor, length: Tensor, image: Tensor) -> Callable[[], Tensor]:
    """Return a function that computes the loss of training on this batch."""

    def loss() -> Tensor:
        found = prior.loss(text, length, image)
        return found.text / 8 + found.image * 7 / 8

    return loss


def step_of(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], object]:
    """Return a function that runs one update of ``model``."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.96), weight_decay=4.5e-2, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss().backward()
        nn.utils.clip_grad_norm_(parameters, 4.0)
        optimizer.step()

    return step


def _contenders(
    sizes: Sizes, batch: int, peer: Any | None, device: str, names: tuple[str, ...]
) -> tuple[dict[str, Contender], dict[str, float], list[str]]:
    """Return all contenders, the FLOPs of each training step, and the names of the matmuls that measure the peak."""
    text, length, image = draw_batch(sizes, batch, device)
    prior = build_ours(sizes).to(device)
    loss = training_loss(prior, text, length, image)

    def in_16_bit() -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return loss()

    step = step_of(prior, loss)
    steps = {f"dalle fp32, {name}": Contender(step, fast=name == names[0]) for name in names}
    if not slow_in_bf16(device):
        steps["dalle bf16 autocast"] = Contender(step_of(prior, in_16_bit))
    naive = make_naive(build_ours(sizes)).to(device)
    steps[NAIVE] = Contender(step_of(naive, lambda: naive_loss(naive, text, image)))
    if peer is not None:
        model = build_training_peer(sizes, peer).to(device)
        steps[PEER] = Contender(step_of(model, lambda: model(text, image, return_loss=True)), fast=False)
    flops = {name: _flops(contender) for name, contender in steps.items()}
    peaks = {
        f"fp32 matmul, {name}": Contender(square_matmul(torch.float32, device), fast=name == names[0]) for name in names
    }
    if not slow_in_bf16(device):
        peaks["bf16 matmul"] = Contender(square_matmul(torch.bfloat16, device))
    return peaks | steps, flops, list(peaks)


def _flops(contender: Contender) -> float:
    with FlopCounterMode(display=False) as counter:
        contender.work()
    return float(counter.get_total_flops())

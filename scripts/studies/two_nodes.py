"""A small prior trained by several machines whose gradients meet through PowerSGD: loss, bytes and time of each rank.

Machines are groups of processes. Inside one, parameters, gradients and moments are split as ZeRO does, by the plainest
means; between them ``distributed/power_sgd.py`` is at work. The data are the shapes world's scenes with words as text
tokens and the colours of patches as image tokens, so that nothing has to be trained or downloaded before.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dalle_cli.config.schema import LearningRate, PowerSgd, PriorModel, PriorObjective, PriorSettings
from dalle_cli.data.batch_order import BatchOrder
from dalle_cli.distributed.group import Group, form_nodes
from dalle_cli.distributed.power_sgd import PowerSgdReducer
from dalle_cli.prior.model import Prior
from dalle_cli.prior.train import TokenBatch
from dalle_cli.progress import progress
from dalle_cli.shapes.world import counter_rng, phrasings, random_caption, random_scene, render
from dalle_cli.training.schedules import learning_rate

MACHINES = 2
PATCH = 8
LEVELS = 4
"""Of each of red, green and blue among a patch's image tokens."""
IMAGE_VOCAB = LEVELS**3
TEXT_LENGTH = 16
HELD_OUT = 256


@dataclass(frozen=True)
class Study:
    """Sizes of the prior, and how it is trained."""

    layers: int = 4
    heads: int = 4
    d_head: int = 32
    grid: int = 4
    scenes: int = 4000
    batch_size: int = 16
    updates: int = 300
    learning_rate: float = 3e-3
    warmup: int = 20
    seed: int = 0

    def prior(self) -> Prior:
        """The untrained prior."""
        model = PriorModel.of_heads(
            layers=self.layers, heads=self.heads, d_head=self.d_head, grid=self.grid, conv_kernel=3
        )
        return Prior(model, TEXT_LENGTH, len(vocabulary()), IMAGE_VOCAB, seed=self.seed)

    def rate(self, update: int) -> float:
        """Step size after ``update`` updates."""
        settings = LearningRate(peak=self.learning_rate, warmup_updates=self.warmup, final=self.learning_rate / 100)
        return learning_rate(settings, update, self.updates)


@dataclass(frozen=True)
class Outcome:
    """What one setting came to."""

    settings: dict[str, float]
    losses: list[float]
    """Of the whole batch before each update, nats."""
    held_out: float
    """Loss of scenes that training left out, after the last update."""
    bytes: int
    """Handed to collectives between machines by this process, an update."""
    link_bytes: int | None
    """Sent by this machine over its network interface, an update; None where that is not its own."""
    step_seconds: float
    """Median of the updates, with forward and backward pass."""
    exchange_seconds: float
    """Median of what of it went into the exchange between machines."""


@cache
def vocabulary() -> dict[str, int]:
    """The words of the shapes world's captions."""
    texts = (text for index in range(500) for text in phrasings(random_scene(0, "train", index)))
    return {word: i for i, word in enumerate(sorted({word for text in texts for word in text.split()}))}


def shapes_tokens(grid: int, indices: range, seed: int = 0) -> TokenBatch:
    """Scenes' captions as words, and pictures as ``grid`` x ``grid`` patches, each the nearest of 64 colours to its
    mean.
    """
    words = vocabulary()
    text = torch.zeros(len(indices), TEXT_LENGTH, dtype=torch.int64)
    length, image = [], []
    for row, index in enumerate(indices):
        this = random_scene(seed, "train", index)
        ids = [words[word] for word in random_caption(this, counter_rng(seed, "caption", "train", index)).split()]
        text[row, : len(ids)] = torch.tensor(ids)
        length.append(len(ids))
        pixels = render(this, grid * PATCH).reshape(grid, PATCH, grid, PATCH, 3).mean((1, 3))
        levels = np.rint(pixels * ((LEVELS - 1) / 255)).astype(np.int64)
        image.append(levels @ [LEVELS**2, LEVELS, 1])
    return TokenBatch(text, torch.tensor(length), torch.from_numpy(np.stack(image)).flatten(1))


class ShardedTraining:
    """AdamW on this process's shards of ``prior``, whose gradients are averaged in its machine and then between them.

    Each parameter, flat and padded, is split among the machine's processes in their order. All processes call the same
    methods in the same order.

    Args:
        node: the processes of this machine.
        reducer: averages shards' gradients between machines.
    """

    def __init__(self, prior: Prior, node: dist.ProcessGroup, reducer: PowerSgdReducer) -> None:
        self.prior, self.node, self.reducer = prior, node, reducer
        self.parts = dist.get_world_size(node)
        self.named = dict(prior.named_parameters())
        own = self._rows(p.detach() for p in self.named.values())[dist.get_rank(node)]
        self.lengths = [self._length(p) for p in self.named.values()]
        self.shards = dict(zip(self.named, map(nn.Parameter, own.clone().split(self.lengths)), strict=True))
        decayed, self.adam = prior.decayed_parameters(), PriorSettings().adam
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [self.shards[name] for name in decayed], "weight_decay": self.adam.weight_decay},
                {"params": [p for name, p in self.shards.items() if name not in decayed], "weight_decay": 0.0},
            ],
            betas=(self.adam.beta1, self.adam.beta2),
            eps=self.adam.eps,
        )

    def update(self, number: int, rate: float) -> float:
        """One update from the gradients that the prior holds. Returns the seconds of the exchange between machines."""
        own = self._node_mean()
        for shard, gradient in zip(self.shards.values(), own.split(self.lengths), strict=True):
            shard.grad = gradient
        began = time.perf_counter()
        self.reducer.reduce(((name, p.grad) for name, p in self.shards.items() if p.grad is not None), number)
        seconds = time.perf_counter() - began
        self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._gather()
        return seconds

    def _node_mean(self) -> Tensor:
        """This process's shards of the gradient, averaged over its machine."""
        rows = self._rows(p.grad for p in self.named.values() if p.grad is not None)
        own = torch.empty(rows.shape[1])
        dist.reduce_scatter(own, list(rows), group=self.node)
        return own / self.parts

    def _clip(self) -> None:
        """The norm is over the machine's shards; every machine holds the same ones."""
        gradients = [p.grad for p in self.shards.values() if p.grad is not None]
        squares = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum()
        dist.all_reduce(squares, group=self.node)
        if self.adam.clip_norm is not None:
            torch._foreach_mul_(gradients, min(1.0, self.adam.clip_norm / (float(squares.sqrt()) + 1e-6)))

    @torch.no_grad()
    def _gather(self) -> None:
        own = torch.cat([shard.detach() for shard in self.shards.values()])
        rows = torch.empty(self.parts, len(own))
        dist.all_gather(list(rows), own, group=self.node)
        columns = rows.split(self.lengths, dim=1)
        for parameter, part in zip(self.named.values(), columns, strict=True):
            parameter.copy_(part.flatten()[: parameter.numel()].view_as(parameter))

    def _length(self, tensor: Tensor) -> int:
        return -(-tensor.numel() // self.parts)

    def _rows(self, tensors: Iterator[Tensor]) -> Tensor:
        """(parts, L): each row one process's shards of ``tensors``."""

        def split(tensor: Tensor) -> Tensor:
            padding = self._length(tensor) * self.parts - tensor.numel()
            return nn.functional.pad(tensor.flatten(), (0, padding)).view(self.parts, -1)

        return torch.cat([split(tensor) for tensor in tensors], dim=1)


def join_machines() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Join the default group as the environment says, and halve it: this process's machine, and those that hold the
    same shards as it.
    """
    dist.init_process_group("gloo")
    nodes = form_nodes(Group(dist.get_rank(), dist.get_world_size()), dist.get_world_size() // MACHINES)
    return nodes.inside.processes, nodes.across.processes


def train(study: Study, settings: PowerSgd, node: dist.ProcessGroup, place: dist.ProcessGroup) -> Outcome:
    """Train the study's prior with ``settings`` on all processes."""
    prior = study.prior()
    columns = {name: parameter.shape[1] for name, parameter in prior.decayed_parameters().items()}
    parts = dist.get_world_size(node)
    reducer = PowerSgdReducer(settings, place, columns, shards=parts, seed=study.seed)
    training = ShardedTraining(prior, node, reducer)
    tokens, held_out = _samples(study)
    size = dist.get_world_size()
    order = BatchOrder(np.arange(len(tokens)), study.batch_size, study.seed)
    losses, seconds, exchanges = [], [], []
    link_before = _link_bytes()
    with progress(f"rank {settings.rank}", study.updates, "updates") as bar:
        for update in range(study.updates):
            began = time.perf_counter()
            rows, _ = order.batch(update)
            batch = TokenBatch(tokens.text[rows], tokens.length[rows], tokens.image[rows])
            count = float(prior.text_counts(batch.length).sum().clamp(min=1)) / size
            part = batch.split(study.batch_size // size)[dist.get_rank()]
            prior.zero_grad()
            loss = weighted_loss(prior, part, count)
            loss.backward()  # type: ignore[no-untyped-call]
            exchanges.append(training.update(update, study.rate(update)))
            seconds.append(time.perf_counter() - began)
            loss = loss.detach()
            dist.all_reduce(loss)
            losses.append(float(loss) / size)
            bar.advance(1, f"loss {losses[-1]:.4f}")
    link_after = _link_bytes()
    with torch.no_grad():
        found = float(weighted_loss(prior, held_out))
    return Outcome(
        settings.model_dump(),
        losses,
        found,
        reducer.bytes_sent // study.updates,
        None if link_before is None or link_after is None else (link_after - link_before) // study.updates,
        median(seconds),
        median(exchanges),
    )


def weighted_loss(prior: Prior, batch: TokenBatch, text_count: float | None = None) -> Tensor:
    """The prior's loss of a batch, see ``Prior.loss``."""
    found, weight = prior.loss(batch.text, batch.length, batch.image, text_count), PriorObjective().text_weight
    return weight * found.text + (1 - weight) * found.image


@cache
def _samples(study: Study) -> tuple[TokenBatch, TokenBatch]:
    """What is trained on, and what is left out."""
    tokens = shapes_tokens(study.grid, range(study.scenes + HELD_OUT), study.seed)
    parts = [
        TokenBatch(tokens.text[part], tokens.length[part], tokens.image[part])
        for part in (slice(study.scenes), slice(study.scenes, None))
    ]
    return parts[0], parts[1]


def _link_bytes() -> int | None:
    """Bytes that the interface between the machines has sent, as the kernel counts them; None where all are one."""
    name = os.environ.get("GLOO_SOCKET_IFNAME")
    return int(Path(f"/sys/class/net/{name}/statistics/tx_bytes").read_text()) if name else None


def table(outcomes: list[Outcome]) -> str:
    """Loss, bytes and time of each, beside the first, which sends gradients whole."""
    whole = outcomes[0]
    lines = [
        f"{'gradients':<12}{'loss, last tenth':>17}{'left out':>10}{'beside whole':>14}{'KB a process':>14}"
        f"{'of whole':>10}{'KB on link':>12}{'s exchange':>12}{'s a step':>10}{'of whole':>10}"
    ]
    for found in outcomes:
        tenth = found.losses[-max(1, len(found.losses) // 10) :]
        link = "" if found.link_bytes is None else f"{found.link_bytes / 1000:.0f}"
        loss, beside = sum(tenth) / len(tenth), found.held_out / whole.held_out - 1
        lines.append(
            f"{_name(found.settings):<12}{loss:>17.4f}{found.held_out:>10.4f}{beside:>+14.1%}"
            f"{found.bytes / 1000:>14.1f}{found.bytes / whole.bytes:>10.1%}{link:>12}{found.exchange_seconds:>12.3f}"
            f"{found.step_seconds:>10.3f}{found.step_seconds / whole.step_seconds:>10.2f}"
        )
    return "\n".join(lines)


def _name(settings: dict[str, float]) -> str:
    if not settings["rank"]:
        return "whole"
    return f"rank {settings['rank']}" if settings["min_compression"] else "full rank"

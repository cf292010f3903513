"""A tiny prior trained on several nodes by a plain ZeRO with PowerSGD between nodes, independent of the FSDP engine.

The data are scenes of the shapes world, with words as text tokens and the colours of patches as image tokens, so that
nothing has to be trained first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

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
from dalle_cli.shapes.drawing import render
from dalle_cli.shapes.scene import counter_rng, random_scene
from dalle_cli.shapes.world import phrasings, random_caption
from dalle_cli.training.schedules import learning_rate

NODES = 2
PATCH = 8
LEVELS = 4
"""Levels of each of red, green and blue among the image tokens."""
IMAGE_VOCAB = LEVELS**3
TEXT_LENGTH = 16
HELD_OUT = 256


@dataclass(frozen=True)
class Study:
    """The prior's sizes and its training."""

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
        """Return the untrained prior."""
        model = PriorModel.of_heads(
            layers=self.layers, heads=self.heads, d_head=self.d_head, grid=self.grid, conv_kernel=3
        )
        return Prior(model, TEXT_LENGTH, len(vocabulary()), IMAGE_VOCAB, seed=self.seed)

    def rate(self, update: int) -> float:
        """Return the step size after ``update`` updates."""
        settings = LearningRate(peak=self.learning_rate, warmup_updates=self.warmup, final=self.learning_rate / 100)
        return learning_rate(settings, update, self.updates)


@dataclass(frozen=True)
class Outcome:
    """The result of a training."""

    losses: list[float]
    """Loss of the whole batch before each update."""
    held_out: float
    """Loss of held-out scenes after the last update."""
    bytes: int
    """Bytes that this rank passed to the collectives between nodes, per update."""


@cache
def vocabulary() -> dict[str, int]:
    """Return the words in the shapes world's captions, with numbers."""
    texts = (text for index in range(500) for text in phrasings(random_scene(0, "train", index)))
    return {word: i for i, word in enumerate(sorted({word for text in texts for word in text.split()}))}


def shapes_tokens(grid: int, indices: range, seed: int = 0) -> TokenBatch:
    """Return scenes as tokens: the captions' words, and the nearest of 64 colours to each patch of the picture."""
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
    """AdamW on this rank's shards of ``prior``, whose gradients are averaged inside the node and then between nodes.

    Each parameter, flat and padded, is split among the node's ranks in order.

    Args:
        prior: the whole prior.
        node: the ranks of this node.
        reducer: averages the shards' gradients between nodes.
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

    def update(self, number: int, rate: float) -> None:
        """Make an update from the prior's gradients."""
        own = self._node_mean()
        for shard, gradient in zip(self.shards.values(), own.split(self.lengths), strict=True):
            shard.grad = gradient
        self.reducer.reduce(((name, p.grad) for name, p in self.shards.items() if p.grad is not None), number)
        self._clip()
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self._gather()

    def _node_mean(self) -> Tensor:
        """Return this rank's shards of the gradient, averaged over its node."""
        rows = self._rows(p.grad for p in self.named.values() if p.grad is not None)
        own = torch.empty(rows.shape[1])
        dist.reduce_scatter(own, list(rows), group=self.node)
        return own / self.parts

    def _clip(self) -> None:
        """Clip by the norm over the node's shards, which all nodes have in common."""
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
        """Return the shards of ``tensors`` (parts, L), a row for each rank."""

        def split(tensor: Tensor) -> Tensor:
            padding = self._length(tensor) * self.parts - tensor.numel()
            return nn.functional.pad(tensor.flatten(), (0, padding)).view(self.parts, -1)

        return torch.cat([split(tensor) for tensor in tensors], dim=1)


def join_nodes() -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """Join all ranks in two nodes; return the group of this node, and that of the ranks with the same shards."""
    dist.init_process_group("gloo")
    nodes = form_nodes(Group(dist.get_rank(), dist.get_world_size()), dist.get_world_size() // NODES)
    return nodes.inside.process_group, nodes.across.process_group


def train(study: Study, settings: PowerSgd, node: dist.ProcessGroup, place: dist.ProcessGroup) -> Outcome:
    """Train the study's prior with PowerSGD's ``settings`` on all ranks."""
    prior = study.prior()
    columns = {name: parameter.shape[1] for name, parameter in prior.decayed_parameters().items()}
    parts = dist.get_world_size(node)
    reducer = PowerSgdReducer(settings, place, columns, shards=parts, seed=study.seed)
    training = ShardedTraining(prior, node, reducer)
    tokens, held_out = _samples(study)
    size = dist.get_world_size()
    order = BatchOrder(np.arange(len(tokens)), study.batch_size, study.seed)
    losses = []
    for update in range(study.updates):
        rows, _ = order.batch(update)
        batch = TokenBatch(tokens.text[rows], tokens.length[rows], tokens.image[rows])
        count = float(prior.text_counts(batch.length).sum().clamp(min=1)) / size
        part = batch.split(study.batch_size // size)[dist.get_rank()]
        prior.zero_grad()
        loss = weighted_loss(prior, part, count)
        loss.backward()
        training.update(update, study.rate(update))
        loss = loss.detach()
        dist.all_reduce(loss)
        losses.append(float(loss) / size)
    with torch.no_grad():
        found = float(weighted_loss(prior, held_out))
    return Outcome(losses, found, reducer.bytes_sent // study.updates)


def weighted_loss(prior: Prior, batch: TokenBatch, text_count: float | None = None) -> Tensor:
    """Return the prior's loss of a batch, see ``Prior.loss``."""
    found, weight = prior.loss(batch.text, batch.length, batch.image, text_count), PriorObjective().text_weight
    return weight * found.text + (1 - weight) * found.image


@cache
def _samples(study: Study) -> tuple[TokenBatch, TokenBatch]:
    """Return the training scenes and the held-out scenes."""
    tokens = shapes_tokens(study.grid, range(study.scenes + HELD_OUT), study.seed)
    parts = [
        TokenBatch(tokens.text[part], tokens.length[part], tokens.image[part])
        for part in (slice(study.scenes), slice(study.scenes, None))
    ]
    return parts[0], parts[1]

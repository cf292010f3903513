"""A plain dense transformer on the tokens of our chain, beside our prior: what the sparse layout and the rest buy.

It is the textbook decoder: pre-norm blocks of causal attention by PyTorch's scaled_dot_product_attention, GELU, learned
positions, AdamW with a cosine schedule, one vocabulary of text and image tokens.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dalle_cli.data.batch_order import BatchOrder
from dalle_cli.distributed.device import fast_matmul
from dalle_cli.prior.train import as_batch, read_tokens
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.stores.held_out import split_store
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.text.training_captions import TrainingCaptions


class Block(nn.Module):
    """Causal attention and a feed-forward layer of four times the width, each with its norm before it."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        heads = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        down: Tensor = self.down(F.gelu(self.up(self.norm_2(x))))
        return x + down


class Dense(nn.Module):
    """The transformer over ``text_length`` text tokens and then ``image_length`` image tokens."""

    def __init__(
        self, width: int, heads: int, layers: int, text_length: int, image_length: int, text_vocab: int, codes: int
    ) -> None:
        super().__init__()
        self.text_length, self.text_vocab = text_length, text_vocab
        self.tokens = nn.Embedding(text_vocab + codes, width)
        self.places = nn.Parameter(torch.zeros(text_length + image_length, width))
        self.blocks = nn.Sequential(*[Block(width, heads) for _ in range(layers)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, codes)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)
        for block in self.blocks.children():
            for name in ("out", "down"):
                nn.init.normal_(block.get_parameter(f"{name}.weight"), std=0.02 / math.sqrt(2 * layers))

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        """Return the logits (B, i + 1, codes) of the image token after each of (B, i) ``image`` tokens."""
        ids = torch.cat([text, image + self.text_vocab], dim=1)
        hidden = self.blocks(self.tokens(ids) + self.places[: ids.shape[1]])
        logits: Tensor = self.head(self.norm(hidden[:, self.text_length - 1 :]))
        return logits


def train_dense(
    model: Dense, batches: Iterator[tuple[Tensor, Tensor]], seconds: float, peak: float, warmup: int = 100
) -> int:
    """Train on (text, image) batches for ``seconds``, with a cosine down to a hundredth; return the updates made."""
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    began, update = time.perf_counter(), 0
    with fast_matmul():
        while (share := (time.perf_counter() - began) / seconds) < 1:
            text, image = next(batches)
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1, (update + 1) / warmup) * (0.01 + 0.99 * (1 + math.cos(math.pi * share)) / 2)
            loss = F.cross_entropy(model(text, image[:, :-1]).flatten(0, 1), image.flatten())
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            update += 1
    return update


@torch.no_grad()
def held_out_loss(model: Dense, text: np.ndarray, image: np.ndarray) -> float:
    """Return the mean cross-entropy of image tokens (n, S) under their captions (n, T), in nats a token."""
    words, codes = (torch.from_numpy(values.astype(np.int64)) for values in (text, image))
    losses = [
        F.cross_entropy(model(w, c[:, :-1]).flatten(0, 1), c.flatten())
        for w, c in zip(words.split(32), codes.split(32), strict=True)
    ]
    return float(torch.stack(losses).mean())


def beside_our_prior(run: Path, seconds: float, seed: int) -> dict[str, Any]:
    """Train a dense transformer of our prior's sizes on the run's tokens for ``seconds``; return both held-out losses.

    Our prior's loss is that of its best checkpoint. Both see the same rows, and one caption a picture in an epoch.
    """
    ours, reader = open_checkpoint(run / "prior", "prior"), TokenReader(run / "tokens.zarr")
    recipe = ours.recipe()
    sizes, tokenizer = recipe.prior.model, recipe.tokenizer
    rows, held_out = split_store(reader, recipe)
    torch.manual_seed(seed)
    model = Dense(
        sizes.d_model, sizes.heads, sizes.layers, tokenizer.text_length, sizes.grid**2, tokenizer.vocab_size,
        recipe.dvae.model.codebook_size,
    )  # fmt: skip
    order, captions = BatchOrder(rows, recipe.prior.training.batch_size, seed), TrainingCaptions(reader)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for step in itertools.count():
            rows, epochs = order.batch(step)
            batch = as_batch(*captions.read(rows, epochs), reader.epoch_image(rows, epochs))
            inside = torch.arange(tokenizer.text_length) < batch.length[:, None]
            yield batch.text * inside, batch.image

    updates = train_dense(model, batches(), seconds, recipe.prior.learning_rate.peak)
    batch = read_tokens(reader, held_out)
    text = (batch.text * (torch.arange(tokenizer.text_length) < batch.length[:, None])).numpy()
    return {
        "updates": updates,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "image_loss": held_out_loss(model, text, batch.image.numpy()),
        "image_loss_other_captions": held_out_loss(model, np.roll(text, len(text) // 2, axis=0), batch.image.numpy()),
        "ours": {"step": ours.step, **ours.metrics},
    }

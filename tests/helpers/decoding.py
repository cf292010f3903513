"""Small priors, and decoding compared with a recomputation of the whole stream."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from dalle_cli.config.schema import PriorModel
from dalle_cli.prior.decode import Cache, Decoder, Prefix
from dalle_cli.prior.model import Prior

LAYOUTS = ["row ...", "column ...", "conv ...", "full ...", "row column conv full row conv", "paper"]


TEXT_VOCAB, IMAGE_VOCAB = 13, 9


def build(layout: str, grid: int, text: int, kernel: int) -> Prior:
    model = PriorModel(layers=6, heads=2, d_head=4, d_model=8, grid=grid, conv_kernel=kernel, layout=layout)
    prior = Prior(model, text, TEXT_VOCAB, IMAGE_VOCAB)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return prior.eval()


def inputs(prior: Prior, captions: int, n: int, given: int = 0) -> tuple[Tensor, Tensor]:
    """Return text ids (C, T) of different lengths, and images (C, n, S) that agree in the first ``given`` tokens."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(TEXT_VOCAB, (captions, prior.text_length), generator=generator)
    length = torch.arange(captions) % prior.text_length + 1
    images = torch.randint(IMAGE_VOCAB, (captions, n, prior.image_length), generator=generator)
    images[..., :given] = images[:, :1, :given]
    return prior.with_padding(text, length), images


Stepping = Callable[[Decoder, Cache], Callable[[int, Tensor], Tensor]]
"""Maker of a decoding step, which maps position and token to logits."""


def plain(decoder: Decoder, cache: Cache) -> Callable[[int, Tensor], Tensor]:
    return partial(decoder.step, cache)


def decoded(decoder: Decoder, prefix: Prefix, images: Tensor, stepping: Stepping = plain) -> Tensor:
    """Return logits (C, n, S - P, V) of the positions behind the prefix."""
    step = stepping(decoder, prefix.fork(images.shape[1]))
    logits = [prefix.logits[:, None].expand(-1, images.shape[1], -1)]
    logits += [step(p, images[..., p]) for p in range(prefix.positions, decoder.image_length - 1)]
    return torch.stack(logits, dim=2)


@torch.no_grad()
def recomputed(prior: Prior, text_ids: Tensor, images: Tensor) -> Tensor:
    n = images.shape[1]
    flat = prior.image_logits(prior(text_ids.repeat_interleave(n, 0), images.flatten(0, 1)))
    return flat.unflatten(0, images.shape[:2])


def check_against_the_whole_stream(prior: Prior, captions: int, n: int, stepping: Stepping = plain) -> None:
    text_ids, images = inputs(prior, captions, n)
    decoder = Decoder(prior)
    found = decoded(decoder, decoder.prefill(text_ids), images, stepping)
    wanted = recomputed(prior, text_ids, images)
    assert wanted.std() > 0.1
    assert (found - wanted).abs().max() < 1e-4

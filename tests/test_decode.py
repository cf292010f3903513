"""Cached decoding against the whole stream computed anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dalle_cli.prior.decode import Cache, Slots, prefill, step
from dalle_cli.prior.transformer import Prior
from dalle_cli.recipes.layout import KINDS, AttentionKind
from dalle_cli.recipes.schema import PriorModel

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


def inputs(prior: Prior, captions: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(TEXT_VOCAB, (captions, prior.text_length), generator=generator)
    length = torch.arange(captions) % prior.text_length + 1
    images = torch.randint(IMAGE_VOCAB, (captions, n, prior.image_length), generator=generator)
    return prior.with_padding(text, length), images


def decoded(prior: Prior, cache: Cache, first: Tensor, images: Tensor, start: int = 0) -> Tensor:
    """Logits (C, n, S - start, V) from position start on, with a cache that holds ``start`` positions."""
    logits = [first]
    for position in range(start, prior.image_length - 1):
        logits.append(step(prior, cache, position, images[..., position]))
    return torch.stack(logits, dim=2)


@torch.no_grad()
def recomputed(prior: Prior, text_ids: Tensor, images: Tensor) -> Tensor:
    n = images.shape[1]
    flat = prior.image_logits(prior(text_ids.repeat_interleave(n, 0), images.flatten(0, 1)))
    return flat.unflatten(0, images.shape[:2])


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("grid", "text", "kernel"), [(3, 1, 5), (5, 7, 3), (3, 7, 11), (5, 1, 1), (1, 2, 3)])
def test_logits_are_those_of_the_whole_stream(layout: str, grid: int, text: int, kernel: int) -> None:
    prior = build(layout, grid, text, kernel)
    text_ids, images = inputs(prior, captions=2, n=3)
    cache = prefill(prior, text_ids)
    found = decoded(prior, cache.fork(3), cache.logits[:, None].expand(-1, 3, -1), images)
    wanted = recomputed(prior, text_ids, images)
    assert wanted.std() > 0.1
    assert (found - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("layout", LAYOUTS)
def test_samples_fork_from_a_shared_prefix(layout: str) -> None:
    prior = build(layout, 5, 3, 3)
    text_ids, images = inputs(prior, captions=2, n=4)
    given = 12
    images[..., :given] = images[:, :1, :given]
    cache = prefill(prior, text_ids)
    for position in range(given):
        logits = step(prior, cache, position, images[:, :1, position])
    forked = cache.fork(4)
    found = decoded(prior, forked, logits.expand(-1, 4, -1), images, start=given)
    assert (found - recomputed(prior, text_ids, images)[:, :, given:]).abs().max() < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_caches_hold_what_can_still_be_read(kind: AttentionKind) -> None:
    grid, kernel = 6, 3
    count = Slots(kind, grid, kernel).count
    assert count == {"row": grid + 1, "column": grid**2, "conv": grid + 1 + 1, "full": grid**2}[kind]
    prior = build(f"{kind} ...", grid, 4, kernel)
    text_ids, _ = inputs(prior, captions=2, n=1)
    cache = prefill(prior, text_ids)
    forked = cache.fork(5)
    for layer, shared in zip(forked.layers, cache.layers, strict=True):
        assert layer.image_k.shape == layer.image_v.shape == (2, 5, 2, count, 4)
        assert layer.text_k.shape == (2, 2, 4, 4)
        assert layer.text_k.data_ptr() == shared.text_k.data_ptr()
        assert layer.text_v.data_ptr() == shared.text_v.data_ptr()


def test_16_bit_decodes() -> None:
    prior = build("row column conv full row conv", 3, 4, 3)
    text_ids, images = inputs(prior, captions=2, n=2)
    wanted = recomputed(prior, text_ids, images)
    prior.cast_resblocks(torch.bfloat16)
    cache = prefill(prior, text_ids)
    found = decoded(prior, cache.fork(2), cache.logits[:, None].expand(-1, 2, -1), images)
    assert (found - wanted).abs().mean() < 0.05 * wanted.std()


def test_misuse_is_refused() -> None:
    prior = build("row ...", 3, 4, 3)
    text_ids, images = inputs(prior, captions=2, n=2)
    cache = prefill(prior, text_ids)
    with pytest.raises(ValueError, match="no successor"):
        step(prior, cache, 8, images[:, :1, 8])
    with pytest.raises(ValueError, match="one sample"):
        cache.fork(2).fork(2)
    with pytest.raises(ValueError, match="3 positions"):
        prefill(prior, text_ids[:, :3])

"""Drawing image tokens from the prior (paper, section 2.6).

Each (caption, sample, position) has its own uniform number, and a token is where that number falls in the
cumulative distribution, in float64. So neither the batch's size nor its other members move a draw, up to the
rounding of the logits themselves.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle_cli.prior.decode import Cache, prefill, step
from dalle_cli.prior.transformer import Prior
from dalle_cli.recipes.schema import SamplingSettings


def filter_logits(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Logits (..., V) of the distribution to draw from; tokens left out have -inf.

    First the temperature (0 leaves the likeliest token only, the lower id of equals), then the ``top_k``
    likeliest, then the fewest of those, likeliest first, whose probabilities sum to at least ``top_p``.
    """
    if temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: out of range")
    if temperature == 0:
        temperature, top_k = 1.0, 1
    logits = logits / temperature
    if top_k is None and top_p == 1:
        return logits
    ordered, order = logits.sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        ordered[..., top_k:] = -math.inf
    if top_p < 1:
        probabilities = ordered.double().softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        ordered = ordered.masked_fill(before >= top_p, -math.inf)
    return torch.empty_like(ordered).scatter_(-1, order, ordered)


def draw_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The token (...) of each distribution (..., V) at its uniform number (...) in [0, 1): inverse CDF.

    A token of probability 0 is never drawn.
    """
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[..., -1:]
    # Below the total even where the product rounds up to it: the draw must fall on a token.
    threshold = torch.minimum(uniforms.double()[..., None] * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0]


@torch.no_grad()
def sample_images(
    prior: Prior,
    text_ids: Tensor,
    n: int,
    uniforms: Tensor,
    settings: SamplingSettings,
    prefix: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw ``n`` images for each of C captions.

    Args:
        text_ids: (C, T) text ids with paddings.
        uniforms: (C, n, S) float64 in [0, 1), one for each token.
        settings: temperature, top_k, top_p, and batch_size, the samples drawn at once.
        prefix: (C, P) first image tokens, given rather than drawn (image-to-image); P may be 0 to S.

    Returns:
        tokens (C, n, S) int64 with the prefix, and the log-likelihood (C, n) float64, in nats, of the drawn
        tokens under the model itself: temperature 1, nothing filtered.
    """
    captions, length = text_ids.shape[0], prior.image_length
    if uniforms.shape != (captions, n, length):
        raise ValueError(f"uniforms have shape {tuple(uniforms.shape)}, not {(captions, n, length)}")
    if prefix is None:
        prefix = text_ids.new_zeros(captions, 0)
    if prefix.shape[0] != captions or prefix.shape[1] > length:
        raise ValueError(f"prefix has shape {tuple(prefix.shape)}, not ({captions}, at most {length})")
    tokens = prefix.new_empty(captions, n, length)
    log_likelihood = torch.empty(captions, n, dtype=torch.float64, device=text_ids.device)
    together = max(1, settings.batch_size // n)
    for first in range(0, captions, together):
        some = slice(first, first + together)
        cache, logits = _primed(prior, text_ids[some], prefix[some])
        for start in range(0, n, settings.batch_size):
            part = slice(start, min(start + settings.batch_size, n))
            tokens[some, part], log_likelihood[some, part] = _continue(
                prior, cache.fork(part.stop - start), logits, prefix[some], uniforms[some, part], settings
            )
    return tokens, log_likelihood


def _primed(prior: Prior, text_ids: Tensor, prefix: Tensor) -> tuple[Cache, Tensor]:
    """A cache of one sample a caption that has read text and prefix, and the logits (C, V) that follow."""
    cache = prefill(prior, text_ids)
    logits = cache.logits
    for position in range(min(prefix.shape[1], prior.image_length - 1)):
        logits = step(prior, cache, position, prefix[:, position, None])[:, 0]
    return cache, logits


def _continue(
    prior: Prior, cache: Cache, logits: Tensor, prefix: Tensor, uniforms: Tensor, settings: SamplingSettings
) -> tuple[Tensor, Tensor]:
    """Draw what follows the prefix (C, P): tokens (C, n, S), log-likelihood (C, n) of the drawn ones."""
    captions, n, length = uniforms.shape
    tokens = prefix.new_empty(captions, n, length)
    tokens[..., : prefix.shape[1]] = prefix[:, None]
    log_likelihood = torch.zeros(captions, n, dtype=torch.float64, device=prefix.device)
    logits = logits[:, None].expand(-1, n, -1)
    for position in range(prefix.shape[1], length):
        drawn = draw_tokens(
            filter_logits(logits, settings.temperature, settings.top_k, settings.top_p),
            uniforms[..., position],
        )
        tokens[..., position] = drawn
        log_likelihood += logits.double().log_softmax(-1).gather(-1, drawn[..., None])[..., 0]
        if position + 1 < length:
            logits = step(prior, cache, position, drawn)
    return tokens, log_likelihood

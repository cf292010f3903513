"""Drawing image tokens from the prior (paper, section 2.6), with classifier-free guidance where it is asked for.

Each (caption, sample, position) has its own uniform number, and a token is where that number falls in the
cumulative distribution, summed in float64. So neither the batch's size nor its other members move a draw, up to the
rounding of the logits themselves.

Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): each sample is two sequences of the same image
tokens, behind its caption and behind the empty one, and tokens are drawn from the logits
uncond + S (cond - uncond).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle_cli.config.schema import SamplingSettings
from dalle_cli.prior.cuda_graph import stepper
from dalle_cli.prior.decode import Decoder, Prefix

BELOW_ONE = 1 - 2.0**-52
"""The largest uniform number times this, times any sum, rounds to less than the sum."""


def filter_logits(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Logits (..., V) of the distribution to draw from; tokens left out have -inf.

    First the temperature (0 leaves the likeliest token only, the lower id of equals), then the ``top_k``
    likeliest, then the fewest of those, likeliest first, whose probabilities sum to at least ``top_p``.
    """
    if temperature < 0 or not 0 < top_p <= 1 or (top_k is not None and top_k < 1):
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: out of range")
    if temperature == 0:
        likeliest = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -math.inf).scatter_(-1, likeliest, 0.0)
    if temperature != 1:
        logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = _likeliest(logits, top_k)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True, stable=True)
        probabilities = ordered.double().softmax(-1)
        before = probabilities.cumsum(-1) - probabilities
        logits = torch.empty_like(logits).scatter_(-1, order, ordered.masked_fill_(before >= top_p, -math.inf))
    return logits


def _likeliest(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the k largest of (..., V), the lower ids of equals."""
    least = logits.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, equal = logits > least, logits == least
    kept = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    return logits.masked_fill(~kept, -math.inf)


def draw_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """The token (...) of each distribution (..., V) at its uniform number (...) in [0, 1): inverse CDF.

    A token of probability 0 is never drawn.
    """
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    threshold = uniforms.double()[..., None] * BELOW_ONE * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0]


@torch.inference_mode()
def sample_images(
    decoder: Decoder,
    text_ids: Tensor,
    n: int,
    uniforms: Tensor,
    settings: SamplingSettings,
    prefix: Tensor | None = None,
    prefix_lengths: Tensor | None = None,
    empty: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw ``n`` images for each of C captions.

    Args:
        text_ids: (C, T) text ids with paddings.
        uniforms: (C, n, S) float64 in [0, 1), one for each token.
        settings: temperature, top_k, top_p, guidance, and batch_size, the samples drawn at once: all if None.
        prefix: (C, P) first image tokens, given rather than drawn (image-to-image); P may be 0 to S.
        prefix_lengths: (C,) how many of them are given for each caption; all P by default. What stands behind is
            ignored.
        empty: (T,) text ids of the empty caption, for guidance other than 1.

    Returns:
        tokens (C, n, S) int64 with the prefix, and the log-likelihood (C, n) float64, in nats, of the drawn
        tokens under the model itself: temperature 1, nothing filtered, not guided.
    """
    captions, length = text_ids.shape[0], decoder.image_length
    if uniforms.shape != (captions, n, length):
        raise ValueError(f"uniforms have shape {tuple(uniforms.shape)}, not {(captions, n, length)}")
    if prefix is None:
        prefix = text_ids.new_zeros(captions, 0)
    if prefix.shape[0] != captions or prefix.shape[1] > length:
        raise ValueError(f"prefix has shape {tuple(prefix.shape)}, not ({captions}, at most {length})")
    given = [prefix.shape[1]] * captions if prefix_lengths is None else prefix_lengths.tolist()
    if len(given) != captions or not all(0 <= some <= prefix.shape[1] for some in given):
        raise ValueError(f"prefix_lengths {given}: not {captions} numbers from 0 to {prefix.shape[1]}")
    if settings.guidance != 1 and empty is None:
        raise ValueError(f"guidance {settings.guidance} needs the empty caption")
    at_once = settings.batch_size or captions * n
    tokens = prefix.new_empty(captions, n, length)
    log_likelihood = torch.empty(captions, n, dtype=torch.float64, device=text_ids.device)
    together = max(1, at_once // n)
    for first in range(0, captions, together):
        some = slice(first, first + together)
        start = min(*given[some], length - 1)
        texts, read = text_ids[some], prefix[some, :start]
        if settings.guidance != 1 and empty is not None:
            texts, read = torch.cat([texts, empty.expand_as(texts)]), torch.cat([read, read])
        begun = decoder.prefill(texts, read)
        for begin in range(0, n, at_once):
            part = slice(begin, min(begin + at_once, n))
            tokens[some, part, :start] = prefix[some, None, :start]
            log_likelihood[some, part] = _continue(
                decoder,
                begun,
                tokens[some, part],
                prefix[some],
                given[some],
                uniforms[some, part],
                settings,
            )
    return tokens, log_likelihood


def _continue(
    decoder: Decoder,
    begun: Prefix,
    tokens: Tensor,
    prefix: Tensor,
    given: list[int],
    uniforms: Tensor,
    settings: SamplingSettings,
) -> Tensor:
    """Fill ``tokens`` (C, n, S) behind what is read; returns the log-likelihood (C, n) of the drawn ones.

    ``begun`` has read C captions, or with guidance 2 C, of which the last C are empty.
    """
    captions, n, length = uniforms.shape
    log_likelihood = torch.zeros(captions, n, dtype=torch.float64, device=tokens.device)
    lengths = torch.tensor(given, device=tokens.device)[:, None]
    step, logits = stepper(decoder, begun.fork(n)), begun.logits[:, None].expand(-1, n, -1)
    for position in range(begun.positions, length):
        own, without = logits[:captions], logits[captions:]
        guided = without + settings.guidance * (own - without) if len(without) else own
        filtered = filter_logits(guided, settings.temperature, settings.top_k, settings.top_p)
        token = draw_tokens(filtered, uniforms[..., position])
        score = own.log_softmax(-1).gather(-1, token[..., None])[..., 0]
        if position < max(given):
            forced = position < lengths
            token = torch.where(forced, prefix[:, position, None], token)
            score = score.masked_fill(forced, 0.0)
        tokens[..., position] = token
        log_likelihood += score
        if position + 1 < length:
            logits = step(position, torch.cat([token, token]) if len(without) else token)
    return log_likelihood

"""Drawing of image tokens from the prior (paper, section 2.6), with optional classifier-free guidance.

Tokens are drawn by inverse CDF, summed in float64, from a uniform number for each (caption, sample, position). So
neither the batch size nor the other samples of a batch change a token, up to rounding of the logits.

With classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), each sample is two sequences of the same image
tokens, one behind its caption and one behind the empty caption. Tokens are drawn from the logits
uncond + S (cond - uncond).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dalle_cli.config.schema import SamplingSettings
from dalle_cli.prior.cuda_graph import fast_step
from dalle_cli.prior.decode import Decoder, Prefix

BELOW_ONE = 1 - 2.0**-52
"""Factor that keeps a uniform number times a sum strictly below the sum after rounding."""


def filter_logits(logits: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Return the logits (..., V) of the distribution to draw from; excluded tokens have -inf.

    Args:
        logits: (..., V) logits of the model.
        temperature: divisor of the logits; 0 keeps only the likeliest token (of ties, the lowest id).
        top_k: number of likeliest tokens to keep; None keeps all.
        top_p: keep the fewest of the remaining likeliest tokens whose probabilities sum to at least this.
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
    """Set all but the k largest of (..., V) to -inf; of ties, keep the lower ids."""
    least = logits.topk(k, sorted=False).values.amin(-1, keepdim=True)
    above, equal = logits > least, logits == least
    selected = above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))
    return logits.masked_fill(~selected, -math.inf)


def draw_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Draw a token of nonzero probability from each distribution (..., V), by inverse CDF at ``uniforms`` in [0, 1)."""
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    threshold = uniforms.double()[..., None] * BELOW_ONE * cumulative[..., -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[..., 0]


@torch.inference_mode()
def sample_images(
    decoder: Decoder,
    text_ids: Tensor,
    uniforms: Tensor,
    settings: SamplingSettings,
    prefix: Tensor | None = None,
    empty: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw n images for each of C captions.

    Args:
        decoder: the prior.
        text_ids: (C, T) text ids with paddings.
        uniforms: (C, n, S) float64 in [0, 1), one for each token, on the device that draws: the decoder's, or the CPU
            if that cannot compute in float64.
        settings: temperature, top_k, top_p, guidance, and batch_size, the samples drawn at once (None: all).
        prefix: (C, P) first image tokens, given rather than drawn (image-to-image), P < S; None for no tokens.
        empty: (T,) text ids of the empty caption, for guidance other than 1.

    Returns:
        Tokens (C, n, S) int64 including the prefix, and the log-likelihood (C, n) float64 of the drawn tokens, in
        nats, at temperature 1 without filters and guidance.
    """
    captions, n, length = uniforms.shape
    if captions != len(text_ids) or length != decoder.image_length:
        raise ValueError(
            f"uniforms have shape {tuple(uniforms.shape)}, not ({len(text_ids)}, n, {decoder.image_length})"
        )
    if prefix is None:
        prefix = text_ids.new_zeros(captions, 0)
    given = prefix.shape[1]
    if prefix.shape[0] != captions or given >= length:
        raise ValueError(f"prefix has shape {tuple(prefix.shape)}, not ({captions}, less than {length})")
    if settings.guidance != 1 and empty is None:
        raise ValueError(f"guidance {settings.guidance} needs the empty caption")
    at_once = settings.batch_size or captions * n
    tokens = prefix.new_empty(captions, n, length)
    tokens[..., :given] = prefix[:, None]
    log_likelihood = torch.empty(captions, n, dtype=torch.float64, device=uniforms.device)
    captions_at_once = max(1, at_once // n)
    for first in range(0, captions, captions_at_once):
        some = slice(first, first + captions_at_once)
        texts, read = text_ids[some], prefix[some]
        if settings.guidance != 1 and empty is not None:
            texts, read = torch.cat([texts, empty.expand_as(texts)]), torch.cat([read, read])
        prefilled = decoder.prefill(texts, read)
        for begin in range(0, n, at_once):
            part = slice(begin, min(begin + at_once, n))
            log_likelihood[some, part] = _draw_rest(
                decoder, prefilled, tokens[some, part], uniforms[some, part], settings
            )
    return tokens, log_likelihood


def _draw_rest(
    decoder: Decoder, prefilled: Prefix, tokens: Tensor, uniforms: Tensor, settings: SamplingSettings
) -> Tensor:
    """Draw the rest of ``tokens`` (C, n, S) in place, and return their log-likelihood (C, n).

    ``prefilled`` holds C captions or, with guidance, 2 C, of which the last C are empty.
    """
    captions, n, length = uniforms.shape
    log_likelihood = torch.zeros(captions, n, dtype=torch.float64, device=uniforms.device)
    step, logits = fast_step(decoder, prefilled.fork(n)), prefilled.logits[:, None].expand(-1, n, -1)
    for position in range(prefilled.positions, length):
        logits = logits.to(uniforms.device)
        conditional, unconditional = logits[:captions], logits[captions:]
        guided = conditional
        if len(unconditional):
            guided = unconditional + settings.guidance * (conditional - unconditional)
        filtered = filter_logits(guided, settings.temperature, settings.top_k, settings.top_p)
        token = draw_tokens(filtered, uniforms[..., position])
        tokens[..., position] = token
        log_likelihood += conditional.log_softmax(-1).gather(-1, token[..., None])[..., 0]
        if position + 1 < length:
            token = token.to(tokens.device)
            logits = step(position, torch.cat([token, token]) if len(unconditional) else token)
    return log_likelihood

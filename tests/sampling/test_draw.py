"""Filters, the inverse CDF, and sampling frequencies against the model's own probabilities."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats
from torch import Tensor

from dalle_cli.config.schema import PriorModel, SamplingSettings
from dalle_cli.prior.decode import Decoder
from dalle_cli.prior.model import Prior
from dalle_cli.sampling.draw import BELOW_ONE, draw_tokens, filter_logits, sample_images

TEXT, TEXT_VOCAB = 3, 5


def tiny(vocab: int = 3, grid: int = 2) -> Prior:
    model = PriorModel(layers=4, heads=2, d_head=4, d_model=8, grid=grid, conv_kernel=3)
    prior = Prior(model, TEXT, TEXT_VOCAB, vocab)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return prior.eval()


def captions(prior: Prior, count: int) -> Tensor:
    text = torch.randint(TEXT_VOCAB, (count, TEXT), generator=torch.Generator().manual_seed(4))
    return prior.with_padding(text, torch.arange(count) % TEXT + 1)


def uniforms(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive_filter(logits: list[float], temperature: float, top_k: int | None, top_p: float) -> list[float]:
    """Return the probabilities of the tokens that are not filtered out, with plain lists."""
    order = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if temperature == 0:
        return [float(i == order[0]) for i in range(len(logits))]
    candidates = order[:top_k]
    largest = logits[order[0]]
    weight = {i: math.exp((logits[i] - largest) / temperature) for i in candidates}
    nucleus: dict[int, float] = {}
    for i in candidates:
        if sum(nucleus.values()) / sum(weight.values()) < top_p:
            nucleus[i] = weight[i]
    return [nucleus.get(i, 0.0) / sum(nucleus.values()) for i in range(len(logits))]


@settings(max_examples=150)
@given(
    logits=hnp.arrays(np.float64, st.integers(1, 8), elements=st.integers(-3, 3).map(float)),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([None, 1, 2, 5, 100]),
    top_p=st.sampled_from([0.011, 0.303, 0.877, 1.0]),
)
def test_filter_is_the_naive_one(logits: np.ndarray, temperature: float, top_k: int | None, top_p: float) -> None:
    found = filter_logits(torch.from_numpy(logits)[None], temperature, top_k, top_p).softmax(-1)[0]
    assert np.allclose(found, naive_filter(logits.tolist(), temperature, top_k, top_p), atol=1e-12)


def test_filter_leaves_its_input() -> None:
    logits = torch.tensor([3.0, 1.0, 2.0])
    filter_logits(logits, 1.0, 1, 0.5)
    assert logits.tolist() == [3.0, 1.0, 2.0]
    with pytest.raises(ValueError, match="top_p"):
        filter_logits(logits, 1.0, None, 0.0)


@settings(max_examples=100)
@given(
    probabilities=hnp.arrays(np.float64, st.integers(1, 6), elements=st.sampled_from([0.0, 1.0, 2.0, 5.0])),
    uniform=st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from([0.0, 1 - 2.0**-53])),
)
def test_draws_are_where_the_uniform_falls(probabilities: np.ndarray, uniform: float) -> None:
    if not probabilities.any():
        return
    share = probabilities / probabilities.sum()
    drawn = int(draw_tokens(torch.from_numpy(share).log(), torch.tensor(uniform, dtype=torch.float64)))
    assert share[drawn] > 0
    assert share[:drawn].sum() <= uniform + 1e-12
    assert uniform <= share[: drawn + 1].sum() + 1e-12


@given(total=st.floats(1e-300, 1e300), below=st.integers(1, 2**20))
def test_edges_of_the_uniform(total: float, below: int) -> None:
    logits = torch.tensor([-math.inf, 0.0, 0.0, -math.inf])
    last = 1 - 2.0**-53
    assert draw_tokens(logits.expand(2, 4), torch.tensor([0.0, last], dtype=torch.float64)).tolist() == [1, 2]
    assert last * BELOW_ONE * total < total
    assert (1 - below * 2.0**-53) * BELOW_ONE * total < total


def test_draws_from_a_large_vocabulary() -> None:
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(5, 7, 8192, generator=generator)
    u = uniforms(5, 7)
    found = draw_tokens(logits, u)
    cumulative = np.cumsum(logits.double().softmax(-1).numpy(), axis=-1)
    for c, n in itertools.product(range(5), range(7)):
        at, number = int(found[c, n]), float(u[c, n])
        assert cumulative[c, n, at] > number - 1e-6
        assert at == 0 or cumulative[c, n, at - 1] < number + 1e-6


@pytest.mark.parametrize(("vocab", "temperature"), [(2, 1.0), (3, 1.0), (3, 0.7)])
def test_frequencies_are_the_models_probabilities(vocab: int, temperature: float) -> None:
    prior, n = tiny(vocab), 4000
    ids = captions(prior, 2)
    images = torch.tensor(list(itertools.product(range(vocab), repeat=4)))
    settings_ = SamplingSettings(temperature=temperature, batch_size=2000)
    tokens, log_likelihood = sample_images(Decoder(prior), ids, uniforms(2, n, 4), settings_)
    for c in range(2):
        repeated = ids[c].expand(len(images), -1)
        whole = prior.log_likelihood(repeated, images).exp()
        assert abs(whole.sum() - 1) < 1e-6
        with torch.no_grad():
            logits = prior.image_logits(prior(repeated, images)).double() / temperature
        expected = logits.log_softmax(-1).gather(-1, images[..., None])[..., 0].sum(-1).exp()
        index = (tokens[c] * vocab ** torch.arange(3, -1, -1)).sum(-1)
        observed = torch.bincount(index, minlength=len(images)).double()
        order = expected.argsort()
        # Rare images are pooled: the chi-square needs expected counts that are not tiny.
        rare = order[expected[order].cumsum(0) * n < 10]
        common = order[len(rare) :]
        pooled = [torch.cat([x[common], x[rare].sum(0, keepdim=True)]) for x in (observed, expected * n)]
        if not len(rare):
            pooled = [x[:-1] for x in pooled]
        assert len(pooled[0]) > vocab**4 / 3
        assert stats.chisquare(pooled[0].numpy(), pooled[1].numpy(), sum_check=False).pvalue > 1e-3
        assert torch.allclose(log_likelihood[c].exp(), whole[index], rtol=1e-4)


def test_nothing_depends_on_the_batch_size() -> None:
    prior, count, n = tiny(7, 3), 3, 5
    ids, u = captions(prior, count), uniforms(count, n, 9)
    runs = [sample_images(Decoder(prior), ids, u, SamplingSettings(batch_size=size)) for size in (1, 2, 5, 10, 64)]
    for tokens, log_likelihood in runs:
        assert tokens.equal(runs[0][0])
        assert torch.allclose(log_likelihood, runs[0][1], atol=1e-5)
    alone = sample_images(Decoder(prior), ids[1:2], u[1:2, 1:3], SamplingSettings())[0]
    assert alone.equal(runs[0][0][1:2, 1:3])


@pytest.mark.parametrize("given", [0, 3, 4, 8])
def test_prefix_stays_and_is_not_scored(given: int) -> None:
    prior, n = tiny(7, 3), 3
    ids, u = captions(prior, 2), uniforms(2, n, 9)
    prefix = torch.randint(7, (2, given), generator=torch.Generator().manual_seed(9))
    tokens, log_likelihood = sample_images(Decoder(prior), ids, u, SamplingSettings(batch_size=2), prefix)
    assert tokens[..., :given].equal(prefix[:, None].expand(-1, n, -1))
    with torch.no_grad():
        logits = prior.image_logits(prior(ids.repeat_interleave(n, 0), tokens.flatten(0, 1))).double()
    terms = logits.log_softmax(-1).gather(-1, tokens.flatten(0, 1)[..., None])[..., 0]
    assert torch.allclose(log_likelihood, terms[:, given:].sum(-1).view(2, n), atol=1e-5)
    wanted = draw_tokens(logits.view(2, n, 9, 7), u)  # teacher-forced: the same draws, position by position
    assert tokens[..., given:].equal(wanted[..., given:])


MEMORY = """
import sys, torch
from pathlib import Path
from dalle_cli.prior.decode import Decoder
from dalle_cli.prior.model import Prior
from dalle_cli.config.schema import PriorModel, SamplingSettings
from dalle_cli.sampling.draw import sample_images

n = int(sys.argv[1])
prior = Prior(PriorModel(layers=8, heads=4, d_head=32, d_model=128, grid=8, layout="column ..."), 16, 32, 64)
uniforms = torch.rand(1, n, 64, dtype=torch.float64)
ids = prior.with_padding(torch.zeros(1, 16), torch.tensor([9]))
sample_images(Decoder(prior), ids, uniforms, SamplingSettings(batch_size=int(sys.argv[2])))
print(next(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_more_samples_of_a_caption_need_no_more_memory() -> None:
    def peak(n: int, batch_size: int) -> int:
        """Return the peak memory in kilobytes."""
        command = [sys.executable, "-c", MEMORY, str(n), str(batch_size)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    # The caches of 64 samples take 32 MB, those of 512 would take 256.
    fewer = peak(64, 64)
    assert peak(512, 64) - fewer < 16 * 1024
    assert peak(192, 192) - fewer > 32 * 1024  # the run is large enough to measure


def test_temperature_0_takes_the_likeliest() -> None:
    prior = tiny(7, 3)
    ids = captions(prior, 2)
    tokens, log_likelihood = sample_images(Decoder(prior), ids, uniforms(2, 2, 9), SamplingSettings(temperature=0))
    with torch.no_grad():
        likeliest = prior.image_logits(prior(ids, tokens[:, 0])).argmax(-1)
    assert tokens[:, 0].equal(likeliest)
    assert tokens[:, 1].equal(likeliest)
    assert torch.allclose(log_likelihood[:, 0], prior.log_likelihood(ids, likeliest), atol=1e-5)


def empty_caption(prior: Prior) -> Tensor:
    return prior.with_padding(torch.zeros(1, TEXT, dtype=torch.long), torch.tensor([0]))[0]


@torch.no_grad()
def naive_guided(
    prior: Prior, ids: Tensor, uniforms: Tensor, guidance: float, top_k: int | None, prefix: Tensor
) -> tuple[Tensor, Tensor]:
    """Return one image (S,) and its log-likelihood, with both sequences computed anew for each token."""
    image, score = torch.zeros(1, prior.image_length, dtype=torch.long), 0.0
    image[0, : len(prefix)] = prefix
    for position in range(len(prefix), prior.image_length):
        own, without = (
            prior.image_logits(prior(text[None], image))[0, position].double() for text in (ids, empty_caption(prior))
        )
        filtered = filter_logits(without + guidance * (own - without), 1.0, top_k, 1.0)
        image[0, position] = token = draw_tokens(filtered, uniforms[position])
        score += float(own.log_softmax(-1)[token])
    return image[0], torch.tensor(score, dtype=torch.float64)


@pytest.mark.parametrize(("guidance", "top_k", "given"), [(3.0, None, 0), (0.0, None, 0), (2.0, 3, 0), (5.0, None, 4)])
def test_guided_samples_are_the_naive_ones(guidance: float, top_k: int | None, given: int) -> None:
    prior, n = tiny(7, 3), 3
    ids, u = captions(prior, 2), uniforms(2, n, 9)
    prefix = torch.randint(7, (2, given), generator=torch.Generator().manual_seed(9))
    wanted = [[naive_guided(prior, ids[c], u[c, i], guidance, top_k, prefix[c]) for i in range(n)] for c in range(2)]
    plain = sample_images(Decoder(prior), ids, u, SamplingSettings(), prefix)
    for size in (None, 1, 2, 4):
        settings_ = SamplingSettings(guidance=guidance, top_k=top_k, batch_size=size)
        tokens, log_likelihood = sample_images(Decoder(prior), ids, u, settings_, prefix, empty=empty_caption(prior))
        assert tokens.equal(torch.stack([torch.stack([image for image, _ in row]) for row in wanted]))
        scores = torch.stack([torch.stack([score for _, score in row]) for row in wanted])
        assert torch.allclose(log_likelihood, scores, atol=1e-4)
        assert not tokens.equal(plain[0])


def test_guidance_of_1_is_the_prior_itself_and_of_0_knows_no_caption() -> None:
    prior, n = tiny(7, 3), 4
    ids, u, empty = captions(prior, 2), uniforms(2, n, 9), empty_caption(prior)
    decoder = Decoder(prior)
    plain = sample_images(decoder, ids, u, SamplingSettings())
    one = sample_images(decoder, ids, u, SamplingSettings(guidance=1.0), empty=empty)
    assert one[0].equal(plain[0])
    assert one[1].equal(plain[1])
    blind = sample_images(decoder, ids, u, SamplingSettings(guidance=0.0), empty=empty)[0]
    assert blind.equal(sample_images(decoder, empty.expand(2, -1), u, SamplingSettings())[0])
    with pytest.raises(ValueError, match="empty caption"):
        sample_images(decoder, ids, u, SamplingSettings(guidance=2.0))


def test_filters_reach_the_samples() -> None:
    prior = tiny(7, 3)
    ids, u = captions(prior, 1), uniforms(1, 40, 9)
    tokens, _ = sample_images(Decoder(prior), ids, u, SamplingSettings(top_k=2))
    with torch.no_grad():
        logits = prior.image_logits(prior(ids.expand(40, -1), tokens[0]))
    rank = (logits > logits.gather(-1, tokens[0][..., None])).sum(-1)
    assert set(rank.flatten().tolist()) == {0, 1}


def test_wrong_shapes_are_refused() -> None:
    prior = tiny()
    ids = captions(prior, 2)
    with pytest.raises(ValueError, match="uniforms"):
        sample_images(Decoder(prior), ids, uniforms(2, 2, 3), SamplingSettings())
    for shape in ((2, 5), (2, 4), (1, 3)):
        prefix = torch.zeros(shape, dtype=torch.long)
        with pytest.raises(ValueError, match="prefix"):
            sample_images(Decoder(prior), ids, uniforms(2, 2, 4), SamplingSettings(), prefix)

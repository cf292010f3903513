"""Tests of the prior's task: captions dropped for classifier-free guidance, embeddings that begin from a codebook."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.tiny_chain import TinyChain, build_chain
from helpers.token_stores import write_tokens

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Recipe
from dalle_cli.data.open_source import open_source
from dalle_cli.distributed.group import Group
from dalle_cli.dvae.train import load_dvae, train_dvae
from dalle_cli.errors import UserError
from dalle_cli.prior.initial import projected_codebook
from dalle_cli.prior.model import build_prior
from dalle_cli.prior.train import PriorTask, dropped_captions, noisy_tokens, train_prior
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.stores.tokens import TokenReader

BATCH = 8


def recipe_of(share: float, noise: float) -> Recipe:
    training = {"updates": 4, "batch_size": BATCH}
    model = {"layers": 2, "heads": 1, "d_head": 4, "d_model": 4, "grid": 2}
    return Recipe.model_validate(
        {
            "image_size": 16,
            "clip": {"model": {"patch_size": 8}},
            "tokenizer": {"vocab_size": 300, "text_length": 5},
            "dvae": {"model": {"codebook_size": 16}},
            "prior": {"model": model, "training": training, "caption_dropout": share, "token_noise": noise},
        }
    )


def task(store: Path, share: float, group: Group | None = None, noise: float = 0.0) -> PriorTask:
    recipe = recipe_of(share, noise)
    return PriorTask(recipe, TokenReader(store), build_prior(recipe), group or Group())


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return write_tokens(tmp_path / "tokens.zarr", 20, 5, 300, 2, 16)


def test_captions_are_dropped_independently_at_the_recipe_s_rate() -> None:
    indices = np.arange(1000)
    for share in (0.0, 0.1, 0.5, 1.0):
        drawn = np.stack([dropped_captions(0, step, indices, share) for step in range(50)])
        assert abs(drawn.mean() - share) < 5 * np.sqrt(share * (1 - share) / drawn.size) + 1e-12
        if 0 < share < 1:
            # Means over steps, and over the samples of a step, vary as much as those of independent draws.
            for axis, count in ((0, 50), (1, 1000)):
                assert drawn.mean(axis).std() == pytest.approx(np.sqrt(share * (1 - share) / count), rel=0.3)
    assert not np.array_equal(dropped_captions(0, 0, indices, 0.5), dropped_captions(1, 0, indices, 0.5))


def test_dropped_captions_have_length_0_and_all_else_stays(store: Path) -> None:
    plain, dropping = task(store, 0.0), task(store, 0.5)
    count = 0
    for step, (a, b) in enumerate(zip(plain.batches(0, 6), dropping.batches(0, 6), strict=True)):
        dropped = torch.from_numpy(dropped_captions(0, step, np.arange(BATCH), 0.5))
        assert b.length.equal(torch.where(dropped, 0, a.length))
        assert b.image.equal(a.image)
        assert b.text.equal(a.text)
        count += int(dropped.sum())
    assert 10 < count < 38


def test_several_ranks_and_resumed_runs_drop_the_same_captions(store: Path) -> None:
    whole = [batch.length for batch in task(store, 0.5).batches(0, 4)]
    parts = [[batch.length for batch in task(store, 0.5, Group(rank, 3)).batches(0, 4)] for rank in range(3)]
    assert all(torch.cat(some).equal(alone) for *some, alone in zip(*parts, whole, strict=True))
    resumed = [batch.length for batch in task(store, 0.5).batches(2, 4)]
    assert all(a.equal(b) for a, b in zip(resumed, whole[2:], strict=True))


def test_a_dropped_caption_is_all_padding_and_adds_no_text_loss(store: Path) -> None:
    all_dropped = task(store, 1.0)
    batch = next(iter(all_dropped.batches(0, 1)))
    assert not batch.length.any()
    prior = all_dropped.model
    ids = prior.with_padding(batch.text, batch.length)
    assert ids.equal((prior.text_vocab + torch.arange(5)).expand(BATCH, -1))
    ((part, share),) = all_dropped.micro_batches(batch, None)
    with torch.no_grad():
        found = all_dropped.loss(part, 0)
    assert share == 1
    assert float(found["text"]) == 0
    assert float(found["image"]) > 0


def test_noise_replaces_tokens_independently_at_the_recipe_s_rate() -> None:
    image, indices, codes = torch.full((500, 64), 3), np.arange(500), 16
    for share in (0.1, 0.5, 1.0):
        seen = torch.stack([noisy_tokens(image, 0, step, indices, share, codes) for step in range(10)])
        counts = torch.bincount(seen.flatten(), minlength=codes).double()
        wanted = torch.full((codes,), share / codes).double()
        wanted[3] += 1 - share
        spread = (wanted * (1 - wanted) * seen.numel()).sqrt()
        assert ((counts - wanted * seen.numel()).abs() < 5 * spread).all()
        # Sums over pictures and over places vary as much as those of independent draws.
        changed, rate = (seen != 3).double(), share * (1 - 1 / codes)
        for axes, count in (((0, 1), 5000), ((0, 2), 640)):
            assert changed.mean(axes).std() == pytest.approx(np.sqrt(rate * (1 - rate) / count), rel=0.3)
    assert noisy_tokens(image, 0, 0, indices, 0.0, codes).equal(image)


def test_several_ranks_and_resumed_runs_see_the_same_noise(store: Path) -> None:
    whole = [batch.seen for batch in task(store, 0.0, noise=0.5).batches(0, 4)]
    parts = [[batch.seen for batch in task(store, 0.0, Group(rank, 3), 0.5).batches(0, 4)] for rank in range(3)]
    assert all(torch.cat(some).equal(alone) for *some, alone in zip(*parts, whole, strict=True))
    resumed = [batch.seen for batch in task(store, 0.0, noise=0.5).batches(2, 4)]
    assert all(a.equal(b) for a, b in zip(resumed, whole[2:], strict=True))
    assert not whole[0].equal(whole[1])


def test_noise_is_seen_and_the_true_tokens_are_predicted(store: Path) -> None:
    noisy, plain = task(store, 0.0, noise=0.5), task(store, 0.0)
    batch, other = (next(iter(each.batches(0, 1))) for each in (noisy, plain))
    assert (batch.image.equal(other.image), other.seen) == (True, None)
    assert batch.seen is not None
    assert 5 < int((batch.seen != batch.image).sum()) < 25  # of 32
    prior = noisy.model
    with torch.no_grad():
        logits = prior.image_logits(prior(prior.with_padding(batch.text, batch.length), batch.seen))
        wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.image.flatten())
        parts = noisy.micro_batches(batch, 3)
        found = sum(float(noisy.loss(part, 0)["image"]) * share for part, share in parts)
    assert len(parts) == 3
    assert found == pytest.approx(float(wanted), rel=1e-6)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> TinyChain:
    return build_chain(tmp_path_factory.mktemp("chain"))


def test_a_prior_begins_from_the_codebook_of_the_dvae_that_encoded_its_tokens(chain: TinyChain, tmp_path: Path) -> None:
    sets = ["prior.image_embedding=codebook", "prior.training.updates=1", "prior.learning_rate.peak=1e-12"]
    trained = train_prior(load_recipe(chain.recipe_file, sets), chain.places.tokens, tmp_path / "prior")
    decoder = load_dvae(open_checkpoint(chain.places.dvae)).decoder
    one_hot = torch.eye(decoder.codebook_size)[:, :, None, None]
    with torch.no_grad():
        vectors = decoder.codebook(one_hot)[:, :, 0, 0] - decoder.codebook.b
    wanted = projected_codebook(vectors, 16, chain.recipe.seed)
    for name in ("image_embedding", "image_head.weight"):
        torch.testing.assert_close(trained.tensors("ema")[name], wanted, rtol=0, atol=1e-6)


def test_a_codebook_of_another_dvae_is_refused(chain: TinyChain, tmp_path: Path) -> None:
    other = train_dvae(
        load_recipe(chain.recipe_file, ["seed=1"]), open_source(str(chain.recipe.data.train)), tmp_path / "other"
    )
    recipe = load_recipe(chain.recipe_file, ["prior.image_embedding=codebook"])
    with pytest.raises(UserError, match=r"is not the dVAE .* that encoded .*; name it with --dvae"):
        train_prior(recipe, chain.places.tokens, tmp_path / "run", other.path)
    assert not (tmp_path / "run").exists()

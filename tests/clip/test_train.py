"""The CLIP model: its inputs, layout, features and loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from helpers.running import Chain
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.clip.model import (
    PIXEL_MEAN,
    PIXEL_STD,
    build_clip,
    clamp_logit_scale,
    clip_text_ids,
    contrastive_loss,
    pixels,
)
from dalle_cli.clip.train import ClipTask, load_clip
from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import ClipModel
from dalle_cli.data.open_source import open_source
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.stores.tokens import TokenReader

VOCAB, LENGTH, SIZE = 50, 7, 32
TINY = ClipModel(
    embed_dim=24,
    patch_size=16,
    vision_width=32,
    vision_layers=2,
    text_width=32,
    text_layers=2,
    head_width=16,
)


@given(
    st.lists(st.lists(st.integers(0, VOCAB - 1), max_size=LENGTH), min_size=1, max_size=5),
    st.integers(0, 65535),
)
@settings(max_examples=60)
def test_text_ids_are_tokens_then_end_then_padding(captions: list[list[int]], junk: int) -> None:
    text = np.full((len(captions), LENGTH), junk, np.uint16)
    for row, caption in zip(text, captions, strict=True):
        row[: len(caption)] = caption
    length = np.array([len(caption) for caption in captions], np.uint16)
    ids = clip_text_ids(torch.from_numpy(text), torch.from_numpy(length), VOCAB)
    assert ids.dtype == torch.int64
    for row, caption in zip(ids.tolist(), captions, strict=True):
        assert row == caption + [VOCAB] + [0] * (LENGTH - len(caption))


def test_text_ids_refuse_lengths_of_another_batch() -> None:
    with pytest.raises(ValueError, match="length"):
        clip_text_ids(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64), VOCAB)


def test_sizes_are_the_settings() -> None:
    model = build_clip(TINY, SIZE, LENGTH, VOCAB)
    assert model.token_embedding.weight.shape == (VOCAB + 1, 32)
    assert model.positional_embedding.shape == (LENGTH + 1, 32)
    assert model.visual.conv1.weight.shape == (32, 3, 16, 16)
    assert model.visual.positional_embedding.shape == ((SIZE // 16) ** 2 + 1, 32)
    assert len(model.transformer.resblocks) == len(model.visual.transformer.resblocks) == 2
    assert all(block.attn.num_heads == 2 for block in model.visual.transformer.resblocks)
    assert isinstance(model.visual.transformer.resblocks[0].mlp.gelu, torch.nn.GELU)
    images, text, scale = model(torch.zeros(3, 3, SIZE, SIZE), torch.full((3, LENGTH + 1), VOCAB))
    assert images.shape == text.shape == (3, 24)
    assert scale.item() == pytest.approx(1 / 0.07)


def test_padding_and_what_the_store_holds_behind_the_caption_change_nothing() -> None:
    model = build_clip(TINY, SIZE, LENGTH, VOCAB).eval()
    text = torch.randint(0, VOCAB, (4, LENGTH), generator=torch.Generator().manual_seed(1))
    length = torch.tensor([0, 1, 4, LENGTH])
    ids = clip_text_ids(text, length, VOCAB)
    other = ids.clone()
    for row, n in zip(other, length.tolist(), strict=True):
        row[n + 1 :] = 17
    with torch.no_grad():
        torch.testing.assert_close(model.encode_text(ids), model.encode_text(other))
        changed = ids.clone()
        changed[3, 0] = (ids[3, 0] + 1) % VOCAB
        assert (model.encode_text(changed)[3] - model.encode_text(ids)[3]).abs().max() > 1e-3


def test_text_feature_is_that_of_the_end_token() -> None:
    model = build_clip(TINY, SIZE, LENGTH, VOCAB).eval()
    ids = clip_text_ids(torch.tensor([[5, 9, 3, 3, 3, 3, 3]]), torch.tensor([2]), VOCAB)
    with torch.no_grad():
        states = model.token_embedding(ids) + model.positional_embedding
        states = model.ln_final(model.transformer(states, attn_mask=model.attn_mask))
        torch.testing.assert_close(model.encode_text(ids), states[:, 2] @ model.text_projection)


def test_weights_depend_on_the_seed_and_not_on_the_global_state() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = build_clip(TINY, SIZE, LENGTH, VOCAB, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    again, other = (build_clip(TINY, SIZE, LENGTH, VOCAB, seed=seed).state_dict() for seed in (1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["token_embedding.weight"], other["token_embedding.weight"])


def test_pixels_are_standardised_by_hand() -> None:
    x = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), dtype=np.uint8)
    expected = (x.astype(np.float64) / 255 - np.array(PIXEL_MEAN)) / np.array(PIXEL_STD)
    out = pixels(torch.from_numpy(x))
    assert out.shape == (2, 3, 5, 4)
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), expected.transpose(0, 3, 1, 2), atol=1e-6)
    with pytest.raises(TypeError):
        pixels(torch.zeros(2, 3, 5, 4))


def test_loss_is_the_symmetric_cross_entropy() -> None:
    model = build_clip(TINY, SIZE, LENGTH, VOCAB).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(5, 3, SIZE, SIZE, generator=generator)
    ids = clip_text_ids(torch.randint(0, VOCAB, (5, LENGTH), generator=generator), torch.tensor([1, 2, 3, 4, 7]), VOCAB)
    with torch.no_grad():
        loss = contrastive_loss(model, images, ids).item()
        a, b = (f.double().numpy() for f in (model.encode_image(images), model.encode_text(ids)))
    a, b = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (a, b))
    logits = a @ b.T / 0.07
    rows = -(np.diag(logits) - np.log(np.exp(logits).sum(1))).mean()
    columns = -(np.diag(logits) - np.log(np.exp(logits).sum(0))).mean()
    assert loss == pytest.approx((rows + columns) / 2, rel=1e-5)


def test_captions_are_kept_from_other_captions_too() -> None:
    model = build_clip(TINY, SIZE, LENGTH, VOCAB).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, SIZE, SIZE, generator=generator)
    text = torch.randint(0, VOCAB, (4, LENGTH), generator=generator)
    text[3] = text[0]  # an equal caption cannot be another one
    ids = clip_text_ids(text, torch.tensor([5, 2, 3, 5]), VOCAB)
    with torch.no_grad():
        loss = contrastive_loss(model, images, ids, caption_negatives=True).item()
        a, b = (f.double().numpy() for f in (model.encode_image(images), model.encode_text(ids)))
    a, b = (f / np.linalg.norm(f, axis=1, keepdims=True) for f in (a, b))
    expected = 0.0
    for i in range(4):
        to_captions = np.exp(a[i] @ b.T / 0.07)
        to_images = np.exp(b[i] @ a.T / 0.07)
        to_other_captions = sum(np.exp(b[i] @ b[j] / 0.07) for j in range(4) if {i, j} not in ({i}, {0, 3}))
        expected -= np.log(to_captions[i] / to_captions.sum())
        expected -= np.log(to_images[i] / (to_images.sum() + to_other_captions))
    assert loss == pytest.approx(expected / 8, rel=1e-5)


def test_pictures_features_are_the_mean_of_patches_with_sine_cosine_positions() -> None:
    visual = build_clip(TINY, SIZE, LENGTH, VOCAB).visual.eval()
    grid = SIZE // 16
    angles = np.arange(grid)[:, None] / 10000 ** (np.arange(8) / 8)
    sides = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    expected = np.array([np.concatenate([sides[x], sides[y]]) for y in range(grid) for x in range(grid)])
    np.testing.assert_allclose(visual.positional_embedding[1:].numpy(), expected, atol=1e-6)
    assert not visual.positional_embedding.requires_grad
    images = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        patches = visual.conv1(images).flatten(2).transpose(1, 2)
        states = torch.cat([visual.class_embedding.expand(2, 1, -1), patches], 1) + visual.positional_embedding
        states = visual.ln_post(visual.transformer(visual.ln_pre(states)))
        torch.testing.assert_close(visual(images), states[:, 1:].mean(1) @ visual.proj)


def test_logit_scale_stays_within_1_and_100() -> None:
    model = build_clip(TINY, SIZE, LENGTH, VOCAB)
    for value, kept in ((9.0, math.log(100)), (-2.0, 0.0), (1.5, 1.5)):
        model.logit_scale.data.fill_(value)
        clamp_logit_scale(model)
        assert model.logit_scale.item() == pytest.approx(kept)
    assert model.logit_scale.requires_grad


def test_a_few_updates_learn_to_match_colours() -> None:
    model = build_clip(TINY, SIZE, LENGTH, VOCAB)
    colours = torch.tensor([[250, 0, 0], [0, 250, 0], [0, 0, 250], [250, 250, 0]], dtype=torch.uint8)
    images = pixels(colours[:, None, None].expand(4, SIZE, SIZE, 3))
    ids = clip_text_ids(torch.arange(4)[:, None].expand(4, LENGTH) + 10, torch.full((4,), 2), VOCAB)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        optimiser.zero_grad()
        loss = contrastive_loss(model, images, ids)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        clamp_logit_scale(model)
    assert loss.item() < 0.2 < math.log(4)


def test_the_sheet_of_a_validation_is_the_ranking_by_hand(by_hand: Chain) -> None:
    recipe, reader = load_recipe(by_hand.recipe), TokenReader(by_hand.tokens)
    model = load_clip(open_checkpoint(by_hand.clip))
    task = ClipTask(recipe, open_source(str(by_hand.train)), reader, model)
    with torch.no_grad():
        task.validate(0)
        assert task.validation is not None
        images, ids = task.validation
        features = (model.encode_image(pixels(images)), model.encode_text(ids))
    scores = torch.cosine_similarity(features[0][:, None], features[1][None], dim=-1)
    (sheet,) = task.example_images().values()
    step = recipe.image_size + 2
    for column in range(min(8, len(images))):
        best = sorted(range(len(images)), key=lambda i: -float(scores[i, column]))
        for place, i in enumerate([column, *best[:3]]):
            shown = sheet[:, 2 + place * step : (place + 1) * step, 2 + column * step : (column + 1) * step]
            torch.testing.assert_close(shown, images[i].permute(2, 0, 1), rtol=0, atol=0)

"""Tests of the prior: its stream, losses and initial weights."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from dalle_cli.config.schema import PriorModel
from dalle_cli.prior.initial import from_codebook
from dalle_cli.prior.model import Prior

TEXT, TEXT_VOCAB, IMAGE_VOCAB, GRID = 5, 11, 7, 3


def small(layers: int = 5, text: int = TEXT, seed: int = 0, **settings: object) -> Prior:
    model = PriorModel(layers=layers, heads=2, d_head=4, d_model=8, grid=GRID, conv_kernel=3, **settings)
    prior = Prior(model, text, TEXT_VOCAB, IMAGE_VOCAB, seed=seed)
    with torch.no_grad():
        for parameter in prior.parameters():  # with a std of 0.02 outputs would hardly depend on inputs
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)))
    return prior.double()


def batch(size: int = 4, text: int = TEXT) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return (
        torch.randint(TEXT_VOCAB, (size, text), generator=generator),
        torch.arange(size) % (text + 1),
        torch.randint(IMAGE_VOCAB, (size, GRID**2), generator=generator),
    )


def test_each_position_has_its_own_padding() -> None:
    prior = small()
    text = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]])
    padded = prior.with_padding(text, torch.tensor([5, 2, 0]))
    assert padded.tolist() == [[1, 2, 3, 4, 5], [1, 2, 13, 14, 15], [11, 12, 13, 14, 15]]
    assert prior.with_padding(text.to(torch.uint16), torch.tensor([5, 2, 0], dtype=torch.uint16)).equal(padded)
    with pytest.raises(ValueError, match="4 positions"):
        prior.with_padding(text[:, :4], torch.tensor([1, 1, 1]))


@pytest.mark.parametrize("layout", ["paper", "row ...", "column ...", "conv ...", "full ..."])
def test_outputs_depend_on_the_past_alone(layout: str) -> None:
    prior = small(layout=layout)
    text, _, image = batch(1)
    ids = prior.with_padding(text, torch.tensor([4]))
    hidden = prior(ids, image)
    for position in range(TEXT + GRID**2):
        other_ids, other_image = ids.clone(), image.clone()
        if position < TEXT:
            other_ids[0, position] = (ids[0, position] + 1) % TEXT_VOCAB
        else:
            other_image[0, position - TEXT] = (image[0, position - TEXT] + 1) % IMAGE_VOCAB
        changed = (prior(other_ids, other_image) - hidden).abs().amax(-1)[0] > 1e-9
        assert not changed[:position].any()
        assert changed[position]
        if position < TEXT:
            assert changed[position:].all()


def test_loss_is_the_mean_over_counted_positions() -> None:
    prior = small()
    text, length, image = batch(7)
    ids = prior.with_padding(text, length)
    hidden = prior(ids, image)
    text_terms, image_terms = [], []
    for b in range(7):
        for t in range(TEXT + GRID**2 - 1):  # the output at t predicts stream element t + 1
            if t + 1 < TEXT:
                logp = prior.text_head(hidden[b, t]).log_softmax(-1)
                if t + 1 < length[b]:
                    text_terms.append(-logp[text[b, t + 1]])
                elif t + 1 == length[b]:
                    text_terms.append(-logp[TEXT_VOCAB])
            else:
                logp = prior.image_head(hidden[b, t]).log_softmax(-1)
                image_terms.append(-logp[image[b, t + 1 - TEXT]])
    assert len(image_terms) == 7 * GRID**2
    assert prior.text_counts(length).tolist() == [0, 1, 2, 3, 4, 4, 0]
    assert len(text_terms) == 14
    found = prior.loss(text, length, image)
    assert abs(found.text - torch.stack(text_terms).mean()) < 1e-9
    assert abs(found.image - torch.stack(image_terms).mean()) < 1e-9
    per_image = torch.stack(image_terms).view(7, -1).sum(-1)
    assert torch.allclose(prior.log_likelihood(ids, image), -per_image, atol=1e-9)


def test_loss_ignores_tokens_after_the_caption() -> None:
    prior = small()
    text, length, image = batch()
    other = torch.where(torch.arange(TEXT) < length[:, None], text, (text + 1) % TEXT_VOCAB)
    assert prior.loss(text, length, image) == prior.loss(other, length, image)


def test_losses_of_micro_batches_sum_to_that_of_the_batch() -> None:
    prior = small()
    text, length, image = batch(6)
    whole = prior.loss(text, length, image)
    count = int(prior.text_counts(length).sum())
    text_mean, image_mean = 0.0, 0.0
    for rows in (slice(0, 1), slice(1, 3), slice(3, 6)):
        share = (rows.stop - rows.start) / 6
        part = prior.loss(text[rows], length[rows], image[rows], count * share)
        text_mean, image_mean = text_mean + share * part.text, image_mean + share * part.image
    assert abs(text_mean - whole.text) < 1e-9
    assert abs(image_mean - whole.image) < 1e-9


def test_one_text_position() -> None:
    prior = small(text=1)
    text, length, image = batch(3, text=1)
    found = prior.loss(text, length, image)
    assert found.text == 0
    assert found.image > 0
    (found.text + found.image).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in prior.parameters())


def test_initial_loss_is_that_of_a_uniform_guess() -> None:
    model = PriorModel(layers=4, heads=2, d_head=16, d_model=32, grid=GRID)
    found = Prior(model, TEXT, 300, 200).loss(*batch())
    assert abs(found.text - math.log(301)) < 0.05
    assert abs(found.image - math.log(200)) < 0.05


def test_initial_weights() -> None:
    model = PriorModel(layers=4, heads=2, d_head=64, d_model=128, grid=GRID)
    state = torch.random.get_rng_state()
    one, same, other = (Prior(model, TEXT, 300, 200, seed=seed) for seed in (5, 5, 6))
    assert torch.random.get_rng_state().equal(state)
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert a.equal(b)
        if name.endswith("bias"):
            assert not a.any()
        elif a.dim() == 1:
            assert (a == 1).all()
        else:
            assert not a.equal(c)
            residual = "resblocks" in name and "out.weight" in name
            wanted = 0.02 / math.sqrt(2 * 4) if residual else 0.02
            assert abs(a.std().item() / wanted - 1) < 6 / math.sqrt(2 * a.numel())
    with torch.device("meta"):
        meta_first = Prior(model, TEXT, 300, 200)
    meta_first.to_empty(device="cpu").initialize(5)
    assert all(a.equal(b) for a, b in zip(one.parameters(), meta_first.parameters(), strict=True))


@pytest.mark.parametrize("vectors", [24, 512])
def test_image_embeddings_that_begin_from_a_codebook_are_as_similar_as_its_vectors(vectors: int) -> None:
    model = PriorModel(layers=1, heads=2, d_head=64, d_model=128, grid=GRID)
    # Codes lie in a plane, far from the origin: their angles around their mean are what there is to know.
    codebook = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)) @ torch.randn(2, vectors) + 10
    initial = from_codebook(codebook, 128, seed=5)
    plain, begun = Prior(model, TEXT, 300, 200, seed=5), Prior(model, TEXT, 300, 200, seed=5, initial=initial)
    changed = {
        name for (name, a), b in zip(plain.named_parameters(), begun.parameters(), strict=True) if not a.equal(b)
    }
    assert changed == {"image_embedding", "image_head.weight"}
    assert begun.image_embedding.equal(begun.image_head.weight)
    assert begun.image_embedding.std().item() == pytest.approx(0.02)

    def similarities(rows: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(rows - rows.mean(0)) @ torch.nn.functional.normalize(rows - rows.mean(0)).T

    found, wanted = similarities(begun.image_embedding.detach()), similarities(codebook)
    assert torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1] > 0.9


def test_decayed_parameters_are_the_matrices_of_resblocks() -> None:
    prior = small()
    decayed = {id(p) for p in prior.decayed_parameters().values()}
    matrices = {
        id(module.weight)
        for module in prior.resblocks.modules()
        if not isinstance(module, nn.LayerNorm) and hasattr(module, "weight")
    }
    assert decayed == matrices
    assert len(decayed) == 4 * 5


def test_recomputing_activations_changes_no_gradient() -> None:
    gradients = []
    for checkpoint in (False, True):
        prior = small(checkpoint_resblocks=checkpoint)
        sum(prior.loss(*batch())).backward()
        gradients.append([p.grad for p in prior.parameters()])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


def test_16_bit_resblocks() -> None:
    prior = small().float()
    wanted = prior.loss(*batch())
    prior.cast_resblocks(torch.bfloat16)
    kinds = {name: p.dtype for name, p in prior.named_parameters()}
    assert {name for name, kind in kinds.items() if kind == torch.bfloat16} == set(prior.decayed_parameters())
    text, length, image = batch()
    assert prior(prior.with_padding(text, length), image).dtype == torch.float32
    found = prior.loss(text, length, image)
    sum(found).backward()
    assert abs(found.image - wanted.image) < 0.05
    assert abs(found.text - wanted.text) < 0.05


def test_sizes_of_the_paper() -> None:
    with torch.device("meta"):
        prior = Prior(PriorModel(), 256, 16384, 8192)
    found = sum(parameter.numel() for parameter in prior.parameters())
    assert all(parameter.is_meta for parameter in prior.parameters())
    d = 3968
    block = 12 * d * d + 9 * d + 4 * d
    embeddings = (16384 + 256 + 256 + 8192 + 64) * d
    assert found == 64 * block + embeddings + 2 * d + (16385 + 8192) * (d + 1)
    assert 12.0e9 < found < 12.4e9


def test_no_tensors_are_kept_beside_the_parameters() -> None:
    prior = small()
    assert not list(prior.buffers())
    for module in prior.modules():
        assert not [name for name, value in vars(module).items() if isinstance(value, Tensor)]
    stream = TEXT + GRID**2
    assert (stream, stream) not in {tuple(p.shape) for p in prior.parameters()}


def test_overfits_a_batch() -> None:
    prior = Prior(PriorModel(layers=3, heads=2, d_head=16, d_model=32, grid=GRID), TEXT, TEXT_VOCAB, IMAGE_VOCAB)
    text, length, image = batch(4)
    length = length.clamp(min=1)
    text[:, 0] = torch.arange(4)  # the first token is given and tells the captions apart
    optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = prior.loss(text, length, image)
        sum(loss).backward()
        optimizer.step()
    assert loss.text < 0.05
    assert loss.image < 0.05

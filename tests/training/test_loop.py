"""The training loop's parts against closed forms and naive loops; accumulation; the losses' weights."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.running import Chain, smallest_recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.config.schema import Adam, LearningRate, Ramp, Recipe
from dalle_cli.data.batch_order import BatchOrder
from dalle_cli.data.open_source import open_source
from dalle_cli.data.picture_loader import TrainingPictures
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.objective import dvae_loss, phi
from dalle_cli.dvae.train import DvaeTask
from dalle_cli.errors import UserError
from dalle_cli.prior.model import build_prior
from dalle_cli.prior.train import PriorTask, TokenBatch
from dalle_cli.randomness import numpy_generator, torch_generator
from dalle_cli.stores.held_out import split_holdout
from dalle_cli.training.loop import Run, Task
from dalle_cli.training.schedules import Plateau, learning_rate, ramp
from dalle_cli.training.state import TrainingState

number = st.floats(-100, 100)


# Schedules


@given(start=number, end=number, updates=st.integers(1, 10_000), shape=st.sampled_from(["linear", "cosine"]),
       steps=st.lists(st.integers(0, 20_000), min_size=1, max_size=10))  # fmt: skip
def test_a_ramp_is_its_closed_form_in_any_order(
    start: float, end: float, updates: int, shape: Any, steps: list[int]
) -> None:
    settings_ = Ramp(start=start, end=end, updates=updates, shape=shape)
    for step in (*steps, *sorted(steps), 0, updates):
        done = min(step / updates, 1)
        share = done if shape == "linear" else 0.5 - 0.5 * math.cos(math.pi * done)
        assert ramp(settings_, step) == pytest.approx((1 - share) * start + share * end, abs=1e-9)
    assert ramp(settings_, updates) == ramp(settings_, 10 * updates) == end
    assert ramp(Ramp(start=start, end=end, updates=0), 0) == end


def test_an_exponential_ramp_halves_evenly_and_a_number_is_a_constant_one() -> None:
    falling = Ramp(start=8.0, end=1.0, updates=30, shape="exponential")
    assert [ramp(falling, step) for step in (0, 10, 20, 30, 99)] == pytest.approx([8, 4, 2, 1, 1])
    with pytest.raises(ValueError, match="positive"):
        Ramp(start=1.0, end=0.0, updates=3, shape="exponential")
    assert ramp(Ramp.model_validate(50), 7) == 50.0


def test_the_papers_temperature_depends_on_the_step_alone() -> None:
    temperature = Recipe().dvae.objective.temperature
    steps = list(range(0, 200_000, 997))
    forwards = [ramp(temperature, step) for step in steps]
    shuffled = random.Random(0).sample(range(len(steps)), len(steps))
    assert all(ramp(temperature, steps[i]) == forwards[i] for i in shuffled)
    # An annealing that multiplies or subtracts at each call would move on here.
    assert len({ramp(temperature, 75_000) for _ in range(1000)}) == 1
    assert ramp(temperature, 75_000) == pytest.approx((1 + 1 / 16) / 2)
    assert (forwards[0], forwards[-1]) == (1.0, 1 / 16)
    assert all(a >= b for a, b in itertools.pairwise(forwards))


@given(peak=st.floats(1e-6, 1), share=st.floats(0, 1), warmup=st.integers(0, 50), updates=st.integers(60, 500))
def test_the_learning_rate_warms_up_and_ends_at_final(peak: float, share: float, warmup: int, updates: int) -> None:
    final = peak * share
    cosine = LearningRate(peak=peak, warmup_updates=warmup, final=final)
    rates = [learning_rate(cosine, step, updates) for step in range(updates + 10)]
    for step in range(warmup):
        assert rates[step] == pytest.approx(peak * (step + 1) / warmup)
    assert rates[warmup] == pytest.approx(peak)
    assert all(rate == pytest.approx(final) for rate in rates[updates:])
    middle = (warmup + updates) / 2
    if middle == int(middle):
        assert rates[int(middle)] == pytest.approx((peak + final) / 2)
    assert all(a >= b - 1e-12 for a, b in zip(rates[warmup:], rates[warmup + 1 :], strict=False))
    early = LearningRate(peak=peak, warmup_updates=warmup, final=final, decay_updates=55)
    assert learning_rate(early, 55, updates) == pytest.approx(final)
    constant = LearningRate(peak=peak, warmup_updates=warmup, schedule="constant")
    assert learning_rate(constant, updates, updates) == peak


def test_a_plateau_halves_after_validations_without_gain() -> None:
    rate = LearningRate(peak=0.4, schedule="plateau", plateau_validations=3, plateau_threshold=0.01, final=0.06)
    plateau, seen = Plateau(rate), []
    #          gain                  a gain too small  three stale      gain, then three, three and three stale
    for loss in (2.0, 1.5, 1.6, 1.55, 1.4999, 1.0, 1.0, 1.2, 1.3, 1.1, 1.1, 1.1, 1.1, 1.1, 1.1):
        plateau.observe(loss)
        seen.append(plateau.halvings)
    assert seen == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4]
    rates = [learning_rate(rate, 10, 100, halvings) for halvings in range(4)]
    assert rates == pytest.approx([0.4, 0.2, 0.1, 0.06])
    again = Plateau(rate, dict(plateau.state))
    assert again.halvings == 4
    falling = Plateau(rate)
    for loss in (-1.0, -1.005, -1.5, -2.0):  # a likelihood may be below zero
        falling.observe(loss)
    assert falling.state == {"best": -2.0, "stale": 0, "halvings": 0}


# Order


@given(size=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 3), steps=st.integers(1, 12))
def test_every_epoch_is_a_permutation_and_batches_run_on_across_epochs(
    size: int, batch: int, seed: int, steps: int
) -> None:
    rows = np.arange(size) * 3 + 1
    order = BatchOrder(rows, batch, seed)
    batches = [order.batch(step) for step in range(steps)]
    stream = np.concatenate([drawn for drawn, _ in batches])
    epochs = np.concatenate([epoch for _, epoch in batches])
    np.testing.assert_array_equal(epochs, np.arange(len(stream)) // size)
    for epoch in range(len(stream) // size):
        assert sorted(stream[epoch * size : (epoch + 1) * size]) == rows.tolist()
    left = stream[len(stream) // size * size :]
    assert len(set(left.tolist())) == len(left)
    assert set(left.tolist()) <= set(rows.tolist())
    # Whatever was asked before, in any order, by any reader.
    for step in random.Random(seed).sample(range(steps), steps):
        np.testing.assert_array_equal(BatchOrder(rows, batch, seed).batch(step)[0], batches[step][0])
        np.testing.assert_array_equal(order.batch(step)[0], batches[step][0])


def test_epochs_and_seeds_differ() -> None:
    rows = np.arange(500)
    first, second = (BatchOrder(rows, 500, 0).batch(step)[0].tolist() for step in (0, 1))
    other = BatchOrder(rows, 500, 1).batch(0)[0].tolist()
    assert first != second
    assert first != other
    assert first != rows.tolist()


def test_rows_beyond_a_window_are_all_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dalle_cli.data.batch_order.WINDOW", 7)
    drawn, _ = BatchOrder(np.arange(40), 40, 0).batch(0)
    assert sorted(drawn.tolist()) == list(range(40))
    windows = {tuple(sorted(drawn[i : i + 7] // 7)) for i in range(0, 35, 7)}
    assert len(windows) >= 4  # neighbours stay together, so that a large store is read in few reads


@given(
    size=st.integers(2, 400),
    seed=st.integers(0, 2**63 - 1),
    share=st.sampled_from([0.05, 0.2, 0.5]),
    some=st.randoms(use_true_random=False),
)
def test_the_holdout_depends_on_each_row_alone(size: int, seed: int, share: float, some: random.Random) -> None:
    rows = np.arange(size)
    try:
        training, held = split_holdout(rows, share, seed)
    except UserError:
        assert size < 20
        return
    assert sorted([*training, *held]) == rows.tolist()
    assert len(held) >= 1
    larger_training, larger_held = split_holdout(np.arange(5000), share, seed)
    assert abs(len(larger_held) / 5000 - share) < 0.05
    if set(held.tolist()) != {held[0]} or held[0] in larger_held:  # else the one row that had to be chosen
        assert set(held.tolist()) == {row for row in larger_held.tolist() if row < size}
    subset = np.array(sorted(some.sample(range(5000), 1000)))
    assert set(split_holdout(subset, share, seed)[1].tolist()) == set(subset.tolist()) & set(larger_held.tolist())
    assert np.all(np.diff(larger_training) > 0)
    assert np.all(np.diff(larger_held) > 0)


def test_a_holdout_of_nothing_and_of_everything() -> None:
    training, held = split_holdout(np.arange(10), 0.0, 0)
    assert training.tolist() == list(range(10))
    assert held.size == 0
    with pytest.raises(UserError, match=r"data.holdout: 1.0 leaves none of 10 samples"):
        split_holdout(np.arange(10), 1.0, 0)
    small = [len(split_holdout(np.arange(20), 0.001, seed)[1]) for seed in range(5)]
    assert min(small) >= 1
    assert split_holdout(np.arange(1000), 0.3, 0)[1].tolist() != split_holdout(np.arange(1000), 0.3, 1)[1].tolist()


# Gradients in parts


def recipe_with(stage: str, **training: Any) -> Recipe:
    values = smallest_recipe(Path("unused"), None)
    values[stage]["training"] = {**values[stage]["training"], **training}
    values["dvae"]["objective"] = {"kl_weight": {"start": 2.0, "end": 2.0, "updates": 0}}
    return Recipe.model_validate(values)


def gradients(task: Task, batch: Any, micro_batch: int | None) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Gradients and values as ``Run`` accumulates them."""
    recipe = task.recipe  # type: ignore[attr-defined]
    stage = getattr(recipe, task.kind)
    training = stage.training.model_copy(update={"micro_batch": micro_batch})
    adam = stage.adam.model_copy(update={"clip_norm": None})
    run = Run(task, recipe, Path("unused"), training, adam, stage.learning_rate, ())
    state = TrainingState(task.model, task.decayed(), adam, stage.learning_rate)
    values = run._update(state, batch, step=4, rate=0.0)
    found = {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}
    assert len(found) > 5
    return found, {name: float(value) for name, value in values.items()}


def assert_same(whole: Any, parts: Any) -> None:
    for name, gradient in whole[0].items():
        assert float((gradient - parts[0][name]).abs().max()) < 1e-5 * max(1.0, float(gradient.abs().max())), name
    assert parts[1] == pytest.approx(whole[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("estimator", ["gumbel", "reinforce"])
def test_accumulation_is_the_whole_batch_for_the_dvae(estimator: str) -> None:
    recipe = recipe_with("dvae", batch_size=6)
    objective = recipe.dvae.objective.model_copy(update={"estimator": estimator})
    recipe = recipe.model_copy(update={"dvae": recipe.dvae.model_copy(update={"objective": objective})})
    pictures = torch.from_numpy(numpy_generator(0, "pictures").integers(0, 256, (6, 3, 32, 32), dtype=np.uint8))
    task = DvaeTask(recipe, _Nothing(), DVAE(recipe.dvae.model, seed=0))
    whole = gradients(task, pictures, None)
    for size in (1, 2, 3, 6):
        assert_same(whole, gradients(task, pictures, size))


def test_accumulation_is_the_whole_batch_for_the_prior() -> None:
    recipe = recipe_with("prior", batch_size=6)
    rng = numpy_generator(0, "tokens")
    # Very unequal lengths: a mean of the parts' means would be another loss.
    batch = TokenBatch(
        torch.from_numpy(rng.integers(0, 400, (6, 48))),
        torch.tensor([1, 48, 2, 30, 3, 47]),
        torch.from_numpy(rng.integers(0, 16, (6, 16))),
    )
    task = PriorTask(recipe, _Reader(), build_prior(recipe))  # type: ignore[arg-type]
    with torch.no_grad():  # at its initial weights every token costs about the same
        for name, parameter in task.model.named_parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch_generator(0, name)))
    whole = gradients(task, batch, None)
    for size in (1, 2, 3, 6):
        assert_same(whole, gradients(task, batch, size))
    with torch.no_grad():
        text, image = task.model.loss(batch.text, batch.length, batch.image)
        naive = [float(task.model.loss(part.text, part.length, part.image).text) for part in batch.split(1)]
    assert whole[1]["text"] == pytest.approx(float(text))
    assert whole[1]["image"] == pytest.approx(float(image))
    assert whole[1]["loss"] == pytest.approx(float(text) / 8 + float(image) * 7 / 8)
    assert abs(sum(naive) / 6 - float(text)) > 0.01  # the test would see the wrong weights
    # Validation goes through the same parts.
    task.validation = batch
    with torch.no_grad():
        assert task.validate(0)["text"] == pytest.approx(float(text))


class _Nothing:
    """A source that is never read."""

    name, format, skipped = "nothing", "none", []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return 10


class _Reader:
    """A store whose tokens are never read."""

    path = Path("unused")

    def usable(self) -> np.ndarray:
        return np.arange(10)


# The ELBO


def test_the_kl_is_in_the_loss_with_its_weight_and_scale() -> None:
    model = DVAE(recipe_with("dvae").dvae.model, seed=0)
    with torch.no_grad():  # at the initial weights the codes are nearly uniform
        for name, parameter in model.named_parameters():
            if "encoder" in name:
                parameter.mul_(1.3)
    pictures = torch.from_numpy(numpy_generator(1, "pictures").integers(0, 256, (3, 3, 32, 32), dtype=np.uint8))

    def loss(beta: Any) -> Any:
        return dvae_loss(
            model, pictures, kl_weight=beta, marginal_kl_weight=0.0, temperature=0.7, eps=0.1,
            ln_b_floor=-4.0, estimator="gumbel", reinforce_samples=2,
            generator=torch_generator(0, "noise"),
        )  # fmt: skip

    with torch.no_grad():
        q = model.encoder(phi(pictures, 0.1)).softmax(dim=1).double()
    # KL(q || uniform) by its definition: summed over codes and positions, averaged over pictures.
    by_hand = (q * (q / (1 / 16)).log()).sum(dim=(1, 2, 3)).mean()
    found = loss(0.0)
    assert float(by_hand) > 1e-3
    assert float(found.kl) == pytest.approx(float(by_hand) / (3 * 32 * 32), rel=1e-4)
    assert float(found.kl_per_position) == pytest.approx(float(by_hand) / 16, rel=1e-4)
    assert float(found.loss.detach()) == pytest.approx(float(found.recon_nll))
    beta = torch.tensor(6.6, requires_grad=True)
    (slope,) = torch.autograd.grad(loss(beta).loss, beta)
    assert float(slope) == pytest.approx(float(found.kl), rel=1e-6)
    for beta in (1.0, 6.6, 50.0):
        assert float((loss(beta).loss - found.loss).detach()) == pytest.approx(beta * float(found.kl), rel=1e-3)
    gradient = torch.autograd.grad(loss(1e4).loss, model.encoder.parameters())
    plain = torch.autograd.grad(found.loss, model.encoder.parameters())
    assert max(float((a - b).abs().max()) for a, b in zip(gradient, plain, strict=True)) > 1e-4


# Averaged weights, decay, noise


@given(steps=st.integers(1, 30), decay=st.floats(0.0, 0.999), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_the_ema_is_a_naive_loop(steps: int, decay: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((2, 3), (4,))]
    state = TrainingState(torch.nn.ParameterList(parameters), set(), Adam(), LearningRate(peak=1.0))
    naive = [p.detach().double() for p in parameters]
    for step in range(steps):
        for parameter in parameters:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator))
        state.average(decay, step)
        kept = min(decay, (1 + step) / (10 + step))
        naive = [kept * mean + (1 - kept) * p.detach().double() for mean, p in zip(naive, parameters, strict=True)]
    raw = [p.detach().clone() for p in parameters]
    with state.averaged():
        for mean, expected in zip(parameters, naive, strict=True):
            torch.testing.assert_close(mean.detach().double(), expected, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(p, value) for p, value in zip(parameters, raw, strict=True))


def test_decay_touches_matrices_only() -> None:
    recipe = recipe_with("prior")
    task = PriorTask(recipe, _Reader(), build_prior(recipe))  # type: ignore[arg-type]
    optimizer = TrainingState(task.model, task.decayed(), recipe.prior.adam, recipe.prior.learning_rate).optimizer
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in task.model.named_parameters() if id(p) in decayed}
    assert names
    assert all("resblocks" in name and name.endswith("weight") and "norm" not in name for name in names)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(task.model.parameters()))


def test_batches_of_pictures_do_not_depend_on_the_workers_or_on_where_a_run_begins(by_hand: Chain) -> None:
    recipe = recipe_with("dvae")
    source = open_source(str(by_hand.train))

    def batches(workers: int, start: int) -> list[torch.Tensor]:
        pictures = TrainingPictures(source, np.arange(5, 30), 32, recipe.data, 0, 8, flip=True, workers=workers)
        return [batch for batch, _, _ in pictures.batches(start, 6)]

    whole = batches(0, 0)
    assert whole[0].shape == (8, 3, 32, 32)
    assert whole[0].dtype == torch.uint8
    for workers, start in ((2, 0), (0, 4), (1, 3)):
        assert all(torch.equal(a, b) for a, b in zip(batches(workers, start), whole[start:], strict=True))

"""The training loop: micro-batches add up to the whole batch, and errors end it with one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Call
from helpers.running import Chain, smallest_recipe

from dalle_cli.config.schema import Recipe
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.train import DvaeTask
from dalle_cli.prior.model import build_prior
from dalle_cli.prior.train import PriorTask, TokenBatch
from dalle_cli.randomness import numpy_generator, torch_generator
from dalle_cli.stores.tokens import PartState
from dalle_cli.training.loop import Run, Task
from dalle_cli.training.state import TrainingState


def recipe_with(stage: str, **training: Any) -> Recipe:
    values = smallest_recipe(Path("unused"), None)
    values[stage]["training"] = {**values[stage]["training"], **training}
    values["dvae"]["objective"] = {"kl_weight": {"start": 2.0, "end": 2.0, "updates": 0}}
    return Recipe.model_validate(values)


def gradients(task: Task, batch: Any, micro_batch: int | None) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return the gradients and logged values of an update in parts of ``micro_batch`` samples."""
    recipe = task.recipe  # type: ignore[attr-defined]
    stage = getattr(recipe, task.kind)
    training = stage.training.model_copy(update={"micro_batch": micro_batch})
    adam = stage.adam.model_copy(update={"clip_norm": None})
    stage = stage.model_copy(update={"training": training, "adam": adam})
    run = Run(task, recipe.model_copy(update={task.kind: stage}), Path("unused"))
    state = TrainingState(run.engine, stage, task.decayed())
    values = run.update(state, batch, step=4, rate=0.0)
    found = {name: p.grad.clone() for name, p in task.model.named_parameters() if p.grad is not None}
    assert len(found) > 5
    return found, {name: float(value) for name, value in values.items()}


def assert_same(whole: Any, parts: Any) -> None:
    for name, gradient in whole[0].items():
        assert float((gradient - parts[0][name]).abs().max()) < 1e-5 * max(1.0, float(gradient.abs().max())), name
    assert parts[1] == pytest.approx(whole[1], rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("estimator", ["gumbel", "reinforce"])
def test_micro_batches_add_up_to_the_whole_batch_for_the_dvae(estimator: str) -> None:
    recipe = recipe_with("dvae", batch_size=6)
    objective = recipe.dvae.objective.model_copy(update={"estimator": estimator})
    recipe = recipe.model_copy(update={"dvae": recipe.dvae.model_copy(update={"objective": objective})})
    pictures = torch.from_numpy(numpy_generator(0, "pictures").integers(0, 256, (6, 32, 32, 3), dtype=np.uint8))
    task = DvaeTask(recipe, _Nothing(), DVAE(recipe.dvae.model, seed=0))
    whole = gradients(task, pictures, None)
    for size in (1, 2, 3, 6):
        assert_same(whole, gradients(task, pictures, size))


def test_micro_batches_add_up_to_the_whole_batch_for_the_prior() -> None:
    recipe = recipe_with("prior", batch_size=6)
    rng = numpy_generator(0, "tokens")
    # The lengths differ widely, so that a mean of the parts' means would be another loss.
    batch = TokenBatch(
        torch.from_numpy(rng.integers(0, 400, (6, 48))),
        torch.tensor([1, 48, 2, 30, 3, 47]),
        torch.from_numpy(rng.integers(0, 16, (6, 16))),
    )
    task = PriorTask(recipe, _Reader(), build_prior(recipe))  # type: ignore[arg-type]
    with torch.no_grad():  # with the initial weights every token costs about the same
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
    assert abs(sum(naive) / 6 - float(text)) > 0.01  # so wrong weights would show
    # Validation splits its batch in the same way.
    task.validation, task.image_unigram = batch, 0.0  # the store has no tokens to count
    with torch.no_grad():
        assert task.validate(0)["text"] == pytest.approx(float(text))


class _Nothing:
    """A source that is never read."""

    name, format, skipped = "nothing", "none", []  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return 10


class _Reader:
    """A store whose tokens are never read."""

    path, parts = Path("unused"), {}  # type: ignore[var-annotated]

    def __len__(self) -> int:
        return 10

    def part(self, part: str) -> PartState:
        return PartState(0, True, {}, {})

    def usable_bits(self) -> np.ndarray:
        return np.packbits(np.ones(10, bool), bitorder="little")


def full() -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.00 GiB is "
        "free. Of the allocated memory 70.00 GiB is allocated by PyTorch."
    )


@pytest.mark.parametrize("where", ["loss", "validate"])
def test_a_full_gpu_gives_one_line_that_says_what_to_lower(
    where: str, by_hand: Chain, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(DvaeTask, where)

    def sometimes(task: DvaeTask, *arguments: Any) -> Any:
        return full() if arguments[-1] >= 8 else whole(task, *arguments)

    monkeypatch.setattr(DvaeTask, where, sometimes)
    done = call("train-dvae", by_hand.recipe, "--data", by_hand.train, "--out", tmp_path / "run",
                "--set", "dvae.training.validate_every=8")  # fmt: skip
    line = done.mistake()
    assert "CUDA out of memory; lower dvae.training.micro_batch, or set dvae.model.checkpoint_resblocks" in line
    assert "no checkpoint is lost" in line
    assert (tmp_path / "run" / "step-00000004").is_dir()


def test_a_task_with_too_few_batches_is_an_error(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(smallest_recipe(tmp_path, None))

    class Short(DvaeTask):
        def batches(self, start: int, stop: int, order: Any = None) -> Any:
            yield torch.zeros(4, 32, 32, 3, dtype=torch.uint8)

    task = Short(recipe, [0] * 9, DVAE(recipe.dvae.model))  # type: ignore[arg-type]
    task.validation_images = None
    with pytest.raises(ValueError, match="shorter"):
        Run(task, recipe, tmp_path / "out").train()

"""An update of each stage, decoding, encoding and scoring on a GPU that is not there.

FakeTensorMode runs every operation on shapes, types and devices alone. It fails if a tensor was left on the CPU, and if
the code asks for a value of a tensor on the GPU, for which it would have to wait. PyTorch runs no backward pass on a
fake GPU, so gradients are made up there, and ``test_on_meta.py`` runs the backward pass. Everything runs a second
time on a fake GPU that refuses 64-bit numbers, as Apple's GPUs do; torch has fake ones of Apple's on a Mac alone.
Updates in 16 bit, which Apple's GPUs do not make here, run once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.running import smallest_recipe, write_recipe
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dalle_cli.clip.model import clip_text_ids, pixels
from dalle_cli.clip.train import ClipTask, build_recipe_clip
from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Recipe, SamplingSettings
from dalle_cli.distributed.device import device_for_doubles
from dalle_cli.distributed.engine import Replicated
from dalle_cli.distributed.group import Group
from dalle_cli.dvae.model import DVAE
from dalle_cli.dvae.objective import encoder_input
from dalle_cli.dvae.train import DvaeTask
from dalle_cli.prior import attention
from dalle_cli.prior.decode import Decoder
from dalle_cli.prior.model import build_prior
from dalle_cli.prior.train import PriorTask, TokenBatch, set_precision
from dalle_cli.sampling.draw import sample_images
from dalle_cli.training.loop import Run, Task
from dalle_cli.training.state import TrainingState

GPU = torch.device("cuda", 0)
BATCH, TEXT, SIDE, GRID, COUNTED = 4, 48, 32, 4, 7
IN_16_BIT = pytest.mark.parametrize("doubles", [True], ids=[""], indirect=True)


class GpuGenerator(torch.Generator):
    """A generator that says that it is on the GPU; its numbers are never drawn."""

    device = GPU


class Late:
    """Values on their way from the GPU, which arrive in the next update; they are ones."""

    newest = 0
    """Number of the newest update."""

    def __init__(self, values: Tensor) -> None:
        assert values.device == GPU
        self.count, self.sent = values.numel(), Late.newest

    of = classmethod(lambda cls, values: cls(values))

    def read(self) -> list[float]:
        assert self.sent < Late.newest
        return [1.0] * self.count


class NoDoubles(TorchDispatchMode):
    """Refuses operations whose result is of 64-bit floating-point numbers on the GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in tree_leaves(found):
            if isinstance(each, Tensor) and (each.device, each.dtype) == (GPU, torch.float64):
                raise TypeError(f"{func} makes float64 on the GPU")
        return found


def counted(values: Tensor) -> Tensor:
    """Return places of some text tokens that the loss counts, which the host finds."""
    assert values.device.type == "cpu"
    return torch.zeros(COUNTED, values.ndim, dtype=torch.long)


def make_up_gradients(engine: Replicated, loss: Tensor) -> None:
    assert loss.requires_grad
    if engine.loss_scaler is not None:
        assert engine.loss_scaler.scale(loss).device == GPU
    for parameter in engine.parameters.values():
        parameter.grad = torch.empty_like(parameter)


@pytest.fixture(params=[True, False], ids=["with doubles", "without"])
def doubles(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


@pytest.fixture
def gpu(doubles: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(Tensor, "nonzero", counted)
    for drawing in ("uniform_", "random_"):
        monkeypatch.setattr(Tensor, drawing, lambda self, *_, generator: self)
    monkeypatch.setattr(Replicated, "backward", make_up_gradients)
    for module in ("dvae.train", "precision.adam"):
        monkeypatch.setattr(f"dalle_cli.{module}.torch_generator", lambda *_, **__: GpuGenerator())
    for module in ("precision.adam", "training.updates"):
        monkeypatch.setattr(f"dalle_cli.{module}.OnItsWay", Late)
    caches = (attention.window_bias, attention.causal_bias)
    for cached in caches:
        cached.cache_clear()
    with FakeTensorMode(), nullcontext() if doubles else NoDoubles():
        yield
    for cached in caches:
        cached.cache_clear()


def on_gpu(build: Callable[[], Any]) -> Any:
    """Build a model on the GPU, since fake tensors cannot be moved in place."""
    with torch.device(GPU):
        return build()


def recipe_of(folder: Path, *changes: str) -> Recipe:
    return load_recipe(write_recipe(folder, smallest_recipe(folder, None)), changes)


def update(task: Task, recipe: Recipe, out: Path, batch: Any, engine: Replicated | None = None) -> dict[str, Tensor]:
    """Make two updates, so that the second one finds moments; check that all that they leave is on the GPU.

    Return what the second one logs.
    """
    engine = engine or Replicated(task.model, task.group)
    run = Run(task, recipe, out, engine)
    state = TrainingState(engine, run.settings, task.decayed(), recipe.seed)
    for step in range(2):
        Late.newest += 1
        values = run.update(state, batch, step, 1e-3)
        state.update_ema(step)
    Late.newest += 1  # a checkpoint waits for what the last update decided
    assert values["loss"].device == values["grad_norm"].device == GPU
    for name in engine.names:
        assert engine.read(name).device == state.ema[name].device == GPU
        moments = state.optimizer.moments(name)
        assert {value.device for key, value in moments.items() if key != "step"} == {GPU}
    return values


def partly_built(task_type: type, **values: Any) -> Any:
    """Return a task without the store or source that it would read its batches from."""
    task = object.__new__(task_type)
    for name, value in values.items():
        setattr(task, name, value)
    return task


def update_prior(recipe: Recipe, out: Path) -> tuple[dict[str, Tensor], Replicated]:
    """Make two updates of the prior; return what the second one logs, and the engine."""
    model = on_gpu(lambda: build_prior(recipe))
    task = partly_built(PriorTask, recipe=recipe, model=model, group=Group(device=GPU), kind="prior", forward=None)
    text, length, image = (torch.zeros(BATCH, *more, dtype=torch.long) for more in ((TEXT,), (), (GRID**2,)))
    engine = Replicated(model, task.group, set_precision(model, recipe.prior, replicas=1))
    return update(task, recipe, out, TokenBatch(text, length, image), engine), engine


@pytest.mark.parametrize("changes", [(), ("prior.training.micro_batch=2",), ("prior.model.checkpoint_resblocks=true",)])
def test_an_update_of_the_prior(changes: tuple[str, ...], tmp_path: Path, gpu: None) -> None:
    update_prior(recipe_of(tmp_path, *changes), tmp_path)


@IN_16_BIT
@pytest.mark.parametrize("skip", ["update", "resblock"])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_an_update_of_the_prior_in_16_bit(precision: str, skip: str, tmp_path: Path, gpu: None) -> None:
    """The GPU decides what is skipped and how the scales change."""
    recipe = recipe_of(tmp_path, f"prior.precision={precision}", f"prior.skip={skip}")
    logged, engine = update_prior(recipe, tmp_path)
    assert {logged[name].device for name in ("grad_norm", "skipped", "skipped_updates")} == {GPU}
    if precision == "fp16":
        blocks = list(engine.model.get_submodule("resblocks"))
        assert len(blocks) > 1
        assert {block.gradient_scale.device for block in blocks} == {logged["log2_scale_max"].device} == {GPU}


@IN_16_BIT
@pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")
def test_an_update_of_the_dvae_with_a_scaled_loss(tmp_path: Path, gpu: None) -> None:
    recipe = recipe_of(tmp_path, "dvae.precision=fp16")
    model = on_gpu(lambda: DVAE(recipe.dvae.model))
    task = partly_built(
        DvaeTask, recipe=recipe, model=model, group=Group(device=GPU), kind="dvae", perceptual=None, _replaced=0.0
    )
    # A scaler of a GPU that is not there would do nothing; this one follows the gradients' device.
    engine = Replicated(model, task.group, loss_scaler=torch.amp.GradScaler("cpu"))
    logged = update(task, recipe, tmp_path, torch.zeros(BATCH, SIDE, SIDE, 3, dtype=torch.uint8), engine)
    names = ("grad_norm", "skipped", "log2_scale", "skipped_updates")
    assert {logged[name].device for name in names} == {GPU}


@pytest.mark.parametrize(
    "changes", [(), ("dvae.training.micro_batch=2",), ("dvae.objective.estimator=reinforce",),
                ("dvae.objective.marginal_kl_weight=10",)],
)  # fmt: skip
def test_an_update_of_the_dvae(changes: tuple[str, ...], tmp_path: Path, gpu: None) -> None:
    recipe = recipe_of(tmp_path, *changes)
    model = on_gpu(lambda: DVAE(recipe.dvae.model))
    task = partly_built(
        DvaeTask, recipe=recipe, model=model, group=Group(device=GPU), kind="dvae", perceptual=None, _replaced=0.0
    )
    update(task, recipe, tmp_path, torch.zeros(BATCH, SIDE, SIDE, 3, dtype=torch.uint8))


@pytest.mark.parametrize("changes", [(), ("clip.objective.caption_negatives=true",)])
def test_an_update_of_clip(changes: tuple[str, ...], tmp_path: Path, gpu: None) -> None:
    recipe = recipe_of(tmp_path, *changes)
    model = on_gpu(lambda: build_recipe_clip(recipe))
    task = partly_built(ClipTask, recipe=recipe, model=model, group=Group(device=GPU), kind="clip", _replaced=0.0)
    pictures = torch.zeros(BATCH, SIDE, SIDE, 3, dtype=torch.uint8)
    text = clip_text_ids(
        torch.zeros(BATCH, TEXT, dtype=torch.long), torch.ones(BATCH, dtype=torch.long), recipe.tokenizer.vocab_size
    )
    update(task, recipe, tmp_path, (pictures, text))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("settings", [{}, {"temperature": 0.5, "top_k": 3, "top_p": 0.9}, {"guidance": 3.0}])
def test_sampling(
    precision: Any,
    settings: dict[str, Any],
    tmp_path: Path,
    doubles: bool,
    gpu: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The plain step is run, since a CUDA graph needs a GPU."""
    monkeypatch.setattr(
        "dalle_cli.sampling.draw.fast_step", lambda decoder, cache: lambda *place: decoder.step(cache, *place)
    )
    prior = on_gpu(lambda: build_prior(recipe_of(tmp_path))).eval().requires_grad_(False)
    decoder = Decoder(prior, precision)
    text = torch.zeros(2, TEXT, dtype=torch.long, device=GPU)
    drawing = device_for_doubles(GPU if doubles else torch.device("mps"))
    uniforms = torch.zeros(2, 3, GRID**2, dtype=torch.float64, device=drawing)
    draw = sample_images.__wrapped__  # type: ignore[attr-defined]
    with torch.no_grad():  # in place of inference mode, in which copies of fake tensors are not fake
        tokens, likelihood = draw(decoder, text, uniforms, SamplingSettings(**settings), empty=text[0])
    assert (tokens.device, likelihood.device) == (GPU, uniforms.device)
    assert tokens.shape == (2, 3, GRID**2)
    assert likelihood.shape == (2, 3)


def test_encoding_and_decoding_of_pictures(tmp_path: Path, gpu: None) -> None:
    model = on_gpu(lambda: DVAE(recipe_of(tmp_path).dvae.model)).eval().requires_grad_(False)
    pictures = torch.zeros(BATCH, SIDE, SIDE, 3, dtype=torch.uint8, device=GPU)
    tokens = model.encode_tokens(encoder_input(pictures, 0.1))
    mu, ln_b = model.decode_tokens(tokens)
    assert (tokens.device, mu.device, ln_b.device) == (GPU, GPU, GPU)
    assert tokens.shape == (BATCH, GRID, GRID)
    assert mu.shape == (BATCH, 3, SIDE, SIDE)


def test_scoring(tmp_path: Path, gpu: None) -> None:
    recipe = recipe_of(tmp_path)
    model = on_gpu(lambda: build_recipe_clip(recipe)).eval().requires_grad_(False)
    pictures = torch.zeros(BATCH, SIDE, SIDE, 3, dtype=torch.uint8, device=GPU)
    text = torch.zeros(BATCH, TEXT + 1, dtype=torch.long, device=GPU)
    image_features, text_features, scale = model(pixels(pictures), text)
    assert (image_features.device, text_features.device, scale.device) == (GPU, GPU, GPU)


def test_a_tensor_left_behind_and_a_wait_are_found(doubles: bool, gpu: None) -> None:
    value = torch.zeros(3, device=GPU)
    assert isinstance(value, FakeTensor)
    with pytest.raises((RuntimeError, TypeError), match=r"[Dd]evice"):
        value + torch.zeros(3)
    with pytest.raises(DataDependentOutputException):
        float(value.sum())
    with nullcontext() if doubles else pytest.raises(TypeError, match="float64 on the GPU"):
        value.double()

"""``precision: auto`` takes what measures faster, keeps its choice for the machine, and leaves a begun run alone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.prior_recipes import tiny_prior
from helpers.running import smallest_recipe, write_recipe
from helpers.token_stores import write_tokens

from dalle_cli.clip.train import clip_update
from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Recipe
from dalle_cli.distributed.engine import Replicated
from dalle_cli.distributed.group import ALONE, Group
from dalle_cli.planning.fit import with_planned_precision
from dalle_cli.planning.memory import Machines
from dalle_cli.prior.model import build_prior
from dalle_cli.prior.train import prior_update, set_precision, train_prior
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.training.precision_choice import Update, settle_precision, trial_update, with_precision

AUTO = {"prior__precision": "auto"}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dalle" / "precision"


def taking(**seconds: float) -> Callable[[Recipe], Update]:
    """Return trials whose updates take so long in each precision."""
    return lambda recipe: lambda: time.sleep(seconds[recipe.prior.precision])


def never(recipe: Recipe) -> Update:
    raise AssertionError("nothing was to be measured")


def settled(recipe: Recipe, out: Path | None, trial: Callable[[Recipe], Update]) -> str:
    return settle_precision(recipe, "prior", out, ALONE, trial).prior.precision


@pytest.mark.parametrize(
    ("seconds", "wanted"),
    [
        ({"fp32": 0.02, "bf16": 0.01}, "bf16"),
        ({"fp32": 0.01, "bf16": 0.02}, "fp32"),
        ({"fp32": 0.0301, "bf16": 0.03}, "fp32"),  # too little for less exact numbers
    ],
)
def test_the_faster_one_is_taken_and_kept_for_these_sizes(
    seconds: dict[str, float], wanted: str, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_prior(**AUTO)
    assert settled(recipe, None, taking(**seconds)) == wanted
    measured = capsys.readouterr().err
    assert f"prior.precision: auto is {wanted}: an update takes 0.0" in measured
    assert measured.rstrip().endswith("measured now")
    assert settled(recipe, None, never) == wanted
    assert capsys.readouterr().err.rstrip().endswith("measured on this kind of processor before")
    longer = tiny_prior(**AUTO, prior__training__updates=500, prior__learning_rate__peak=1e-2)
    assert settled(longer, None, never) == wanted  # an update takes as long
    with pytest.raises(AssertionError, match="nothing was to be measured"):
        settled(tiny_prior(**AUTO, prior__training__batch_size=8), None, never)
    (kept,) = own_cache.iterdir()
    kept.write_text("{")  # a damaged choice is measured again
    assert settled(recipe, None, taking(fp32=0.01, bf16=0.0)) == "bf16"


def test_a_choice_does_not_depend_on_when_pictures_are_enlarged(tmp_path: Path) -> None:
    def chosen(enlarged_from: int | None, trial: Callable[[Recipe], Update]) -> str:
        settings = smallest_recipe(tmp_path, None)
        settings["dvae"]["precision"] = "auto"
        settings["dvae"].setdefault("objective", {})["perceptual"] = {"weight": 1.0, "enlarged_from": enlarged_from}
        recipe = load_recipe(write_recipe(tmp_path, settings))
        return settle_precision(recipe, "dvae", None, ALONE, trial).dvae.precision

    def trial(recipe: Recipe) -> Update:
        return lambda: time.sleep({"fp32": 0.01, "bf16": 0.0}[recipe.dvae.precision])

    assert chosen(4, trial) == chosen(7, never) == chosen(None, never) == "bf16"
    with pytest.raises(AssertionError, match="nothing was to be measured"):
        chosen(0, never)  # the first update, which is timed, takes longer


def test_a_stated_precision_is_not_measured() -> None:
    assert settled(tiny_prior(prior__precision="bf16"), None, never) == "bf16"


@pytest.mark.parametrize(
    ("kind", "lacking", "wanted"), [("cuda", False, "bf16"), ("cuda", True, "fp32"), ("mps", True, "fp32")]
)
def test_gpus_are_not_measured(
    kind: str, lacking: bool, wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not lacking)
    group = Group(device=torch.device(kind))
    assert settle_precision(tiny_prior(**AUTO), "prior", None, group, never).prior.precision == wanted
    assert f"prior.precision: auto is {wanted}: " in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_trial_reaches_every_parameter_and_changes_none(precision: str) -> None:
    recipe, micro_batches = tiny_prior(prior__precision=precision, prior__training__micro_batch=8), []
    prior = build_prior(recipe)
    engine = Replicated(prior, scaling=set_precision(prior, recipe.prior, 1))
    before = {name: p.detach().clone() for name, p in prior.named_parameters()}
    text, image = torch.randint(400, (8, 8)), torch.randint(64, (8, 16))

    def loss(samples: int) -> torch.Tensor:
        micro_batches.append(samples)
        return sum(prior.loss(text[:samples], torch.full((samples,), 8), image[:samples]), torch.zeros(()))

    trial_update(recipe, "prior", engine, set(prior.decayed_parameters()), loss)()
    assert micro_batches == [8, 8]
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None, name
        assert torch.equal(parameter, before[name]), name


def test_trials_of_stages_run_on_the_recipes_sizes(tmp_path: Path) -> None:
    recipe = load_recipe(write_recipe(tmp_path, smallest_recipe(tmp_path, None)), ["prior.training.micro_batch=1"])
    for trial in (prior_update(recipe, torch.device("cpu")), clip_update(recipe, torch.device("cpu"))):
        trial()


def test_a_run_trains_in_what_it_began_with(tmp_path: Path, own_cache: Path) -> None:
    """The checkpoint names the settled precision, so that the run resumes with it whatever is faster by then."""
    store, out, recipe = write_tokens(tmp_path / "t.zarr", 80, 8, 400, 4, 64), tmp_path / "run", tiny_prior(**AUTO)
    trained = train_prior(recipe, store, out)
    begun = trained.recipe().prior.precision
    assert begun in ("fp32", "bf16")
    assert json.loads(next(own_cache.iterdir()).read_text())["precision"] == begun
    other = {"fp32": "bf16", "bf16": "fp32"}[begun]
    assert settled(recipe, out, never) == begun
    assert settled(recipe, tmp_path / "another", taking(**{begun: 0.01, other: 0.0})) == begun  # as kept
    next(own_cache.iterdir()).unlink()
    assert settled(recipe, tmp_path / "another", taking(**{begun: 0.01, other: 0.0})) == other
    again = train_prior(recipe, store, out)
    assert (again.step, again.identity) == (trained.step, trained.identity)
    assert open_checkpoint(out, "prior").recipe() == with_precision(recipe, "prior", begun)


def test_plans_reckon_with_bf16_on_gpus_alone() -> None:
    recipe = tiny_prior(**AUTO)
    assert with_planned_precision(recipe, Machines(8, 1, 0)).prior.precision == "bf16"
    assert with_planned_precision(recipe, Machines(1, 1, 0, on_cpu=True)).prior.precision == "fp32"

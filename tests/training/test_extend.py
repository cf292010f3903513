"""A finished run that is extended anneals once more, keeps its moments, and resumes to the same bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.killed_runs import files, journal_lines
from helpers.running import run
from helpers.tiny_chain import TinyChain, build_chain

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import LearningRate
from dalle_cli.errors import UserError
from dalle_cli.prior.train import train_prior
from dalle_cli.stores.checkpoint import open_checkpoint
from dalle_cli.training.journal import Journal
from dalle_cli.training.schedules import learning_rate

UPDATES, MORE = 6, 4
SETTINGS = [
    f"prior.training.updates={UPDATES}",
    "prior.training.save_every=1",
    "prior.training.validate_every=2",
    "prior.learning_rate.schedule=cosine",
    "prior.learning_rate.peak=1e-2",
    "prior.learning_rate.warmup_updates=2",
]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> TinyChain:
    return build_chain(tmp_path_factory.mktemp("chain"))


def test_each_round_runs_through_the_schedule_and_a_killed_one_ends_with_the_same_bytes(
    chain: TinyChain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, store = load_recipe(chain.recipe_file, SETTINGS), chain.places.tokens
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    for out in (undisturbed, killed):
        train_prior(recipe, store, out)
    extended = train_prior(recipe, store, undisturbed, extend=MORE)
    assert (extended.step, extended.updates()) == (UPDATES + MORE, UPDATES + MORE)

    settings = LearningRate(peak=1e-2, warmup_updates=2)
    wanted = [learning_rate(settings, step, UPDATES) for step in range(UPDATES)]
    wanted += [learning_rate(settings, step, MORE) for step in range(MORE)]
    assert [line["lr"] for line in journal_lines(undisturbed) if "lr" in line] == pytest.approx(wanted)
    moments, _ = extended.trainer()
    assert {float(value) for name, value in moments.items() if name.startswith("step.")} == {float(UPDATES + MORE)}

    log_training = Journal.log_training

    def break_off(self: Journal, step: int, *rest: object) -> None:
        if step == UPDATES + 3:
            raise KeyboardInterrupt
        log_training(self, step, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "log_training", break_off)
        with pytest.raises(KeyboardInterrupt):
            train_prior(recipe, store, killed, extend=MORE)
    assert open_checkpoint(killed, which="last").step == UPDATES + 2
    train_prior(recipe, store, killed, extend=MORE)
    newest = f"step-{UPDATES + MORE:08d}"
    assert files(killed / newest) == files(undisturbed / newest)
    assert journal_lines(killed) == journal_lines(undisturbed)


def test_a_run_that_was_extended_needs_no_option_later(chain: TinyChain, tmp_path: Path) -> None:
    recipe, store, out = load_recipe(chain.recipe_file, SETTINGS), chain.places.tokens, tmp_path / "run"
    train_prior(recipe, store, out)
    identity = train_prior(recipe, store, out, extend=MORE).identity
    assert train_prior(recipe, store, out).identity == identity
    again = train_prior(recipe, store, out, extend=1)
    assert again.step == again.updates() == UPDATES + MORE + 1


def test_a_run_that_ran_out_of_patience_is_extended_from_where_it_stands(chain: TinyChain, tmp_path: Path) -> None:
    settings = [*SETTINGS, "prior.training.validate_every=1", "prior.training.patience=1", "prior.training.updates=50"]
    recipe = load_recipe(chain.recipe_file, [*settings, "prior.learning_rate.peak=1"])
    stopped = train_prior(recipe, chain.places.tokens, tmp_path / "run")
    assert stopped.step < 50
    extended = train_prior(recipe, chain.places.tokens, tmp_path / "run", extend=1)
    assert extended.step == extended.updates() == stopped.step + 1


def test_nothing_to_extend_is_refused(chain: TinyChain, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--extend 4: there is no run to extend; leave it out"):
        train_prior(load_recipe(chain.recipe_file, SETTINGS), chain.places.tokens, tmp_path / "run", extend=4)


def test_more_updates_of_a_cosine_run_are_refused_with_the_option_that_makes_them(
    chain: TinyChain, tmp_path: Path
) -> None:
    train_prior(load_recipe(chain.recipe_file, SETTINGS), chain.places.tokens, tmp_path / "run")
    more = load_recipe(chain.recipe_file, [*SETTINGS, f"prior.training.updates={UPDATES + 1}"])
    with pytest.raises(UserError, match="or give --extend N to train a finished run further"):
        train_prior(more, chain.places.tokens, tmp_path / "run")


def test_show_and_the_command_say_how_far_an_extended_run_goes(chain: TinyChain, tmp_path: Path) -> None:
    out, sets = tmp_path / "prior", [word for setting in SETTINGS for word in ("--set", setting)]
    command = ["train-prior", chain.recipe_file, *sets, "--out", out]
    assert run(*command).code == 0
    done = run(*command, "--extend", MORE)
    assert done.code == 0, done.err
    assert f"extended by {MORE} updates" in done.err
    more = run(*command, "--set", f"prior.training.updates={UPDATES + 1}").mistake()
    assert "or give --extend N to train a finished run further" in more
    shown = json.loads(run("show", out / f"step-{UPDATES + MORE:08d}", "--json").out)
    assert (shown["step"], shown["updates"]) == (UPDATES + MORE, UPDATES + MORE)

"""``dalle init`` writes a recipe that loads, with settings that follow from the data and from the time."""

from __future__ import annotations

import tomllib
from pathlib import Path

import numpy as np
import pytest
from helpers.running import run
from PIL import Image

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Recipe
from dalle_cli.planning.budget import SHARES, updates_within
from dalle_cli.planning.new_recipe import times_seen

RECIPES = Path(__file__).parents[2] / "recipes"
SLURM = Path(__file__).parents[2] / "scripts" / "slurm"


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty JPEG files of 40 to 50 pixels, each with a caption of up to 30 words."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for i in range(60):
        pixels = rng.integers(0, 256, (50, 40 + i % 10, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:02d}.jpg")
        (folder / f"{i:02d}.txt").write_text(" ".join(["word"] * (1 + i % 30)))
    return folder


def test_a_copy_without_data_differs_in_its_name_and_run_only(tmp_path: Path) -> None:
    for name, words in (("own-data", []), ("quickstart", ["quickstart"])):
        file = tmp_path / f"my-{name}.yaml"
        done = run("init", *words, file)
        assert (done.code, done.out) == (0, f"{file}\n"), done.err
        original = load_recipe(RECIPES / f"{name}.yaml")
        wanted = original.model_copy(update={"name": f"my-{name}", "run": f"runs/my-{name}"})
        assert load_recipe(file) == wanted
        assert file.read_text().count("#") == (RECIPES / f"{name}.yaml").read_text().count("#")


def test_settings_follow_from_the_data(photographs: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    done = run("init", file, "--data", photographs)
    assert done.code == 0, done.err
    assert "init: data.holdout 0.05, data.crop true, data.views 8, tokenizer.vocab_size" in done.err
    recipe = load_recipe(file)
    assert recipe.data.train == str(photographs)
    assert recipe.data.crop
    assert recipe.data.views == 8
    assert recipe.dvae.objective.perceptual.weight == 4.0
    assert recipe.image_size == 32  # the median of the shorter sides is 44 or 45
    assert recipe.grid == recipe.prior.model.grid == 8
    assert recipe.tokenizer.text_length == 48  # 30 words of 1.4 tokens, in eights
    trained = run("train-tokenizer", file, "--out", tmp_path / "tokenizer")
    assert trained.code == 0
    assert f"tokenizer.json: {recipe.tokenizer.vocab_size} tokens" in trained.err
    assert "warning" not in trained.err
    assert recipe.dvae.training == load_recipe(RECIPES / "own-data.yaml").dvae.training


def test_drawings_take_a_small_perceptual_weight(photographs: Path, tmp_path: Path) -> None:
    """PNG files are taken for drawings; photographs keep the weight of the recipe."""
    for i, file in enumerate(sorted(photographs.glob("*.jpg"))[:30]):
        Image.open(file).save(tmp_path / f"{i:02d}.png")
        (tmp_path / f"{i:02d}.txt").write_text("a drawing")
    done = run("init", tmp_path / "drawn.yaml", "--data", tmp_path)
    assert done.code == 0, done.err
    drawn, before = load_recipe(tmp_path / "drawn.yaml"), load_recipe(RECIPES / "own-data.yaml")
    assert drawn.prior.token_noise == 0.15  # 41,600 pictures seen, of 30
    assert before.prior.token_noise == 0.0
    assert times_seen(drawn, 2600) == pytest.approx(16)
    assert (drawn.data.crop, drawn.data.views, drawn.dvae.objective.perceptual.weight) == (False, 1, 1.0)
    assert before.dvae.objective.perceptual.weight == 4.0


def test_updates_follow_from_the_time(photographs: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    done = run("init", file, "--data", photographs, "--minutes", 10)
    assert done.code == 0, done.err
    recipe, before = load_recipe(file), load_recipe(RECIPES / "own-data.yaml")
    for kind in SHARES:
        training = getattr(recipe, kind).training
        assert f"init: {training.updates} updates of the {kind} within 10 minutes" in done.err
        assert training.save_every == training.validate_every == max(25, training.updates // 8)
    ramp, share = recipe.dvae.objective.temperature.updates, 3500 / 5200
    assert ramp / recipe.dvae.training.updates == pytest.approx(share, rel=0.02)
    since = recipe.dvae.objective.perceptual.enlarged_from
    assert since is not None
    assert since / recipe.dvae.training.updates == pytest.approx(4400 / 5200, abs=0.01)
    assert before.dvae.objective.temperature.updates / before.dvae.training.updates == pytest.approx(share)


def test_each_stage_gets_its_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"dvae": 0.25, "prior": 0.5, "clip": 1.0}
    monkeypatch.setattr("dalle_cli.planning.budget.seconds_per_update", lambda *_: seconds)
    found = updates_within(Recipe(), None, 100)  # type: ignore[arg-type]
    assert sum(SHARES.values()) == pytest.approx(1)
    taken = {kind: found[kind] * seconds[kind] for kind in found}
    assert taken == pytest.approx({kind: share * 0.85 * 6000 for kind, share in SHARES.items()}, rel=0.03)
    assert set(updates_within(Recipe(), None, 1).values()) == {110, 100}  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "mistake"),
    [
        (["none", "a.yaml"], "there is no recipe none; there are 12b"),
        (["a.txt"], "a.txt: a recipe is a YAML file; name it a.txt.yaml"),
        (["a", "b", "c"], "3 names are given; write dalle init [NAME] FILE"),
        (["--data", "DATA"], "the new file is not named; write dalle init [NAME] FILE"),
        (["a.yaml", "--minutes", "5"], "--minutes: the updates depend on the data; give --data SOURCE too"),
        (["dvae", "a.yaml", "--data", "DATA"], "the recipe dvae does not say"),
        (["a.yaml", "--data", "nowhere"], "nowhere: no such file or folder"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], mistake: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert mistake in run("init", *(str(photographs) if word == "DATA" else word for word in words)).mistake()
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("mine")
    assert "exists already; choose another name" in run("init", file).mistake()
    assert file.read_text() == "mine"


def test_the_batch_files_for_slurm_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run("init", "--slurm", "dvae", "mine.yaml")
    assert (done.code, done.out) == (0, "scripts/slurm\nmine.yaml\n"), done.err
    copied, shipped = ({file.name: file for file in folder.iterdir()} for folder in (tmp_path / "scripts/slurm", SLURM))
    assert copied.keys() == shipped.keys()
    for name, file in shipped.items():
        assert copied[name].read_bytes() == file.read_bytes()
        assert copied[name].stat().st_mode == file.stat().st_mode
    assert "exists already" in run("init", "--slurm").mistake()


def test_a_wheel_has_the_recipes_and_the_batch_files() -> None:
    wheel = tomllib.loads((RECIPES.parent / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"] == {"recipes": "dalle_cli/recipes", "scripts/slurm": "dalle_cli/slurm"}

"""Recipes: every one in recipes/ builds; faults are named by file, line and key; layouts follow their words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.clip.train import build_recipe_clip
from dalle_cli.config.layout import KINDS, AttentionKind, paper_layout, parse_layout
from dalle_cli.config.load import dump_recipe, load_recipe
from dalle_cli.config.schema import Recipe
from dalle_cli.dvae.model import DVAE
from dalle_cli.errors import UserError
from dalle_cli.prior.model import build_prior

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
PAPER = {"2.8b": (30, 1920, 512), "5.6b": (42, 2688, 640), "12b": (62, 3968, 896)}


def fault(tmp_path: Path, text: str, *overrides: str) -> str:
    """Return the message about a recipe; ``{file}`` stands for its path."""
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        load_recipe(file, overrides)
    return str(refused.value).replace(str(file), "{file}")


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_a_shipped_recipe_builds_and_comes_back(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file)
    assert recipe.name == file.stem
    assert recipe.run == f"runs/{file.stem}"
    with torch.device("meta"):
        prior, dvae = build_prior(recipe), DVAE(recipe.dvae.model)
        clip = build_recipe_clip(recipe, pretrained=False)
    for model in (prior, dvae, clip):
        parameters = list(model.parameters())
        assert parameters
        assert all(parameter.is_meta for parameter in parameters)
    assert prior.image_length == recipe.grid**2
    assert prior.image_vocab == recipe.dvae.model.codebook_size
    assert len(prior.resblocks) == 2 * recipe.prior.model.layers
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
    assert dump_recipe(load_recipe(again)) == again.read_text()


def test_all_the_papers_recipes_are_shipped() -> None:
    assert {"dvae", "1b", "2.8b", "5.6b", "12b"} <= {file.stem for file in RECIPES}


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_priors(name: str) -> None:
    recipe = load_recipe(Path(__file__).parents[2] / "recipes" / f"{name}.yaml")
    prior, (heads, d_model, rank) = recipe.prior, PAPER[name]
    model = prior.model
    assert (model.layers, model.heads, model.d_head, model.d_model) == (64, heads, 64, d_model)
    assert (recipe.grid, model.conv_kernel, prior.powersgd.rank) == (32, 11, rank)
    assert (recipe.tokenizer.vocab_size, recipe.tokenizer.text_length, recipe.tokenizer.dropout) == (16384, 256, 0.1)
    assert (recipe.image_size, recipe.dvae.model.codebook_size) == (256, 8192)
    assert prior.objective.text_weight == 1 / 8
    adam = prior.adam
    assert (adam.beta1, adam.beta2, adam.eps, adam.weight_decay, adam.clip_norm) == (0.9, 0.96, 1e-8, 4.5e-2, 4.0)
    assert (prior.precision, prior.sharding.zero) == ("fp16", 3)
    if name == "12b":
        rate, training = prior.learning_rate, prior.training
        assert (rate.peak, rate.warmup_updates, rate.schedule) == (4.5e-4, 5000, "plateau")
        assert (rate.plateau_watches, rate.plateau_halvings) == ("training", 5)
        assert (training.batch_size, training.updates) == (1024, 430_000)
        assert training.ema_decay**training.ema_every == pytest.approx(0.99, abs=1e-5)
        assert (training.ema_every, training.ema_warmup) == (25, False)
        assert recipe.data.holdout * 250e6 == pytest.approx(606_000, rel=0.02)


def test_the_papers_dvae() -> None:
    dvae = load_recipe(Path(__file__).parents[2] / "recipes" / "dvae.yaml").dvae
    objective, rate, adam, training = dvae.objective, dvae.learning_rate, dvae.adam, dvae.training
    assert (dvae.model.n_hid, dvae.model.n_init, dvae.model.blocks_per_group) == (256, 128, 2)
    kl, temperature = objective.kl_weight, objective.temperature
    assert (kl.start, kl.end, kl.updates) == (0.0, 6.6, 5000)
    assert (temperature.start, temperature.end, temperature.updates) == (1.0, 1 / 16, 150_000)
    assert (rate.peak, rate.final, rate.decay_updates, rate.schedule) == (1e-4, 1.25e-6, 1_200_000, "cosine")
    assert (adam.beta1, adam.beta2, adam.eps, adam.weight_decay) == (0.9, 0.999, 1e-8, 1e-4)
    assert (training.batch_size, training.updates, training.ema_decay) == (512, 3_000_000, 0.999)
    assert not training.ema_warmup


# Layouts


def test_the_papers_layout_in_its_words() -> None:
    for layers in (1, 2, 3, 5, 6, 24, 64):
        for number, kind in enumerate(paper_layout(layers), start=1):
            if number == layers:
                assert kind == "conv"
            elif (number - 2) % 4 == 0:
                assert kind == "column"
            else:
                assert kind == "row"
    twelve = load_recipe(Path(__file__).parents[2] / "recipes" / "12b.yaml").prior.model.attention_kinds()
    assert twelve == paper_layout(64) == parse_layout("row, column, row, row, ... conv", 64)
    assert (twelve.count("column"), twelve.count("conv"), twelve.count("row")) == (16, 1, 47)


kinds = st.sampled_from(KINDS)


@given(cycle=st.lists(kinds, min_size=1, max_size=5), tail=st.lists(kinds, max_size=4), layers=st.integers(1, 40))
def test_dots_repeat_what_stands_before_them(
    cycle: list[AttentionKind], tail: list[AttentionKind], layers: int
) -> None:
    words = [*cycle, "...", *tail]
    if len(cycle) + len(tail) > layers:
        with pytest.raises(ValueError, match="cannot be stretched"):
            parse_layout(words, layers)
        return
    expected: list[AttentionKind] = []
    while len(expected) < layers - len(tail):
        expected += cycle
    expected = expected[: layers - len(tail)] + tail
    for written in (words, ", ".join(words), " ".join(words), f"{','.join(cycle)}...{' '.join(tail)}"):
        assert parse_layout(written, layers) == expected


@given(layout=st.lists(kinds, min_size=1, max_size=20), layers=st.integers(1, 20))
def test_a_layout_spelled_out_has_one_kind_a_layer(layout: list[AttentionKind], layers: int) -> None:
    if len(layout) == layers:
        assert parse_layout(", ".join(layout), layers) == layout
    else:
        with pytest.raises(ValueError, match=f"names {len(layout)} layers, the model has {layers}"):
            parse_layout(layout, layers)


@given(word=st.text("abcdefghijklmnopqrstuvwxyz", min_size=1).filter(lambda w: w not in KINDS))
def test_an_unknown_attention_is_named(word: str) -> None:
    with pytest.raises(ValueError, match=f"unknown attention '{word}'"):
        parse_layout(["row", word], 2)


@pytest.mark.parametrize("layout", ["... conv", "row ... conv ... row"])
def test_misplaced_dots(layout: str) -> None:
    with pytest.raises(ValueError, match=r"one '\.\.\.' after the kinds"):
        parse_layout(layout, 8)


# Faults


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("prior:\n  modle: {}\n", "{file}:2: prior.modle: unknown key; did you mean 'model'?"),
        ("zzz: 1\n", "{file}:1: zzz: unknown key; known here: name, description, seed"),
        ("seed: many\n", "{file}:1: seed: must be a whole number, not 'many'"),
        ("name: a\nimage_size: [1]\n", "{file}:2: image_size: must be a whole number"),
        (
            "dvae:\n  training:\n    updates: 0\n    batch_size: 1\n",
            "{file}:3: dvae.training.updates: must be above 0, not 0",
        ),
        (
            "data: here\n",
            "{file}:1: data: must be a block of settings, not 'here'; write its settings in the lines below",
        ),
        (
            "data:\n  train x\n",
            "{file}:1: data: must be a block of settings, not 'train x'; a colon is missing: write train: x",
        ),
        ("data:\n  train:x\n", "a space is missing after the colon: write train: x"),
        ("data:\n  - train: x\n", "{file}:1: data: must be a block of settings, not a list; leave out the dashes"),
        (
            "data:\n",
            "{file}:1: data: must be a block of settings, and nothing is given; write its settings in the lines",
        ),
        ("train: x\n", "{file}:1: train: unknown key; it belongs in a block: data.train"),
        ("training: {}\n", "unknown key; it belongs in a block: dvae.training or prior.training or clip.training"),
        ("name: yes\n", "{file}:1: name: must be text; put it in quotes, not true"),
        ("data: {filters: {language: english}}\n", "language: must be two small letters, such as en, not 'english'"),
        (
            "dvae:\n  objective:\n    estimator: guess\n",
            "{file}:3: dvae.objective.estimator: must be 'gumbel' or 'reinforce', not 'guess'",
        ),
        ("data: {crop: maybe}\n", "{file}:1: data.crop: must be true or false, not 'maybe'"),
        ("name: 5\n", "{file}:1: name: must be text; put it in quotes, not 5"),
        ("prior:\n  objective: {text_weight: 2}\n", "{file}:2: prior.objective.text_weight: must be at most 1"),
        ("data: {crop:false}\n", "data.crop:false: a space is missing after the colon; write crop: false"),
        ("seed: 1\nname: a\nseed: 2\n", "{file}:3: seed: written twice"),
        ("prior:\n  model:\n    layers: 1\n    layers: 2\n", "{file}:4: prior.model.layers: written twice"),
        ("seed: 1\nname: !!int ''\n", "{file}:2: name: not a plain value: "),
        ("name: !!bool maybe\n", "{file}:1: name: not a plain value: "),
        ("name: !!timestamp today\n", "{file}:1: name: not a plain value: "),
        ("name: 2024-99-99\n", "{file}:1: name: not a plain value: month must be in 1..12"),
        ("data: {weights: " + "[" * 3000 + "]" * 3000 + "}\n", "{file}: its settings are nested too deeply"),
        ('run: "a\\0b"\n', "{file}:1: recipe: run holds a NUL character; leave it out"),
        ('data:\n  train: [a, "b\\0"]\n', "{file}:2: data: train holds a NUL character; leave it out"),
        ('extends: "a\\0b"\n', "{file}:1: extends: name one recipe by its path"),
        ("dvae: {objective: {ln_b_floor: .nan}}\n", "{file}:1: dvae.objective.ln_b_floor: must be a finite number"),
        ("sampling:\n  temperature: .inf\n", "{file}:2: sampling.temperature: must be a finite number, not inf"),
        (
            "prior:\n  model:\n    heads: 3\n    d_model: 100\n",
            "{file}:4: prior.model: d_model 100 is not heads x d_head = 3 x 64 = 192; set d_model: 192",
        ),
        (
            "image_size: 128\nprior: {model: {grid: 32}}\n",
            "prior.model.grid 32 is not image_size / dvae.model.downsampling = 16; set",
        ),
        (
            "dvae:\n  model: {downsampling: 4}\nprior: {model: {grid: 32}}\n",
            "image_size / dvae.model.downsampling = 64; set prior.model.grid: 64",
        ),
        ("image_size: 100\n", "image_size 100 is no multiple of dvae.model.downsampling, 8; set it to 104"),
        (
            "prior:\n  powersgd:\n    rank: 4000\n",
            "{file}:3: prior: powersgd.rank 4000 is above the matrices' smaller side, d_model 3968",
        ),
        (
            "prior:\n  sharding: {zero: 3, node_size: 2}\n  powersgd:\n    rank: 8000\n",
            "prior: powersgd.rank 8000 is above the matrices' smaller side, d_model 3968 times 2 shards",
        ),
        ("prior:\n  model:\n    layout: row, colum, ...\n", "layout names an unknown attention 'colum'"),
        ("prior:\n  model:\n    conv_kernel: 4\n", "conv_kernel 4 is even"),
        ("clip:\n  model: {patch_size: 24}\n", "clip.model.patch_size 24 does not divide image_size 256"),
        ("clip:\n  model: {vision_width: 100}\n", "vision_width 100 is no multiple of head_width 64"),
        ("clip:\n  model: {vision_width: 30, head_width: 15, text_width: 30}\n", "vision_width 30 is no multiple of 4"),
        (
            "clip:\n  objective: {hard_negatives: 3}\n",
            "objective.hard_negatives 3 does not divide training.batch_size 256",
        ),
        (
            "prior:\n  training: {updates: 1, batch_size: 6, micro_batch: 4}\n",
            "micro_batch 4 does not divide batch_size 6",
        ),
    ],
)
def test_a_fault_is_named_with_its_place_and_mend(tmp_path: Path, text: str, said: str) -> None:
    found = fault(tmp_path, text)
    assert said in found
    assert "\n" not in found
    assert found.startswith("{file}")


def test_each_fault_has_its_line(tmp_path: Path) -> None:
    lines = fault(tmp_path, "seed: x\nnam: y\ndvae: {model: {n_hid: -1}}\n").splitlines()
    assert [line.split(": ")[:2] for line in sorted(lines)] == [
        ["{file}:1", "seed"], ["{file}:2", "nam"], ["{file}:3", "dvae.model.n_hid"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("seed=many", "--set seed=many: seed: must be a whole number, not 'many'"),
        ("sed=1", "--set sed=1: sed: unknown key; did you mean 'seed'?"),
        ("seed", "--set seed: write it as key.key=value"),
        ("=1", "--set =1: write it as key.key=value"),
        ("a..b=1", "--set a..b=1: write it as key.key=value"),
        ("seed=[1", "--set seed=[1: the value is not valid YAML"),
        ("name=2024-99-99", "--set name=2024-99-99: the value is not valid YAML"),
        ("name=!!int ''", "--set name=!!int '': the value is not valid YAML"),
        ("seed=" + "[" * 3000, "the value is not valid YAML"),
        ("dvae.adam.eps=.inf", "--set dvae.adam.eps=.inf: dvae.adam.eps: must be a finite number"),
        ("seed.deep=1", "--set seed.deep=1: seed holds a value"),
        ("prior.model.d_model=10", "--set prior.model.d_model=10: prior.model: d_model 10 is not heads x d_head"),
    ],
)
def test_a_fault_in_set_is_named(tmp_path: Path, override: str, said: str) -> None:
    assert said in fault(tmp_path, "seed: 3\nprior: {model: {d_model: 3968, heads: 62}}\n", override)


def test_extends_and_set_change_single_keys(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "base.yaml").write_text("seed: 1\ndvae: {model: {n_hid: 16, n_init: 4}}\nrun: a\n")
    (tmp_path / "middle.yaml").write_text("extends: deep/base.yaml\ndvae: {model: {n_hid: 32}}\n")
    file = tmp_path / "top.yaml"
    file.write_text("extends: middle.yaml\nrun: b\n")
    recipe = load_recipe(file, ["dvae.model.n_init=8", "name='5'", "clip.learning_rate.peak=1e-4", "data.train="])
    assert (recipe.seed, recipe.run, recipe.name) == (1, "b", "5")
    assert (recipe.dvae.model.n_hid, recipe.dvae.model.n_init) == (32, 8)
    assert recipe.clip.learning_rate.peak == 1e-4
    assert recipe.data.train is None
    (tmp_path / "deep" / "base.yaml").write_text("sede: 1\n")
    with pytest.raises(UserError, match=r"base\.yaml:1: sede: unknown key; did you mean 'seed'"):
        load_recipe(file)


def test_settings_do_not_change_once_loaded() -> None:
    recipe = Recipe()
    with pytest.raises(ValueError, match="frozen"):
        recipe.seed = 1  # type: ignore[misc]


# Without line breaks of Unicode's own: YAML 1.1 folds them.
words = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zl", "Zp"]), max_size=20)


@settings(max_examples=30)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "name": words,
            "description": words,
            "run": words,
            "seed": st.integers(0, 2**63 - 1),
            "threads": st.none() | st.integers(1, 64),
            "data": st.fixed_dictionaries({}, optional={"train": st.none() | words, "holdout": st.floats(0, 1)}),
            "sampling": st.fixed_dictionaries(
                {}, optional={"temperature": st.floats(0, 10), "top_k": st.none() | st.integers(1, 9)}
            ),
        },
    )
)
def test_a_dumped_recipe_is_read_back_whatever_is_in_it(values: dict[str, Any]) -> None:
    recipe = Recipe.model_validate(values)
    assert Recipe.model_validate(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_a_block_written_in_part_keeps_the_stage_s_other_defaults(tmp_path: Path) -> None:
    path = tmp_path / "part.yaml"
    path.write_text("prior: {adam: {clip_norm: 1.0}, learning_rate: {warmup_updates: 7}}\n")
    found = load_recipe(path, ["dvae.objective.temperature.end=0.5"])
    whole = Recipe()
    assert found.prior.adam == whole.prior.adam.model_copy(update={"clip_norm": 1.0})
    assert found.prior.learning_rate == whole.prior.learning_rate.model_copy(update={"warmup_updates": 7})
    assert found.dvae.objective.temperature == whole.dvae.objective.temperature.model_copy(update={"end": 0.5})


def test_a_marginal_weight_may_end_but_not_start_below_zero(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    for weight in ("-1", "{start: -1, end: 0, updates: 3}"):
        path.write_text(f"dvae:\n  objective: {{marginal_kl_weight: {weight}}}\n")
        with pytest.raises(UserError, match="marginal_kl_weight starts at -1"):
            load_recipe(path)
    path.write_text("dvae:\n  objective: {marginal_kl_weight: {start: 50, end: -1, updates: 3}}\n")
    assert load_recipe(path).dvae.objective.marginal_kl_weight.end == -1


def test_a_marginal_over_parts_of_a_batch_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "parts.yaml"
    path.write_text("dvae:\n  objective: {marginal_kl_weight: 1.0}\n  training: {batch_size: 4, micro_batch: 2}\n")
    with pytest.raises(UserError, match="needs the whole batch"):
        load_recipe(path)

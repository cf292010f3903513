"""Checkpoints: what is saved comes back, whatever was interrupted."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Recipe
from dalle_cli.errors import UserError
from dalle_cli.stores.checkpoint import (
    Checkpoint,
    CheckpointContent,
    CheckpointFacts,
    check_belongs,
    open_checkpoint,
    prune,
    save_checkpoint,
    step_folder,
    steps_in,
)
from dalle_cli.stores.files import sha256_file


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.w": torch.randn(3, 2, generator=generator),
        "b": torch.randn((), generator=generator),
        "c": torch.randn(2, 4, generator=generator).T,  # not contiguous
        "d": torch.randn(5, generator=generator).half(),
        "step": torch.tensor(seed),
    }


def save(run: Path, step: int, weights: Any = None) -> Path:
    path = step_folder(run, step)
    facts = CheckpointFacts("prior", step, Recipe(name="saved", seed=5), {"dvae": "d" * 64}, {"loss": 0.25})
    weights = weights or {"raw": tensors(step), "ema": tensors(step + 1)}
    state = {"step": step, "plateau": {"best": float("inf"), "stale": 1}}
    save_checkpoint(path, facts, CheckpointContent(weights, tensors(step + 2), state))
    return path


def equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items()
    )


def test_a_checkpoint_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    path = save(tmp_path / "run", 7)
    assert path == tmp_path / "run" / "step-00000007"
    for place in (path, path.parent):
        found = open_checkpoint(place, "prior")
        assert (found.path, found.kind, found.step) == (path, "prior", 7)
        assert (found.belongs, found.metrics) == ({"dvae": "d" * 64}, {"loss": 0.25})
        assert equal(found.tensors("raw"), tensors(7))
        assert equal(found.tensors(), tensors(8))
        moments, state = found.trainer()
        assert equal(moments, tensors(9))
        assert state["plateau"] == {"best": float("inf"), "stale": 1}
        assert found.recipe() == Recipe(name="saved", seed=5) == load_recipe(path / "recipe.yaml")
        assert found.identity == sha256_file(path / "ema.safetensors")
    names = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    assert names == {
        "model.safetensors", "ema.safetensors", "recipe.yaml", "manifest.json", "trainer/optimizer.safetensors",
        "trainer/state.json",
    }  # fmt: skip


def test_equal_checkpoints_are_equal_bytes(tmp_path: Path) -> None:
    first, second = save(tmp_path / "a", 3), save(tmp_path / "b", 3)
    for file in first.rglob("*.*"):
        assert file.read_bytes() == (second / file.relative_to(first)).read_bytes()


@given(steps=st.lists(st.integers(0, 10**8 - 1), min_size=1, max_size=6, unique=True), keep=st.integers(1, 4))
@settings(max_examples=30)
def test_the_newest_steps_are_found_and_kept(steps: list[int], keep: int) -> None:
    with TemporaryDirectory() as folder:
        run = Path(folder)
        for step in steps:  # in any order
            save(run, step)
        assert open_checkpoint(run).step == max(steps)
        half_deleted = step_folder(run, min(steps))
        if len(steps) > keep:
            (half_deleted / "manifest.json").unlink()
            assert half_deleted not in steps_in(run)
        prune(run, keep)
        assert sorted(p.name for p in run.iterdir()) == [f"step-{s:08d}" for s in sorted(steps)[-keep:]]


def test_what_a_user_puts_beside_checkpoints_is_left_alone(tmp_path: Path) -> None:
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for step in (1, 2, 3):
        save(run, step)
    run.joinpath("step-00000001").rename(elsewhere)
    step_folder(run, 1).symlink_to(elsewhere)
    (run / "step-00000002-best").mkdir()
    (run / "step-00000009").write_text("a list of my runs")
    prune(run, keep=1)
    assert open_checkpoint(run).step == 3
    assert (elsewhere / "manifest.json").is_file()
    assert sorted(path.name for path in run.iterdir()) == [
        "step-00000001", "step-00000002-best", "step-00000003", "step-00000009",
    ]  # fmt: skip


@pytest.mark.parametrize("fault", ["weights", "optimizer", "recipe", "killed"])
def test_what_goes_wrong_while_saving_leaves_nothing(tmp_path: Path, fault: str) -> None:
    save(tmp_path / "run", 1)
    weights = {"raw": tensors(0), "ema": {"a": "no tensor"}} if fault == "weights" else None
    target = {"optimizer": "write_json", "recipe": "dump_recipe", "killed": "sha256_file"}.get(fault, "dump_recipe")
    error: BaseException = Killed() if fault == "killed" else RuntimeError("broken")
    with (
        mock.patch(f"dalle_cli.stores.checkpoint.{target}", side_effect=error),
        pytest.raises((Killed, RuntimeError, AttributeError)),
    ):
        save(tmp_path / "run", 2, weights)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["step-00000001"]
    assert open_checkpoint(tmp_path / "run").step == 1
    save(tmp_path / "run", 2)
    assert open_checkpoint(tmp_path / "run").step == 2


@pytest.mark.parametrize("role", ["dvae", "tokenizer"])
def test_joining_names_both(role: Literal["dvae", "tokenizer"]) -> None:
    user = Checkpoint(Path("the-prior"), "prior", 1, {role: "a" * 64})
    check_belongs(user, role, "a" * 64, "its own")
    check_belongs(user, "something else", "b" * 64, "free")
    with pytest.raises(UserError, match=f"the-prior .*{role} {'a' * 12}, but the-other is {'b' * 12}"):
        check_belongs(user, role, "b" * 64, "the-other")

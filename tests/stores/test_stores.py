"""Token stores and checkpoints: what is committed is what was written, whatever was interrupted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Recipe
from dalle_cli.errors import UserError
from dalle_cli.stores import tokens
from dalle_cli.stores.checkpoint import (
    Checkpoint,
    check_belongs,
    open_checkpoint,
    prune,
    save_checkpoint,
    step_folder,
    steps_in,
)
from dalle_cli.stores.files import new_directory, sha256_file, write_atomically
from dalle_cli.stores.tokens import PartWriter, TokenReader

TEXT = 3
IDENTITY = {"source": "shapes", "seed": 0, "share": 0.1}


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


@contextmanager
def shards_of(rows: int) -> Iterator[None]:
    with mock.patch.object(tokens, "ROWS_PER_SHARD", rows), mock.patch.object(tokens, "ROWS_PER_CHUNK", rows // 2):
        yield


def text_rows(start: int, stop: int, seed: int = 0) -> tuple[list[str], dict[str, np.ndarray], dict[str, str]]:
    """Rows that are a function of their number: keys, arrays and reasons of those skipped."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, 65536, (200, TEXT), dtype=np.uint16)[start:stop]
    lengths = rng.integers(0, TEXT + 1, 200).astype(np.uint16)[start:stop]
    keys = [f"key-{row}" for row in range(start, stop)]
    captions = np.array([f"caption {row} \u00e9\u2603" * (row % 3) for row in range(start, stop)], dtype=object)
    skipped = {key: f"reason {n % 2}" for n, (key, length) in enumerate(zip(keys, lengths, strict=True)) if length == 0}
    return keys, {"text": ids, "text_length": lengths, "caption": captions}, skipped


class Uncommitted:
    """A Zarr group that takes arrays, but dies when its attributes are to be written."""

    def __init__(self, group: Any) -> None:
        self.group, self.attrs = group, self

    def __contains__(self, name: str) -> bool:
        return name in self.group

    def __getitem__(self, name: str) -> Any:
        return self.group[name]

    def __setitem__(self, name: str, value: Any) -> None:
        raise Killed

    def create_array(self, name: str, **settings: Any) -> Any:
        return self.group.create_array(name, **settings)


def die_at(writer: PartWriter, rows: tuple[Any, ...], point: int) -> None:
    """Begin to append ``rows`` and die: while the arrays are written (0, 1, 2 ...), or just before the commit."""
    real, calls = writer._array, iter(range(100))

    def array(name: str, values: np.ndarray) -> Any:
        if next(calls) == point:
            raise Killed
        return real(name, values)

    with mock.patch.object(writer, "_array", array), pytest.raises(Killed):
        writer.group = Uncommitted(writer.group)
        writer.append(*rows)


def check(path: Path, committed: int) -> None:
    reader = TokenReader(path)
    assert len(reader) == committed
    order = np.random.default_rng(1).permutation(committed)
    keys, arrays, skipped = text_rows(0, committed)
    np.testing.assert_array_equal(reader.read("text", order), arrays["text"][order])
    np.testing.assert_array_equal(reader.read("text_length", order), arrays["text_length"][order])
    assert reader.strings("key", order) == [keys[row] for row in order]
    assert reader.strings("caption", order) == [arrays["caption"][row] for row in order]
    assert sum(reader.part("text")["skipped"].values()) == len(skipped)
    report = path / "skipped-text.jsonl"
    lines = [json.loads(line) for line in report.read_text().splitlines()] if report.exists() else []
    assert [line["key"] for line in lines][: len(skipped)] == list(skipped)


@given(
    shard=st.sampled_from([2, 4, 6]),
    rows=st.integers(1, 23),
    kills=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 5)), max_size=4),
)
@settings(max_examples=40, deadline=None)
def test_a_store_reads_back_as_written_wherever_its_writer_died(
    shard: int, rows: int, kills: list[tuple[int, int]]
) -> None:
    with TemporaryDirectory() as folder, shards_of(shard):
        path = Path(folder) / "tokens.zarr"
        deaths = dict(kills)
        while True:
            writer = PartWriter(path, "text", IDENTITY)
            assert writer.rows % shard == 0 or writer.rows == rows
            while writer.rows < rows:
                start, stop = writer.rows, min(writer.rows + shard, rows)
                point = deaths.pop(start // shard, None)
                if point is not None:
                    die_at(writer, text_rows(start, stop), point)
                    if start:
                        check(path, start)
                    break
                writer.append(*text_rows(start, stop))
            else:
                writer.finish()
                break
        check(path, rows)
        again = PartWriter(path, "text", IDENTITY)
        assert again.complete
        assert again.rows == rows


@given(shard=st.sampled_from([2, 4]), rows=st.integers(1, 11), wrong=st.data())
@settings(max_examples=15, deadline=None)
def test_the_second_part_must_hold_the_same_keys(shard: int, rows: int, wrong: st.DataObject) -> None:
    row = wrong.draw(st.integers(0, rows - 1))
    with TemporaryDirectory() as folder, shards_of(shard):
        path = Path(folder) / "tokens.zarr"
        first = PartWriter(path, "text", IDENTITY)
        with pytest.raises(UserError, match="text part is unfinished"):
            PartWriter(path, "image", IDENTITY)
        for start in range(0, rows, shard):
            first.append(*text_rows(start, min(start + shard, rows)))
        first.finish()

        def block(start: int, keys: list[str]) -> tuple[list[str], dict[str, np.ndarray], dict[str, str]]:
            some = keys[start : start + shard]
            image = np.arange(start * 4, (start + len(some)) * 4, dtype=np.uint16).reshape(-1, 2, 2)
            return some, {"image": image, "image_ok": np.ones(len(some), np.uint8)}, {}

        keys = text_rows(0, rows)[0]
        other = [*keys[:row], "another", *keys[row + 1 :]]
        second = PartWriter(path, "image", IDENTITY)
        with pytest.raises(UserError, match=f"row {row} is 'key-{row}' in the store and 'another'"):
            for start in range(0, rows, shard):
                second.append(*block(start, other))
        assert second.rows == row // shard * shard
        second = PartWriter(path, "image", IDENTITY)
        if second.rows < rows:
            with pytest.raises(UserError, match=f"the source has {second.rows} samples, the store {rows} rows"):
                second.finish()
        for start in range(second.rows, rows, shard):
            second.append(*block(start, keys))
        with pytest.raises(UserError, match="no more rows"):
            second.append(*block(0, ["one too many"]))
        second.finish()
        reader = TokenReader(path)
        reader.require_complete()
        image = reader.read("image", np.arange(rows))
        np.testing.assert_array_equal(image.ravel(), np.arange(4 * rows))
        lengths = text_rows(0, rows)[1]["text_length"]
        np.testing.assert_array_equal(reader.usable(), np.flatnonzero(lengths))


def test_a_reader_of_a_growing_store_sees_committed_rows_only(tmp_path: Path) -> None:
    with shards_of(4):
        writer = PartWriter(tmp_path / "t", "text", IDENTITY)
        with pytest.raises(UserError, match="has no image part"):
            TokenReader(tmp_path / "t").part("image")
        writer.append(*text_rows(0, 4))
        early = TokenReader(tmp_path / "t")
        writer.append(*text_rows(4, 8))
        assert len(early) == 4
        assert len(TokenReader(tmp_path / "t")) == 8
        with pytest.raises(UserError, match="its text part stops at row 8"):
            early.__class__(tmp_path / "t").require_complete()
        assert early.read("text", np.array([], np.int64)).shape == (0, TEXT)


@pytest.mark.parametrize("change", [{"source": "other"}, {"seed": 1}, {"share": 0.2}, {"new": 1}])
def test_a_store_begun_otherwise_is_refused_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    PartWriter(tmp_path / "t", "text", IDENTITY)
    PartWriter(tmp_path / "t", "text", IDENTITY)
    with pytest.raises(UserError, match=f"made with {next(iter(change))} ") as refused:
        PartWriter(tmp_path / "t", "text", {**IDENTITY, **change})
    assert str(tmp_path / "t") in str(refused.value)


def test_leavings_of_a_killed_writer_are_swept(tmp_path: Path) -> None:
    writer = PartWriter(tmp_path / "t", "text", IDENTITY)
    writer.append(*text_rows(0, 4))
    left = tmp_path / "t" / "text" / "c" / "0" / "0.123.partial"
    left.write_bytes(b"half")
    PartWriter(tmp_path / "t", "text", IDENTITY)
    assert not left.exists()
    check(tmp_path / "t", 4)


# Checkpoints


def tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "a.w": torch.randn(3, 2, generator=generator),
        "b": torch.randn((), generator=generator),
        "c": torch.randn(2, 4, generator=generator).T,  # not contiguous
        "d": torch.randn(5, generator=generator).half(),
        "step": torch.tensor(seed),
    }


def save(run: Path, step: int, **changes: Any) -> Path:
    path = step_folder(run, step)
    given: dict[str, Any] = {
        "kind": "prior",
        "step": step,
        "recipe": Recipe(name="saved", seed=5),
        "belongs": {"dvae": "d" * 64},
        "metrics": {"loss": 0.25},
        "weights": {"raw": tensors(step), "ema": tensors(step + 1)},
        "optimizer": tensors(step + 2),
        "trainer_state": {"step": step, "plateau": {"best": float("inf"), "stale": 1}},
    }
    save_checkpoint(path, **{**given, **changes})
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
@settings(max_examples=30, deadline=None)
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


@pytest.mark.parametrize("fault", ["weights", "optimizer", "recipe", "killed"])
def test_what_goes_wrong_while_saving_leaves_nothing(tmp_path: Path, fault: str) -> None:
    save(tmp_path / "run", 1)
    changes: dict[str, Any] = {"weights": {"raw": tensors(0), "ema": {"a": "no tensor"}}} if fault == "weights" else {}
    target = {"optimizer": "write_json", "recipe": "dump_recipe", "killed": "sha256_file"}.get(fault, "dump_recipe")
    error: BaseException = Killed() if fault == "killed" else RuntimeError("broken")
    with mock.patch(f"dalle_cli.stores.checkpoint.{target}", side_effect=error), pytest.raises(BaseException):  # noqa: B017
        save(tmp_path / "run", 2, **changes)
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["step-00000001"]
    assert open_checkpoint(tmp_path / "run").step == 1
    save(tmp_path / "run", 2)
    assert open_checkpoint(tmp_path / "run").step == 2


def test_a_directory_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with new_directory(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(ZeroDivisionError), new_directory(target) as folder:
        (folder / "a").write_text("2")
        raise ZeroDivisionError
    assert [p.name for p in target.parent.iterdir()] == ["target"]
    assert (target / "a").read_text() == "1"
    with new_directory(target) as folder:
        (folder / "b").write_text("3")
    assert [p.name for p in target.iterdir()] == ["b"]


def test_a_file_is_the_old_or_the_new(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomically(file, "old")
    with (
        mock.patch.object(Path, "replace", side_effect=OSError(28, "No space left on device")),
        pytest.raises(UserError, match="no space left"),
    ):
        write_atomically(file, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "old"


@pytest.mark.parametrize(
    ("number", "words"),
    [(28, "no space left"), (13, "may not be written"), (30, "may not be written"), (17, "in the way")],
)
def test_faults_of_the_disk_are_one_line(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused, new_directory(tmp_path / "place"):
        raise OSError(number, "as the system says it")
    assert str(tmp_path / "place") in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("role", ["dvae", "tokenizer"])
def test_joining_names_both(role: Literal["dvae", "tokenizer"]) -> None:
    user = Checkpoint(Path("the-prior"), "prior", 1, {role: "a" * 64})
    check_belongs(user, role, "a" * 64, "its own")
    check_belongs(user, "something else", "b" * 64, "free")
    with pytest.raises(UserError, match=f"the-prior .*{role} {'a' * 12}, but the-other is {'b' * 12}"):
        check_belongs(user, role, "b" * 64, "the-other")

"""Checkpoints written in parts by several processes, and what is exported from them."""

from __future__ import annotations

import errno
import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from helpers.running import smallest_recipe, write_recipe
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from dalle_cli.config.load import load_recipe
from dalle_cli.config.schema import Recipe
from dalle_cli.errors import UserError
from dalle_cli.prior.model import build_prior, load_prior
from dalle_cli.stores.checkpoint import (
    CheckpointContent,
    CheckpointFacts,
    CheckpointShards,
    open_checkpoint,
    save_checkpoint,
    save_sharded_checkpoint,
)
from dalle_cli.stores.export import export_checkpoint
from dalle_cli.stores.tensor_files import Part, Slab, TensorFiles, index_entries, join_entries, part_file, save_tensors


class Threads:
    """``count`` writers in this process."""

    def __init__(self, count: int) -> None:
        self.size, self.values = count, [None] * count
        self.barrier = threading.Barrier(count)

    def of(self, rank: int) -> Any:
        threads = self

        class Writer:
            size = threads.size

            def __init__(self) -> None:
                self.rank = rank

            def gather(self, value: Any) -> list[Any]:
                threads.values[rank] = value
                threads.barrier.wait()
                found = list(threads.values)
                threads.barrier.wait()
                return found

        return Writer()

    def run(self, work: Any) -> list[BaseException | None]:
        """``work(rank, writer)`` on all; what each raised."""
        raised: list[BaseException | None] = [None] * self.size

        def one(rank: int) -> None:
            try:
                work(rank, self.of(rank))
            except Exception as error:
                raised[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return raised


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    root = tmp_path_factory.mktemp("recipe")
    return load_recipe(write_recipe(root, smallest_recipe(root / "run", None)))


def tensors(recipe: Recipe, seed: int) -> dict[str, torch.Tensor]:
    prior = build_prior(recipe.model_copy(update={"seed": seed}))
    return {name: parameter.detach() for name, parameter in prior.named_parameters()}


BELONGS = {"tokenizer": "t", "dvae": "d"}


def facts(recipe: Recipe) -> CheckpointFacts:
    return CheckpointFacts("prior", 3, recipe, BELONGS, {"loss": 1.5})


def part_of(tensor: torch.Tensor, rank: int, count: int) -> Part:
    """Split rows, or columns of a matrix wider than high, as sharding does: the last ranks may have fewer, or none."""
    axis = int(tensor.dim() == 2 and tensor.shape[1] > tensor.shape[0] and tensor.shape[1] % count == 0)
    size = -(-tensor.shape[axis] // count)
    first, stop = (min(place * size, tensor.shape[axis]) for place in (rank, rank + 1))
    return Part(tensor.narrow(axis, first, stop - first), first, tuple(tensor.shape), axis)


def save(path: Path, recipe: Recipe, count: int, seed: int = 1, *, updated: bool = True) -> list[BaseException | None]:
    """A checkpoint in the parts of ``count`` processes; what each of them raised.

    Without an update that was not skipped there are no moments yet.
    """

    def work(rank: int, writer: Any) -> None:
        parts = {
            which: {name: part_of(value, rank, count) for name, value in tensors(recipe, seed + offset).items()}
            for which, offset in (("raw", 0), ("ema", 1))
        }
        parts = {which: {k: p for k, p in own.items() if len(p.value)} for which, own in parts.items()}
        moments = {f"exp_avg.{name}": part for name, part in parts["raw"].items()}
        moments |= {f"step.{name}": Part(torch.tensor(3.0)) for name in parts["raw"]}
        own = {"factor.x": torch.full((2,), float(rank))}
        errors = {name: part for name, part in parts["raw"].items() if name == "text_head.weight"}
        shards = CheckpointShards(parts, moments if updated else {}, {"step": 3}, own, errors)
        save_sharded_checkpoint(path, writer, facts(recipe), shards)

    return Threads(count).run(work)


def test_weights_are_saved_before_there_are_moments(recipe: Recipe, tmp_path: Path) -> None:
    assert save(tmp_path / "step-00000003", recipe, 2, updated=False) == [None] * 2
    found = open_checkpoint(tmp_path, "prior")
    assert all(torch.equal(value, found.tensors("raw")[name]) for name, value in tensors(recipe, 1).items())
    assert found.trainer()[0] == {}


@pytest.mark.parametrize("count", [1, 2, 5])
def test_parts_are_the_whole(count: int, recipe: Recipe, tmp_path: Path) -> None:
    assert save(tmp_path / "step-00000003", recipe, count) == [None] * count
    found = open_checkpoint(tmp_path, "prior")
    found.check(0, 1)
    assert found.step == 3
    assert found.belongs == BELONGS
    assert len(found.files) == 2 * count
    for which, seed in (("raw", 1), ("ema", 2)):
        loaded, expected = found.tensors(which), tensors(recipe, seed)
        assert loaded.keys() == expected.keys()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
        name, files = "text_head.weight", found.files_of(which)
        for rows in (slice(0, 7), slice(5, 200), slice(399, 401), slice(0, None)):
            assert torch.equal(files.read(name, Slab(rows.start, rows.stop)), expected[name][rows])
    moments, state = found.trainer()
    assert state == {"step": 3}
    assert moments["step.norm.weight"] == 3.0
    assert torch.equal(moments["exp_avg.image_row"], tensors(recipe, 1)["image_row"])
    for rank in range(count):
        assert float((found.own_state(rank, count) or {})["factor.x"][0]) == rank
    errors = found.errors()
    assert errors is not None
    assert errors.names() == ["text_head.weight"]
    assert torch.equal(errors.read("text_head.weight"), tensors(recipe, 1)["text_head.weight"])
    assert found.own_state(0, count + 1) is None
    loaded_prior = dict(load_prior(found).named_parameters())
    assert all(torch.equal(loaded_prior[name], value) for name, value in tensors(recipe, 2).items())


def test_one_that_cannot_write_keeps_all_from_it(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert save(tmp_path / "step-00000003", recipe, 2) == [None, None]
    before = open_checkpoint(tmp_path).files

    def full(values: dict[str, torch.Tensor], file: Path) -> None:
        if file.name == "ema-00002-of-00002.safetensors":
            raise OSError(28, "No space left on device")
        save_tensors(values, file)

    monkeypatch.setattr("dalle_cli.stores.checkpoint.save_tensors", full)
    for raised in save(tmp_path / "step-00000003", recipe, 2, seed=5):
        assert isinstance(raised, UserError)
        assert str(raised).startswith("rank 1 of 2: ")
        assert "No space left on device" in str(raised)
    assert open_checkpoint(tmp_path).files == before
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("text", ["I/O error: as it is (os error {0})", "IoError(Os {{ code: {0}, kind: Other }})"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_fault_of_the_disk_while_weights_are_written_keeps_its_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, number: int
) -> None:
    """Safetensors reports each as an error of its own, which would end the command in a traceback."""

    def failing(*_: object) -> None:
        raise SafetensorError(text.format(number))

    monkeypatch.setattr("safetensors.torch.save_file", failing)
    with pytest.raises(OSError, match=r"model\.safetensors") as found:
        save_tensors({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    assert found.value.errno == number


def test_a_checkpoint_half_written_is_none(recipe: Recipe, tmp_path: Path) -> None:
    """The remains of a killed run are ignored and replaced."""
    half = tmp_path / ".step-00000003.partial"
    (half / "trainer").mkdir(parents=True)
    (half / "model-00001-of-00002.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="holds no checkpoint"):
        open_checkpoint(tmp_path)
    assert save(tmp_path / "step-00000003", recipe, 3) == [None] * 3
    assert not half.exists()
    open_checkpoint(tmp_path).check(0, 1)


def test_a_damaged_or_missing_part_is_named(recipe: Recipe, tmp_path: Path) -> None:
    save(tmp_path / "step-00000003", recipe, 2)
    found = open_checkpoint(tmp_path)
    file = found.path / "ema-00002-of-00002.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(UserError, match=r"ema-00002-of-00002\.safetensors: damaged"):
        found.tensors("ema")
    file.unlink()
    with pytest.raises(UserError, match=r"ema-00002-of-00002\.safetensors: missing"):
        found.tensors("ema")


@settings(max_examples=60)
@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=5),
    st.integers(0, 12),
    st.integers(0, 12),
    st.integers(0, 1),
    st.integers(0, 1),
)
def test_slabs_are_found_wherever_they_lie(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], first: int, stop: int, stored: int, wanted: int
) -> None:
    folder = tmp_path_factory.mktemp("slabs")
    total = sum(sizes)
    shape = [total, total]
    shape[1 - stored] = 12
    whole = torch.arange(12 * total).view(shape)
    entries, at = [], 0
    for i, size in enumerate(sizes):
        if size:
            parts = {"x": Part(whole.narrow(stored, at, size), at, tuple(shape), stored)}
            file = part_file("t", i, len(sizes))
            save_tensors({"x": parts["x"].value}, folder / file)
            entries.append(index_entries(file, parts))
        at += size
    if not total:
        return
    (folder / "t.index.json").write_text(json.dumps(join_entries(entries[::-1])))
    files = TensorFiles(folder, "t")
    assert torch.equal(files.all()["x"], whole)
    if first < min(stop, shape[wanted]):
        cut = (slice(first, stop), slice(None)) if wanted == 0 else (slice(None), slice(first, stop))
        assert torch.equal(files.read("x", Slab(first, stop, wanted)), whole[cut])


def test_rows_that_are_missing_or_double_are_an_error() -> None:
    whole = torch.zeros(4, 2)
    one, two = Part(whole[:2], 0, (4, 2)), Part(whole[3:], 3, (4, 2))
    for parts in ([one], [one, two], [one, one]):
        with pytest.raises(ValueError, match="do not make up its shape"):
            join_entries([index_entries(f"{i}", {"x": part}) for i, part in enumerate(parts)])


@pytest.mark.parametrize("size", [None, "20KB", "1B"])
def test_what_is_exported_is_the_same(size: str | None, recipe: Recipe, tmp_path: Path, call: Call) -> None:
    run = tmp_path / "run"
    save(run / "step-00000003", recipe, 3)
    found = open_checkpoint(run)
    done = call("export", run, *([] if size is None else [tmp_path / "out", "--shard-size", size]))
    out = run / "exported" if size is None else tmp_path / "out"
    assert done.code == 0
    assert done.out.strip() == str(out)
    exported = open_checkpoint(out, "prior")
    assert exported.identity == found.identity
    assert exported.belongs == found.belongs
    expected = found.tensors()
    assert all(torch.equal(value, expected[name]) for name, value in exported.tensors().items())
    assert dict(load_prior(exported).named_parameters()).keys() == expected.keys()
    names = sorted(path.name for path in out.iterdir())
    files = [name for name in names if name.endswith(".safetensors")]
    if size is None:
        assert names == ["ema.safetensors", "manifest.json", "recipe.yaml"]
    elif size == "1B":
        assert len(files) == len(expected)
    else:
        largest = max(20_000, *(tensor.nbytes for tensor in expected.values()))
        assert len(files) > 1
        assert max((out / name).stat().st_size for name in files) < largest + 5000
    assert open_checkpoint(run).path == found.path


def test_exporting_one_file_and_what_is_refused(recipe: Recipe, tmp_path: Path, call: Call) -> None:
    path = tmp_path / "run" / "step-00000003"
    weights = {"raw": tensors(recipe, 1), "ema": tensors(recipe, 2)}
    save_checkpoint(path, facts(recipe), CheckpointContent(weights, {}, {}))
    exported = export_checkpoint(open_checkpoint(path), tmp_path / "out")
    assert (exported.path / "ema.safetensors").read_bytes() == (path / "ema.safetensors").read_bytes()
    assert exported.identity == open_checkpoint(path).identity == exported.files["ema.safetensors"]
    assert "exists already" in call("export", path, tmp_path / "out").mistake()
    assert "write bytes, such as 16GB" in call("export", path, tmp_path / "new", "--shard-size", "big").mistake()
    assert "holds no checkpoint" in call("export", tmp_path).mistake()
    (path / "ema.safetensors").write_bytes(b"damaged")
    assert "ema.safetensors: damaged" in call("export", path, tmp_path / "new").mistake()
    assert not (tmp_path / "new").exists()
    shutil.rmtree(tmp_path / "out")


@pytest.mark.parametrize("count", [1, 2])
def test_only_what_is_exported_need_be_whole(count: int, recipe: Recipe, tmp_path: Path) -> None:
    save(tmp_path / "step-00000003", recipe, count)
    found = open_checkpoint(tmp_path)
    last = {name: found.path / part_file(name, count - 1, count) for name in ("model", "ema")}

    def spoil(file: Path) -> None:
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))

    spoil(last["model"])
    with pytest.raises(UserError, match=rf"{last['model'].name}: damaged"):
        found.check(0, 1)
    exported, expected = export_checkpoint(found, tmp_path / "out").tensors(), tensors(recipe, 2)
    assert exported.keys() == expected.keys()
    assert all(torch.equal(exported[name], expected[name]) for name in expected)
    spoil(last["ema"])
    with pytest.raises(UserError, match=rf"{last['ema'].name}: damaged"):
        export_checkpoint(found, tmp_path / "new")
    assert not (tmp_path / "new").exists()

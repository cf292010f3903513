"""Shares of a token store: jobs that write one store side by side leave the same files as one process."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import pytest
from helpers.power_cuts import Disk
from helpers.running import ENVIRONMENT
from helpers.shares import FILE, IDENTITY, arrays, files, key, make, small_files
from hypothesis import given, settings
from hypothesis import strategies as st

from dalle_cli.errors import UserError
from dalle_cli.stores import shards, token_writer
from dalle_cli.stores.shards import WHOLE, Part, Shard, ShareProgress, Shares, parse_shard
from dalle_cli.stores.token_writer import PartWriter
from dalle_cli.stores.tokens import MOST_SHARDS, TokenReader, rows_per_shard
from dalle_cli.stores.verify import verify
from dalle_cli.views.describe import describe

BUSY = f"is being written by process {os.getpid()} on .*; wait for it, or end it"


class Killed(BaseException):
    """Stands for kill -9: nothing after it runs."""


# How the work is split


@given(samples=st.integers(0, 10**6), multiple=st.integers(1, 5000), of=st.integers(1, 300))
def test_shards_part_the_rows(samples: int, multiple: int, of: int) -> None:
    shares = [Shard(number, of).rows(samples, multiple) for number in range(1, of + 1)]
    assert shares[0].start == 0
    assert shares[-1].stop == samples
    assert all(one.stop == two.start for one, two in itertools.pairwise(shares))
    assert all(share.start % multiple == 0 or share.start == samples for share in shares)
    whole_files = [-(-len(share) // multiple) for share in shares]
    assert max(whole_files) - min(whole_files) <= 1


def test_shards_are_counted_from_one() -> None:
    assert parse_shard("3/8") == Shard(3, 8)
    assert str(Shard(3, 8)) == "3/8"
    for wrong in ("0/8", "9/8", "3", "3/0", "a/b", "-1/2", "1/8/2", " 1/8", "1/8\n", "", "0/0", "٣/٨"):
        with pytest.raises(UserError, match=r"I/N with I from 1 to N"):
            parse_shard(wrong)


# One store of many shares


def test_rows_are_on_the_disk_before_they_are_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk, store, real, commits = Disk(monkeypatch), tmp_path / "tokens.zarr", Shares.write, list[int]()
    parts: list[Part] = ["text", "image"]

    def commit(self: Shares, shard: Shard, progress: ShareProgress) -> None:
        if progress.rows:
            assert disk.lacks(store) == []
            commits.append(progress.rows)
        real(self, shard, progress)

    monkeypatch.setattr(Shares, "write", commit)
    with small_files():
        for part in parts:
            for number in (2, 1):
                make(store, part, 30, Shard(number, 2))
    assert len(commits) == 2 * -(-30 // FILE)
    assert disk.lacks(store) == []


@given(
    samples=st.integers(1, 45),
    text=st.integers(1, 7),
    image=st.integers(1, 7),
    order=st.randoms(use_true_random=False),
    kills=st.lists(st.integers(0, 60), max_size=6),
    most=st.sampled_from([3, 10**6]),
)
@settings(max_examples=25)
def test_shares_in_any_order_killed_anywhere_make_the_store_of_one_process(
    samples: int, text: int, image: int, order: st.DataObject, kills: list[int], most: int
) -> None:
    splits: dict[Part, int] = {"text": text, "image": image}
    jobs = [(part, Shard(number, of)) for part, of in splits.items() for number in range(1, of + 1)]
    order.shuffle(jobs)  # type: ignore[attr-defined]
    with TemporaryDirectory() as folder, small_files(most=most):
        calm, store = Path(folder) / "calm.zarr", Path(folder) / "tokens.zarr"
        for part in splits:
            make(calm, part, samples)
        for number, (part, shard) in enumerate(jobs):
            for kill in kills[number::3]:
                make_and_die(store, part, samples, shard, kill)
            make(store, part, samples, shard)
        assert files(store) == files(calm)
        reader = TokenReader(store)
        reader.require_complete()
        assert -(-samples // reader.rows_per_shard) <= most
        known = [file for file, _ in itertools.takewhile(lambda pair: "text" not in pair[0].parts, reader.shards())]
        there = (file for name in ("caption", "image", "image_ok", "key") for file in (store / name / "c").rglob("*"))
        assert sorted(known) == sorted(filter(Path.is_file, there))
        for name, values in arrays("image", range(samples))[0].items():
            np.testing.assert_array_equal(reader.read(name, np.arange(samples)), values)
        assert reader.strings("key", range(samples)) == [key(row) for row in range(samples)]
        np.testing.assert_array_equal(reader.usable_bits(), np.packbits(
            [row % 5 != 2 for row in range(samples)], bitorder="little"
        ))  # fmt: skip
        for part, state in reader.parts.items():
            assert state.bytes == {name: bytes_in(store / name) for name in ("key", *written(store, part))}


def written(store: Path, part: Part) -> list[str]:
    """Return the names of a part's arrays that are there."""
    return [name for name in token_writer.ARRAYS[part] if (store / name).is_dir()]


def bytes_in(array: Path) -> int:
    """Return the size of all shard files of an array."""
    return sum(file.stat().st_size for file in (array / "c").rglob("*") if file.is_file())


def make_and_die(store: Path, part: Part, samples: int, shard: Shard, when: int) -> None:
    """Make a share, and die before one of the steps that change the disk."""
    moments = iter(range(when))

    def step(real):  # type: ignore[no-untyped-def]
        def dying(*args, **kwargs):  # type: ignore[no-untyped-def]
            if next(moments, None) is None:
                raise Killed
            return real(*args, **kwargs)

        return dying

    steps = ("_open_arrays", "_write_keys", "_commit", "_join_reports", "_sweep", "finish")
    with contextlib.ExitStack() as patches:
        for name in steps:
            patches.enter_context(mock.patch.object(PartWriter, name, step(getattr(PartWriter, name))))
        for owner, name in ((shards, "write_json"), (token_writer, "create_group"), (Shares, "remove")):
            patches.enter_context(mock.patch.object(owner, name, step(getattr(owner, name))))
        patches.enter_context(contextlib.suppress(Killed))
        make(store, part, samples, shard)


@pytest.mark.parametrize("shard", [WHOLE, Shard(1, 3)])
def test_a_store_begun_with_small_files_is_finished_with_them(tmp_path: Path, shard: Shard) -> None:
    """Earlier versions made such stores, whatever the number of samples, and did not keep the size of their files."""
    calm, store = tmp_path / "calm.zarr", tmp_path / "tokens.zarr"
    with small_files():
        for part in ("text", "image"):
            make(calm, part, 45)  # type: ignore[arg-type]
        make(store, "text", 45, shard, until=8)
        progress = Shares(store, "text").file(shard, ".json")
        known = json.loads(progress.read_text())
        assert known.pop("bytes")["text"] == bytes_in(store / "text")
        progress.write_text(json.dumps(known))
    with small_files(most=3):
        for number in range(1, shard.of + 1):
            make(store, "text", 45, Shard(number, shard.of))
        make(store, "image", 45)
        reader = TokenReader(store)
        reader.require_complete()
        assert (reader.rows_per_shard, reader.parts["text"].bytes) == (FILE, None)
    unlike = {"zarr.json", "checksums.json"}  # which hold the size, and the checksum of that
    assert {name: data for name, data in files(store).items() if name not in unlike} == {
        name: data for name, data in files(calm).items() if name not in unlike
    }
    known = json.loads((calm / "zarr.json").read_text())
    known["attributes"]["text"].pop("bytes")
    assert json.loads((store / "zarr.json").read_text()) == known
    assert known["attributes"]["version"] == 3


def test_a_killed_writer_resumes_inside_a_large_file_to_the_same_bytes(tmp_path: Path) -> None:
    with small_files(most=3):
        make(tmp_path / "calm.zarr", "text", 45)
        make(tmp_path / "tokens.zarr", "text", 45, Shard(1, 2))
        with PartWriter(tmp_path / "tokens.zarr", "text", IDENTITY, 45, Shard(2, 2)) as writer:
            assert (writer.rows_per_shard, writer.share) == (16, range(16, 45))
            found, skipped, counts = arrays("text", range(16, 32))
            with mock.patch.object(writer, "_commit", side_effect=Killed), pytest.raises(Killed):
                writer.append([key(row) for row in range(16, 32)], found, skipped, counts)
            with pytest.raises(ValueError, match="rows 16 to 20 end inside a shard file of 16 rows"):
                writer.append([key(row) for row in range(16, 20)], arrays("text", range(16, 20))[0], {})
        for name in ("text/c/1/0.12.partial", "text_length/c/1.12.partial"):  # another killed writer's
            (tmp_path / "tokens.zarr" / name).write_bytes(b"half")
        make(tmp_path / "tokens.zarr", "text", 45, Shard(2, 2))
        assert json.loads((tmp_path / "tokens.zarr" / "zarr.json").read_text())["attributes"]["version"] == 4
    assert files(tmp_path / "tokens.zarr") == files(tmp_path / "calm.zarr")


def test_a_missing_large_file_is_named(tmp_path: Path) -> None:
    store = tmp_path / "tokens.zarr"
    with small_files(most=3):
        for part in ("text", "image"):
            make(store, part, 45)  # type: ignore[arg-type]
        assert verify(store).damage == []
        shutil.rmtree(store / "image" / "c" / "2")
        (store / "image_ok" / "c" / "1").write_bytes(b"")
        with pytest.raises(UserError, match="image/c/2: is missing; copy the store again"):
            TokenReader(store).require_complete()
        damage = verify(store).damage
    assert [line.partition(";")[0] for line in damage] == [
        f"{store / 'image' / 'c' / '2' / '0' / '0'}: is missing", f"{store / 'image_ok' / 'c' / '1'}: is empty"
    ]  # fmt: skip


@pytest.mark.parametrize("rows", [3, 6, "four", -4, 4.5, None])
def test_a_wrong_number_of_rows_per_shard_is_damage(tmp_path: Path, rows: object) -> None:
    store = tmp_path / "tokens.zarr"
    with small_files(most=3):
        make(store, "text", 45)
        metadata = json.loads((store / "zarr.json").read_text())
        metadata["attributes"]["rows_per_shard"] = rows
        (store / "zarr.json").write_text(json.dumps(metadata))
        for open_it in (lambda: TokenReader(store), lambda: PartWriter(store, "text", IDENTITY, 45)):
            with pytest.raises(UserError, match=r"tokens\.zarr: is damaged"):
                open_it()


def test_no_array_of_a_store_has_more_files_than_said() -> None:
    """The paper's store of 250 million rows has fewer than 200,000 files and folders in all."""
    for samples in (1, 4096, 10**6, 4096 * 2**14, 4096 * 2**14 + 1, 250 * 10**6, 10**9):
        rows = rows_per_shard(samples)
        assert rows % 4096 == 0
        assert -(-samples // rows) <= MOST_SHARDS
        assert rows == 4096 or -(-samples // (rows // 2)) > MOST_SHARDS
    assert rows_per_shard(60 * 10**6) == 4096
    files_and_folders = {"key": 1, "text": 2, "text_length": 1, "caption": 1, "image": 3, "image_ok": 1}
    assert sum(files_and_folders.values()) * -(-250 * 10**6 // rows_per_shard(250 * 10**6)) < 200_000


@pytest.mark.parametrize("most", [3, 10**6])
def test_no_command_lists_all_files(tmp_path: Path, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening, appending, finishing and describing list as many folders of a large store as of a small one."""
    listed = []
    real = os.scandir
    monkeypatch.setattr(os, "scandir", lambda *path: listed.append(path) or real(*path))
    counts, identity = [], {**IDENTITY, "source_name": "shapes"}
    for samples in (40, 200):
        store = tmp_path / f"{samples}.zarr"
        with small_files(most=most if samples == 40 else 5 * most):
            make(store, "text", samples, identity=identity)
            listed.clear()
            make(store, "image", samples, Shard(1, 2), identity=identity)
            make(store, "image", samples, Shard(2, 2), until=samples - 16, identity=identity)
            appended = len(listed)
            listed.clear()
            make(store, "image", samples, Shard(2, 2), identity=identity)
            describe(store)
            counts.append(len(listed))
        assert appended > 0
    assert counts[0] == counts[1]


def test_a_job_killed_as_it_completes_the_store_leaves_nothing_behind(tmp_path: Path) -> None:
    calm, store = tmp_path / "calm.zarr", tmp_path / "tokens.zarr"
    with small_files():
        make(calm, "image", 30)
        make(store, "image", 30, Shard(1, 2))
        with mock.patch.object(Shares, "remove", side_effect=Killed), pytest.raises(Killed):
            make(store, "image", 30, Shard(2, 2))
        make(store, "image", 30, Shard(2, 2))
    assert files(store) == files(calm)


@pytest.mark.parametrize("text_shares", [1, 4])
def test_jobs_at_the_same_time_make_the_store_of_one_process(tmp_path: Path, text_shares: int) -> None:
    samples, store = 150, tmp_path / "tokens.zarr"
    program = [sys.executable, Path(__file__).parents[1] / "helpers" / "shares.py", store, str(samples)]
    jobs = [("text", f"{number}/{text_shares}") for number in range(1, text_shares + 1)]
    jobs += [("image", f"{number}/3") for number in (1, 2, 3)]
    running = [subprocess.Popen([*program, *job], env=ENVIRONMENT) for job in jobs]
    assert [process.wait(120) for process in running] == [0] * len(jobs)
    with small_files():
        for part in ("text", "image"):
            make(tmp_path / "calm.zarr", part, samples)  # type: ignore[arg-type]
    assert files(store) == files(tmp_path / "calm.zarr")


def test_a_share_resumes_where_it_was_killed(tmp_path: Path) -> None:
    store, shard = tmp_path / "tokens.zarr", Shard(2, 3)
    with small_files():
        rows = shard.rows(40, FILE)
        assert len(rows) > FILE
        make(store, "text", 40, shard, until=rows.start + FILE)
        with PartWriter(store, "text", IDENTITY, 40, shard) as writer:
            assert (writer.rows, writer.complete) == (FILE, False)
            assert writer.todo == range(rows.start + FILE, rows.stop)
        assert TokenReader(store).part("text").rows == 0  # no row before share 2 is committed
        for number in (1, 3, 2):
            make(store, "text", 40, Shard(number, 3))
        make(tmp_path / "calm.zarr", "text", 40)
    assert files(store) == files(tmp_path / "calm.zarr")


def test_missing_and_unfinished_shares_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tmp_path / "tokens.zarr"
    with small_files():
        make(store, "text", 40)
        make(store, "image", 40, Shard(1, 4))
        make(store, "image", 40, Shard(3, 4))
        make(store, "image", 40, Shard(4, 4), until=Shard(4, 4).rows(40, FILE).start + FILE)
        assert f"{store}: share 3/4 of its image part is complete; unfinished: 2/4, 4/4" in capsys.readouterr().err
        reader = TokenReader(store)
        assert len(reader) == reader.part("image").rows == len(Shard(1, 4).rows(40, FILE))
        with pytest.raises(UserError, match="with --shard for its unfinished shares, 2/4, 4/4, to finish"):
            reader.require_complete()
        make(store, "image", 40, Shard(4, 4))
        make(store, "image", 40, Shard(2, 4))
        TokenReader(store).require_complete()


def test_more_shares_than_files_leave_some_without_rows(tmp_path: Path) -> None:
    with small_files():
        for number in range(5, 0, -1):
            make(tmp_path / "tokens.zarr", "image", 9, Shard(number, 5))
        make(tmp_path / "calm.zarr", "image", 9)
    assert files(tmp_path / "tokens.zarr") == files(tmp_path / "calm.zarr")


def test_a_share_may_be_made_again(tmp_path: Path) -> None:
    store = tmp_path / "tokens.zarr"
    with small_files():
        for number in (1, 2):
            make(store, "image", 30, Shard(number, 3))
        progress = Shares(store, "image")
        progress.file(Shard(2, 3), ".json").unlink()
        (store / "image_ok" / "c" / "3").unlink()
        make(store, "image", 30, Shard(2, 3))
        make(store, "image", 30, Shard(3, 3))
        make(tmp_path / "calm.zarr", "image", 30)
        assert files(store) == files(tmp_path / "calm.zarr")
        for shard in (Shard(2, 3), WHOLE, Shard(1, 7)):  # the part is complete: nothing is left to do
            assert make(store, "image", 30, shard).rows == 30
        assert files(store) == files(tmp_path / "calm.zarr")


def test_a_second_writer_of_a_share_is_refused(tmp_path: Path) -> None:
    store = tmp_path / "tokens.zarr"
    with small_files():
        with PartWriter(store, "image", IDENTITY, 30, Shard(2, 3)):
            with pytest.raises(UserError, match=f"share 2/3 of its image part {BUSY}"):
                make(store, "image", 30, Shard(2, 3))
            make(store, "image", 30, Shard(1, 3))
            make(store, "text", 30, Shard(2, 3))
        make(store, "image", 30, Shard(2, 3))
        with (
            PartWriter(tmp_path / "whole.zarr", "image", IDENTITY, 30),
            pytest.raises(UserError, match=f"share 1/1 of its image part {BUSY}"),
        ):
            make(tmp_path / "whole.zarr", "image", 30)


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("other dVAE", "its image part was made with dvae 'a', now 'b'; choose another --tokens, or delete the store"),
        ("more samples", "its image part has 30 samples, the source now has 31; choose another --tokens"),
        ("another split", "begun as share 1/3, now 1/4; make all of its shares with the same N, or delete .*progress"),
        ("no split", "begun as share 1/3, now 1/1; make all of its shares with the same N"),
        ("text of more samples", "its image part has 30 samples, the source now has 31; both commands must read the"),
        ("other keys", "row 0 is 'key-0' in the store and 'other-0' in the source; both commands must read"),
        (
            "skips",
            r"image-0001-of-0003\.jsonl: lists 0 of 2 skipped samples; delete .*json and run dalle",
        ),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path: Path, fault: str, words: str) -> None:
    store, made_by_a = tmp_path / "tokens.zarr", {**IDENTITY, "dvae": "a"}
    with small_files():
        make(store, "image", 30, Shard(1, 3), identity=made_by_a)
        if fault == "skips":
            Shares(store, "image").report(Shard(1, 3)).unlink()
            make(store, "image", 30, Shard(2, 3), identity=made_by_a)
        before = files(store)
        deeds = {
            "other dVAE": lambda: make(store, "image", 30, Shard(2, 3), identity={**IDENTITY, "dvae": "b"}),
            "more samples": lambda: make(store, "image", 31, Shard(2, 3), identity=made_by_a),
            "another split": lambda: make(store, "image", 30, Shard(1, 4), identity=made_by_a),
            "no split": lambda: make(store, "image", 30, identity=made_by_a),
            "text of more samples": lambda: make(store, "text", 31),
            "other keys": lambda: make(store, "text", 30, prefix="other-"),
            "skips": lambda: make(store, "image", 30, Shard(3, 3), identity=made_by_a),
        }
        with pytest.raises(UserError, match=words):
            deeds[fault]()
        if fault not in ("other keys", "skips"):
            assert files(store) == before
        with pytest.raises(UserError, match=r"has no text part yet|its text part stops at row 0"):
            TokenReader(store).require_complete()


# The list of skipped samples


def test_the_list_of_skips_is_only_ever_appended_to(tmp_path: Path) -> None:
    with small_files(), PartWriter(tmp_path / "t", "image", IDENTITY, 80) as writer:
        report = writer.path / "skipped-image.jsonl"
        sizes = []
        real = Path.open

        def opened(self: Path, mode: str = "r", *args: object, **kwargs: object):  # type: ignore[no-untyped-def]
            assert self != report or mode == "a", "what is committed is read again"
            return real(self, mode, *args, **kwargs)

        with mock.patch.object(Path, "open", opened):
            for start in range(0, 80, FILE):
                rows = range(start, start + FILE)
                skips = {key(row): "broken" for row in rows}
                writer.append([key(row) for row in rows], arrays("image", rows)[0], skips)
                sizes.append(report.stat().st_size)
    assert sizes == sorted(sizes)
    assert [json.loads(line)["key"] for line in report.read_text().splitlines()] == [key(row) for row in range(80)]


@pytest.mark.parametrize("shard", [WHOLE, Shard(1, 2)])
def test_what_a_killed_run_listed_beyond_its_rows_is_cut(tmp_path: Path, shard: Shard) -> None:
    with small_files():
        make(tmp_path / "calm", "image", 24, shard)
        make(tmp_path / "struck", "image", 24, shard, until=8)
        report = Shares(tmp_path / "struck", "image").report(shard)
        committed = report.read_text()
        report.write_text(committed + '{"key": "key-12", "reason": "reason 0"}\n{"key": "key-1')
        make(tmp_path / "struck", "image", 24, shard, until=8)
        assert report.read_text() == committed
        make(tmp_path / "struck", "image", 24, shard)
    assert files(tmp_path / "struck") == files(tmp_path / "calm")


def test_many_kinds_of_skips_keep_the_attributes_small(tmp_path: Path) -> None:
    reasons = {key(row): f"{row} x {row} pixels" for row in range(300)}
    with small_files(100):
        for store, shares in ((tmp_path / "calm", [WHOLE]), (tmp_path / "tokens", [Shard(2, 2), Shard(1, 2)])):
            for shard in shares:
                with PartWriter(store, "image", IDENTITY, 300, shard) as writer:
                    while rows := writer.todo[:100]:
                        keys = [key(row) for row in rows]
                        values = {"image": np.zeros((100, 2, 2), np.uint16), "image_ok": np.zeros(100, np.uint8)}
                        writer.append(keys, values, {name: reasons[name] for name in keys})
                    writer.finish()
    counts = TokenReader(tmp_path / "calm").part("image").skipped
    assert sum(counts.values()) == 300
    assert len(counts) == token_writer.MOST_REASONS + 1
    assert counts[token_writer.OTHER_REASONS] == 200
    assert files(tmp_path / "tokens") == files(tmp_path / "calm")

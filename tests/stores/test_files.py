"""Files and folders on disk: the old one or the new one, never half of one; locks."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest import mock

import pytest
from conftest import Call

from dalle_cli.errors import UserError
from dalle_cli.shapes.world import make_shapes
from dalle_cli.stores.files import (
    append_json_line,
    csv_text,
    json_text,
    locked,
    new_directory,
    owned,
    read_json_lines,
    split_lines,
    write_atomically,
    write_json,
)


def test_a_directory_is_whole_or_absent(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    with new_directory(target) as folder:
        (folder / "a").write_text("1")
        assert not target.exists()
    with pytest.raises(IsADirectoryError), new_directory(target) as folder:
        folder.write_text("2")
    assert [p.name for p in target.parent.iterdir()] == ["target"]
    assert (target / "a").read_text() == "1"
    with new_directory(target) as folder:
        (folder / "b").write_text("3")
    assert [p.name for p in target.iterdir()] == ["b"]


def test_a_file_never_takes_the_place_of_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "kept").write_text("1")
    with pytest.raises(UserError, match="folder: is a folder; name a file"):
        write_atomically(folder, "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    assert (folder / "kept").read_text() == "1"


def test_a_link_stays_one_and_a_pipe_takes_what_is_written(tmp_path: Path) -> None:
    target, link, pipe = tmp_path / "deep" / "target", tmp_path / "link", tmp_path / "pipe"
    link.symlink_to(target)
    for text in ("first", "second"):  # before the target is there, and in its place
        write_atomically(link, text)
        assert link.is_symlink()
        assert target.read_text() == text
    os.mkfifo(pipe)
    with ThreadPoolExecutor(1) as pool:
        read = pool.submit(pipe.read_bytes)
        write_atomically(pipe, "through")
        assert read.result(timeout=30) == b"through"
    assert pipe.is_fifo()
    write_atomically(Path(os.devnull), "nothing")
    assert Path(os.devnull).is_char_device()


def test_names_that_are_not_utf_8_come_back(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9")
    write_json(tmp_path / "value.json", {name: name})
    assert json.loads((tmp_path / "value.json").read_bytes()) == {name: name}
    assert (tmp_path / "value.json").read_text() == json_text({name: name})
    append_json_line(tmp_path / "lines.jsonl", {"name": name})
    assert read_json_lines(tmp_path / "lines.jsonl") == [{"name": name}]
    write_atomically(tmp_path / "page.html", f"<p>{name}</p>")
    assert (tmp_path / "page.html").read_text() == "<p>caf\\udce9</p>"


def test_everything_is_on_the_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Record what is synced and renamed: what is below a renamed path was synced before, and its new folder after."""
    events: list[tuple[str, Path]] = []
    fsync, replace = os.fsync, Path.replace

    def record_fsync(descriptor: int) -> None:
        events.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def record_replace(self: Path, target: Path) -> Path:
        below = {self, *self.rglob("*")} if self.is_dir() else {self}
        assert below <= {path for kind, path in events if kind == "sync"}
        events.append(("rename", target))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "replace", record_replace)
    write_atomically(tmp_path / "file", "text")
    with new_directory(tmp_path / "folder") as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_text("1")
        (folder / "b").write_text("2")
    make_shapes(tmp_path / "world", n=1, test_n=0, seed=0, size=32)
    renames = [at for at, (kind, _) in enumerate(events) if kind == "rename"]
    assert [events[at][1].name for at in renames] == ["file", "folder", "world.json", "shapes-00000.tar"]
    assert all(events[at + 1] == ("sync", events[at][1].parent) for at in renames)


def test_a_file_is_the_old_or_the_new(tmp_path: Path) -> None:
    file = tmp_path / "file"
    write_atomically(file, "old")
    with (
        mock.patch.object(Path, "replace", side_effect=OSError(28, "No space left on device")),
        pytest.raises(UserError, match="No space left"),
    ):
        write_atomically(file, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert file.read_text() == "old"


@pytest.mark.parametrize(
    ("number", "words"),
    [(28, "No space left"), (13, "may not be written"), (30, "may not be written"), (17, "in the way")],
)
def test_faults_of_the_disk_are_one_line(tmp_path: Path, number: int, words: str) -> None:
    with pytest.raises(UserError, match=words) as refused, new_directory(tmp_path / "place"):
        raise OSError(number, "as the system says it")
    assert str(tmp_path / "place") in str(refused.value)
    assert "\n" not in str(refused.value)


def test_one_process_at_a_time_holds_a_lock(tmp_path: Path) -> None:
    lock = tmp_path / "deep" / "lock"
    for _ in range(2):
        with (
            locked(lock, "it", patience=0),
            pytest.raises(UserError, match=f"it is being written by process {os.getpid()} on .*; wait for it, or end"),
            locked(lock, "it", patience=0),
        ):
            pass
        assert not lock.exists()


OWNER = """
import os, sys, time
from pathlib import Path
from dalle_cli.stores.files import owned
with owned(Path(sys.argv[1])):
    if worker := os.fork():
        print(worker, flush=True)
    time.sleep(float(sys.argv[2]))
"""


@contextmanager
def another_owner(path: Path, seconds: float) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Yield a process that owns ``path`` and the number of its forked worker, which holds the lock too."""
    program = [sys.executable, "-c", OWNER, path, str(seconds)]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        worker = int(owner.stdout.readline())
        try:
            yield owner, worker
        finally:
            for number in (owner.pid, worker):
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)


@pytest.mark.parametrize("alive", [False, True])
def test_workers_of_a_killed_owner_are_waited_for(
    tmp_path: Path, alive: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The owner's forked worker keeps the lock for two seconds."""
    run = tmp_path / "run"
    with another_owner(run, 2) as (owner, _):
        name = f"process {owner.pid} on {socket.gethostname()}"
        if not alive:
            owner.kill()
            owner.wait()
        began = time.monotonic()
        if alive:
            with pytest.raises(UserError, match=f"is being written by {name}; wait for it, or end it"), owned(run):
                pass
            assert time.monotonic() - began < 1
            assert capsys.readouterr().err == ""
        else:
            with owned(run):
                assert time.monotonic() - began > 0.5
            waited = f"{run}: is being written by a worker of {name}, which has ended; waiting for it\n"
            assert capsys.readouterr().err == waited


@pytest.mark.parametrize("stopped", ["owner", "worker"])
def test_a_stopped_process_is_named_at_once_and_not_waited_for_long(tmp_path: Path, call: Call, stopped: str) -> None:
    """A process stopped by SIGSTOP, or a stopped worker that its killed owner left, keeps the lock without end."""
    out = tmp_path / "out"
    with another_owner(out, 60) as (owner, worker):
        name = f"process {owner.pid} on {socket.gethostname()}"
        if stopped == "owner":
            owner.send_signal(signal.SIGSTOP)
            told, mend = f"{name}, which is stopped", f"let it go on (kill -CONT {owner.pid}), or end it"
        else:
            os.kill(worker, signal.SIGSTOP)
            owner.kill()
            owner.wait()
            told, mend = f"a worker of {name}, which has ended", f"end it too (lsof {tmp_path / '.out.lock'} names it)"
        began = time.monotonic()
        refused = call("make-shapes", out, "--n", 4, "--size", 32)
        assert 1 < time.monotonic() - began < 30
        assert refused.code == 2
        assert refused.err.splitlines() == [
            f"{out}: is being written by {told}; waiting for it",
            f"dalle: {out}: is being written by {told}; {mend}",
        ]


def test_a_lock_is_waited_for_as_long_as_its_holder_gets_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began, lock = time.monotonic(), tmp_path / ".run.lock"
    with another_owner(tmp_path / "run", 60) as (owner, _):

        def wait(sign_of_life: Callable[[], object]) -> None:
            refusal = pytest.raises(UserError, match=f"it is being written by process {owner.pid} on .*; wait for it")
            with refusal, locked(lock, "it", patience=1, sign_of_life=sign_of_life):
                pass

        wait(lambda: None)
        assert time.monotonic() - began < 3
        assert f"it is being written by process {owner.pid} on" in capsys.readouterr().err
        began = time.monotonic()
        wait(lambda: min(time.monotonic() - began, 2))
        assert time.monotonic() - began > 2.5


def test_a_process_that_waited_for_a_deleted_lock_takes_the_next(tmp_path: Path) -> None:
    lock, held, turns = tmp_path / "progress" / "lock", [0], []

    def work() -> None:
        for _ in range(50):
            with locked(lock, "it"):
                held[0] += 1
                turns.append(held[0])
                held[0] -= 1

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work) for _ in range(4)]:
            done.result()
    assert turns == [1] * 200


def test_a_file_system_without_locks_is_one_line(tmp_path: Path) -> None:
    with (
        mock.patch("fcntl.flock", side_effect=OSError(38, "Function not implemented")),
        pytest.raises(UserError, match=r"lock: cannot be locked .*; use a file system with locks"),
        locked(tmp_path / "lock", "it"),
    ):
        pass


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    assert split_lines("a\u2028b\r\nc\x0bd\re\n") == ["a\u2028b", "c\x0bd", "e", ""]


def test_a_torn_line_swallows_no_later_one(tmp_path: Path) -> None:
    file = tmp_path / "journal.jsonl"
    assert read_json_lines(file) == []
    append_json_line(file, {"name": "größe\u2028"})
    with file.open("ab") as torn:
        torn.write(b'{"name": "ha')
    append_json_line(file, {"name": "b"})
    with file.open("a") as deep:
        deep.write("[" * 100_000 + "\n")
    append_json_line(file, {"name": "c"})
    assert [line["name"] for line in read_json_lines(file)] == ["größe\u2028", "b", "c"]
    assert file.read_bytes().count(b"\n") == 5


def test_no_text_of_a_csv_file_is_a_formula() -> None:
    texts = ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1", "a=1", "", "1-2", " =1", 'a "red", star\nbelow']
    found = list(csv.reader(io.StringIO(csv_text([texts, [-1, 2.5, None]]), newline="")))
    assert found[0] == [f"'{text}".replace("\r", "\n") for text in texts[:6]] + texts[6:]
    assert found[1] == ["-1", "2.5", ""]

"""Samples with every common fault: the commands succeed, and exactly the unusable samples are skipped and named."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from helpers.faults import FAULTS, write_faulty_shards
from helpers.running import run, smallest_recipe

FAST, WHOLE = 600, 100_000


def _skipped(report: Path) -> dict[str, str]:
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    assert len({line["key"] for line in lines}) == len(lines), "a key is listed twice"
    return {line["key"]: line["reason"] for line in lines}


class _Peak:
    """Samples the largest resident memory of this process's descendants, in MiB."""

    def __enter__(self) -> _Peak:
        self.mib, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.mib = max(self.mib, sum(_resident_mib(pid) for pid in _descendants(os.getpid())))
            time.sleep(0.1)


def _descendants(pid: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found, frontier = [], [pid]
    while frontier:
        frontier = [child for child, parent in parents.items() if parent in frontier]
        found += frontier
    return found


def _resident_mib(pid: int) -> float:
    """Return the process's proportional memory: pages it shares with others are divided among them."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    return 0.0


def _run_on(folder: Path, samples: int) -> dict[str, float]:
    """Tokenize and encode faulty shards; return the peak memory of each command in MiB."""
    faulty = write_faulty_shards(folder / "data", samples, 0.05)
    settings = smallest_recipe(folder / "run", folder / "data")
    settings["data"]["filters"] = {"min_side": 8}
    settings["dvae"]["training"]["workers"] = 1
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    assert run("train-tokenizer", recipe).code == 0
    assert run("train-dvae", recipe).code == 0
    peaks = {}
    for command in ("tokenize-text", "encode-images"):
        with _Peak() as peak:
            done = run(command, recipe, timeout=3600)
        assert done.code == 0, done.err
        peaks[command] = peak.mib
    store = folder / "run" / "tokens.zarr"
    pictures, captions = _skipped(store / "skipped-image.jsonl"), _skipped(store / "skipped-text.jsonl")
    assert set(pictures) == {key for key, kind in faulty.items() if FAULTS[kind].picture_skipped}
    assert set(captions) == {key for key, kind in faulty.items() if FAULTS[kind].caption_skipped}
    assert Counter(faulty.values()).keys() == FAULTS.keys()
    for part, found in (("pictures", pictures), ("captions", captions)):
        for (kind, reason), count in sorted(Counter((faulty[key], reason) for key, reason in found.items()).items()):
            print(f"{part}: {kind}: {count} x {reason}")
    print(f"peak MiB: {peaks}")
    return peaks


def test_exactly_the_unusable_samples_are_skipped(tmp_path: Path) -> None:
    _run_on(tmp_path, FAST)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path) -> None:
    """The peak memory of 100,000 samples is less than 2 GB above that of 600."""
    small, large = _run_on(tmp_path / "small", FAST), _run_on(tmp_path / "large", WHOLE)
    for command, peak in large.items():
        assert peak < small[command] + 2000

"""Joining the shares that ``--shard`` made into one token store, the same bytes as if one process had made it.

A share's shard files become the store's under their new numbers, as hard links: nothing is read or written twice, and
the shares stay whole. Rows are committed share by share, so that a killed merge goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dalle_cli.errors import UserError
from dalle_cli.progress import progress
from dalle_cli.stores.files import explain_os_errors
from dalle_cli.stores.shards import COMMANDS, Part, Shard, parts_folder, parts_of
from dalle_cli.stores.tokens import BY_VERSION, ROWS_PER_SHARD, PartWriter, TokenReader


@dataclass(frozen=True)
class Share:
    """A finished share of a part, and the source's rows in it."""

    path: Path
    shard: Shard
    rows: range
    samples: int
    identity: dict[str, Any]
    counts: dict[str, int]


def merge_store(out: Path) -> dict[Part, int]:
    """Join the shares of the store ``out``, text first. Returns the number of rows of each part joined.

    Raises:
        UserError: there are no shares, one is missing or unfinished, or they do not belong together; the disk is full.
    """
    found: dict[Part, list[Share]] = {part: _shares(out, part) for part in COMMANDS if parts_of(out, part)}
    if not found:
        raise UserError(
            f"{parts_folder(out)}: no shares to join; make them with encode-images --shard I/N --tokens {out}"
        )
    return {part: _merge_part(out, part, shares) for part, shares in found.items()}


def _shares(out: Path, part: Part) -> list[Share]:
    """Every share of the part, checked to be whole and to belong together."""
    command, begun = COMMANDS[part], parts_of(out, part)
    if len(splits := sorted({shard.of for shard in begun})) > 1:
        raise UserError(
            f"{parts_folder(out)}: {part} shares of several splits, of {' and of '.join(map(str, splits))}; "
            "delete those of all but one"
        )
    shares = []
    for shard in (Shard(number, splits[0]) for number in range(1, splits[0] + 1)):
        path = shard.store(out, part)
        again = f"run dalle {command} --shard {shard} with the same settings"
        if shard not in begun:
            raise UserError(f"{path}: is missing; {again}")
        reader = TokenReader(path)
        state, place = reader.part(part), reader.attributes.get("shard")
        if place is None or not state["complete"]:
            raise UserError(f"{path}: is unfinished, it stops at {state['rows']} rows; {again}")
        share = Share(path, shard, range(*place["rows"]), place["samples"], state["identity"], state.get("counts", {}))
        if share.rows != shard.rows(share.samples, ROWS_PER_SHARD) or state["rows"] != len(share.rows):
            raise UserError(f"{path}: does not hold shard {shard} of {share.samples} samples; delete it, then {again}")
        if len(_skips(path, part)) != sum(state["skipped"].values()):
            raise UserError(f"{path}: its skipped-{part}.jsonl is not whole; delete the share, then {again}")
        shares.append(share)
    first = shares[0]
    for share in shares[1:]:
        facts: dict[str, tuple[Any, Any]] = {"samples": (first.samples, share.samples)}
        facts |= {name: (first.identity.get(name), value) for name, value in share.identity.items()}
        for name, (one, other) in facts.items():
            if one != other:
                raise UserError(
                    f"{share.path}: was made with {name} {other!r}, {first.path.name} with {one!r}; "
                    "make both with the same settings"
                )
    return shares


def _merge_part(out: Path, part: Part, shares: list[Share]) -> int:
    samples = shares[0].samples
    writer = PartWriter(out, part, shares[0].identity)
    at = writer.check_source(samples).start
    if at not in {border for share in shares for border in (share.rows.start, share.rows.stop)}:
        raise UserError(
            f"{out}: its {part} part stops at row {at}, where none of {parts_folder(out)} begins; "
            "finish it as it was begun, or delete the store to begin again"
        )
    if not writer.complete:
        with progress(f"merge {part}", samples, "rows", at) as bar:
            for share in shares:
                if share.rows and share.rows.start >= at:
                    if writer.keys_from_other:
                        _check_keys(writer, share)
                    with explain_os_errors(out):
                        _adopt(share, out, with_keys=not writer.keys_from_other)
                    writer.commit(share.rows.stop, _skips(share.path, part), share.counts)
                    bar.advance(len(share.rows))
        writer.finish()
    return samples


def _check_keys(writer: PartWriter, share: Share) -> None:
    reader = TokenReader(share.path, cached_rows=0)
    for start in range(0, len(share.rows), ROWS_PER_SHARD):
        keys = reader.strings("key", range(start, min(start + ROWS_PER_SHARD, len(share.rows))))
        writer.check_keys(keys, share.rows.start + start)


def _skips(share: Path, part: Part) -> list[tuple[str, str]]:
    report = share / f"skipped-{part}.jsonl"
    lines = [json.loads(line) for line in report.read_text().splitlines()] if report.is_file() else []
    return [(line["key"], line["reason"]) for line in lines]


def _adopt(share: Share, out: Path, *, with_keys: bool) -> None:
    """Give the store the share's shard files, and arrays that reach to their end."""
    for metadata in sorted(share.path.glob("*/zarr.json")):
        name, there = metadata.parent.name, out / metadata.parent.name / "zarr.json"
        if name == "key" and not with_keys:
            continue
        array = json.loads(metadata.read_text())
        array["shape"][0] = share.rows.stop
        if there.is_file():
            known = json.loads(there.read_text())
            known["shape"][0] = share.rows.stop
            if name in BY_VERSION:  # as many versions as the row with the most has
                known["shape"][1] = array["shape"][1] = max(known["shape"][1], array["shape"][1])
            if known != array:
                raise UserError(f"{share.path}: its array {name} is of another kind than {out}'s; make both anew")
        offset = share.rows.start // ROWS_PER_SHARD
        for number in range(-(-len(share.rows) // ROWS_PER_SHARD)):
            _link(metadata.parent / "c" / str(number), out / name / "c" / str(offset + number))
        _write(there, json.dumps(array, indent=2).encode())


def _link(source: Path, target: Path) -> None:
    """Make ``target`` the file, or the folder of files, ``source``; a shard of nothing but zeros has none."""
    if target.is_dir():
        shutil.rmtree(target)
    target.unlink(missing_ok=True)
    if source.is_dir():
        for below in sorted(source.iterdir()):
            _link(below, target / below.name)
    elif source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target)
        except OSError:  # a file system without hard links, or another one
            _write(target, source.read_bytes())


def _write(target: Path, data: bytes) -> None:
    """Write beside ``target`` and rename; what a killed merge leaves there, the next writer sweeps."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.partial")
    beside.write_bytes(data)
    beside.replace(target)

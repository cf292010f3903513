"""No flipped bit, cut or missing file of a run goes unnoticed by ``dalle verify``."""

from __future__ import annotations

import random
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers.running import run
from helpers.tiny_chain import TinyChain, build_chain

from dalle_cli.errors import UserError
from dalle_cli.stores.tokens import TokenReader
from dalle_cli.stores.verify import verify

QUICK, THOROUGH = 90, 1000


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> TinyChain:
    chain = build_chain(tmp_path_factory.mktemp("chain"))
    lines = chain.ranked.read_text()
    assert run("rerank", "--clip", chain.places.clip, stdin=lines).code == 0  # adds scores to the sample store
    return chain


def files_of(root: Path) -> list[Path]:
    """Return the files that stages read: all but journals and reports."""
    unread = ("metrics.jsonl", "commands.jsonl", "ranked.jsonl")
    found = [path for path in root.rglob("*") if path.is_file() and path.name not in unread]
    shown = {"tensorboard", "validation"}  # parts of journals, too
    return sorted(path for path in found if not shown & {*path.parts} and not path.name.startswith("."))


def arrays_of(root: Path) -> str:
    """Return a hash of all values of the stores."""
    digest = sha256()
    for store in sorted(root.rglob("*.zarr")):
        for name, array in sorted(zarr.open_group(str(store), mode="r").arrays()):
            values = np.asarray(array[:])
            digest.update(
                name.encode() + (repr(values.tolist()).encode() if values.dtype.hasobject else values.tobytes())
            )
    return digest.hexdigest()


@pytest.mark.filterwarnings("ignore:Object at")  # zarr does not know checksums.json
@pytest.mark.parametrize("count", [QUICK, pytest.param(THOROUGH, marks=pytest.mark.slow)])
def test_flips_cuts_and_deletions_are_all_noticed(chain: TinyChain, count: int) -> None:
    root, rng = chain.places.root, random.Random(count)
    assert verify(root).damage == []
    arrays = arrays_of(root)
    files, unnoticed, noticed, kinds = files_of(root), [], 0, Counter[str]()
    for number in range(count):
        file = files[number % len(files)] if number < len(files) else rng.choice(files)
        whole = file.read_bytes()
        kind = rng.choice(["flip", "flip", "flip", "cut", "delete"]) if whole else "delete"
        place = rng.randrange(len(whole)) if whole else 0
        if kind == "flip":
            bit = 1 << rng.randrange(8)
            file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
        elif kind == "cut":
            file.write_bytes(whole[:place])
        else:
            file.unlink()
        try:
            damage = verify(root).damage
        except UserError as error:
            damage = [str(error)]
        if not damage and arrays_of(root) != arrays:  # some bits of zstd's code decode to the same
            unnoticed.append((file.relative_to(root).as_posix(), kind, place))
        kinds[kind] += 1
        noticed += bool(damage)
        file.write_bytes(whole)
    without = count - noticed - len(unnoticed)
    print(f"{dict(kinds)}: {noticed} noticed, {len(unnoticed)} silent, {without} without effect")
    assert unnoticed == []
    assert min(kinds.values()) > count / 10
    assert verify(root).damage == []


def test_the_damaged_file_is_named(chain: TinyChain) -> None:
    picture = next(chain.places.samples.rglob("*.png"))
    whole = picture.read_bytes()
    picture.write_bytes(whole[:-20] + b"x" * 8 + whole[-12:])
    done = run("verify", chain.places.root)
    picture.write_bytes(whole)
    assert done.code == 2
    assert f"{picture}: is damaged: wrong checksum of a PNG's 'IDAT' chunk; delete it and draw it again" in done.out
    assert run("verify", chain.places.samples).code == 0
    assert run("verify", picture.parent).code == 0


def test_a_training_refuses_a_store_whose_metadata_were_changed(chain: TinyChain) -> None:
    metadata = chain.places.tokens / "zarr.json"
    whole = metadata.read_text()
    assert '"rows": 40' in whole
    metadata.write_text(whole.replace('"rows": 40', '"rows": 10'))
    try:
        with pytest.raises(
            UserError, match=r"zarr.json: is damaged: its sha256 is not that of checksums.json; copy .* again"
        ):
            TokenReader(chain.places.tokens).require_complete()
    finally:
        metadata.write_text(whole)
    TokenReader(chain.places.tokens).require_complete()


def test_what_is_no_artifact_is_refused(tmp_path: Path) -> None:
    assert "is no run, checkpoint, token store or folder of samples" in run("verify", tmp_path).mistake()

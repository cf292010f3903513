"""Hostile files of torch.save, in both layouts: refused by name with nothing executed, or read as plain data."""

from __future__ import annotations

import contextlib
import functools
import io
import operator
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Call
from helpers.released_dvae import released, save
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dalle_cli.dvae.inert_pickle import MAX_OPCODES, Allowlist, BadPickle, Instance, Symbol, read_pickle
from dalle_cli.dvae.openai import CLASSES, read_released
from dalle_cli.dvae.torch_file import StoredTensor, open_torch_file, read_tensors
from dalle_cli.errors import UserError

LAYOUTS = ["zip", "legacy"]
ROOT = b"cdall_e.encoder\nEncoder\n"
FLOATS = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def write(path: Path, pickled: bytes, layout: str, storages: dict[str, bytes] | None = None) -> Path:
    """Write a file of torch.save whose object is ``pickled``."""
    storages = {"0": FLOATS} if storages is None else storages
    if layout == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickled)
            for key, values in storages.items():
                archive.writestr(f"archive/data/{key}", values)
            archive.writestr("archive/version", b"3\n")
        return path
    machine = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    parts = [pickle.dumps(value, 2) for value in (0x1950A86A20F9469CFC6C, 1001, machine)]
    parts += [pickled, pickle.dumps(list(storages), 2)]
    parts += [struct.pack("<q", len(values) // 4) + values for values in storages.values()]
    path.write_bytes(b"".join(parts))
    return path


def load(path: Path) -> object:
    with open_torch_file(path, CLASSES) as file:
        return file.root


def read_tensor(path: Path) -> torch.Tensor:
    """Return the values of a file that holds one tensor."""
    with open_torch_file(path, CLASSES) as file:
        assert isinstance(file.root, StoredTensor)
        ((_, values),) = read_tensors(file, {"w": file.root})
    return values


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as refused:
        load(path)
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    return message


# Code


class Calls:
    """An object whose pickle calls ``function`` when Python reads it."""

    def __init__(self, function: Callable[..., Any], *arguments: object) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, ...]]:
        return self.reduced


def armed(marker: Path) -> dict[str, tuple[object, str]]:
    """Return objects that create the file ``marker`` when Python unpickles them, and the global that is to be named.

    The global has its name from a pickle of protocol 2, which uses Python 2's names of modules.
    """
    touch, script = f"touch {marker}", f"open({str(marker)!r}, 'w').close()"
    nested = pickle.dumps(Calls(os.system, touch), 2)
    return {
        "system": (Calls(os.system, touch), "posix.system"),
        "exec": (Calls(exec, script), "__builtin__.exec"),
        "eval": (Calls(eval, script), "__builtin__.eval"),
        "popen": (Calls(subprocess.check_call, ["touch", str(marker)]), "commands.check_call"),
        "partial": (Calls(functools.partial(os.mkdir, str(marker))), "functools.partial"),
        "methodcaller": (Calls(operator.methodcaller("touch"), marker), "operator.methodcaller"),
        "nested pickle": (Calls(pickle.loads, nested), "pickle.loads"),
        "nested in a storage": (Calls(torch.storage._load_from_bytes, nested), "torch.storage._load_from_bytes"),
        "in a dictionary": ({"blocks": [Calls(os.system, touch)]}, "posix.system"),
        "in an ordered one": (OrderedDict(w=(1, Calls(os.system, touch))), "posix.system"),
        "as a key": ({Calls(os.system, touch): 1}, "posix.system"),
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", list(armed(Path("unused"))))
def test_code_is_named_and_not_run(tmp_path: Path, call: Call, layout: str, name: str) -> None:
    marker = tmp_path / "marker"
    payload, named = armed(marker)[name]
    pickled = pickle.dumps(payload, 2)
    with contextlib.suppress(RuntimeError):  # torch finds no tensors in the nested one, after it was run
        pickle.loads(pickled)
    assert marker.exists(), "the payload does nothing"
    marker.rmdir() if marker.is_dir() else marker.unlink()
    path = write(tmp_path / "encoder.pkl", pickled, layout)
    refused = call("import-dvae", path, path, tmp_path / "out").mistake()
    assert f"{path}: it names {named!r}, which is not on the allowlist; nothing was executed" in refused
    assert not marker.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_code_that_hides_in_a_module_of_the_release_is_not_run(tmp_path: Path, layout: str) -> None:
    marker = tmp_path / "marker"
    for place in ("device", "_forward_hooks", "_modules"):
        encoder, _ = released(blocks=1)
        encoder.__dict__[place] = {"blocks": encoder.blocks, "hook": Calls(os.system, f"touch {marker}")}
        path = save(encoder, tmp_path / "encoder.pkl", legacy=layout == "legacy")
        assert "'posix.system'" in refusal(path)
        assert not marker.exists()


ODD: dict[str, tuple[bytes, str]] = {
    "class called": (ROOT + b"(tR", "it calls 'dall_e.encoder.Encoder'"),
    "class called with text": (ROOT + text("os") + b"\x85R", "it calls 'dall_e.encoder.Encoder'"),
    "class made with arguments": (ROOT + text("os") + b"\x85\x81", "makes an object of 'dall_e.encoder.Encoder' with"),
    "function made": (b"ctorch._utils\n_rebuild_tensor_v2\n)\x81", "which is not a class on the allowlist"),
    "symbol called": (b"ctorch\nFloatStorage\n)R", "it calls 'torch.FloatStorage'"),
    "text called": (text("os.system") + b")R", "it calls 'os.system', which is not a function on the allowlist"),
    "arguments in a list": (b"ccollections\nOrderedDict\n]R", "with arguments that are not a tuple"),
    "ordered with items": (b"ccollections\nOrderedDict\n]\x85R", "'collections.OrderedDict' with arguments"),
    "set of something": (b"c__builtin__\nset\n(](K\x01etR", "a set that is not empty"),
    "device of a tuple": (b"ctorch\ndevice\n)\x85R", "'torch.device' with arguments that are not a device's"),
    "device of nothing": (b"ctorch\ndevice\n)R", "'torch.device' with arguments that are not a device's"),
    "tensor of text": (
        b"ctorch._utils\n_rebuild_tensor_v2\n" + text("x") + b"\x85R",
        "arguments that are not a tensor's",
    ),
    "parameter of text": (
        b"ctorch._utils\n_rebuild_parameter\n(" + text("x") + b"\x88}tR",
        "arguments that are not a parameter's",
    ),
    "class built": (ROOT + b"}" + text("forward") + b"Nsb", "it sets the attributes of 'dall_e.encoder.Encoder'"),
    "function built": (b"ctorch._utils\n_rebuild_parameter\n}b", "it sets the attributes of"),
    "text built": (text("x") + b"}b", "it sets the attributes of 'x'"),
    "built twice": (ROOT + b")\x81}b}b", "it sets the attributes of an object of"),
    "built with slots": (ROOT + b")\x81}}" + text("__class__") + b"Ns\x86b", "it sets the attributes of an object of"),
    "built with a list": (ROOT + b")\x81]b", "it sets the attributes of an object of"),
    "attribute of a class": (b"cdall_e.encoder\nEncoder.__init__\n", "it names 'dall_e.encoder.Encoder.__init__'"),
    "submodule": (b"cdall_e\nencoder.Encoder\n", "it names 'dall_e.encoder.Encoder', which is not on the allowlist"),
    "line breaks in a name": (b"cos\\n\nsystem\\x1b[2J\n", "it names 'os\\n.system\\x1b[2J'"),
    "another class of torch": (b"ctorch.nn.modules.linear\nLinear\n", "it names 'torch.nn.modules.linear.Linear'"),
    "another storage": (b"ctorch\nUntypedStorage\n", "it names 'torch.UntypedStorage'"),
    "STACK_GLOBAL": (b"\x8c\x02os\x8c\x06system\x93", "the pickle opcode"),
    "INST": (b"(ios\nsystem\n", "the pickle opcode INST"),
    "OBJ": (b"(cos\nsystem\no", "it names 'os.system'"),
    "NEWOBJ_EX": (ROOT + b")}\x92", "the pickle opcode NEWOBJ_EX"),
    "EXT1": (b"\x82\x01", "the pickle opcode EXT1"),
    "PERSID": (b"Pstorage\n", "the pickle opcode PERSID"),
    "BUFFER": (b"\x97", "the pickle opcode NEXT_BUFFER"),
    "id of text": (text("storage") + b"Q", "a persistent id that is neither"),
    "id of a number": (b"K\x00Q", "a persistent id that is neither"),
    "id with a call": (b"(" + text("storage") + b"cos\nsystem\n" + text("true") + b"\x85RtQ", "it names 'os.system'"),
    "id of another class": (b"(" + text("module") + text("os") + b"NNtQ", "a persistent id that is neither"),
    "id with a view": (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x04(K\x01K\x01ttQ",
        "a persistent id that is neither",
    ),
    "id of a negative length": (
        b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"J\xff\xff\xff\xfftQ",
        "a persistent id that is neither",
    ),
    "number as a key": (b"}K\x01Ns", "a dictionary with keys that are not text"),
    "tuple as a key": (b"})Ns", "a dictionary with keys that are not text"),
    "items of an object": (ROOT + b")\x81" + text("x") + b"Ns", "something other than a dictionary"),
    "append to a dictionary": (b"}Na", "something other than a list"),
    "odd items": (b"}(" + text("x") + b"u", "something other than a dictionary"),
    "nothing to pop": (b"0", "the pickle opcode POP"),
    "empty stack": (b"\x85", "pops from an empty stack"),
    "mark taken": (b"(\x85", "pops from an empty stack"),
    "mark remembered": (b"(q\x00", "pops from an empty stack"),
    "no mark": (b"Nt", "pops from an empty stack"),
    "no memo": (b"h\x07", "refers to a missing object"),
    "unknown opcode": (b"\xff", "damaged, or not a pickle"),
    "short text": (b"X\xff\xff\xff\xffabc", "damaged, or not a pickle"),
    "long text": (b"\x8d" + b"\xff" * 8, "damaged, or not a pickle"),
    "huge number": (b"I" + b"9" * 100_000 + b"\n", "damaged, or not a pickle"),
    "no text": (b"X\x02\x00\x00\x00\xff\xff", "damaged, or not a pickle"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", list(ODD))
def test_odd_pickles_are_refused(tmp_path: Path, layout: str, name: str) -> None:
    body, why = ODD[name]
    assert why in refusal(write(tmp_path / "encoder.pkl", b"\x80\x02" + body + b".", layout))


def test_other_protocols_and_pickles_without_an_end(tmp_path: Path) -> None:
    assert "pickle protocol 4" in refusal(write(tmp_path / "a.pkl", pickle.dumps({"a": 1}, 4), "zip"))
    assert "damaged, or not a pickle" in refusal(write(tmp_path / "a.pkl", b"\x80\x02N", "zip"))
    assert "damaged, or not a pickle" in refusal(write(tmp_path / "a.pkl", b"", "zip"))


# Sizes

DEEP = 150_000
"""Depth at which hashing, comparing or printing nested tuples ends the process or raises RecursionError."""


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b")" + b"\x85" * DEEP, None),  # a tuple in a tuple in a tuple ...
        (b"]" + b"]" * DEEP + b"a" * DEEP, None),
        (b"})" + b"\x85" * DEEP + b"Ns", "keys that are not text"),
        (b")" + b"\x85" * DEEP + b"Q", "a persistent id"),
        (b")" + b"\x85" * DEEP + b"}b", "it sets the attributes of a tuple"),
        (ROOT + b")" + b"\x85" * DEEP + b"\x81", "with arguments"),
        (b"c__builtin__\nset\n)" + b"\x85" * DEEP + b"R", "a set that is not empty"),
    ],
    ids=["tuples", "lists", "key", "id", "built", "arguments", "set"],
)
def test_deep_nesting_ends_well(tmp_path: Path, layout: str, body: bytes, why: str | None) -> None:
    path = write(tmp_path / "encoder.pkl", b"\x80\x02" + body + b".", layout)
    if why is not None:
        assert why in refusal(path)
    else:
        with pytest.raises(UserError, match=r"holds a (tuple|list) where dall_e\.encoder\.Encoder is needed"):
            read_released(path, path)


def test_more_objects_than_a_module_can_have(tmp_path: Path) -> None:
    path = write(tmp_path / "encoder.pkl", b"\x80\x02" + b"]" * MAX_OPCODES + b".", "zip")
    assert f"more than {MAX_OPCODES} opcodes" in refusal(path)


def test_an_object_that_holds_itself(tmp_path: Path) -> None:
    body = ROOT + b")\x81q\x00}" + text("_modules") + b"}" + text("blocks") + b"h\x00ss" + b"b."
    root = load(write(tmp_path / "encoder.pkl", b"\x80\x02" + body, "zip"))
    assert isinstance(root, Instance)
    assert root.state is not None
    modules = root.state["_modules"]
    assert isinstance(modules, dict)
    assert modules["blocks"] is root


def tensor(numel: int, offset: int, shape: list[int], stride: list[int], key: str = "0") -> bytes:
    sides, steps = (b"(" + b"".join(map(number, values)) + b"t" for values in (shape, stride))
    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + number(numel) + b"tQ"
    return b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + sides + steps + b"\x89}tR."


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_tensor_within_its_storage_is_read(tmp_path: Path, layout: str) -> None:
    path = write(tmp_path / "t.pkl", tensor(4, 1, [1, 2], [7, 2]), layout)
    values = read_tensor(path)
    assert values.tolist() == [[2.0, 4.0]]
    assert values.dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "made",
    [
        tensor(4, 0, [5], [1]),
        tensor(4, 3, [2], [1]),
        tensor(4, -1, [2], [1]),
        tensor(4, 0, [-2], [1]),
        tensor(4, 3, [2], [-1]),
        tensor(4, 0, [0], [1]),
        tensor(4, 0, [2, 2], [1]),
        tensor(4, 0, [1 << 40], [0]),
        tensor(4, 0, [3, 3], [1, 0]),
        tensor(0, 0, [], []),
        tensor(4, 0, [1] * 9, [1] * 9),
        tensor(4, 1 << 62, [1], [1]),
        tensor(4, 0, [2], [1 << 62]),
    ],
)
def test_a_tensor_beyond_its_storage_is_refused(tmp_path: Path, layout: str, made: bytes) -> None:
    assert "it has a tensor" in refusal(write(tmp_path / "t.pkl", made, layout))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("numel", "key"), [(1 << 62, "0"), (1 << 34, "0"), (5, "0"), (3, "0"), (4, "1"), (4, "../data.pkl")]
)
def test_a_storage_that_the_file_does_not_hold(tmp_path: Path, layout: str, numel: int, key: str) -> None:
    path = write(tmp_path / "t.pkl", tensor(numel, 0, [2], [1], key), layout)
    with pytest.raises(UserError, match=r"damaged|missing|longer"):
        read_tensor(path)


def test_a_length_beyond_the_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.pkl", tensor(4, 0, [2], [1]), "legacy", {})
    with path.open("ab") as file:
        file.seek(-len(pickle.dumps([], 2)), io.SEEK_END)
        file.truncate()
        file.write(pickle.dumps(["0"], 2) + struct.pack("<q", 1 << 61) + FLOATS)
    assert "cut short" in refusal(path)


def test_compressed_records_are_not_unpacked(tmp_path: Path) -> None:
    for name, body in (("data.pkl", b"\x80\x02N."), ("data/0", bytes(1 << 20))):
        path = tmp_path / "bomb.pkl"
        with zipfile.ZipFile(path, "w") as archive:
            records = {"data.pkl": tensor(1 << 18, 0, [2], [1]), "data/0": bytes(1 << 20), name: body}
            for record, data in records.items():
                how = zipfile.ZIP_DEFLATED if record == name else zipfile.ZIP_STORED
                archive.writestr(f"archive/{record}", data, how)
        with pytest.raises(UserError, match=f"its record '{name}' is compressed"):
            read_tensor(path)


def test_values_that_were_changed_are_noticed(tmp_path: Path) -> None:
    path = write(tmp_path / "t.pkl", tensor(4, 0, [2], [1]), "zip")
    data = path.read_bytes()
    path.write_bytes(data.replace(FLOATS, FLOATS[::-1]))
    with pytest.raises(UserError, match="damaged"):
        read_tensor(path)


def test_a_hostile_file_takes_little_memory(tmp_path: Path) -> None:
    """Read hostile files in a process limited to half a gigabyte beyond the libraries' memory."""
    paths = [write(tmp_path / f"{layout}.pkl", tensor(1 << 40, 0, [1 << 38], [1]), layout) for layout in LAYOUTS]
    paths.append(write(tmp_path / "text.pkl", b"\x80\x02X\xff\xff\xff\xffabc.", "legacy"))
    paths.append(write(tmp_path / "longer.pkl", b"\x80\x02\x8d\x00\x00\x00\x00\xff\x00\x00\x00abc.", "legacy"))
    program = f"""
import resource, sys
from dalle_cli.dvae.openai import CLASSES
from dalle_cli.dvae.torch_file import open_torch_file, read_tensors
from dalle_cli.errors import UserError
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 29), used + (1 << 29)))
for path in {[str(path) for path in paths]!r}:
    try:
        from pathlib import Path
        with open_torch_file(Path(path), CLASSES) as file:
            list(read_tensors(file, {{"w": file.root}}))
    except UserError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(paths)


# Files of other kinds


def test_other_files_are_named_for_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.pkl"
    path.write_bytes(b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>")
    assert "damaged, or not a pickle" in refusal(path)
    path.write_bytes(pickle.dumps({"a": 1}, 2))
    assert "not a file of torch.save" in refusal(path)
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    assert "a damaged zip archive" in refusal(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "nothing")
    assert "not of torch.save" in refusal(path)
    scripted = tmp_path / "script.pkl"
    with zipfile.ZipFile(scripted, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        archive.writestr("archive/constants.pkl", b"\x80\x02).")
    assert "TorchScript" in refusal(scripted)
    swapped = tmp_path / "swapped.pkl"
    with zipfile.ZipFile(swapped, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02N.")
        archive.writestr("archive/byteorder", b"big")
    assert "little-endian" in refusal(swapped)


# Plain data


PLAIN = Allowlist(frozenset(), {}, frozenset(), lambda saved: saved)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 500), 1 << 500) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text(), inner),
    max_leaves=30,
)


@given(VALUES)
def test_plain_values_are_those_that_python_reads(value: object) -> None:
    stream = io.BytesIO(pickle.dumps(value, 2) + b"behind")
    assert repr(read_pickle(stream, PLAIN)) == repr(value)
    assert stream.read() == b"behind"


def test_a_name_is_only_a_name() -> None:
    allowlist = Allowlist(frozenset({"os Thing"}), {}, frozenset({"os system"}), lambda saved: saved)
    assert read_pickle(io.BytesIO(b"\x80\x02cos\nsystem\n."), allowlist) == Symbol("os system")
    made = read_pickle(io.BytesIO(b"\x80\x02cos\nThing\n)\x81}X\x01\x00\x00\x00aK\x05sb."), allowlist)
    assert isinstance(made, Instance)
    assert (made.kind, made.state) == ("os Thing", {"a": 5})
    with pytest.raises(BadPickle, match=r"'os\.system'"):
        read_pickle(io.BytesIO(b"\x80\x02cos\nsystem\n."), PLAIN)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    folder = tmp_path_factory.mktemp("whole")
    encoder, decoder = released(n_hid=4, n_init=2, blocks=1, vocab=2)
    return {
        layout: (
            save(encoder, folder / f"encoder-{layout}.pkl", legacy=layout == "legacy"),
            save(decoder, folder / f"decoder-{layout}.pkl", legacy=layout == "legacy"),
        )
        for layout in LAYOUTS
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_of_any_kind_is_one_line(
    whole: dict[str, tuple[Path, Path]], tmp_path: Path, layout: str, data: st.DataObject
) -> None:
    encoder, decoder = whole[layout]
    changed = bytearray(encoder.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Half of the positions are in the first part, where a small file has its pickle.
        place = data.draw(st.integers(0, 8000) | st.integers(0, len(changed) - 1))
        how = data.draw(st.sampled_from(["set", "cut", "drop", "double"]))
        if how == "set":
            changed[min(place, len(changed) - 1)] = data.draw(st.integers(0, 255))
        elif how == "cut":
            del changed[max(place, 1) :]
        elif how == "drop":
            del changed[place : place + data.draw(st.integers(1, 40))]
        else:
            changed[place:place] = changed[place : place + data.draw(st.integers(1, 40))]
        if not changed:
            changed = bytearray(b"\x80")
    path = tmp_path / "changed.pkl"
    path.write_bytes(changed)
    try:
        released_dvae = read_released(path, decoder)
    except UserError as error:
        message = str(error)
    else:
        message = "read"
        assert released_dvae.settings.n_hid == 4
        assert all(value.isfinite().all() for value in released_dvae.weights.values())
    assert message.isprintable()
    assert "\n" not in message

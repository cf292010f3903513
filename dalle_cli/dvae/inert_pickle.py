"""A reader of pickles as inert data: nothing that a pickle names is imported, constructed or called.

It interprets the opcodes itself, and only those that ``torch.save`` writes by default (protocol 2). Objects become
their class's name and attributes. Functions are replaced by ours; a pickle that names any other is refused.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, Final

MAX_OPCODES = 1_000_000
"""Limit against memory bombs: one byte of opcode can make an object of 60 bytes. A dVAE has about 10,000 opcodes."""


class BadPickle(Exception):
    """A damaged pickle, or one with something that is not on the allowlist; the message is a short reason."""


@dataclass(frozen=True)
class Symbol:
    """A global that the pickle names, written "module name"."""

    name: str


@dataclass(eq=False)
class Instance:
    """An object of the class ``kind`` ("module name"), with its attributes as pickled, or None before they are set."""

    kind: str
    state: dict[str, object] | None = None


@dataclass(frozen=True)
class Allowlist:
    """Globals that a pickle may name, each written "module name", and what they become."""

    classes: frozenset[str]
    """Classes whose objects become an ``Instance``."""
    functions: Mapping[str, Callable[..., object]]
    """Replacements for functions. They check their arguments and raise BadPickle."""
    symbols: frozenset[str]
    """Globals that become a ``Symbol``."""
    persistent: Callable[[object], object]
    """Returns the object of a persistent id, or raises BadPickle."""


_MARK: Final = object()
_VALUES: Final = frozenset({"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"})
_TUPLES: Final = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def read_pickle(stream: IO[bytes], allowlist: Allowlist) -> object:
    """Read the pickle at the current position of ``stream``, up to its end.

    The result consists of None, bool, int, float, str, tuples, lists, dictionaries with str keys, ``Instance``,
    ``Symbol`` and results of the functions in ``allowlist``. It may contain itself and be nested to any depth.

    Raises:
        BadPickle: the pickle is damaged or too large, or has something that is not on the allowlist.
    """
    machine = _Machine(allowlist)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count == MAX_OPCODES:
                raise BadPickle(f"its pickle has more than {MAX_OPCODES} opcodes")
            machine.step(opcode.name, argument)
    except (ValueError, OverflowError) as error:  # from genops: unknown opcode, cut short, not UTF-8
        raise BadPickle(f"damaged, or not a pickle ({' '.join(str(error).split())[:100]})") from error
    return machine.result


class _Machine:
    def __init__(self, allowlist: Allowlist) -> None:
        self.allowlist = allowlist
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}
        self.result: object = None

    def step(self, name: str, argument: Any) -> None:
        match name:
            case "PROTO":
                if argument != 2:
                    raise BadPickle(f"pickle protocol {argument}; torch.save writes protocol 2")
            case "NONE":
                self.stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                self.stack.append(name == "NEWTRUE")
            case "EMPTY_LIST":
                self.stack.append([])
            case "EMPTY_DICT":
                self.stack.append({})
            case "MARK":
                self.stack.append(_MARK)
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.top()
            case "BINGET" | "LONG_BINGET":
                if argument not in self.memo:
                    raise BadPickle("damaged: its pickle refers to a missing object")
                self.stack.append(self.memo[argument])
            case "TUPLE":
                self.stack.append(tuple(self.pop_to_mark()))
            case "APPEND":
                self.extend([self.pop()])
            case "APPENDS":
                self.extend(self.pop_to_mark())
            case "SETITEM":
                value = self.pop()
                self.update([self.pop(), value])
            case "SETITEMS":
                self.update(self.pop_to_mark())
            case "GLOBAL":
                self.stack.append(self.symbol(argument))
            case "NEWOBJ":
                arguments = self.pop()
                self.stack.append(self.new(self.pop(), arguments))
            case "REDUCE":
                arguments = self.pop()
                self.stack.append(self.call(self.pop(), arguments))
            case "BUILD":
                self.build(self.pop())
            case "BINPERSID":
                self.stack.append(self.allowlist.persistent(self.pop()))
            case "STOP":
                self.result = self.pop()
            case _ if name in _VALUES:
                self.stack.append(argument)
            case _ if name in _TUPLES:
                items = [self.pop() for _ in range(_TUPLES[name])]
                self.stack.append(tuple(reversed(items)))
            case _:
                raise BadPickle(f"it has the pickle opcode {name}, which torch.save does not write by default")

    def top(self) -> object:
        if not self.stack or self.stack[-1] is _MARK:
            raise BadPickle("damaged: its pickle pops from an empty stack")
        return self.stack[-1]

    def pop(self) -> object:
        self.top()
        return self.stack.pop()

    def pop_to_mark(self) -> list[object]:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                items = self.stack[place + 1 :]
                del self.stack[place:]
                return items
        raise BadPickle("damaged: its pickle pops from an empty stack")

    def extend(self, items: list[object]) -> None:
        target = self.top()
        if type(target) is not list:
            raise BadPickle("it appends to something other than a list")
        target.extend(items)

    def update(self, items: list[object]) -> None:
        target = self.top()
        if type(target) is not dict or len(items) % 2:
            raise BadPickle("it sets items of something other than a dictionary")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:  # hashing a deeply nested tuple overflows the C stack
                raise BadPickle("it has a dictionary with keys that are not text")
            target[key] = value

    def symbol(self, name: str) -> Symbol:
        allowed = self.allowlist
        if name not in allowed.classes and name not in allowed.functions and name not in allowed.symbols:
            raise BadPickle(f"it names {dotted(name)!r}, which is not on the allowlist; nothing was executed")
        return Symbol(name)

    def new(self, symbol: object, arguments: object) -> Instance:
        if not isinstance(symbol, Symbol) or symbol.name not in self.allowlist.classes:
            raise BadPickle(f"it makes an object of {shown(symbol)}, which is not a class on the allowlist")
        if type(arguments) is not tuple or arguments:
            raise BadPickle(f"it makes an object of {dotted(symbol.name)!r} with arguments")
        return Instance(symbol.name)

    def call(self, symbol: object, arguments: object) -> object:
        function = self.allowlist.functions.get(symbol.name) if isinstance(symbol, Symbol) else None
        if function is None:
            raise BadPickle(f"it calls {shown(symbol)}, which is not a function on the allowlist; nothing was executed")
        if type(arguments) is not tuple:
            raise BadPickle(f"it calls {shown(symbol)} with arguments that are not a tuple")
        return function(*arguments)

    def build(self, state: object) -> None:
        target = self.top()
        if not isinstance(target, Instance) or target.state is not None or type(state) is not dict:
            raise BadPickle(f"it sets the attributes of {shown(target)} in a way that torch.save does not")
        target.state = state


def dotted(name: str) -> str:
    """Return "module name" as Python writes it, module.name."""
    return name.replace(" ", ".")


def shown(value: object) -> str:
    """Describe a value of a pickle in one short line, safely for any depth of nesting."""
    if isinstance(value, Symbol):
        return repr(dotted(value.name))
    if isinstance(value, Instance):
        return f"an object of {dotted(value.kind)!r}"
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)[:80] if not isinstance(value, int) or abs(value) < 1 << 64 else "a huge number"
    return f"a {type(value).__name__}"

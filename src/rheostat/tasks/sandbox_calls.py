"""Tests that call the program's functions, in another process than the program's.

The tests' process asks over a socket for what the program defines, and calls it there. Only plain values (numbers,
strings, bytes, lists, tuples, dictionaries, sets, and None) come back, so that what an ``assert`` sees has no method,
no comparison and no built-in function of the program's. Everything else stays with the program and is a
:class:`Remote` to the tests: it can be passed back, called, iterated over, and its attributes can be read and set, but
it is equal to nothing and neither true nor false.
"""

import builtins
import importlib
import io
import pickle
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

_PLAIN = (type(None), bool, int, float, complex, str, bytes, bytearray, list, tuple, dict, set, frozenset)
_BUILT_IN = {kind.__name__: kind for kind in _PLAIN[1:]}


class _ProgramPickler(pickle.Pickler):
    """Plain values by value, subclasses of them as what they are subclasses of, everything else by number."""

    def __init__(self, file: io.BytesIO, kept: list[object]) -> None:
        super().__init__(file, protocol=5)
        self._kept = kept

    def persistent_id(self, value: Any) -> int | None:
        if isinstance(value, _PLAIN) or (isinstance(value, type) and value in _PLAIN):
            return None
        self._kept.append(value)
        return len(self._kept) - 1

    def reducer_override(self, value: Any) -> Any:
        for kind in _PLAIN[2:]:  # nothing is a subclass of NoneType or bool
            if isinstance(value, kind) and type(value) not in _PLAIN:
                return kind, (kind(value),)  # type: ignore[arg-type]
        return NotImplemented


class _ProgramUnpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, kept: list[object]) -> None:
        super().__init__(file)
        self._kept = kept

    def persistent_load(self, number: int) -> object:
        return self._kept[number]


def serve(namespace: dict[str, Any], requests: BinaryIO, replies: BinaryIO) -> None:
    """The program's side: do what the tests ask until they end."""
    kept: list[object] = []

    def name(name: str) -> object:
        try:
            return namespace[name]
        except KeyError:
            raise NameError(f"name {name!r} is not defined") from None

    def call(function: Callable[..., object], arguments: tuple[object, ...], named: dict[str, object]) -> object:
        return function(*arguments, **named)

    actions: dict[str, Callable[..., object]] = {"name": name, "call": call, "list": list}
    actions |= {"get": getattr, "set": setattr}
    while True:
        try:
            action, *arguments = _ProgramUnpickler(requests, kept).load()
        except EOFError:
            return
        answer = io.BytesIO()
        try:
            _ProgramPickler(answer, kept).dump((True, actions[action](*arguments)))
        except Exception as error:
            answer = io.BytesIO()
            _ProgramPickler(answer, kept).dump((False, (type(error).__name__, str(error))))
        replies.write(answer.getvalue())
        replies.flush()


class Program:
    """The tests' side of the connection."""

    def __init__(self, replies: BinaryIO, requests: BinaryIO) -> None:
        self._replies, self._requests = replies, requests

    def ask(self, action: str, *arguments: object) -> Any:
        request = io.BytesIO()
        _TestsPickler(request, protocol=5).dump((action, *arguments))
        self._requests.write(request.getvalue())
        self._requests.flush()
        fine, value = _TestsUnpickler(self._replies, self).load()
        if fine is True:
            return value
        kind, message = value
        known = getattr(builtins, kind, None)
        if not (isinstance(known, type) and issubclass(known, Exception)) or issubclass(known, StopIteration):
            known = RuntimeError  # StopIteration would end a loop of the tests as if all were well
        raise known(message)


class Remote:
    """Something that lives in the program's process."""

    __slots__ = ("_number", "_program")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, program: Program, number: int) -> None:
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: object, **named: object) -> Any:
        return self._program.ask("call", self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._program.ask("get", self, name)

    def __setattr__(self, name: str, value: object) -> None:
        self._program.ask("set", self, name, value)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._program.ask("list", self))

    def __eq__(self, other: object) -> bool:
        raise TypeError("the program returned an object that is no plain value and cannot be compared")

    def __ne__(self, other: object) -> bool:
        return self == other

    def __bool__(self) -> bool:
        raise TypeError("the program returned an object that is no plain value and is neither true nor false")


class _TestsPickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> int | None:
        return value._number if type(value) is Remote else None


class _TestsUnpickler(pickle.Unpickler):
    """Of what a pickle can name, the plain built-in types only."""

    def __init__(self, file: BinaryIO, program: Program) -> None:
        super().__init__(file)
        self._program = program

    def persistent_load(self, number: Any) -> Remote:
        return Remote(self._program, number)

    def find_class(self, module: str, name: str) -> type:
        if module == "builtins" and name in _BUILT_IN:
            return _BUILT_IN[name]
        raise pickle.UnpicklingError(f"{module}.{name} is no plain value")


class _Names(dict[str, Any]):
    """The global names of the tests: their own, the entry point, Python's and its library's, then the program's."""

    def __init__(self, program: Program, entry_point: str) -> None:
        super().__init__(__name__="__main__")
        self._program, self._entry_point = program, entry_point

    def __missing__(self, name: str) -> Any:
        if name == self._entry_point:
            return self._program.ask("name", name)
        if hasattr(builtins, name):
            raise KeyError(name)
        if name in sys.stdlib_module_names:
            return importlib.import_module(name)
        return self._program.ask("name", name)


def run_tests(tests: str, entry_point: str, program: Program) -> None:
    """Run the tests' text; what it raises is a test that failed."""
    exec(compile(tests, "<tests>", "exec"), _Names(program, entry_point))

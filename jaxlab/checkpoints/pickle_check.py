"""Whether a pickle of tensors asks for memory and time in proportion to its size, found before it is read."""

import pickletools
from typing import Any

from jaxlab.errors import UserError

MAX_WEIGHT = 250
"""Of a tuple: all that is in it, and in the tuples in it; a parameter's holds two results of calls."""
OF_TENSOR = 100
"""Weight of what a call makes, at most a tensor of 32 axes: its storage, shape and strides are 71 objects."""
_PUT, _GET = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), ("GET", "BINGET", "LONG_BINGET")
_LEAVES = (
    "NONE",
    "NEWTRUE",
    "NEWFALSE",
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "BINFLOAT",
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "EMPTY_TUPLE",
    "EMPTY_LIST",
    "EMPTY_DICT",
    "GLOBAL",
)
_TAKES = {
    "TUPLE1": 1,
    "TUPLE2": 2,
    "TUPLE3": 3,
    "REDUCE": 2,
    "BUILD": 2,
    "BINPERSID": 1,
    "STACK_GLOBAL": 2,
    "APPEND": 2,
    "SETITEM": 3,
}
"""Objects that an opcode takes from the stack, to put one back."""
_TAKES_TO_MARK = {"TUPLE": 0, "APPENDS": 1, "SETITEMS": 1}
"""The same, for those that take all down to the last mark, the mark, and so many below it."""


def check_pickle(description: bytes) -> None:
    """Follow what the opcodes do to the stack, with weights (see MAX_WEIGHT) in place of objects.

    A tuple of a tuple that is used twice, and so on, is small in a pickle, but as the key of a dict its hash
    takes time exponential in the depth. A slot of the memo takes memory for all slots before it.

    Raises:
      UserError: an opcode that tensors are not described with, a slot out of reach, a tuple that weighs more
        than MAX_WEIGHT.
      Exception: of any kind, if the pickle is damaged.
    """
    stack: list[int] = []
    marks: list[int] = []
    memo: dict[int, int] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(description):
        name = opcode.name
        if name in ("PROTO", "FRAME", "STOP"):
            continue
        if name == "MARK":
            marks.append(len(stack))
        elif name in _PUT:
            slot = len(memo) if argument is None else int(argument)
            if slot > max(255, len(description)):
                raise UserError("refused: it asks for more memory than its description can need")
            memo[slot] = stack[-1]
        elif name in _GET:
            stack.append(memo[int(argument)])
        elif name in _LEAVES:
            stack.append(1)
        elif name in _TAKES or name in _TAKES_TO_MARK:
            taken = _take(stack, marks, name)
            weight = OF_TENSOR if name == "REDUCE" else 1
            if name.startswith("TUPLE"):
                weight += sum(taken)
            if weight > MAX_WEIGHT:
                raise UserError("refused: it holds a tuple larger than the description of any tensor")
            stack.append(weight)
        else:
            raise UserError(f"refused: tensors are not described with {name}")


def _take(stack: list[int], marks: list[int], name: str) -> list[int]:
    """Remove what an opcode takes from the stack. Raises IndexError if there is less."""
    start = marks.pop() - _TAKES_TO_MARK[name] if name in _TAKES_TO_MARK else len(stack) - _TAKES[name]
    if start < 0:
        raise IndexError("the stack holds less than an opcode takes")
    taken = stack[start:]
    del stack[start:]
    return taken

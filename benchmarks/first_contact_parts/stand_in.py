"""jaxtyping where it is not installed: a GPU machine may have little more than jax."""

import importlib.util
import sys
import types
from typing import Any


class _Shaped:
    """Float[Array, "B T"] and its like: any array."""

    def __class_getitem__(cls, _: Any) -> Any:
        return Any


def put_in() -> bool:
    """Whether it was necessary."""
    if importlib.util.find_spec("jaxtyping") is not None:
        return False
    import jax

    module = types.ModuleType("jaxtyping")
    for name in (
        "Bool",
        "Float",
        "Int",
        "Integer",
        "Num",
        "Shaped",
        "Inexact",
        "Real",
        "UInt8",
        "Int32",
        "Key",
    ):
        setattr(module, name, _Shaped)
    module.Array = jax.Array  # type: ignore[attr-defined]
    module.PyTree = Any  # type: ignore[attr-defined]
    sys.modules["jaxtyping"] = module
    return True

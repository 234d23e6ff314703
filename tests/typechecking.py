"""Every call checks its annotations while tests run, by beartype; shapes across a signature by jaxtyping."""

import dataclasses
import functools
import inspect
import typing

import jaxtyping
from beartype import BeartypeConf, beartype

_with_shapes = jaxtyping.jaxtyped
_without = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))
"""Raises what jaxtyping raises."""


def check_types(packages: list[str]):
    """Of modules of these packages that are imported from now on, or in a `with` of what it returns."""
    jaxtyping.jaxtyped = _checked
    return jaxtyping.install_import_hook(packages, "beartype.beartype")


def _checked(*, typechecker):
    return functools.partial(_wrap, typechecker=typechecker)


def _wrap(function, *, typechecker):
    """What the import hook puts around a function or a class.

    jaxtyping binds each call's arguments anew and checks them twice, so that axes of one name agree. Where a
    signature names no shape that took a third of the suite's time for nothing.
    """
    if inspect.isclass(function):
        if dataclasses.is_dataclass(function) and "__init__" in vars(function):
            function.__init__ = _wrap(function.__init__, typechecker=typechecker)
        return function
    if inspect.isfunction(function) and not any(map(_names_a_shape, _annotations(function))):
        return _without(function)
    return _with_shapes(function, typechecker=typechecker)


def _annotations(function):
    return inspect.get_annotations(function).values()


def _names_a_shape(annotation) -> bool:
    """Whether it holds an array of jaxtyping's, or is a text, in which one may stand."""
    if isinstance(annotation, str | typing.ForwardRef | typing.TypeAliasType):
        return True
    if inspect.isclass(annotation) and issubclass(annotation, jaxtyping.AbstractArray):
        return True
    if type(annotation).__module__.startswith("jaxtyping") or annotation is jaxtyping.PyTree:
        return True
    return any(map(_names_a_shape, typing.get_args(annotation)))

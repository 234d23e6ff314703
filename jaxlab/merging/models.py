"""Several models of one architecture into one."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlab.checkpoints import Entry, LeafPath, entries, from_hf, to_hf, tree_of
from jaxlab.errors import UserError
from jaxlab.merging.account import Account, Line
from jaxlab.merging.arithmetic import Mode
from jaxlab.merging.operators import merge_tensors
from jaxlab.merging.randomness import tensor_key
from jaxlab.models import Params


def merge_models(
    method: str,
    models: Sequence[Params],
    *,
    base: Params | None = None,
    mode: Mode = "paper",
    seed: int = 0,
    family: str = "jaxlab",
    **parameters: Any,
) -> tuple[Params, Account]:
    """Every tensor of `models` merged by `merge_tensors`, and the account.

    Tensors have the names and shapes that they have in a folder of `family` (`ModelConfig.family`).

    Raises:
      UserError: trees that differ in names or shapes, and what `merge_tensors` refuses.
    """
    known = entries(models[0], family)
    named = {f"model {i}": model for i, model in enumerate(models)} | ({} if base is None else {"base": base})
    for name, other in named.items():
        _same_tensors(known, models[0], name, other, family)
    leaves: dict[LeafPath, Any] = {}
    for entry in known:
        one = functools.partial(_merge_one, method, mode, parameters)
        tensors = [to_hf(model, entry) for model in models]
        origin = None if base is None else to_hf(base, entry)
        keys = jnp.asarray(np.stack([tensor_key(seed, name) for name in entry.names]))
        merged = jax.jit(jax.vmap(one))(tensors, origin, keys)
        leaves |= from_hf(merged, entry, models[0])
    lines = [Line(name, e.pattern, "merged", tuple(named), method) for e in known for name in e.names]
    return tree_of(leaves), Account(tuple(lines), family)


def _merge_one(
    method: str, mode: Mode, parameters: dict[str, Any], tensors: list[Array], base: Array | None, key: Array
) -> Array:
    return merge_tensors(method, tensors, base=base, mode=mode, key=key, **parameters)


def _same_tensors(known: tuple[Entry, ...], first: Params, name: str, other: Params, family: str) -> None:
    want = {entry.pattern: (len(entry.names), *entry.shape(first)) for entry in known}
    have = {entry.pattern: (len(entry.names), *entry.shape(other)) for entry in entries(other, family)}
    wrong = sorted(pattern for pattern in want | have if want.get(pattern) != have.get(pattern))
    if wrong:
        first_shape, other_shape = (shapes.get(wrong[0], "absent") for shapes in (want, have))
        raise UserError(
            f"the models cannot be merged: {wrong[0]} is {first_shape} in model 0 and {other_shape} in {name}"
        )

"""What a search measures: exact match of answers, on batches of the project's data sources."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlab.data import DataConfig, make_source
from jaxlab.errors import UserError
from jaxlab.losses import exact_match
from jaxlab.merging.grid import Measure
from jaxlab.models import Batch, ModelConfig, Params, forward

Data = dict[str, list[Batch]]
"""By name of the data set: its batches, those of equal shapes stacked on a leading axis."""


def read_data(evaluate: Mapping[str, DataConfig], split: str, batch_size: int, batches: int) -> Data:
    """The batches of a held-out split of every data set. Raises UserError for a set without any."""
    data: Data = {}
    for name, config in evaluate.items():
        found = list(make_source(config).held_out_batches(batch_size, batches, split))
        if not found:
            raise UserError(f"{name}: the {split} split has no batch of {batch_size}; lower batch_size")
        data[name] = stack_batches(found)
    return data


def stack_batches(batches: Sequence[Mapping[str, Any]]) -> list[Batch]:
    """Batches of equal shapes on a new leading axis, one dict for each set of shapes."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for batch in batches:
        shapes = tuple(sorted((name, np.shape(value)) for name, value in batch.items()))
        groups.setdefault(shapes, []).append(batch)
    return [jax.tree.map(lambda *rows: jnp.asarray(np.stack(rows)), *group) for group in groups.values()]


@functools.cache
def exact_match_of(config: ModelConfig) -> Measure:
    """(parameters, data) -> the share of sequences, by data set, all of whose targets are the likeliest
    tokens.

    With the answer given and every target predicted from what stands before it, that is what greedy decoding
    would have answered.
    """

    def measure(params: Params, data: Data) -> dict[str, Float[Array, ""]]:
        def matches(batch: Batch) -> Array:
            return exact_match(forward(params, batch, config)[0], batch)

        found = {name: [jax.lax.map(matches, stack).reshape(-1) for stack in data[name]] for name in data}
        return {name: jnp.mean(jnp.concatenate(rows).astype(jnp.float32)) for name, rows in found.items()}

    return measure


def text_only(data: Data) -> Data:
    """The data sets without images."""
    return {name: stacks for name, stacks in data.items() if not any("images" in stack for stack in stacks)}

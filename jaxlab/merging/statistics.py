"""What operators with data need to know: measured on texts by passes of the models.

Everything has the name and the layout of the tensor that is merged, as the first model's checkpoint has it.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlab.checkpoints import Entry, OpenModel, to_hf
from jaxlab.errors import UserError
from jaxlab.losses import target_mask
from jaxlab.merging.merge_data import MergeData, read_texts
from jaxlab.merging.plan import MergePlan
from jaxlab.models import Batch, ModelConfig, Params, activations, cast_floats, forward

Statistics = Mapping[str, Any]
"""By the name of a tensor that is merged: what its operator takes."""

INPUTS = {
    "attention.query": ("attention_input", ("d",)),
    "attention.key": ("attention_input", ("d",)),
    "attention.value": ("attention_input", ("d",)),
    "attention.output": ("head_output", ("h", "k")),
    "mlp.gate": ("mlp_input", ("d",)),
    "mlp.up": ("mlp_input", ("d",)),
    "mlp.down": ("mlp_hidden", ("f",)),
    "head.table": ("final_hidden", ("d",)),
}
"""Of leaves that multiply activations: which, and what their axes are called in layouts."""


def text_batches(model: OpenModel, data: MergeData, path: Path) -> list[Batch]:
    """Batches {tokens, segment_ids}, int32[batch_size, length], of a model's own tokens; padding has segment
    0.

    Raises:
      UserError: texts without a target, tokens that the model does not have.
    """
    tokenizer, rows = model.tokenizer, []
    if tokenizer is None and model.config.family != "jaxlab":
        raise UserError(f"{model.path}: has no tokenizer to read texts with")
    for text in read_texts(path, data.batches * data.batch_size):
        ids = list(text.encode()) if tokenizer is None else tokenizer.encode(text).ids
        if len(ids) > 1:
            rows.append(ids[: data.length])
    if not rows:
        raise UserError(f"{path}: no text of two tokens or more")
    if (most := max(map(max, rows))) >= model.config.vocab_size:
        raise UserError(f"{path}: token {most} is beyond the {model.config.vocab_size} of {model.path}")
    width = max(map(len, rows))
    rows += [[]] * (-len(rows) % data.batch_size)
    tokens = np.zeros((len(rows), width), np.int32)
    segments = np.zeros_like(tokens)
    for i, ids in enumerate(rows):
        tokens[i, : len(ids)], segments[i, : len(ids)] = ids, 1
    cuts = range(0, len(rows), data.batch_size)
    return [
        {"tokens": tokens[i : i + data.batch_size], "segment_ids": segments[i : i + data.batch_size]}
        for i in cuts
    ]


@functools.partial(jax.jit, static_argnames=("config", "squared"))
def _gradient_sums(
    params: Params, batch: Batch, key: Array, config: ModelConfig, squared: bool
) -> tuple[Params, Float[Array, ""]]:
    """Over the texts of a batch: squares of the gradient of log p(y | x), y drawn from p, or absolute values
    of that of the loss; and how many texts there are.
    """

    def one(row: Batch, key: Array) -> Params:
        row = jax.tree.map(lambda x: x[None], row)
        mask = target_mask(row)

        def log_likelihood(params: Params) -> Float[Array, ""]:
            log_p = jax.nn.log_softmax(forward(params, row, config)[0][:, :-1], axis=-1)
            drawn = jax.random.categorical(key, jax.lax.stop_gradient(log_p))
            y = drawn if squared else row["tokens"][:, 1:]
            return jnp.sum(jnp.take_along_axis(log_p, y[..., None], axis=-1)[..., 0], where=mask)

        gradient = jax.grad(log_likelihood)(params)
        return jax.tree.map(jnp.square if squared else jnp.abs, gradient)

    def add(total: Params, row: tuple[Batch, Array]) -> tuple[Params, None]:
        return jax.tree.map(jnp.add, total, one(*row)), None

    keys = jax.random.split(key, batch["tokens"].shape[0])
    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), (batch, keys))
    real = jnp.any(target_mask(batch), axis=1)
    return total, jnp.sum(real, dtype=jnp.float32)


def gradient_statistics(
    params: Params, config: ModelConfig, batches: Sequence[Batch], *, squared: bool, seed: int = 0
) -> Params:
    """The mean over texts of what `_gradient_sums` adds up, float32: with squares the diagonal of the Fisher
    information (arXiv 2111.09832, eq. 2).
    """
    params, total, count = cast_floats(params, jnp.float32), None, 0.0
    for i, batch in enumerate(batches):
        key = jax.random.fold_in(jax.random.key(seed), i)
        found, texts = _gradient_sums(params, batch, key, config, squared)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
        count += float(texts)
    return jax.tree.map(lambda x: x / max(count, 1.0), total)


def input_of(entry: Entry) -> str | None:
    """The activation that a tensor multiplies, if its rows are its outputs; see INPUTS."""
    name, axes = INPUTS.get(".".join(entry.path[-2:]), (None, ()))
    return name if entry.layout.theirs[-1] == axes else None


def gram_matrices(
    params: Params,
    config: ModelConfig,
    batches: Sequence[Batch],
    known: Sequence[Entry],
    layers: Sequence[int] | None = None,
) -> dict[str, Float[np.ndarray, "in in"]]:
    """X^T X of the inputs X [tokens, in] of every tensor that multiplies activations, float32, a mean over
    tokens (arXiv 2212.09849).

    Args:
      known: whose inputs.
      layers: only of these layers, and of nothing outside.
    """
    wanted = {entry: name for entry in known if (name := input_of(entry)) is not None}
    names = tuple(dict.fromkeys(n for n in wanted.values() if layers is None or n != "final_hidden"))
    sums: dict[str, Any] = {}
    count = 0.0
    for batch in batches:
        found = activations(params, batch, config, names, layers=layers)
        real = jnp.asarray(batch["segment_ids"] > 0)
        count += float(jnp.sum(real))
        for name, x in found.items():
            gram = _gram(x, real, layered=name != "final_hidden")
            sums[name] = gram if name not in sums else sums[name] + gram
    grams = {name: np.asarray(total / max(count, 1.0)) for name, total in sums.items()}
    result: dict[str, Any] = {}
    for entry, name in wanted.items():
        for tensor, layer in zip(entry.names, entry.layers, strict=True):
            if name == "final_hidden":
                result |= {tensor: grams[name]} if layers is None else {}
            elif layer is not None and (layers is None or layer in layers):
                result[tensor] = grams[name][layer if layers is None else list(layers).index(layer)]
    return result


@functools.partial(jax.jit, static_argnames="layered")
def _gram(x: Array, real: Array, layered: bool) -> Array:
    x = x.reshape(*x.shape[: 3 if layered else 2], -1).astype(jnp.float32)
    x = x * real.astype(jnp.float32).reshape(*(1,) * (x.ndim - 3), *real.shape, 1)
    flat = x.reshape(*x.shape[: 1 if layered else 0], -1, x.shape[-1])
    return jnp.einsum("...ti,...tj->...ij", flat, flat, precision=jax.lax.Precision.HIGHEST)


def by_name(params: Params, known: Sequence[Entry]) -> dict[str, np.ndarray]:
    """The tensors of a tree by name, as a checkpoint has them."""
    found: dict[str, Any] = {}
    for entry in known:
        stacked = np.asarray(to_hf(params, entry))
        found |= dict(zip(entry.names, stacked, strict=True))
    return found


def of_tensors(plan: MergePlan, each: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """For every tensor that is merged what its models have, only of the rows that are merged; None: nothing.

    Args:
      each: of each model, without the base, by the tensor's name.
    """
    result = {}
    for tensor in plan.tensors:
        if tensor.merging is None:
            continue
        own: list[Any] = [found.get(tensor.name) for found in each]
        rows = tensor.common_rows
        if rows is not None:
            elementwise = [x is not None and x.shape[:1] == (rows.sizes[i],) for i, x in enumerate(own)]
            own = [x[rows.index(i)] if elementwise[i] else x for i, x in enumerate(own)]
        result[tensor.name] = own
    return result

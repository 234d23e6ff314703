"""Retrofit: a dense model's parameters as those of the same model with Native Sparse Attention.

Every branch gets the dense keys and values, compression is their exact mean, and the gates let selection pass
almost alone. So a query whose chosen blocks hold what it attends to gets what the dense model gives it, up to
the gates of the other two branches; how much they hold is measured by `attention_coverage` (coverage.py).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from jaxlab.errors import ConfigError
from jaxlab.models import (
    BRANCHES,
    ModelConfig,
    NSAConfig,
    Params,
    RopeConfig,
    ViTConfig,
    abstract_params,
    language_model,
    linear_mean_compressor,
    mean_compressor,
)

GATE = 0.05
"""Of compression and of the window: small beside selection's 0.9, and far from where a sigmoid is flat."""


def retrofit(
    params: Params,
    config: ModelConfig,
    nsa: NSAConfig,
    *,
    key: Key[Array, ""] | None = None,
    gate: float = GATE,
) -> tuple[Params, ModelConfig]:
    """The parameters and the config of the NSA model that begins as the dense one.

    Keys, values and their biases are copied into the three branches (with `shared_kv` they stay as they are);
    everything else stays as it is, and what is new takes the dtype of the keys. An indexer is drawn; train it
    first (`selector_stage: warm_up`). An auxiliary selector is drawn too. What compresses gives the mean of
    its block; in an MLP silu(x) - silu(-x) = x, so two units for each dimension pass on the sum of
    x / block_len; the other units are drawn from `key` (None: key(0)) and do not reach the output before
    training. Gates do not depend on their input: `gate` for compression and window, 1 - 2 * gate for
    selection. With one branch and without gates (`gated: false`) nothing is weighed, and the model is the
    dense one where all blocks are read. Gates sum to one, so that an output is a weighted mean of the same
    values as the dense one, and where selection covers all that a query sees, it differs from it by at most
    4 * gate * max |v| in each component.

    Raises:
      ConfigError: `retrofitted` refuses the model.
      ValueError: `params` are not those of `config`, or `gate` is not between 0 and 0.5.

    Source of the branches: arXiv 2502.11089, sec. 3; the initialisation is ours.
    """
    new = retrofitted(config, nsa)
    if not 0 < gate < 0.5:
        raise ValueError(f"gate must lie between 0 and 0.5, is {gate}")
    _check(params, config)
    key = jax.random.key(0) if key is None else key
    changed = dict(params)
    for number, part in enumerate(("dense_layers", "layers")):
        if part in params:
            inner = jax.random.fold_in(key, number)
            attention = _branched(params[part]["attention"], new, inner, gate)
            changed[part] = {**params[part], "attention": attention}
    return changed, new


def retrofitted(config: ModelConfig, nsa: NSAConfig) -> ModelConfig:
    """`config` with NSA in place of full attention.

    Raises:
      ConfigError: naming the field, if the model has what NSA has not, or `nsa` cannot hold a mean.
    """
    if config.attention.kind == "nsa":
        raise ConfigError("the model has NSA already; a dense one can be retrofitted", key="attention")
    if set(config.kinds) != {"full"}:
        raise ConfigError(
            "the model has sliding layers; only full attention can be retrofitted",
            key="attention",
        )
    if isinstance(config.position, RopeConfig) and config.position.sections:
        raise ConfigError(
            "NSA decodes by positions of one coordinate, not by M-RoPE", key="position.sections"
        )
    if isinstance(config.position, RopeConfig) and config.position.scaling in ("dynamic", "longrope"):
        raise ConfigError(
            "wavelengths that change with the length differ between NSA's blocks and queries; take yarn",
            key="position.scaling",
        )
    if isinstance(config.vision, ViTConfig) and config.vision.together != "none":
        raise ConfigError("NSA is causal: no tokens see each other both ways", key="vision.together")
    dim = max(config.key_dim, config.value_dim)
    if nsa.compress_kind == "mlp" and nsa.compress_width < 2 * dim:
        raise ConfigError(
            f"{nsa.compress_width} units cannot pass on the mean of a block: that takes 2 for each of the "
            f"{dim} dimensions of a head; set at least {2 * dim}",
            key="attention.compress_width",
        )
    # The names of a family of Hugging Face have none for NSA's parameters.
    return dataclasses.replace(config, attention=nsa, family="jaxlab")


def _branched(params: Params, config: ModelConfig, key: Key[Array, ""], gate: float) -> Params:
    """Attention of stacked layers with three branches."""
    layers, dtype = params["key"].shape[0], params["key"].dtype
    of_key, of_value, of_gate = jax.random.split(key, 3)
    new = dict(params)
    for name in ("key", "value", "key_bias", "value_bias"):
        if name in params and not config.nsa.shared_kv:
            new[name] = jnp.repeat(params[name][:, None], len(BRANCHES), axis=1)
    if config.nsa.compress_kind != "mean":  # which has no parameters
        new["compress_key"] = _compressor(layers, config.key_dim, config.nsa, of_key, dtype)
        new["compress_value"] = _compressor(layers, config.value_dim, config.nsa, of_value, dtype)
    if config.nsa.gated:
        new["gate"] = _gate(layers, config, of_gate, gate, dtype)
    part = {"indexer": "indexer", "auxiliary": "selector"}.get(config.nsa.selector)
    if part is not None:
        shapes = abstract_params(config)["layers"]["attention"][part]
        new[part] = {
            name: _drawn(
                jax.random.fold_in(key, number),
                (layers, *shape.shape[1:]),
                config.initializer_range,
                dtype,
            )
            for number, (name, shape) in enumerate(sorted(shapes.items()))
        }
    return new


def _compressor(layers: int, dim: int, nsa: NSAConfig, key: Key[Array, ""], dtype: Any) -> Params:
    """The mean for each layer, in an MLP with units beside it that can learn but say nothing yet."""
    linear = nsa.compress_kind == "linear"
    mean = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf[None], (layers, *leaf.shape)),
        (linear_mean_compressor if linear else mean_compressor)(nsa.block_len, dim, dtype),
    )
    if linear:
        return mean
    spare = nsa.compress_width - 2 * dim
    drawn = _drawn(key, (layers, nsa.block_len, dim, spare), (nsa.block_len * dim) ** -0.5, dtype)
    return mean | {
        "hidden": jnp.concatenate([mean["hidden"], drawn], axis=-1),
        "hidden_bias": jnp.pad(mean["hidden_bias"], ((0, 0), (0, spare))),
        "output": jnp.pad(mean["output"], ((0, 0), (0, spare), (0, 0))),
    }


def _gate(layers: int, config: ModelConfig, key: Key[Array, ""], gate: float, dtype: Any) -> Params:
    """Gates that say the same to every token, by their biases alone."""
    width = config.nsa.gate_width or config.width
    logits = [math.log(g / (1 - g)) for g in (gate, 1 - 2 * gate, gate)]
    bias = jnp.broadcast_to(jnp.asarray(logits, dtype)[None, None], (layers, config.num_heads, len(BRANCHES)))
    params = {"output": jnp.zeros((layers, width, config.num_heads, len(BRANCHES)), dtype), "bias": bias}
    if config.nsa.gate_width:
        params["hidden"] = _drawn(key, (layers, config.width, width), config.initializer_range, dtype)
    return params


def _drawn(key: Key[Array, ""], shape: tuple[int, ...], scale: float, dtype: Any) -> Float[Array, "..."]:
    return (scale * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _check(params: Params, config: ModelConfig) -> None:
    have, want = (_shapes(language_model(p)) for p in (params, abstract_params(config.language)))
    for name in sorted(have.keys() | want.keys()):
        if have.get(name) != want.get(name):
            raise ValueError(
                f"the parameters do not fit the config: {name} is {have.get(name)}, not {want.get(name)}"
            )


def _shapes(params: Params) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf.shape for path, leaf in leaves}

"""From the features of a vision transformer to tokens of the decoder's width."""

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlab.errors import UserError
from jaxlab.models.config import ModelConfig
from jaxlab.models.layers import ACTIVATIONS, norm
from jaxlab.models.modules import Layer, Norm, Numbers, Params, normal, zeros


class Projector(nnx.Module):
    """A norm if there is one, one or two matrices, and what some families have besides."""

    def __init__(self, config: ModelConfig, numbers: Numbers):
        v, t, d = config.vision, config.vision.vit, config.width
        size = v.width * len(t.feature_layers) * (1 if t.connector == "merger" else t.shuffle**2)
        if t.connector_norm != "none":
            self.norm = Norm(_norm_config(config, size), size)
        if t.connector == "resampler":
            inward, outward = ("embed", "mlp"), ("mlp", "embed")
            self.gate = normal(numbers, (size, t.connector_width), inward, size**-0.5)
            self.up = normal(numbers, (size, t.connector_width), inward, size**-0.5)
            self.down = normal(numbers, (t.connector_width, d), outward, t.connector_width**-0.5)
            self.resampler = Resampler(config, numbers)
            return
        if t.connector == "merger":
            axes = ("channels", "pixels", "pixels", "embed")
            self.merger = normal(
                numbers, (size, t.shuffle, t.shuffle, size), axes, (size * t.shuffle**2) ** -0.5
            )
        if t.connector != "linear":
            self.hidden = normal(numbers, (size, d), ("embed", "mlp"), size**-0.5)
            size = d
        self.output = normal(numbers, (size, d), ("mlp", "embed"), size**-0.5)
        if t.connector_bias:
            if t.connector != "linear":
                self.hidden_bias = zeros((d,), ("mlp",))
            self.output_bias = zeros((d,), ("embed",))
        if t.has_newline:
            self.newline = normal(numbers, (d,), ("embed",), d**-0.5)


class Resampler(nnx.Module):
    """Learned queries and the layers in which they read features and themselves (Idefics2)."""

    def __init__(self, config: ModelConfig, numbers: Numbers):
        r, d = config.vision.vit.resampler, config.width
        self.latents = nnx.Param(jnp.ones((r.num_queries, d), jnp.float32), axes=("position", "embed"))
        layer_config = ModelConfig(
            vocab_size=1,
            width=d,
            num_layers=r.num_layers,
            num_heads=r.num_heads,
            position="none",
            num_kv_heads=r.num_kv_heads,
            head_dim=r.head_dim,
            mlp_width=4 * d,
        )
        self.layers = stacked(ResamplerLayer(layer_config, numbers), r.num_layers)
        self.norm = Norm(layer_config)


class ResamplerLayer(Layer):
    """Its queries are read after attention_norm, the features after context_norm."""

    def __init__(self, config: ModelConfig, numbers: Numbers):
        super().__init__(config, numbers)
        self.context_norm = Norm(config)


def stacked(layer: nnx.Module, count: int) -> Any:
    """Layers that begin alike, stacked: for models that are read and written, never trained from nothing."""
    state = nnx.to_pure_dict(nnx.state(layer, nnx.Param))
    axes = nnx.to_pure_dict(
        jax.tree.map(
            lambda p: _Axes(p.axes),
            nnx.state(layer, nnx.Param),
            is_leaf=lambda leaf: isinstance(leaf, nnx.Param),
        )
    )

    def over(value: Array, names: "_Axes") -> nnx.Param:
        return nnx.Param(jnp.broadcast_to(value, (count, *value.shape)), axes=("layers", *names))

    return _modules(jax.tree.map(over, state, axes))


class _Axes(tuple):
    """Names of axes: a leaf of a tree."""


def _modules(tree: Any) -> Any:
    return nnx.Dict({k: _modules(v) for k, v in tree.items()}) if isinstance(tree, dict) else tree


def _norm_config(config: ModelConfig, size: int) -> ModelConfig:
    t = config.vision.vit
    return ModelConfig(
        vocab_size=1,
        width=size,
        num_heads=1,
        position="none",
        norm_eps=t.connector_norm_eps,
        norm="layer" if t.connector_norm == "layer" else "rms",
        norm_offset=t.connector_norm_offset,
    )


def refuse(config: ModelConfig) -> NoReturn:
    """Raises UserError: a family whose parameters are known, and whose images are not run."""
    raise UserError(f"images of {config.family} models cannot be read yet; leave them out of the batch")


def connect(params: Params, features: Float[Array, "N F V"], config: ModelConfig) -> Float[Array, "N P D"]:
    """The tokens of N tiles. The square of features is read row by row."""
    t, x = config.vision.vit, features
    if t.pooled_side:
        x = _pool(x, t.pooled_side)
    if t.shuffle > 1:
        x = _shuffle(x, t.shuffle)
    if t.connector_norm != "none":
        x = norm(params["norm"], x, _norm_config(config, x.shape[-1]))

    def linear(name: str, y: Array) -> Array:
        y = y @ params[name].astype(y.dtype)
        return y + params[f"{name}_bias"].astype(y.dtype)[None, None] if t.connector_bias else y

    if t.connector == "mlp":
        x = ACTIVATIONS[t.connector_activation](linear("hidden", x))
    return linear("output", x)


def tokens_per_tile(config: ModelConfig) -> int:
    """Tokens that `connect` makes of one tile."""
    v, t = config.vision, config.vision.vit
    side = v.image_size // v.patch_size
    if t.resampler.num_queries:
        return t.resampler.num_queries
    if t.pooled_side:
        return _pooled(side, t.pooled_side) ** 2
    return t.features(side) // t.shuffle**2


def _pooled(side: int, wanted: int) -> int:
    return side // (side // wanted)


def _pool(x: Float[Array, "N F V"], wanted: int) -> Float[Array, "N P V"]:
    """Averages of squares of features; what does not fill a square at the end is dropped."""
    side = round(x.shape[1] ** 0.5)
    size, out = side // wanted, _pooled(side, wanted)
    x = x.reshape(-1, side, side, x.shape[-1])[:, : out * size, : out * size]
    x = x.reshape(-1, out, size, out, size, x.shape[-1])
    return jnp.mean(x, axis=(2, 4)).reshape(x.shape[0], out * out, x.shape[-1])


def _shuffle(x: Float[Array, "N F V"], size: int) -> Float[Array, "N P W"]:
    """Squares of features side by side: their rows, in them their columns, in them the width."""
    side = round(x.shape[1] ** 0.5)
    count, width = x.shape[0], x.shape[-1]
    x = x.reshape(count, side // size, size, side // size, size, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(count, (side // size) ** 2, size * size * width)

"""From the features of a vision transformer to tokens of the decoder's width."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from jaxlab.models.block import Block
from jaxlab.models.config import ModelConfig, NoPositions, ResamplerConfig, ViTConfig
from jaxlab.models.full_attention import softmax_attention
from jaxlab.models.initializer import Initializer, repeat
from jaxlab.models.layers import ACTIVATIONS, Norm, layer_norm, linear


class Projector(nnx.Module):
    """A norm if there is one, one or two matrices, and what some families have besides."""

    def __init__(self, config: ModelConfig, init: Initializer):
        v, d = config.vision_as(ViTConfig), config.width
        self.config, self.activation = v, config.activation
        size = v.width * len(v.feature_layers) * (1 if v.connector == "merger" else v.shuffle**2)
        norm = lambda kind: Norm((size,), kind, v.connector_norm_eps, init, offset=v.connector_norm_offset)
        self.norm = None if v.connector_norm == "none" else norm(v.connector_norm)
        if v.resampler is not None:
            inward, outward = ("embed", "mlp"), ("mlp", "embed")
            self.gate = init.normal((size, v.connector_width), inward, size**-0.5)
            self.up = init.normal((size, v.connector_width), inward, size**-0.5)
            self.down = init.normal((v.connector_width, d), outward, v.connector_width**-0.5)
            self.resampler = Resampler(v.resampler, config, init)
            return
        if v.connector == "merger":
            axes, squares = ("channels", "pixels", "pixels", "embed"), (v.shuffle, v.shuffle)
            self.merger = init.normal((size, *squares, size), axes, (size * v.shuffle**2) ** -0.5)
        two, bias = v.connector != "linear", v.connector_bias
        self.hidden = init.normal((size, d), ("embed", "mlp"), size**-0.5) if two else None
        self.hidden_bias = init.zeros((d,), ("mlp",)) if two and bias else None
        size = d if two else size
        self.output = init.normal((size, d), ("mlp", "embed"), size**-0.5)
        self.output_bias = init.zeros((d,), ("embed",)) if bias else None
        self.newline = init.normal((d,), ("embed",), d**-0.5) if v.has_newline else None

    def __call__(
        self,
        features: Float[Array, "N F V"],
        *,
        rows: int | None = None,
        visible: Bool[Array, "N F"] | None = None,
    ) -> Float[Array, "N P D"]:
        """The tokens of N tiles.

        Args:
          features: of one tile row by row.
          rows: how many of them; None: a tile is a square.
          visible: features that show something, for a resampler; None: all.
        """
        v, x = self.config, features
        if v.resampler is not None:
            gate = ACTIVATIONS[self.activation](linear(x, self.gate))
            return self.resampler(linear(gate * linear(x, self.up), self.down), visible)
        if v.pooled_side:
            x = _pool(x, v.pooled_side)
        if v.connector == "merger":  # the norm is of single patches
            x = self.norm(x) if self.norm is not None else x
            squares = _shuffle(x, v.shuffle, rows)
            squares = squares.reshape(*squares.shape[:2], v.shuffle, v.shuffle, x.shape[-1])
            x = jnp.einsum("npyxc,cyxv->npv", squares, self.merger.astype(x.dtype))
        else:
            x = _shuffle(x, v.shuffle, rows) if v.shuffle > 1 else x
            x = self.norm(x) if self.norm is not None else x
        if self.hidden is not None:
            x = ACTIVATIONS[v.connector_activation](linear(x, self.hidden, self.hidden_bias))
        return linear(x, self.output, self.output_bias)


class Resampler(nnx.Module):
    """Learned queries and the layers in which they read features and themselves (Idefics2)."""

    def __init__(self, resampler: ResamplerConfig, config: ModelConfig, init: Initializer):
        r, d = resampler, config.width
        self.latents = init.full((r.num_queries, d), ("position", "embed"), 1.0)
        layer_config = ModelConfig(
            vocab_size=1,
            width=d,
            num_layers=r.num_layers,
            num_heads=r.num_heads,
            position=NoPositions(),
            num_kv_heads=r.num_kv_heads,
            head_dim=r.head_dim,
            mlp_width=4 * d,
            norm_eps=r.norm_eps,
        )
        self.layers = repeat(ResamplerBlock(layer_config, init), r.num_layers)
        self.norm = layer_norm(layer_config, init)

    def __call__(
        self, features: Float[Array, "N F D"], visible: Bool[Array, "N F"] | None = None
    ) -> Float[Array, "N P D"]:
        """What the queries make of the features of each image, of those that are visible."""
        count, latents = features.shape[0], self.latents.astype(features.dtype)
        visible = jnp.ones(features.shape[:2], bool) if visible is None else visible
        mask = jnp.pad(visible, ((0, 0), (0, latents.shape[0])), constant_values=True)[:, None]
        graphdef, params = nnx.split(self.layers)
        x = jnp.broadcast_to(latents[None], (count, *latents.shape))

        def read(x: Array, params: Any) -> tuple[Array, None]:
            return nnx.merge(graphdef, params).read(x, features, mask), None

        return self.norm(jax.lax.scan(read, x, params)[0])


class ResamplerBlock(Block):
    """Its queries are read after attention_norm, the features after context_norm."""

    def __init__(self, config: ModelConfig, init: Initializer):
        super().__init__(config, init)
        self.scale = config.score_scale
        self.context_norm = layer_norm(config, init)

    def read(
        self, x: Float[Array, "N P D"], features: Float[Array, "N F D"], mask: Bool[Array, "N 1 S"]
    ) -> Float[Array, "N P D"]:
        """The queries after they have read features and themselves, in this order in the mask."""
        normed = self.attention_input(x)
        q = self.attention.project(normed)[0]
        _, k, v = self.attention.project(jnp.concatenate([self.context_norm(features), normed], axis=1))
        mask = jnp.broadcast_to(mask, (*x.shape[:2], k.shape[1]))
        x = x + self.attention.project_output(softmax_attention(q, k, v, mask, scale=self.scale))
        assert self.mlp is not None
        assert self.mlp_norm is not None
        return x + self.mlp(self.mlp_norm(x))


def tokens_per_tile(config: ModelConfig) -> int:
    """Tokens that a `Projector` makes of one tile."""
    v = config.vision_as(ViTConfig)
    side = v.image_size // v.patch_size
    if v.resampler is not None:
        return v.resampler.num_queries
    if v.pooled_side:
        return _pooled(side, v.pooled_side) ** 2
    return v.features(side) // v.shuffle**2


def _pooled(side: int, wanted: int) -> int:
    return side // (side // wanted)


def _pool(x: Float[Array, "N F V"], wanted: int) -> Float[Array, "N P V"]:
    """Averages of squares of features; what does not fill a square at the end is dropped."""
    side = round(x.shape[1] ** 0.5)
    size, out = side // wanted, _pooled(side, wanted)
    x = x.reshape(-1, side, side, x.shape[-1])[:, : out * size, : out * size]
    x = x.reshape(-1, out, size, out, size, x.shape[-1])
    return jnp.mean(x, axis=(2, 4)).reshape(x.shape[0], out * out, x.shape[-1])


def _shuffle(x: Float[Array, "N F V"], size: int, rows: int | None = None) -> Float[Array, "N P W"]:
    """Squares of features side by side: their rows, in them their columns, in them the width."""
    down = math.isqrt(x.shape[1]) if rows is None else rows
    count, across, width = x.shape[0], x.shape[1] // down, x.shape[-1]
    x = x.reshape(count, down // size, size, across // size, size, width).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(count, (down // size) * (across // size), size * size * width)

"""The vision towers of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, for images of any size.

Images are the patches of all images of the batch, one after the other: float [N, channels * frames * side *
side], those of one token (a square of merge x merge patches) next to each other; image_grid_thw
int[images, 3] has the frames, rows and columns of patches of each image. The layers are the decoder's own,
over one row of patches for each image, or for each window where layers see no more.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.models.block import Block
from jaxlab.models.config import ModelConfig, QwenVisionConfig, RopeConfig
from jaxlab.models.context import AttentionContext
from jaxlab.models.initializer import Initializer, repeat
from jaxlab.models.layers import ACTIVATIONS, Embedding, Norm, linear
from jaxlab.models.rotary import Rotary
from jaxlab.models.stack import apply_blocks, take_blocks
from jaxlab.models.taps import read_outputs
from jaxlab.models.vision import qwen_positions
from jaxlab.models.vision.encoder import Encoded, Encoder, on_host
from jaxlab.models.vision.patches import PatchEmbedding

EPSILON = 1e-6
"""In norms."""
THETA = 10000.0
"""Base of the wavelengths of rows and columns."""


def tower_config(config: ModelConfig) -> ModelConfig:
    """The vision transformer in the decoder's terms."""
    v = config.vision_as(QwenVisionConfig)
    return ModelConfig(
        vocab_size=1,
        width=v.width,
        num_layers=v.num_layers,
        num_heads=v.num_heads,
        mlp=v.mlp,
        mlp_width=v.mlp_width,
        activation=v.activation,
        norm=v.norm,
        norm_eps=EPSILON,
        position=RopeConfig(theta=THETA),
        attention_bias=True,
        mlp_bias=True,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        initializer_range=config.initializer_range,
    )


class QwenTower(nnx.Module):
    """The patch projection, the table of positions if there is one, and blocks over images or windows."""

    def __init__(self, config: ModelConfig, init: Initializer):
        v, tower = config.vision_as(QwenVisionConfig), tower_config(config)
        self.config = config
        shape, axes = (
            (v.channels, v.frames, v.patch_size, v.patch_size),
            ("channels", "frames", "pixels", "pixels"),
        )
        self.patch = PatchEmbedding(shape, axes, v.width, init, bias=v.patch_bias)
        rows, std = v.position_side**2, config.initializer_range
        self.position = Embedding(rows, v.width, "position", std, init) if rows else None
        self.layers = init.stack(lambda init: Block(tower, init), v.num_layers)

    def __call__(
        self, batch: Mapping[str, Any]
    ) -> tuple[Float[Array, "N V"], Float[Array, "deep N V"] | None]:
        """The last layer's output, and those that DeepStack reads, in the order of the layers."""
        x = self.patch(jnp.asarray(batch["images"]).astype(self.config.compute_dtype))
        if self.position is not None:
            near = self.position(jnp.asarray(batch["image_corners"]), x.dtype)
            x = x + jnp.einsum("ncd,nc->nd", near, jnp.asarray(batch["image_corner_weights"], x.dtype))
        v, tower = self.config.vision_as(QwenVisionConfig), tower_config(self.config)
        places, deep = jnp.asarray(batch["image_places"]), []
        whole = [not v.window or i in v.full_layers for i in range(tower.num_layers)]
        stops = [i for i in range(1, len(whole) + 1) if i == len(whole) or whole[i] != whole[i - 1]]
        for start, stop in zip([0, *stops], stops, strict=False):
            groups = "image" if whole[start] else "window"
            rows, filled, order = (
                jnp.asarray(batch[f"{groups}_{name}"]) for name in ("rows", "filled", "order")
            )
            rotary = _rotary(places[rows], tower.key_dim)
            context = AttentionContext(jnp.zeros_like(rows), filled, rotary=rotary, causal=False)
            blocks = take_blocks(self.layers, slice(start, stop))
            read = tuple(i - start for i in sorted(v.deep_layers) if start <= i < stop)
            done = apply_blocks([blocks], x[rows], context, tower, taps=read_outputs(tower, rows.shape, read))
            x = done.x.reshape(-1, x.shape[-1])[order]
            if read:
                outputs = done.activations["residual_post"]
                deep.append(outputs.reshape(len(read), -1, x.shape[-1])[:, order])
        return x, jnp.concatenate(deep) if deep else None


class Merger(nnx.Module):
    """A norm, and two matrices over the joined patches of a token; `lead` of them, stacked."""

    def __init__(self, config: ModelConfig, norm_size: int, init: Initializer, lead: int | None = None):
        v, d = config.vision_as(QwenVisionConfig), config.width
        size, norm = v.width * v.merge**2, Norm((norm_size,), v.norm, EPSILON, init)
        ahead: tuple[int, ...] = () if lead is None else (lead,)
        axes: tuple[str, ...] = () if lead is None else ("layers",)
        self.norm = norm if lead is None else repeat(norm, lead)
        self.hidden = init.normal((*ahead, size, size), (*axes, "embed", "mlp"), size**-0.5)
        self.hidden_bias = init.zeros((*ahead, size), (*axes, "mlp"))
        self.output = init.normal((*ahead, size, d), (*axes, "mlp", "embed"), size**-0.5)
        self.output_bias = init.zeros((*ahead, d), (*axes, "embed"))

    def __call__(self, joined: Float[Array, "P W"]) -> Float[Array, "P D"]:
        """Joined and normed patches to tokens."""
        hidden = ACTIVATIONS["gelu"](linear(joined, self.hidden, self.hidden_bias))
        return linear(hidden, self.output, self.output_bias)


class QwenProjector(Merger):
    """The merger of the last layer's output, and those of DeepStack, whose norms are over whole tokens."""

    def __init__(self, config: ModelConfig, init: Initializer):
        v = config.vision_as(QwenVisionConfig)
        super().__init__(config, v.width, init)
        if v.deep_layers:
            self.deep = Merger(config, v.width * v.merge**2, init, len(v.deep_layers))


class QwenEncoder(Encoder):
    vision: QwenTower
    projector: QwenProjector

    def __init__(self, config: ModelConfig, init: Initializer):
        self.config = config
        self.vision = QwenTower(config, init)
        self.projector = QwenProjector(config, init)

    def __call__(self, batch: Mapping[str, Any]) -> Encoded:
        """Tokens [P, D] of a prepared batch, in the order of the placeholders, and DeepStack's additions."""
        v = self.config.vision_as(QwenVisionConfig)
        x, outputs = self.vision(batch)
        joined = lambda y: y.reshape(*y.shape[:-2], -1, v.merge**2 * y.shape[-1])
        tokens = self.projector(joined(self.projector.norm(x)))
        if outputs is None:
            return Encoded(tokens)
        graphdef, params = nnx.split(self.projector.deep)

        def merge_normed(params: Any, y: Array) -> Array:
            merger = nnx.merge(graphdef, params)
            return merger(merger.norm(y))

        rank = np.argsort(np.argsort(v.deep_layers))
        deep = jax.vmap(merge_normed)(params, joined(outputs[jnp.asarray(rank)]))
        return Encoded(tokens, deep[jnp.asarray(np.argsort(v.deep_layers))])

    @staticmethod
    def prepare(batch: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        """What follows from the sizes of the images: a row for each of them, and the positions of the text.

        image_rows int32[images, most], the patches of each image; image_filled, 1 on them and 0 on what fills
        the row; image_order int32[N], where each patch went in it; window_rows, window_filled, window_order
        likewise, where there are windows; image_places int32[N, 2], the row and column of each patch in its
        image; image_corners int32[N, 4] and image_corner_weights float32[N, 4], the learned positions around
        it, where there are any; positions int32[B, T, 3] with M-RoPE, unless the batch has them.

        Raises:
          ValueError: sizes or tokens are traced, sizes that do not fit the patches or the placeholders,
            videos, or packed sequences.
        """
        if "image_rows" in batch:
            return {}
        v = config.vision_as(QwenVisionConfig)
        videos = [name for name in ("pixel_values_videos", "video_grid_thw") if name in batch]
        if videos:
            raise ValueError(
                f"the batch holds {videos[0]}: videos are not supported, take their frames as images"
            )
        grids = _grids(batch, config)
        rows, columns = qwen_positions.places(grids, v.merge)
        images = np.repeat(np.arange(len(grids), dtype=np.int32), grids[:, 0] * grids[:, 1])
        added: dict[str, Any] = {"image_places": np.stack([rows, columns], axis=-1)}
        groups = {"image": images}
        if v.window:
            side = v.window_side * v.merge
            groups["window"] = qwen_positions.windows(images, rows, columns, side)
        for name, numbers in groups.items():
            cut = qwen_positions.cut(numbers)
            added |= {f"{name}_rows": cut.rows, f"{name}_filled": cut.filled, f"{name}_order": cut.order}
        if v.position_side:
            near = qwen_positions.corners(grids[images], rows, columns, v.position_side)
            added["image_corners"], added["image_corner_weights"] = near
        positions = qwen_positions.of_text(
            on_host(batch, "tokens"),
            None if batch.get("segment_ids") is None else on_host(batch, "segment_ids"),
            grids // v.merge,
            v.image_token,
        )
        if isinstance(config.position, RopeConfig) and config.position.sections and "positions" not in batch:
            added["positions"] = positions
        return added


def _grids(batch: Mapping[str, Any], config: ModelConfig) -> Int[np.ndarray, "images 2"]:
    """Rows and columns of patches of each image, checked against the patches that there are."""
    merge, images = config.vision_as(QwenVisionConfig).merge, batch["images"]
    grids = on_host(batch, "image_grid_thw").reshape(-1, 3).astype(np.int64)
    if not len(grids):
        raise ValueError("image_grid_thw is empty; leave it and the images out of a batch of text")
    if (grids[:, 0] != 1).any():
        raise ValueError("image_grid_thw has an image of several frames: videos are not supported")
    if (grids < 1).any() or (grids[:, 1:] % merge).any():
        raise ValueError(f"image_grid_thw {grids.tolist()}: rows and columns must be multiples of {merge}")
    expected = (int(np.prod(grids, axis=1).sum()), _patch_size(config))
    if tuple(images.shape) != expected:
        raise ValueError(f"images are {tuple(images.shape)}, image_grid_thw asks for patches {expected}")
    return grids[:, 1:]


def _patch_size(config: ModelConfig) -> int:
    """Numbers in a patch."""
    v = config.vision_as(QwenVisionConfig)
    return v.channels * v.frames * v.patch_size**2


def _rotary(places: Int[Array, "groups most 2"], dim: int) -> Rotary:
    """The first half of a head's pairs turns by the row, the second by the column."""
    frequencies = 1.0 / THETA ** (np.arange(0, dim // 2, 2, dtype=np.float32) / np.float32(dim // 2))
    angles = places.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)[None, None, None]
    angles = angles.reshape(*places.shape[:2], dim // 2)
    return Rotary(jnp.cos(angles), jnp.sin(angles))

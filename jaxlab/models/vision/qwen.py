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

from jaxlab.models.config import ModelConfig
from jaxlab.models.layers import ACTIVATIONS, norm
from jaxlab.models.modules import Layer, Numbers, Params, normal, zeros
from jaxlab.models.rotary import Rotary
from jaxlab.models.stack import stack
from jaxlab.models.vision import qwen_positions
from jaxlab.models.vision.tower import Encoded, Tower
from jaxlab.models.where import Where

EPSILON = 1e-6
"""In norms."""
THETA = 10000.0
"""Base of the wavelengths of rows and columns."""


def tower_config(config: ModelConfig) -> ModelConfig:
    """The vision transformer in the decoder's terms."""
    v, q = config.vision, config.vision.qwen
    return ModelConfig(
        vocab_size=1,
        width=v.width,
        num_layers=v.num_layers,
        num_heads=v.num_heads,
        mlp=q.mlp,
        mlp_width=v.mlp_width,
        activation=q.activation,
        norm=q.norm,
        norm_eps=EPSILON,
        position="none",
        attention_bias=True,
        mlp_bias=True,
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        initializer_range=config.initializer_range,
    )


class VisionEdges(nnx.Module):
    """The patch projection and the table of positions, if there is one."""

    def __init__(self, config: ModelConfig, numbers: Numbers):
        v, q = config.vision, config.vision.qwen
        axes = ("channels", "frames", "pixels", "pixels", "embed")
        shape = (v.channels, q.frames, v.patch_size, v.patch_size, v.width)
        self.patch = nnx.Dict(table=normal(numbers, shape, axes, _patch_size(config) ** -0.5))
        if q.patch_bias:
            self.patch.bias = zeros((v.width,), ("embed",))
        if q.position_side:
            table = normal(
                numbers, (q.position_side**2, v.width), ("position", "embed"), config.initializer_range
            )
            self.position = nnx.Dict(table=table)


class Merger(nnx.Module):
    """A norm, and two matrices over the joined patches of a token; `lead` of them, stacked."""

    def __init__(self, config: ModelConfig, numbers: Numbers, norm_size: int, lead: tuple[int, ...] = ()):
        d, size = config.width, config.vision.width * config.vision.qwen.merge**2
        ahead = ("layers",) * len(lead)
        self.norm = nnx.Dict(scale=nnx.Param(jnp.ones((*lead, norm_size)), axes=(*ahead, "embed")))
        if config.vision.qwen.norm == "layer":
            self.norm.bias = zeros((*lead, norm_size), (*ahead, "embed"))
        self.hidden = normal(numbers, (*lead, size, size), (*ahead, "embed", "mlp"), size**-0.5)
        self.hidden_bias = zeros((*lead, size), (*ahead, "mlp"))
        self.output = normal(numbers, (*lead, size, d), (*ahead, "mlp", "embed"), size**-0.5)
        self.output_bias = zeros((*lead, d), (*ahead, "embed"))


class Projector(Merger):
    """The merger of the last layer's output, and those of DeepStack, whose norms are over whole tokens."""

    def __init__(self, config: ModelConfig, numbers: Numbers):
        v, q = config.vision, config.vision.qwen
        super().__init__(config, numbers, v.width)
        if q.deep_layers:
            self.deep = Merger(config, numbers, v.width * q.merge**2, (len(q.deep_layers),))


def layer(config: ModelConfig, numbers: Numbers) -> nnx.Module:
    return Layer(tower_config(config), numbers)


def encode(params: Params, batch: Mapping[str, Any], config: ModelConfig) -> Encoded:
    """Tokens [P, D] of a prepared batch, in the order of the placeholders, and DeepStack's additions."""
    q, tower, vision = config.vision.qwen, tower_config(config), params["vision"]
    x = jnp.asarray(batch["images"]).astype(config.compute_dtype)
    table = vision["patch"]["table"].astype(x.dtype)
    x = x @ table.reshape(-1, table.shape[-1])
    if q.patch_bias:
        x = x + vision["patch"]["bias"].astype(x.dtype)[None]
    if q.position_side:
        near = vision["position"]["table"].astype(x.dtype)[jnp.asarray(batch["image_corners"])]
        x = x + jnp.einsum("ncd,nc->nd", near, jnp.asarray(batch["image_corner_weights"], x.dtype))
    x, outputs = _layers(vision["layers"], x, batch, config)
    joined = lambda y: y.reshape(*y.shape[:-2], -1, q.merge**2 * y.shape[-1])
    projector = params["projector"]
    tokens = _merge(projector, joined(norm(projector["norm"], x, tower)))
    if outputs is None:
        return Encoded(tokens)
    read = joined(outputs[jnp.asarray(q.deep_layers)])
    deep = jax.vmap(lambda p, y: _merge(p, norm(p["norm"], y, tower)))(projector["deep"], read)
    return Encoded(tokens, deep[jnp.asarray(np.argsort(q.deep_layers))])


def _layers(
    params: Params, x: Float[Array, "N V"], batch: Mapping[str, Any], config: ModelConfig
) -> tuple[Float[Array, "N V"], Float[Array, "L N V"] | None]:
    """All layers: their last output and, if DeepStack reads any, every one's."""
    q, tower = config.vision.qwen, tower_config(config)
    places, outputs = jnp.asarray(batch["image_places"]), []
    whole = [not q.window or i in q.full_layers for i in range(tower.num_layers)]
    stops = [i for i in range(1, len(whole) + 1) if i == len(whole) or whole[i] != whole[i - 1]]
    for start, stop in zip([0, *stops], stops, strict=False):
        groups = "image" if whole[start] else "window"
        rows, filled, order = (jnp.asarray(batch[f"{groups}_{name}"]) for name in ("rows", "filled", "order"))
        where = Where(jnp.zeros_like(rows), filled, rotary=_turns(places[rows], tower.key_dim))
        part = jax.tree.map(lambda leaf, run=slice(start, stop): leaf[run], params)
        done = stack(part, x[rows], where, tower, causal=False, keep_outputs=bool(q.deep_layers))
        x = done.x.reshape(-1, x.shape[-1])[order]
        if done.outputs is not None:
            outputs.append(done.outputs.reshape(stop - start, -1, x.shape[-1])[:, order])
    return x, jnp.concatenate(outputs) if outputs else None


def _merge(params: Params, x: Float[Array, "P W"]) -> Float[Array, "P D"]:
    """Joined and normed patches to tokens."""
    linear = lambda name, y: y @ params[name].astype(y.dtype) + params[f"{name}_bias"].astype(y.dtype)[None]
    return linear("output", ACTIVATIONS["gelu"](linear("hidden", x)))


def _turns(places: Int[Array, "groups most 2"], dim: int) -> Rotary:
    """The first half of a head's pairs turns by the row, the second by the column."""
    frequencies = 1.0 / THETA ** (np.arange(0, dim // 2, 2, dtype=np.float32) / np.float32(dim // 2))
    angles = places.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)[None, None, None]
    angles = angles.reshape(*places.shape[:2], dim // 2)
    return Rotary(jnp.cos(angles), jnp.sin(angles))


def prepare(batch: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """What follows from the sizes of the images: a row for each of them, and the positions of the text.

    image_rows int32[images, most], the patches of each image; image_filled, 1 on them and 0 on what fills the
    row; image_order int32[N], where each patch went in it; window_rows, window_filled, window_order likewise,
    where there are windows; image_places int32[N, 2], the row and column of each patch in its image;
    image_corners int32[N, 4] and image_corner_weights float32[N, 4], the learned positions around it, where
    there are any; positions int32[B, T, 3] with M-RoPE, unless the batch has them.

    Raises:
      ValueError: sizes or tokens are traced, sizes that do not fit the patches or the placeholders, videos,
        or packed sequences.
    """
    if "image_rows" in batch:
        return {}
    v, q = config.vision, config.vision.qwen
    videos = [name for name in ("pixel_values_videos", "video_grid_thw") if name in batch]
    if videos:
        raise ValueError(
            f"the batch holds {videos[0]}: videos are not supported, take their frames as images"
        )
    grids = _grids(batch, config)
    rows, columns = qwen_positions.places(grids, q.merge)
    images = np.repeat(np.arange(len(grids), dtype=np.int32), grids[:, 0] * grids[:, 1])
    added: dict[str, Any] = {"image_places": np.stack([rows, columns], axis=-1)}
    groups = {"image": images}
    if q.window:
        side = q.window_side(v.patch_size) * q.merge
        groups["window"] = qwen_positions.windows(images, rows, columns, side)
    for name, numbers in groups.items():
        cut = qwen_positions.cut(numbers)
        added |= {f"{name}_rows": cut.rows, f"{name}_filled": cut.filled, f"{name}_order": cut.order}
    if q.position_side:
        near = qwen_positions.corners(grids[images], rows, columns, q.position_side)
        added["image_corners"], added["image_corner_weights"] = near
    positions = qwen_positions.of_text(
        _host(batch, "tokens"),
        None if batch.get("segment_ids") is None else _host(batch, "segment_ids"),
        grids // q.merge,
        v.image_token,
    )
    if config.rope.sections and "positions" not in batch:
        added["positions"] = positions
    return added


def _grids(batch: Mapping[str, Any], config: ModelConfig) -> Int[np.ndarray, "images 2"]:
    """Rows and columns of patches of each image, checked against the patches that there are."""
    merge, images = config.vision.qwen.merge, batch["images"]
    grids = _host(batch, "image_grid_thw").reshape(-1, 3).astype(np.int64)
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
    v = config.vision
    return v.channels * v.qwen.frames * v.patch_size**2


def _host(batch: Mapping[str, Any], name: str) -> np.ndarray:
    """A value of the batch on the host."""
    if name not in batch:
        raise ValueError(f"the batch lacks {name}, which the family's processor gives beside the images")
    if isinstance(batch[name], jax.core.Tracer):
        raise ValueError(f"{name} is traced; call prepare_batch outside of jit")
    return np.asarray(batch[name])


TOWER = Tower(edges=VisionEdges, layer=layer, projector=Projector, encode=encode, prepare=prepare)

"""Plain vision transformers of other people's models: CLIP, SigLIP, InternViT, Idefics's (`ViTConfig`).

The layers are the decoder's own. Images have the shape that the family's processor gives them: float
[N, channels, height, width]; cut to tiles [N, most tiles, channels, height, width], with the sizes of the
originals in image_sizes int[N, 2] (and batch_num_images int[B] where several images of a row are whole); or
for Idefics3 [B, most images, channels, height, width], images of nothing but zeros being none, with
pixel_attention_mask [B, most images, height, width] that is 1 on pixels of the image.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.models.config import ModelConfig
from jaxlab.models.layers import norm
from jaxlab.models.modules import Layer, Norm, Numbers, Params, normal, zeros
from jaxlab.models.stack import stack
from jaxlab.models.vision import tiles
from jaxlab.models.vision.connectors import Projector, connect, refuse, tokens_per_tile
from jaxlab.models.vision.tower import Encoded, Tower
from jaxlab.models.where import Where


def tower_config(config: ModelConfig) -> ModelConfig:
    """The vision transformer in the decoder's terms."""
    v, t = config.vision, config.vision.vit
    return ModelConfig(
        vocab_size=1,
        width=v.width,
        num_layers=v.num_layers,
        num_heads=v.num_heads,
        mlp=t.mlp,
        mlp_width=v.mlp_width,
        activation=t.activation,
        norm=t.norm,
        norm_eps=t.norm_eps,
        position="none",
        attention_bias=t.attention_bias,
        output_bias=t.output_bias,
        mlp_bias=t.mlp_bias,
        qk_norm="width" if t.qk_norm else "none",
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        initializer_range=config.initializer_range,
    )


class VisionEdges(nnx.Module):
    """What stands around the layers of the vision transformer."""

    def __init__(self, config: ModelConfig, numbers: Numbers):
        v, t, std = config.vision, config.vision.vit, config.initializer_range
        tower = tower_config(config)
        axes = ("channels", "pixels", "pixels", "embed")
        shape = (v.channels, v.patch_size, v.patch_size, v.width)
        self.patch = nnx.Dict(table=normal(numbers, shape, axes, (v.channels * v.patch_size**2) ** -0.5))
        if t.patch_bias:
            self.patch.bias = zeros((v.width,), ("embed",))
        if t.class_token:
            self.class_token = normal(numbers, (v.width,), ("embed",), std)
        if t.mask_token:
            self.mask_token = zeros((v.width,), ("embed",))
        if t.position in ("learned", "fractional"):
            rows = v.num_patches + int(t.class_token)
            self.position = nnx.Dict(table=normal(numbers, (rows, v.width), ("position", "embed"), std))
        if t.pre_norm:
            self.pre_norm = Norm(tower)
        if t.final_norm != "none":
            self.final_norm = Norm(dataclasses.replace(tower, norm="layer"))
        if t.pooling_head:
            self.head = PoolingHead(tower, numbers)


class PoolingHead(nnx.Module):
    """SigLIP's head for whole images: kept so that a checkpoint stays complete."""

    def __init__(self, tower: ModelConfig, numbers: Numbers):
        layer = Layer(dataclasses.replace(tower, attention_bias=True, qk_norm="none"), numbers)
        self.probe = normal(numbers, (tower.width,), ("embed",), tower.initializer_range)
        self.attention, self.norm, self.mlp = layer.attention, layer.mlp_norm, layer.mlp


class TowerLayer(Layer):
    """The decoder's layer with LayerScale, and with RMSNorm on queries and keys whatever the other norms."""

    def __init__(self, config: ModelConfig, numbers: Numbers):
        tower = tower_config(config)
        super().__init__(dataclasses.replace(tower, qk_norm="none"), numbers)
        if tower.qk_norm != "none":
            rms, size = dataclasses.replace(tower, norm="rms"), tower.num_heads * tower.key_dim
            self.attention.query_norm = Norm(rms, size, "head_dim")
            self.attention.key_norm = Norm(rms, size, "head_dim")
        if config.vision.vit.layer_scale:
            gain = jnp.full((tower.width,), 0.1, jnp.float32)
            self.attention_gain = nnx.Param(gain, axes=("embed",))
            self.mlp_gain = nnx.Param(gain, axes=("embed",))


def encode(params: Params, batch: Mapping[str, Any], config: ModelConfig) -> Encoded:
    """Image tokens [P, D] of a prepared batch, in the order of the placeholders."""
    images = jnp.asarray(batch["images"])
    images = images.reshape(-1, *images.shape[-3:])
    if "image_tiles" in batch:
        images = images[batch["image_tiles"]]
    features = _features(params["vision"], images, batch, config)
    tokens = connect(params["projector"], features, config)
    tokens = tokens.reshape(-1, tokens.shape[-1])
    if "image_rows" in batch:
        newline = params["projector"]["newline"].astype(tokens.dtype)
        table = jnp.concatenate([tokens, newline[None]])
        taken = table[batch["image_rows"]]
        if "image_weights" in batch:
            tokens = jnp.einsum("pkd,pk->pd", taken, jnp.asarray(batch["image_weights"], taken.dtype))
        else:
            tokens = taken[:, 0]
    return Encoded(tokens)


def _features(
    params: Params, images: Float[Array, "N C y x"], batch: Mapping[str, Any], config: ModelConfig
) -> Float[Array, "N F V"]:
    """The hidden states that the connector reads, without those of the class token if it is dropped."""
    t, tower = config.vision.vit, tower_config(config)
    x = _embed(params, images, batch.get("image_patch_positions"), config)
    if t.pre_norm:
        x = norm(params["pre_norm"], x, tower)
    visible = batch.get("image_patch_visible")
    where = Where(
        jnp.zeros(x.shape[:2], jnp.int32), visible=None if visible is None else jnp.asarray(visible)
    )
    states = [i % (tower.num_layers + 1) for i in t.feature_layers]
    last = max(states)
    read = [x]
    if last:
        layers = jax.tree.map(lambda leaf: leaf[:last], params["layers"])
        several = len(states) > 1
        done = stack(layers, x, where, tower, causal=False, keep_outputs=several)
        if several:
            assert done.outputs is not None
            read += list(done.outputs)
        else:
            read += [done.x] * last
    x = read[states[0]] if len(states) == 1 else jnp.concatenate([read[i] for i in states], axis=-1)
    if t.final_norm == "used":
        x = norm(params["final_norm"], x, tower)
    return x[:, 1:] if t.drop_first else x


def _embed(
    params: Params,
    images: Float[Array, "N C y x"],
    positions: Int[np.ndarray, "N F"] | Int[Array, "N F"] | None,
    config: ModelConfig,
) -> Float[Array, "N F V"]:
    """Patches row by row, after the class token if there is one, with their positions."""
    v, t = config.vision, config.vision.vit
    count, channels, height, width = images.shape
    if channels != v.channels or (t.position != "fractional" and (height, width) != (v.image_size,) * 2):
        raise ValueError(
            f"images are {images.shape[1:]}, the model takes {(v.channels, v.image_size, v.image_size)}"
        )
    size, down, across = v.patch_size, height // v.patch_size, width // v.patch_size
    x = images[:, :, : down * size, : across * size].astype(config.compute_dtype)
    x = x.reshape(count, channels, down, size, across, size).transpose(0, 2, 4, 1, 3, 5)
    table = params["patch"]["table"].astype(x.dtype)
    x = x.reshape(count, down * across, -1) @ table.reshape(-1, table.shape[-1])
    if t.patch_bias:
        x = x + params["patch"]["bias"].astype(x.dtype)[None, None]
    if t.class_token:
        first = params["class_token"].astype(x.dtype)[None, None]
        x = jnp.concatenate([jnp.broadcast_to(first, (count, 1, x.shape[-1])), x], axis=1)
    if t.position == "learned":
        x = x + params["position"]["table"].astype(x.dtype)[None]
    elif t.position == "fractional":
        x = x + params["position"]["table"].astype(x.dtype)[positions]
    return x


def prepare(batch: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """What encoding needs besides the images: which tiles there are, which features make which token.

    Also `together` where image tokens, or a prompt, see themselves both ways; a prompt is the tokens whose
    token_type_ids are 0, or all of them.

    Raises:
      ValueError: the text has more or fewer placeholders than the images have tokens, sizes of images do not
        fit the images, or they are traced.
      UserError: the family's images are not run.
    """
    t, added = config.vision.vit, dict[str, Any]()
    if t.connector in ("merger", "resampler"):
        refuse(config)
    tokens, images = batch["tokens"], batch["images"]
    if "pixel_values_videos" in batch:
        raise ValueError(
            "the batch holds pixel_values_videos: videos are not run, take their frames as images"
        )
    prepared = "image_tiles" in batch
    if t.grid and not prepared:
        added, made = _tiles(batch, config)
    elif t.position == "fractional" and not prepared:
        added = _patches(batch, config)
        made = added["image_patch_positions"].size // t.shuffle**2
    elif not prepared:
        made = int(np.prod(images.shape[:-3])) * tokens_per_tile(config)
    if not prepared and not isinstance(tokens, jax.core.Tracer):
        places = int(np.sum(np.asarray(tokens) == config.vision.image_token))
        if places != made:
            raise ValueError(f"the text has {places} placeholders, its images make {made} tokens")
    if t.together != "none" and "together" not in batch:
        added["together"] = _together(batch, config)
    return added


def _together(batch: Mapping[str, Any], config: ModelConfig) -> Any:
    """int32[B, T]: numbers of groups that see themselves whole, from 1 on; 0 elsewhere."""
    tokens = batch["tokens"]
    xp: Any = jnp if isinstance(tokens, jax.core.Tracer) else np
    if config.vision.vit.together == "prefix":
        return (xp.asarray(batch.get("token_type_ids", xp.zeros_like(tokens))) == 0).astype(np.int32)
    is_image = xp.asarray(tokens) == config.vision.image_token
    before = xp.pad(is_image, ((0, 0), (1, 0)))[:, :-1]
    return xp.where(is_image, xp.cumsum(is_image & ~before, axis=1), 0).astype(np.int32)


def _host(batch: Mapping[str, Any], name: str) -> np.ndarray:
    """A value of the batch on the host."""
    if name not in batch:
        raise ValueError(f"the batch lacks {name}, which the family's processor gives beside the images")
    if isinstance(batch[name], jax.core.Tracer):
        raise ValueError(f"{name} is traced; call prepare_batch outside of jit")
    return np.asarray(batch[name])


def _tiles(batch: Mapping[str, Any], config: ModelConfig) -> tuple[dict[str, Any], int]:
    """Tiles of images of varying size, and how many tokens they make."""
    v, t, images = config.vision, config.vision.vit, batch["images"]
    sizes = [(int(height), int(width)) for height, width in _host(batch, "image_sizes").reshape(-1, 2)]
    whole = [False] * len(sizes)
    if "batch_num_images" in batch:
        whole = [n > 1 for n in _host(batch, "batch_num_images").tolist() for _ in range(n)]
        if len(whole) != len(sizes):
            raise ValueError(f"batch_num_images counts {len(whole)} images, image_sizes has {len(sizes)}")
    counts = [
        1 if one else tiles.count_tiles(size, t.grid, v.image_size)
        for size, one in zip(sizes, whole, strict=True)
    ]
    if images.ndim == 5:
        most = images.shape[1]
        if images.shape[0] != len(sizes) or max(counts) > most:
            raise ValueError(f"images are {images.shape}, image_sizes ask for {counts} tiles")
        taken = np.concatenate([i * most + np.arange(count) for i, count in enumerate(counts)])
    else:
        if images.shape[0] != sum(counts):
            raise ValueError(f"images are {images.shape}, image_sizes ask for {counts} tiles")
        taken = np.arange(sum(counts))
    side = v.image_size // v.patch_size
    packed = tiles.pack(sizes, whole, grid=t.grid, tile=v.image_size, side=side, max_tiles=t.max_tiles)
    added = {"image_tiles": taken.astype(np.int32), "image_rows": packed.rows}
    if packed.weights is not None:
        added["image_weights"] = packed.weights
    return added, len(packed.rows)


def _patches(batch: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Images that are there, the patches of each that show something, and where in the whole they lie."""
    v = config.vision
    images = _host(batch, "images")
    images = images.reshape(-1, *images.shape[-3:])
    height, width = images.shape[-2:]
    down, across = height // v.patch_size, width // v.patch_size
    if down != across or down % v.vit.shuffle:
        raise ValueError(f"images are {images.shape[1:]}, the model takes squares of {v.vit.shuffle} patches")
    kept = np.flatnonzero(np.any(images != 0, axis=(1, 2, 3)))
    visible = np.ones((len(kept), down, across), bool)
    if "pixel_attention_mask" in batch:
        mask = _host(batch, "pixel_attention_mask").reshape(-1, height, width)[kept] != 0
        mask = mask[:, : down * v.patch_size, : across * v.patch_size]
        visible = mask.reshape(-1, down, v.patch_size, across, v.patch_size).any(axis=(2, 4))
    side = v.image_size // v.patch_size
    rows = _places(visible[:, :, 0].sum(axis=1), down, side)
    columns = _places(visible[:, 0, :].sum(axis=1), across, side)
    positions = np.where(visible, rows[:, :, None] * side + columns[:, None, :], 0)
    return {
        "image_tiles": kept.astype(np.int32),
        "image_patch_positions": positions.reshape(len(kept), -1).astype(np.int32),
        "image_patch_visible": visible.reshape(len(kept), -1),
    }


def _places(lengths: Int[np.ndarray, " N"], count: int, side: int) -> Int[np.ndarray, "N n"]:
    """Which of `side` equal stretches patch i of `lengths[n]` begins in; in float32, as models learned it.

    Where a patch begins on a bound, rounding decides. PyTorch's rounding depends on the machine: for 55 of
    3,159 pairs of sizes below 80 it differs, none of a model that there is.
    """
    bounds = (np.arange(1, side) / side).astype(np.float32)
    with np.errstate(divide="ignore"):
        step = np.float32(1) / lengths.astype(np.float32)
    starts = np.arange(count, dtype=np.float32)[None] * step[:, None]
    return np.searchsorted(bounds, np.minimum(starts, np.float32(1 - 1e-6)), side="right")


TOWER = Tower(edges=VisionEdges, layer=TowerLayer, projector=Projector, encode=encode, prepare=prepare)

"""Plain vision transformers of other people's models: CLIP, SigLIP, InternViT, Idefics's (`ViTConfig`).

The layers are the decoder's own. Images have the shape that the family's processor gives them: float
[N, channels, height, width]; cut to tiles [N, most tiles, channels, height, width], with the sizes of the
originals in image_sizes int[N, 2] (and batch_num_images int[B] where several images of a row are whole);
for Idefics 2 and 3 [B, most images, channels, height, width], images of nothing but zeros being none, with
pixel_attention_mask [B, most images, height, width] that is 1 on pixels of the image; or for Pixtral
[N, channels, most height, most width], with the size of each image in image_sizes int[N, 2].
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.models.block import Block
from jaxlab.models.config import ModelConfig, NoPositions, RopeConfig, ViTConfig
from jaxlab.models.context import AttentionContext
from jaxlab.models.initializer import Initializer
from jaxlab.models.layers import Embedding, Norm, layer_norm
from jaxlab.models.rotary import Rotary
from jaxlab.models.stack import apply_blocks, take_blocks
from jaxlab.models.taps import read_outputs
from jaxlab.models.vision import tiles
from jaxlab.models.vision.connectors import Projector, tokens_per_tile
from jaxlab.models.vision.encoder import Encoded, Encoder, on_host
from jaxlab.models.vision.patches import PatchEmbedding, cut_patches

THETA = 10000.0
"""Base of the wavelengths of rows and columns (Pixtral)."""


def tower_config(config: ModelConfig) -> ModelConfig:
    """The vision transformer in the decoder's terms."""
    v = config.vision_as(ViTConfig)
    return ModelConfig(
        vocab_size=1,
        width=v.width,
        num_layers=v.num_layers,
        num_heads=v.num_heads,
        mlp=v.mlp,
        mlp_width=v.mlp_width,
        activation=v.activation,
        norm=v.norm,
        norm_eps=v.norm_eps,
        position=RopeConfig(theta=THETA) if v.position == "rotary" else NoPositions(),
        attention_bias=v.attention_bias,
        output_bias=v.output_bias,
        mlp_bias=v.mlp_bias,
        qk_norm="width" if v.qk_norm else "none",
        compute_dtype=config.compute_dtype,
        remat=config.remat,
        initializer_range=config.initializer_range,
    )


class ViTTower(nnx.Module):
    """Patches with positions, after a class token if there is one; blocks that see the whole image."""

    def __init__(self, config: ModelConfig, init: Initializer):
        v, std = config.vision_as(ViTConfig), config.initializer_range
        tower = tower_config(config)
        self.config = config
        shape, axes = (v.channels, v.patch_size, v.patch_size), ("channels", "pixels", "pixels")
        self.patch = PatchEmbedding(shape, axes, v.width, init, bias=v.patch_bias)
        self.class_token = init.normal((v.width,), ("embed",), std) if v.class_token else None
        self.mask_token = init.zeros((v.width,), ("embed",)) if v.mask_token else None
        has_table, rows = v.position in ("learned", "fractional"), v.num_patches + int(v.class_token)
        self.position = Embedding(rows, v.width, "position", std, init) if has_table else None
        self.pre_norm = layer_norm(tower, init) if v.pre_norm else None
        has_final_norm = v.final_norm != "none"
        self.final_norm = Norm((v.width,), "layer", v.norm_eps, init) if has_final_norm else None
        self.head = PoolingHead(tower, init) if v.pooling_head else None
        self.layers = init.stack(lambda init: vit_block(config, init), v.num_layers)

    def __call__(self, images: Float[Array, "N C y x"], batch: Mapping[str, Any]) -> Float[Array, "N F V"]:
        """The hidden states that the connector reads, without those of the class token if it is dropped."""
        v, tower = self.config.vision_as(ViTConfig), tower_config(self.config)
        x = self.embed(images, batch.get("image_patch_positions"))
        if self.pre_norm is not None:
            x = self.pre_norm(x)
        visible = batch.get("image_patch_visible")
        rows = images.shape[-2] // v.patch_size
        context = AttentionContext(
            jnp.zeros(x.shape[:2], jnp.int32),
            causal=False,
            visible=None if visible is None else jnp.asarray(visible),
            rotary=_rotary(x.shape[0], rows, x.shape[1], tower.key_dim) if v.position == "rotary" else None,
        )
        states = [i % (tower.num_layers + 1) for i in v.feature_layers]
        last, several = max(states), len(states) > 1
        read = {0: x}
        if last:
            blocks = take_blocks(self.layers, slice(0, last))
            before = tuple(sorted({i - 1 for i in states if 0 < i < last}))
            done = apply_blocks([blocks], x, context, tower, taps=read_outputs(tower, x.shape[:2], before))
            read |= {i + 1: done.activations["residual_post"][at] for at, i in enumerate(before)}
            read[last] = done.x
        x = jnp.concatenate([read[i] for i in states], axis=-1) if several else read[states[0]]
        if self.final_norm is not None and v.final_norm == "used":
            x = self.final_norm(x)
        return x[:, 1:] if v.drop_first else x

    def embed(
        self,
        images: Float[Array, "N C y x"],
        positions: Int[np.ndarray, "N F"] | Int[Array, "N F"] | None,
    ) -> Float[Array, "N F V"]:
        """Patches row by row, after the class token if there is one, with their positions."""
        v = self.config.vision_as(ViTConfig)
        channels, height, width = images.shape[1:]
        square = v.position in ("learned", "none")
        if channels != v.channels or (square and (height, width) != (v.image_size,) * 2):
            raise ValueError(
                f"images are {images.shape[1:]}, the model takes {(v.channels, v.image_size, v.image_size)}"
            )
        x = self.patch(cut_patches(images, v.patch_size, "first").astype(self.config.compute_dtype))
        if self.class_token is not None:
            first = self.class_token.astype(x.dtype)[None, None]
            x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, x.shape[-1])), x], axis=1)
        if self.position is not None:
            table = self.position.table.astype(x.dtype)
            x = x + (table[None] if v.position == "learned" else table[positions])
        return x


class PoolingHead(nnx.Module):
    """SigLIP's head for whole images: kept so that a checkpoint stays complete."""

    def __init__(self, tower: ModelConfig, init: Initializer):
        block = Block(dataclasses.replace(tower, attention_bias=True, qk_norm="none"), init)
        self.probe = init.normal((tower.width,), ("embed",), tower.initializer_range)
        self.attention, self.norm, self.mlp = block.attention, block.mlp_norm, block.mlp


def vit_block(config: ModelConfig, init: Initializer) -> Block:
    """The decoder's block with LayerScale, and with RMSNorm on queries and keys whatever the other norms."""
    layer_scale = 0.1 if config.vision_as(ViTConfig).layer_scale else None
    return Block(tower_config(config), init, qk_norm_kind="rms", layer_scale=layer_scale)


class ViTEncoder(Encoder):
    vision: ViTTower
    projector: Projector

    def __init__(self, config: ModelConfig, init: Initializer):
        self.vision = ViTTower(config, init)
        self.projector = Projector(config, init)

    def __call__(self, batch: Mapping[str, Any]) -> Encoded:
        """Image tokens [P, D] of a prepared batch, in the order of the placeholders."""
        images = jnp.asarray(batch["images"])
        images = images.reshape(-1, *images.shape[-3:])
        if "image_tiles" in batch:
            images = images[batch["image_tiles"]]
        rows = images.shape[-2] // self.vision.config.vision_as(ViTConfig).patch_size
        visible = batch.get("image_patch_visible")
        tokens = self.projector(
            self.vision(images, batch),
            rows=rows if visible is not None else None,
            visible=None if visible is None else jnp.asarray(visible),
        )
        tokens = tokens.reshape(-1, tokens.shape[-1])
        if "image_rows" in batch:
            if self.projector.newline is not None:
                newline = self.projector.newline.astype(tokens.dtype)
                tokens = jnp.concatenate([tokens, newline[None]])
            taken = tokens[batch["image_rows"]]
            if "image_weights" in batch:
                tokens = jnp.einsum("pkd,pk->pd", taken, jnp.asarray(batch["image_weights"], taken.dtype))
            else:
                tokens = taken[:, 0]
        return Encoded(tokens)

    @staticmethod
    def prepare(batch: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
        """What encoding needs besides the images: which tiles there are, which features make which token.

        Also `together` where image tokens, or a prompt, see themselves both ways; a prompt is the tokens
        whose token_type_ids are 0, or all of them.

        Raises:
          ValueError: the text has more or fewer placeholders than the images have tokens, sizes of images do
            not fit the images, or they are traced.
        """
        v, added = config.vision_as(ViTConfig), dict[str, Any]()
        tokens, images = batch["tokens"], batch["images"]
        if "pixel_values_videos" in batch:
            raise ValueError(
                "the batch holds pixel_values_videos: videos are not run, take their frames as images"
            )
        prepared = "image_tiles" in batch
        made = 0
        if v.grid and not prepared:
            added, made = _tiles(batch, config)
        elif v.position == "fractional" and not prepared:
            added = _patches(batch, config)
            made = added["image_patch_positions"].size // v.shuffle**2
            if v.resampler is not None:
                made = len(added["image_tiles"]) * v.resampler.num_queries
        elif v.position == "rotary" and not prepared:
            added = _squares(batch, config)
            made = len(added["image_rows"])
        elif not prepared:
            made = int(np.prod(images.shape[:-3])) * tokens_per_tile(config)
        if not prepared and not isinstance(tokens, jax.core.Tracer):
            places = int(np.sum(np.asarray(tokens) == config.image_token))
            if places != made:
                raise ValueError(f"the text has {places} placeholders, its images make {made} tokens")
        if v.together != "none" and "together" not in batch:
            added["together"] = _together(batch, config)
        return added


def _together(batch: Mapping[str, Any], config: ModelConfig) -> Any:
    """int32[B, T]: numbers of groups that see themselves whole, from 1 on; 0 elsewhere."""
    tokens = batch["tokens"]
    xp: Any = jnp if isinstance(tokens, jax.core.Tracer) else np
    if config.has_prefix:
        prefix = xp.asarray(batch.get("token_type_ids", xp.zeros_like(tokens))) == 0
        if "segment_ids" in batch:  # a cache knows no segments: padding would be seen
            prefix &= xp.asarray(batch["segment_ids"]) != 0
        return prefix.astype(np.int32)
    is_image = xp.asarray(tokens) == config.image_token
    before = xp.pad(is_image, ((0, 0), (1, 0)))[:, :-1]
    return xp.where(is_image, xp.cumsum(is_image & ~before, axis=1), 0).astype(np.int32)


def _tiles(batch: Mapping[str, Any], config: ModelConfig) -> tuple[dict[str, Any], int]:
    """Tiles of images of varying size, and how many tokens they make."""
    v, images = config.vision_as(ViTConfig), batch["images"]
    sizes = [(int(height), int(width)) for height, width in on_host(batch, "image_sizes").reshape(-1, 2)]
    whole = [False] * len(sizes)
    if "batch_num_images" in batch:
        whole = [n > 1 for n in on_host(batch, "batch_num_images").tolist() for _ in range(n)]
        if len(whole) != len(sizes):
            raise ValueError(f"batch_num_images counts {len(whole)} images, image_sizes has {len(sizes)}")
    counts = [
        1 if one else tiles.count_tiles(size, v.grid, v.image_size)
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
    packed = tiles.pack(sizes, whole, grid=v.grid, tile=v.image_size, side=side, max_tiles=v.max_tiles)
    added = {"image_tiles": taken.astype(np.int32), "image_rows": packed.rows}
    if packed.weights is not None:
        added["image_weights"] = packed.weights
    return added, len(packed.rows)


def _patches(batch: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Images that are there, the patches of each that show something, and where in the whole they lie."""
    v = config.vision_as(ViTConfig)
    images = on_host(batch, "images")
    images = images.reshape(-1, *images.shape[-3:])
    height, width = images.shape[-2:]
    down, across = height // v.patch_size, width // v.patch_size
    if v.shuffle > 1 and (down != across or down % v.shuffle):
        raise ValueError(f"images are {images.shape[1:]}, the model takes squares of {v.shuffle} patches")
    kept = np.flatnonzero(np.any(images != 0, axis=(1, 2, 3)))
    visible = np.ones((len(kept), down, across), bool)
    if "pixel_attention_mask" in batch:
        mask = on_host(batch, "pixel_attention_mask").reshape(-1, height, width)[kept] != 0
        mask = mask[:, : down * v.patch_size, : across * v.patch_size]
        of_patches = mask.reshape(-1, down, v.patch_size, across, v.patch_size)
        # Idefics2 leaves out patches at the edge of an image that it fills in part.
        visible = (of_patches.all if v.resampler is not None else of_patches.any)(axis=(2, 4))
    side = v.image_size // v.patch_size
    rows = _places(visible[:, :, 0].sum(axis=1), down, side)
    columns = _places(visible[:, 0, :].sum(axis=1), across, side)
    positions = np.where(visible, rows[:, :, None] * side + columns[:, None, :], 0)
    return {
        "image_tiles": kept.astype(np.int32),
        "image_patch_positions": positions.reshape(len(kept), -1).astype(np.int32),
        "image_patch_visible": visible.reshape(len(kept), -1),
    }


def _squares(batch: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """The patches of images of varying size, each in the corner of a larger tensor, and their tokens."""
    v, images = config.vision_as(ViTConfig), batch["images"]
    unit = v.patch_size * v.shuffle
    sizes = on_host(batch, "image_sizes").reshape(-1, 2).astype(np.int64)
    height, width = images.shape[-2:]
    fits = (sizes >= unit).all() and (sizes <= (height, width)).all()
    if len(sizes) != len(images) or not fits or height % unit or width % unit or (sizes % unit).any():
        raise ValueError(
            f"images are {images.shape}, their sizes {sizes.tolist()}: each must be made of tokens of {unit} "
            "pixels a side, and lie within the images"
        )

    def inside(size: int) -> np.ndarray:
        down, across = np.arange(height // size), np.arange(width // size)
        ends = sizes // size
        within = (down < ends[:, :1])[:, :, None] & (across < ends[:, 1:])[:, None]
        return within.reshape(len(sizes), -1)

    return {
        "image_tiles": np.arange(len(sizes), dtype=np.int32),
        "image_patch_visible": inside(v.patch_size),
        "image_rows": np.flatnonzero(inside(unit))[:, None].astype(np.int32),
    }


def _rotary(count: int, rows: int, patches: int, dim: int) -> Rotary:
    """Pixtral's: of the wavelengths of a text every other one turns by the row, the rest by the column."""
    frequencies = 1.0 / THETA ** (np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim))
    row, column = np.divmod(np.arange(patches, dtype=np.float32), patches // rows)
    angles = np.concatenate([row[:, None] * frequencies[0::2], column[:, None] * frequencies[1::2]], axis=1)
    turns = jnp.broadcast_to(jnp.asarray(angles, jnp.float32)[None], (count, *angles.shape))
    return Rotary(jnp.cos(turns), jnp.sin(turns))


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

"""Rotary positions (RoFormer, arXiv 2104.09864): wavelengths, their stretching, and the rotation."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxlab.models.config import ModelConfig, RopeConfig


class Rotary(NamedTuple):
    """How far each pair of a head's dimensions turns at each token."""

    cos: Float[Array, "B T pairs"]
    sin: Float[Array, "B T pairs"]


def rotary_table(positions: Int[Array, "B T *axes"], rope: RopeConfig, dim: int) -> Rotary:
    """The turns, float32, of `dim` dimensions at `positions`.

    Positions may have several coordinates (M-RoPE); `rope.sections` then says which pair turns by which one.
    """
    frequencies, factor = _frequencies(rope, dim, positions)
    if positions.ndim == 3:
        coordinate = jnp.asarray(_coordinate_of_pair(rope, dim // 2))
        x = jnp.take(positions, coordinate, axis=-1).astype(jnp.float32)
    else:
        x = positions.astype(jnp.float32)[..., None]
    angles = x * jnp.broadcast_to(frequencies, (1, 1, dim // 2))
    return Rotary(jnp.cos(angles) * factor, jnp.sin(angles) * factor)


def rope_tables(
    positions: Int[Array, "B T *axes"], config: ModelConfig
) -> tuple[Rotary | None, Rotary | None]:
    """Of full (and NSA) layers, and of sliding ones; None where positions are not rotary."""
    if config.position.kind != "rotary":
        return None, None
    table = rotary_table(positions, config.rope, config.rotary_dim)
    theta = getattr(config.attention, "rope_theta", None)
    if theta is None:
        return table, table
    return table, rotary_table(positions, RopeConfig(theta=theta), config.key_dim)


def rotate(x: Float[Array, "B T H Dk"], table: Rotary, interleaved: bool = False) -> Float[Array, "B T H Dk"]:
    """Turn the first 2 * pairs dimensions of each head; the others pass.

    Pairs are (i, i + pairs), the layout of Llama's Hugging Face checkpoints, or `interleaved` (2i, 2i + 1).
    The rotation is float32; the result has the dtype of `x`.
    """
    cos, sin = table.cos[:, :, None], table.sin[:, :, None]
    pairs = cos.shape[-1]
    y = x[..., : 2 * pairs].astype(jnp.float32)
    if interleaved:
        first, second = y[..., 0::2], y[..., 1::2]
    else:
        first, second = jnp.split(y, 2, axis=-1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    y = jnp.stack(rotated, axis=-1).reshape(y.shape) if interleaved else jnp.concatenate(rotated, axis=-1)
    return jnp.concatenate([y.astype(x.dtype), x[..., 2 * pairs :]], axis=-1)


def _frequencies(
    rope: RopeConfig, dim: int, positions: Int[Array, "..."]
) -> tuple[Float[np.ndarray, " pairs"] | Float[Array, " pairs"], float]:
    """Radians per position of each pair, and the factor on cosines and sines."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    plain = (1.0 / np.float32(rope.theta) ** exponents).astype(np.float32)
    if rope.scaling == "linear":
        return plain / np.float32(rope.factor), 1.0
    if rope.scaling == "dynamic":
        length = jnp.maximum(jnp.max(positions) + 1, rope.original_length).astype(jnp.float32)
        growth = (rope.factor * length / rope.original_length) - (rope.factor - 1.0)
        theta = rope.theta * growth ** (dim / (dim - 2))
        return 1.0 / jnp.broadcast_to(theta, exponents.shape) ** jnp.asarray(exponents), 1.0
    if rope.scaling == "llama3":
        return _llama3(plain, rope), 1.0
    if rope.scaling == "yarn":
        return _yarn(plain, rope, dim), _attention_factor(rope)
    if rope.scaling == "longrope":
        of_short, of_long = (
            jnp.asarray(plain / np.asarray(factors, np.float32))
            for factors in (rope.short_factors, rope.long_factors)
        )
        is_long = jnp.max(positions) + 1 > rope.original_length
        return jnp.where(is_long, of_long, of_short), _attention_factor(rope)
    return plain, 1.0


def _llama3(plain: np.ndarray, rope: RopeConfig) -> np.ndarray:
    """Long wavelengths are divided by the factor, short ones stay, those between are mixed."""
    turns = rope.original_length * plain / (2 * math.pi)
    low, high = rope.low_frequency_factor, rope.high_frequency_factor
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return ((1 - kept) * plain / rope.factor + kept * plain).astype(np.float32)


def _yarn(plain: np.ndarray, rope: RopeConfig, dim: int) -> np.ndarray:
    """arXiv 2309.00071, sec. 3.2: as llama3, with the bounds given in rotations over the original length."""

    def dimension(turns: float) -> float:
        return dim * math.log(rope.original_length / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    divided = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0.0, 1.0)
    return (plain / rope.factor * divided + plain * (1 - divided)).astype(np.float32)


def _attention_factor(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.scaling == "longrope":
        growth = math.log(max(rope.factor, 1.0)) / math.log(max(rope.original_length, 2))
        return math.sqrt(1 + growth)
    return 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0


def _coordinate_of_pair(rope: RopeConfig, pairs: int) -> Int[np.ndarray, " pairs"]:
    """Which coordinate of a position each pair turns by."""
    if not rope.sections:
        return np.zeros(pairs, np.int32)
    if not rope.sections_interleaved:
        return np.repeat(np.arange(len(rope.sections), dtype=np.int32), rope.sections)
    index = np.arange(pairs, dtype=np.int32)
    axes = len(rope.sections)
    turn = index % axes
    within = index < axes * np.asarray(rope.sections, np.int32)[turn]
    return np.where(within, turn, 0).astype(np.int32)

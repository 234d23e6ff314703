"""How much of a dense model's attention the blocks hold that NSA would choose, layer by layer."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxlab.distributed import compile_together
from jaxlab.errors import ConfigError
from jaxlab.models import (
    AttentionContext,
    Batch,
    Block,
    ModelConfig,
    NSAConfig,
    Params,
    as_arrays,
    bind_decoder,
    encode_images,
    mean_compressor,
    prepare_batch,
    rotary_table,
)
from jaxlab.retrofit.convert import retrofitted
from kernels_pallas.nsa import block_starts, compress_blocks, compressed_attention, select_blocks

SCORES = 1 << 24
"""Attention weights, over all rows and heads, that exist at once."""


class Coverage(NamedTuple):
    """Shares of attention: means over the queries of a batch and the heads of a group, each in [0, 1]."""

    chosen: Float[Array, "L Hkv"]
    """On the tokens of the blocks that the retrofitted model would choose, the forced ones included."""
    with_window: Float[Array, "L Hkv"]
    """On these tokens and those of the window."""
    random: Float[Array, "L Hkv"]
    """The expectation for as many blocks where those that are not forced are drawn by lot."""
    best: Float[Array, "L Hkv"]
    """For the blocks that hold most, as many of them."""
    choice: Float[Array, " L"]
    """Of the queries, those that see more blocks than they may choose; the others read all, and count as 1
    in each of the above."""


@compile_together
@partial(jax.jit, static_argnames=("config", "nsa", "query_chunk"))
def attention_coverage(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    nsa: NSAConfig,
    *,
    chosen: Int[Array, "L B Hkv T n"] | None = None,
    query_chunk: int | None = None,
) -> Coverage:
    """What share of its attention weights the dense model of `config` puts on what NSA would read.

    Blocks are chosen as by the model that `retrofit` makes, were its input to the layer the dense one: by
    mean keys of compressed blocks. `chosen` are taken instead, where another selector chose. Weights are
    taken for `query_chunk` queries at a time (None: as many as `SCORES` allows), so that memory is linear in
    the length. Padding counts for nothing.

    Raises:
      ConfigError: the model cannot be retrofitted (see `retrofitted`), or its layers read the images.
    """
    retrofitted(config, nsa)
    batch = as_arrays(prepare_batch(batch, config))
    decoder = bind_decoder(params, config)
    images = encode_images(params, batch, config)
    if images is not None and images.cross is not None:
        raise ConfigError("models whose layers read images are measured on text alone; leave the images out")
    x, context, _ = decoder.embed(batch, images)  # DeepStack's models have M-RoPE: they are refused above

    parts: list[Coverage] = []
    for blocks in decoder.stacks:
        graphdef, stacked = nnx.split(blocks)
        first = sum(part.choice.shape[0] for part in parts)
        turned = jnp.asarray(config.rotary_layers[first:])[: jax.tree.leaves(stacked)[0].shape[0]]

        def layer(
            x: Array, of_layer: tuple[Any, Bool[Array, ""], Array | None], graphdef: Any = graphdef
        ) -> tuple[Array, Coverage]:
            state, rotary, own = of_layer

            def step(x: Array, context: AttentionContext) -> tuple[Array, Coverage]:
                block = nnx.merge(graphdef, state)
                return block(x, context).x, _coverage(block, x, context, nsa, own, query_chunk)

            if len({*config.rotary_layers}) == 1:
                return step(x, context)
            of_kinds = (lambda x, r=r: step(x, context.for_layer(r)) for r in (True, False))
            return lax.cond(rotary, *of_kinds, x)

        own = None if chosen is None else chosen[first : first + turned.shape[0]]
        x, found = lax.scan(layer, x, (stacked, turned, own))
        parts.append(found)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)


def _coverage(
    block: Block,
    x: Float[Array, "B T D"],
    context: AttentionContext,
    nsa: NSAConfig,
    chosen: Int[Array, "B Hkv T n"] | None,
    query_chunk: int | None,
) -> Coverage:
    """Of one layer, whose input is x."""
    attention, config = block.attention, block.attention.config
    q, k, _ = attention.project(block.attention_input(x))
    batch, length, heads, dim = q.shape
    sizes: dict[str, Any] = {"block_len": nsa.block_len, "stride": nsa.stride}
    segments = context.segment_ids
    if segments is None:
        segments = jnp.ones((batch, length), jnp.int32)
    scale, before = config.score_scale, k
    if context.rotary is not None:
        q, k = (attention.with_rope(y, context.rotary) for y in (q, k))
    if chosen is None:
        starts = block_starts(segments, **sizes)
        mean = mean_compressor(nsa.block_len, dim, k.dtype)
        k_cmp = compress_blocks(before, mean, starts=starts, **sizes)
        if context.rotary is not None:
            positions = jax.vmap(lambda x, at: x[jnp.maximum(at, 0)])(context.positions, starts)
            k_cmp = attention.with_rope(k_cmp, rotary_table(positions, config.rope, config.rotary_dim))
        _, lse = compressed_attention(q, k_cmp, k_cmp, scale=scale, segment_ids=segments, **sizes)
        chosen = select_blocks(
            q,
            k_cmp,
            lse,
            block_size=nsa.block_size,
            num_blocks=nsa.num_blocks,
            num_init=nsa.num_init,
            num_local=nsa.num_local,
            scale=scale,
            segment_ids=segments,
            **sizes,
        )
    size = query_chunk or min(length, max(1, SCORES // (batch * heads * length)))
    rows = jnp.arange(length, dtype=jnp.int32)
    new = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    texts = lax.cummax(jnp.where(new, rows[None], 0), axis=1)
    chunks = lambda y, axis: _chunks(y, axis, size)
    # A row that fills the last chunk up is of segment 0: padding.
    of_queries = _Queries(
        chunks(rows, 0), chunks(q, 1), chunks(chosen, 2), chunks(segments, 1), chunks(texts, 1)
    )
    sums = lax.map(lambda part: _sums(part, k, segments, scale, nsa), of_queries)
    totals, free, queries = (jnp.sum(y, axis=0) for y in sums)
    queries = jnp.maximum(queries, 1.0)
    means = totals / queries
    return Coverage(means[0], means[1], means[2], means[3], free / queries)


def _chunks(x: Array, axis: int, size: int) -> Array:
    """Axis `axis` cut into pieces of `size`, zeros at the end, on a new first axis."""
    missing = -x.shape[axis] % size
    x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
    shape = (*x.shape[:axis], x.shape[axis] // size, size, *x.shape[axis + 1 :])
    return jnp.moveaxis(x.reshape(shape), axis, 0)


class _Queries(NamedTuple):
    """Some queries, or chunks of them on a new first axis: rows, vectors, chosen blocks, segments, first rows
    of their texts."""

    rows: Int[Array, "*chunks c"]
    q: Float[Array, "*chunks B c H Dk"]
    chosen: Int[Array, "*chunks B Hkv c n"]
    segments: Int[Array, "*chunks B c"]
    texts: Int[Array, "*chunks B c"]


def _sums(
    queries: _Queries,
    k: Float[Array, "B S Hkv Dk"],
    segments: Int[Array, "B S"],
    scale: float,
    nsa: NSAConfig,
) -> tuple[Float[Array, "4 Hkv"], Float[Array, ""], Float[Array, ""]]:
    """Over some queries: the four shares, how many have a choice, and how many there are."""
    rows, q, chosen, query_segments, texts = queries
    age = (rows[:, None] - jnp.arange(k.shape[1], dtype=jnp.int32)[None])[None, None]  # [1, 1, c, S]
    seen = (age >= 0) & ((query_segments[:, :, None] == segments[:, None]) & (segments != 0)[:, None])[
        :, None
    ]
    mass = _mass(q, k, seen, scale)
    # From here on tokens are counted from the start of each query's text, as blocks are.
    token = texts[..., None] + jnp.arange(k.shape[1], dtype=jnp.int32)[None, None]  # [B, c, S]
    own_text = lambda x: jnp.take_along_axis(x, token[:, None], axis=3, mode="fill", fill_value=0)
    mass, seen = own_text(mass), own_text(seen)
    age = (rows[None, :, None] - token)[:, None]

    by_block = _by_block(mass, nsa.block_size)
    visible = _by_block(seen.astype(jnp.int32), nsa.block_size) > 0  # [B, 1, c, N]
    index = jnp.arange(visible.shape[-1], dtype=jnp.int32)[None, None, None]
    own = ((rows[None] - texts) // nsa.block_size)[:, None, :, None]
    forced = visible & ((index < nsa.num_init) | (index > own - nsa.num_local))
    count = lambda blocks: jnp.sum(blocks, axis=-1, dtype=jnp.float32)
    slots, candidates = nsa.num_blocks - count(forced), count(visible & ~forced)
    lot = jnp.minimum(slots / jnp.maximum(candidates, 1.0), 1.0)
    on = lambda mask, values: jnp.sum(jnp.where(mask, values, 0.0), axis=-1)

    is_chosen = jnp.any(chosen[..., None] == index[:, :, :, None], axis=-2)  # [B, Hkv, c, N]
    read = jnp.repeat(is_chosen, nsa.block_size, axis=-1)[..., : mass.shape[-1]]
    shares = jnp.stack(
        [
            on(is_chosen, by_block),
            on(read | (age < nsa.window), mass),
            on(forced, by_block) + lot * on(~forced, by_block),
            jnp.sum(jnp.sort(by_block, axis=-1)[..., -nsa.num_blocks :], axis=-1),
        ]
    )
    valid = query_segments != 0
    totals = jnp.sum(shares, axis=(1, 3), where=valid[None, :, None])
    free = jnp.sum(valid & (candidates > slots)[:, 0], dtype=jnp.float32)
    return totals, free, jnp.sum(valid, dtype=jnp.float32)


def _mass(
    q: Float[Array, "B c H Dk"], k: Float[Array, "B S Hkv Dk"], seen: Bool[Array, "B 1 c S"], scale: float
) -> Float[Array, "B Hkv c S"]:
    """The attention weights of a group, the mean over its heads."""
    batch, length, heads, dim = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], dim)
    scores = jnp.einsum("bchgd,bshd->bhgcs", grouped, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(seen[:, :, None], scores, jnp.finfo(jnp.float32).min)
    weights = jnp.where(seen[:, :, None], jax.nn.softmax(scores, axis=-1), 0.0)
    return jnp.mean(weights, axis=2)


def _by_block(x: Array, block_size: int) -> Array:
    """[..., S] summed over each block of tokens: [..., N]."""
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block_size)])
    return jnp.sum(x.reshape(*x.shape[:-1], -1, block_size), axis=-1)

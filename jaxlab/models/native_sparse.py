"""Native Sparse Attention of one layer: compression, choice, gates; of whole texts and over a cache."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxlab.errors import ConfigError
from jaxlab.models.config import ModelConfig
from jaxlab.models.mesh import Part, in_parts
from jaxlab.models.modules import Params
from jaxlab.models.probe import Probe, probed_nsa_attention
from jaxlab.models.rotary import rotary_table, rotate
from jaxlab.models.selectors import auxiliary_loss, auxiliary_scores, block_bounds, bound_scores
from jaxlab.models.sparse_config import BRANCHES
from jaxlab.models.where import Where
from kernels_pallas import nsa
from kernels_pallas.nsa import PagedCache, compress_blocks, nsa_attention, select_blocks_by_importance


class Choice(NamedTuple):
    """What one layer of NSA chose to read, and how far the choice is from where attention lies."""

    blocks: Int[Array, "B Hkv T n"] | None = None
    """None without a selection branch."""
    loss: Float[Array, ""] | None = None
    """Of the auxiliary selector."""


def whole_attention(
    params: Params,
    x: Array,
    q: Array,
    k: Array,
    v: Array,
    where: Where,
    config: ModelConfig,
    probe: Probe | None,
) -> tuple[Array, Choice]:
    """Three branches with their own keys and values."""
    n, segment_ids = config.nsa, where.segment_ids
    starts = where.positions[:, : max(0, k.shape[2] - n.block_len + 1) : n.stride]
    k_slc, k_win = _turned(k[:, 1], where, config), _turned(k[:, 2], where, config)
    gates = _gates_of_branches(params, x, config)
    if probe is not None:
        if n.selector != "compressed":
            raise ValueError("flows and blocking know no selector of NSA but compressed")
        compressed = _compress(params, config, k[:, 0], v[:, 0], starts)
        operands = (q, *compressed, k_slc, v[:, 1], k_win, v[:, 2], gates)
        return probed_nsa_attention(*operands, probe, segment_ids=segment_ids, **_sizes(config)), Choice()
    indices, loss = None, None
    if n.selector != "compressed" and "selection" in n.branches:
        if n.selector == "min_max":
            importance = _bounds_of_groups(q, k_slc, config)
        else:
            if segment_ids is not None:
                raise ValueError("the auxiliary selector reads one whole text a row: no segments")
            scale = config.key_dim**-0.5 if config.attention_scale is None else config.attention_scale
            importance = auxiliary_scores(params["selector"], x, n.block_size)
            loss = auxiliary_loss(importance, _of_groups(q, config), k_slc, n, scale=scale)
        indices = _best_blocks(importance, config, segment_ids=segment_ids)
    out, chosen = in_parts(
        functools.partial(_nsa_part, config=config),
        (q, k[:, 0], v[:, 0], k_slc, v[:, 1], k_win, v[:, 2], gates),
        (starts, segment_ids),
        {name: params[name] for name in ("compress_key", "compress_value")},
        indices,
        unit=n.stride,
        least=n.block_len - n.stride,
    )
    return out, Choice(chosen, loss)


def _nsa_part(
    tokens: tuple[Array, ...],
    rows: tuple[Array, Array | None],
    params: Params,
    indices: Array | None,
    part: Part | None,
    config: ModelConfig,
) -> tuple[Array, Array | None]:
    """Output and choice of all queries, or of those of one stretch of the sequence.

    A stretch compresses the blocks that begin in it, the last ones with the first tokens of the next, so that
    their tokens are never gathered, only the compressed keys and values of all stretches.
    """
    (q, k, v, *others, gates), (starts, segment_ids) = tokens, rows
    n, positions = config.nsa, None
    k_cmp, v_cmp = _compress(params, config, k, v, starts, part)
    if part is not None:
        others, positions = [part.whole(x) for x in others], part.positions(q.shape[0])
    k_slc, v_slc, k_win, v_win = others
    try:
        out, branches = nsa_attention(
            q,
            k_cmp,
            v_cmp,
            k_slc,
            v_slc,
            k_win,
            v_win,
            gates,
            segment_ids=segment_ids,
            indices=indices,
            q_positions=positions,
            implementation=None if n.implementation == "auto" else n.implementation,
            **_sizes(config),
        )
    except NotImplementedError as error:  # the kernel that was named does not take the case, or not here
        raise ConfigError(str(error), key="model.nsa.implementation") from error
    there = [branch in n.branches for branch in BRANCHES]
    if all(there):
        return out, branches.indices
    # What the other branches would give is not used, so it is not computed.
    outputs = zip(there, (branches.compressed, branches.selected, branches.window), strict=True)
    parts = [gates[..., i, None].astype(q.dtype) * y for i, (used, y) in enumerate(outputs) if used]
    return jax.tree.reduce(jnp.add, parts), branches.indices if "selection" in n.branches else None


def cached_attention(
    params: Params,
    x: Array,
    q: Array,
    k: Array,
    v: Array,
    where: Where,
    config: ModelConfig,
    cache: PagedCache,
) -> tuple[Array, PagedCache, Choice]:
    """The same for tokens that continue what the cache holds; segment_ids mark padding at their right end."""
    assert where.rows is not None
    n = config.nsa
    if n.selector == "auxiliary" and "selection" in n.branches:
        raise ValueError("the auxiliary selector reads one whole text a row: no cache")
    k_slc, k_win = _turned(k[:, 1], where, config), _turned(k[:, 2], where, config)
    new = nsa.NewTokens(k[:, 0], v[:, 0], k_slc, v[:, 1], k_win, v[:, 2])
    compress = lambda k, v, starts: _compress(params, config, k, v, starts)
    num_new = None
    if where.segment_ids is not None:
        num_new = jnp.sum(where.segment_ids != 0, axis=1, dtype=jnp.int32)
    cache, recent = nsa.append_tokens(
        cache, new, compress, block_len=config.nsa.block_len, stride=config.nsa.stride, num_new=num_new
    )
    indices = None
    if n.selector == "min_max" and "selection" in n.branches:
        importance = _bounds_of_groups(q, nsa.whole(cache, cache.k_slc), config)
        last = importance.shape[-1] * n.block_size - 1  # padding may stand past the cache's end
        indices = _best_blocks(importance, config, q_positions=jnp.minimum(where.rows, last))
    gates = _gates_of_branches(params, x, config)
    try:
        out, branches = nsa.cached_attention(
            cache,
            recent,
            q,
            gates,
            indices=indices,
            **_sizes(config),
            implementation=None if n.implementation == "auto" else n.implementation,
        )
    except NotImplementedError as error:
        raise ConfigError(str(error), key="model.nsa.implementation") from error
    return out, cache, Choice(branches.indices if "selection" in config.nsa.branches else None)


def _compress(
    params: Params,
    config: ModelConfig,
    k: Array,
    v: Array,
    starts: Int[Array, "B M *axes"],
    part: Part | None = None,
) -> tuple[Array, Array]:
    """Compressed keys are built from un-rotated keys and take the rotary position of their block's first
    token; all of them, where k and v are one stretch of the tokens."""
    if part is not None:
        beyond = config.nsa.block_len - config.nsa.stride
        k, v = part.with_next(k, beyond), part.with_next(v, beyond)
    sizes: dict[str, Any] = {"block_len": config.nsa.block_len, "stride": config.nsa.stride}
    k_cmp = compress_blocks(k, _cast(params["compress_key"], k.dtype), **sizes)
    v_cmp = compress_blocks(v, _cast(params["compress_value"], v.dtype), **sizes)
    if part is not None:  # blocks that run past the end are no blocks
        k_cmp, v_cmp = part.whole(k_cmp)[:, : starts.shape[1]], part.whole(v_cmp)[:, : starts.shape[1]]
    if config.position == "rotary":
        k_cmp = rotate(k_cmp, rotary_table(starts, config.rope, config.rotary_dim), config.rope.interleaved)
    return k_cmp, v_cmp


def _turned(k: Array, where: Where, config: ModelConfig) -> Array:
    return k if where.rotary is None else rotate(k, where.rotary, config.rope.interleaved)


def _sizes(config: ModelConfig) -> dict[str, Any]:
    n = config.nsa
    return {
        "block_len": n.block_len,
        "stride": n.stride,
        "block_size": n.block_size,
        "num_blocks": n.num_blocks,
        "num_init": n.num_init,
        "num_local": n.num_local,
        "window": n.window,
        "scale": config.attention_scale,
    }


def _of_groups(q: Array, config: ModelConfig) -> Float[Array, "B T Hkv G Dk"]:
    return q.reshape(*q.shape[:2], config.kv_heads, -1, config.key_dim)


def _bounds_of_groups(q: Array, k: Array, config: ModelConfig) -> Float[Array, "B Hkv T N"]:
    """Quest's bound of the scores in each block, summed over the heads of a group."""
    return jnp.sum(bound_scores(_of_groups(q, config), block_bounds(k, config.nsa.block_size)), axis=2)


def _best_blocks(importance: Array, config: ModelConfig, **where: Array | None) -> Int[Array, "B Hkv T n"]:
    n = config.nsa
    return select_blocks_by_importance(
        importance,
        block_size=n.block_size,
        num_blocks=n.num_blocks,
        num_init=n.num_init,
        num_local=n.num_local,
        **where,
    )


def _gates_of_branches(params: Params, x: Array, config: ModelConfig) -> Float[Array, "B T H 3"]:
    """Exactly 0 for the branches that the model goes without."""
    there = jnp.asarray([branch in config.nsa.branches for branch in BRANCHES])
    return jnp.where(there[None, None, None], _gates(params["gate"], x), 0)


def _gates(params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T H 3"]:
    if "hidden" in params:
        x = jax.nn.silu(x @ params["hidden"].astype(x.dtype))
    logits = jnp.einsum("btd,dhc->bthc", x, params["output"].astype(x.dtype))
    return jax.nn.sigmoid(logits + params["bias"].astype(x.dtype)[None, None])


def _cast(params: Params, dtype: jax.typing.DTypeLike) -> Params:
    return jax.tree.map(lambda p: p.astype(dtype), params)

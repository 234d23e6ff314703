"""Attention of one layer: projections, positions, the cache, and the kinds full, sliding and nsa."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxlab.errors import ConfigError
from jaxlab.models.config import ModelConfig
from jaxlab.models.layers import norm, softcap
from jaxlab.models.mesh import Part, in_parts
from jaxlab.models.modules import Params
from jaxlab.models.probe import Probe, probed_attention, probed_nsa_attention
from jaxlab.models.rotary import Rotary, rotary_table, rotate
from jaxlab.models.selectors import auxiliary_loss, auxiliary_scores, block_bounds, bound_scores
from jaxlab.models.sparse_config import BRANCHES
from jaxlab.models.sparse_inference import sparse_attention
from kernels_pallas import nsa
from kernels_pallas.nsa import PagedCache, best_blocks, compress_blocks, nsa_attention, window_attention

LayerCache = tuple[Array, Array] | PagedCache
"""Of one layer: keys and values, a row a position; or what NSA keeps."""


class Where(NamedTuple):
    """Where the tokens of a batch stand: what every layer's attention needs to know of them."""

    positions: Int[Array, "B T *axes"]
    """Position within the sequence; with M-RoPE its three coordinates."""
    segment_ids: Int[Array, "B T"] | None = None
    """Packed sequences; 0 is padding. None: one sequence a row, no padding."""
    rows: Int[Array, "B T"] | None = None
    """With a cache: the row of the cache that each token takes."""
    together: Int[Array, "B T"] | None = None
    """Tokens of one number above 0 see each other whatever their order (the patches of an image)."""
    local_segments: Int[Array, "B T"] | None = None
    """Segments of sliding layers, where they are others (the windows of a vision tower)."""
    rotary: Rotary | None = None
    local_rotary: Rotary | None = None
    """Turns of full and of sliding layers; None: attention has no rotary positions."""
    together_in_window: bool = False
    """Sliding layers bound what `together` allows by their window (Gemma 3)."""
    visible: Bool[Array, "B T"] | None = None
    """Tokens that may be seen; None: all (the patches of an image within a larger tensor)."""


class Cache(NamedTuple):
    """What all layers keep of the tokens read so far."""

    layers: LayerCache
    """Stacked on a leading axis L: keys and values [L, B, S, Hkv, D]; or NSA's PagedCache, with a page for
    every layer and sequence in one pool [L * B, ...] that all layers share."""
    length: Int[Array, " B"]
    """Tokens held, for each sequence."""
    offset: Int[Array, " B"]
    """By how much the next position exceeds its row (M-RoPE: an image has fewer positions than rows)."""


class Choice(NamedTuple):
    """What one layer of NSA chose to read, and how far the choice is from where attention lies."""

    blocks: Int[Array, "B Hkv T n"] | None = None
    """None without a selection branch."""
    loss: Float[Array, ""] | None = None
    """Of the auxiliary selector."""


def init_cache(config: ModelConfig, batch_size: int, length: int) -> Cache:
    """An empty cache for `batch_size` sequences of at most `length` tokens, in the compute dtype.

    Raises ValueError for NSA with positions of several coordinates: its blocks know one a token.
    """
    if config.attention == "nsa" and config.rope.sections and config.position == "rotary":
        raise ValueError("NSA has no cache for positions of several coordinates; set rope.sections: []")
    make = _empty_nsa if config.attention == "nsa" else _empty_dense
    empty = jnp.zeros((batch_size,), jnp.int32)
    return Cache(make(config, batch_size, length), empty, jnp.zeros_like(empty))


def _empty_dense(config: ModelConfig, batch_size: int, length: int) -> tuple[Array, Array]:
    shape = (config.num_layers, batch_size, length, config.kv_heads)
    dtype = jnp.dtype(config.compute_dtype)
    return jnp.zeros((*shape, config.key_dim), dtype), jnp.zeros((*shape, config.value_dim), dtype)


def _empty_nsa(config: ModelConfig, batch_size: int, length: int) -> PagedCache:
    n, count = config.nsa, config.num_layers
    page_size = nsa.page_for(length, block_size=n.block_size, stride=n.stride)
    pages = jnp.arange(count * batch_size, dtype=jnp.int32).reshape(count, batch_size, 1)
    cache = nsa.init_paged_cache(
        pages[0], num_pages=count * batch_size, page_size=page_size, kv_heads=config.kv_heads,
        key_dim=config.key_dim, value_dim=config.value_dim, dtype=jnp.dtype(config.compute_dtype),
        block_len=n.block_len, stride=n.stride, block_size=n.block_size, window=n.window,
    )  # fmt: skip
    pool, own = part_cache(cache)
    own = jax.tree.map(lambda x: jnp.zeros((count, *x.shape), x.dtype), own)
    return join_cache(pool, own._replace(page_table=pages))


def part_cache(cache: Any) -> tuple[dict[str, Array] | None, Any]:
    """What layers share, to be carried from one to the next and changed in place, and what is each one's own.

    Scanned over, a layer's pages would be copied whole at every step.
    """
    if not isinstance(cache, PagedCache):
        return None, cache
    pool = {name: getattr(cache, name) for name in ("k_slc", "v_slc", "k_cmp", "v_cmp")}
    nothing: dict[str, Any] = dict.fromkeys(pool)
    return pool, cache._replace(**nothing)


def join_cache(pool: dict[str, Array] | None, own: Any) -> Any:
    """Undo `part_cache`."""
    return own if pool is None else own._replace(**pool)


def attention(
    params: Params,
    x: Float[Array, "B T D"],
    where: Where,
    config: ModelConfig,
    *,
    kind: str = "full",
    causal: bool = True,
    probe: Probe | None = None,
    cache: LayerCache | None = None,
) -> tuple[Float[Array, "B T D"], LayerCache | None, Choice]:
    """Attention of one layer, of a kind of `config.kinds`, on its normed input.

    Returns the output, the layer's cache with these tokens in it, and NSA's choice of blocks. `probe` is
    the layer's slice; it taps or edits the attention of full and sliding layers, and of NSA's branches.
    """
    rotary = where.local_rotary if kind == "sliding" else where.rotary
    q, k, v = projections(params, x, config, kind)
    if rotary is not None:
        q = rotate(q, rotary, config.rope.interleaved)
        if kind != "nsa":
            k = rotate(k, rotary, config.rope.interleaved)

    if isinstance(cache, PagedCache):
        out, cache, choice = _nsa_cached(params, x, q, k, v, where, config, cache)
    elif kind == "nsa":
        out, choice = _nsa(params, x, q, k, v, where, config, probe)
    else:
        if cache is not None:
            cache = k, v = _write(cache[0], k, where.rows), _write(cache[1], v, where.rows)
        window = config.window if kind == "sliding" else None
        if kind == "sliding" and where.local_segments is not None:
            where, window = where._replace(segment_ids=where.local_segments), None
        out = _dense(q, k, v, where, config, window, causal, probe, cached=cache is not None)
        choice = Choice()
    y = jnp.einsum("bthk,hkd->btd", out, params["output"].astype(x.dtype))
    if config.has_output_bias:
        y = y + params["output_bias"].astype(x.dtype)[None, None]
    return y, cache, choice


def projections(
    params: Params, x: Float[Array, "B T D"], config: ModelConfig, kind: str
) -> tuple[Float[Array, "B T H Dk"], Float[Array, "B ... T Hkv Dk"], Float[Array, "B ... T Hkv Dv"]]:
    """Queries, keys and values of a layer, normed where the model has it, before their rotary positions.

    With NSA keys and values of its three branches: [B, 3, T, Hkv, D].
    """
    equation = "btd,cdhk->bcthk" if kind == "nsa" else "btd,dhk->bthk"
    q = _project(params, "query", x, "btd,dhk->bthk")
    k, v = _project(params, "key", x, equation), _project(params, "value", x, equation)
    if config.qk_norm != "none":
        q = _head_norm(params["query_norm"], q, config)
        k = _head_norm(params["key_norm"], k, config)
    return q, k, v


def _head_norm(
    params: Params, x: Float[Array, "*rows H K"], config: ModelConfig
) -> Float[Array, "*rows H K"]:
    """Queries or keys normed over each head, or over all heads together."""
    if config.qk_norm == "head":
        return norm(params, x, config)
    return norm(params, x.reshape(*x.shape[:-2], -1), config).reshape(x.shape)


def _project(params: Params, name: str, x: Array, equation: str) -> Array:
    if equation.startswith("btd,c") and params[name].ndim == 3:  # one projection for all of NSA's branches
        y = _project(params, name, x, "btd,dhk->bthk")
        return jnp.broadcast_to(y[:, None], (y.shape[0], len(BRANCHES), *y.shape[1:]))
    y = jnp.einsum(equation, x, params[name].astype(x.dtype))
    if f"{name}_bias" not in params:
        return y
    bias = params[f"{name}_bias"].astype(x.dtype)
    # [H, K] -> [1, 1, H, K]; with NSA's branches [3, H, K] -> [1, 3, 1, H, K]
    return y + (bias[None, None] if bias.ndim == 2 else bias[None, :, None])


def _write(cached: Array, new: Array, rows: Int[Array, "B T"] | None) -> Array:
    """`cached` [B, S, H, K] with row `rows[b, t]` replaced by token t of `new`; none past the end."""
    put = lambda c, n, r: c.at[r].set(n.astype(c.dtype), mode="drop")  # noqa: E731
    return jax.vmap(put)(cached, new, rows)


def _dense(
    q: Array,
    k: Array,
    v: Array,
    where: Where,
    config: ModelConfig,
    window: int | None,
    causal: bool,
    probe: Probe | None,
    cached: bool,
) -> Array:
    scale = config.key_dim**-0.5 if config.attention_scale is None else config.attention_scale
    if config.sparsity.method != "none":
        if cached or probe is not None or where.segment_ids is not None or where.together is not None:
            raise ValueError("sparsity reads one whole text a row: no cache, probe, segments or images")
        return sparse_attention(q, k, v, config.sparsity, scale=scale)
    if probe is not None:
        if config.attention_softcap is not None or where.together is not None:
            raise ValueError("flows and blocking know no softcap and no images that see themselves whole")
        return probed_attention(q, k, v, probe, segment_ids=where.segment_ids, window=window, scale=scale)
    if cached or not causal:
        return _dense_part(q, k, v, where, config, window, causal, cached, scale)

    def core(
        tokens: tuple[Array, ...], rows: tuple[Any, ...], _: None, __: None, part: Part | None
    ) -> tuple[Array, None]:
        q, k, v = tokens
        if part is not None:
            k, v = part.whole(k), part.whole(v)
        here = where._replace(**dict(zip(of_keys, rows, strict=True)))
        return _dense_part(q, k, v, here, config, window, causal, cached, scale, part), None

    of_keys = ("positions", "segment_ids", "together", "visible")
    return in_parts(core, (q, k, v), tuple(getattr(where, name) for name in of_keys), None)[0]


def _dense_part(
    q: Array,
    k: Array,
    v: Array,
    where: Where,
    config: ModelConfig,
    window: int | None,
    causal: bool,
    cached: bool,
    scale: float,
    part: Part | None = None,
) -> Array:
    """Of all queries, or of those of one stretch; `where` is of all keys."""
    if config.attention_implementation == "chunked" and not cached:
        if not causal or where.together is not None or where.visible is not None:
            raise ValueError("chunked attention is causal and knows no images; use xla")
        reach = k.shape[1] if window is None else window
        positions = None if part is None else part.positions(q.shape[0])
        return window_attention(
            q, k, v, window=reach, scale=scale, segment_ids=where.segment_ids, q_positions=positions
        )
    mask = lambda: _mask(where, k.shape[1], window, causal, cached, part)  # noqa: E731
    if config.attention_implementation in ("xla", "chunked"):
        return _softmax_attention(q, k, v, mask(), scale, config.attention_softcap)
    kwargs: dict[str, Any] = {"implementation": config.attention_implementation, "scale": scale}
    plain = where.segment_ids is None and where.together is None and where.visible is None
    if plain and not cached and part is None:
        kwargs |= {"is_causal": causal, "local_window_size": None if window is None else (window - 1, 0)}
    else:
        kwargs["mask"] = mask()[:, None]
    with jax.numpy_dtype_promotion("standard"):  # jax's own function mixes bfloat16 and float32 inside
        return jax.nn.dot_product_attention(q, k, v, **kwargs)


def _softmax_attention(
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B S Hkv Dk"],
    v: Float[Array, "B S Hkv Dv"],
    mask: Bool[Array, "B T S"],
    scale: float,
    cap: float | None,
) -> Float[Array, "B T H Dv"]:
    """Scores and softmax in float32. Dk and Dv may differ, unlike in jax.nn.dot_product_attention.

    A score has one row for each query and head of a group: with an axis for each, XLA takes half as long
    again on a CPU.
    """
    batch, length, heads, dim = q.shape
    groups = heads // k.shape[2]
    rows = q.transpose(0, 2, 1, 3).reshape(batch, k.shape[2], groups * length, dim)
    scores = jnp.einsum("bhrd,bshd->bhrs", rows, k, preferred_element_type=jnp.float32) * scale
    of_rows = jnp.broadcast_to(mask[:, None], (batch, groups, *mask.shape[1:])).reshape(
        batch, 1, -1, k.shape[1]
    )
    scores = jnp.where(of_rows, softcap(scores, cap), jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bhrs,bshd->bhrd", weights, v)
    return out.reshape(batch, heads, length, v.shape[-1]).transpose(0, 2, 1, 3)


def _mask(
    where: Where, source_len: int, window: int | None, causal: bool, cached: bool, part: Part | None = None
) -> Bool[Array, "B T S"]:
    batch, target_len = where.positions.shape[:2]
    targets = where.rows if cached else jnp.broadcast_to(jnp.arange(target_len)[None], (batch, target_len))
    if part is not None:
        targets = part.positions(batch)
    assert targets is not None
    of_targets = lambda x: x if part is None else part.own(x)  # noqa: E731
    behind = targets[:, :, None] - jnp.arange(source_len)[None, None]
    mask = behind >= 0 if causal else jnp.ones_like(behind, dtype=bool)
    if window is not None and not where.together_in_window:
        mask &= behind < window
    if where.together is not None:
        of_sources = where.together
        if cached:  # rows that were read before belong to no image of this batch
            empty = jnp.zeros((batch, source_len), jnp.int32)
            of_sources = jax.vmap(lambda e, n, r: e.at[r].set(n, mode="drop"))(
                empty, where.together, where.rows
            )
        together = of_targets(where.together)
        mask |= (together[:, :, None] == of_sources[:, None, :]) & (together > 0)[:, :, None]
    if window is not None and where.together_in_window:
        mask &= behind < window
    if where.visible is not None and not cached:
        mask &= where.visible[:, None, :]
    if where.segment_ids is not None and not cached:
        mask &= of_targets(where.segment_ids)[:, :, None] == where.segment_ids[:, None, :]
    return mask


def _nsa(
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
        (q, k[:, 0], v[:, 0], k_slc, v[:, 1], k_win, v[:, 2], gates), (starts, segment_ids),
        {name: params[name] for name in ("compress_key", "compress_value")}, indices,
        unit=n.stride, least=n.block_len - n.stride,
    )  # fmt: skip
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
            q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, gates,
            segment_ids=segment_ids, indices=indices, q_positions=positions,
            implementation=None if n.implementation == "auto" else n.implementation, **_sizes(config),
        )  # fmt: skip
    except NotImplementedError as error:  # the kernel that was named does not take the case, or not here
        raise ConfigError(str(error), key="model.nsa.implementation") from error
    there = [branch in n.branches for branch in BRANCHES]
    if all(there):
        return out, branches.indices
    # What the other branches would give is not used, so it is not computed.
    outputs = zip(there, (branches.compressed, branches.selected, branches.window), strict=True)
    parts = [gates[..., i, None].astype(q.dtype) * y for i, (used, y) in enumerate(outputs) if used]
    return jax.tree.reduce(jnp.add, parts), branches.indices if "selection" in n.branches else None


def _nsa_cached(
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
    compress = lambda k, v, starts: _compress(params, config, k, v, starts)  # noqa: E731
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
            cache, recent, q, gates, indices=indices, **_sizes(config),
            implementation=None if n.implementation == "auto" else n.implementation,
        )  # fmt: skip
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
        "block_len": n.block_len, "stride": n.stride, "block_size": n.block_size, "num_blocks": n.num_blocks,
        "num_init": n.num_init, "num_local": n.num_local, "window": n.window, "scale": config.attention_scale,
    }  # fmt: skip


def _of_groups(q: Array, config: ModelConfig) -> Float[Array, "B T Hkv G Dk"]:
    return q.reshape(*q.shape[:2], config.kv_heads, -1, config.key_dim)


def _bounds_of_groups(q: Array, k: Array, config: ModelConfig) -> Float[Array, "B Hkv T N"]:
    """Quest's bound of the scores in each block, summed over the heads of a group."""
    return jnp.sum(bound_scores(_of_groups(q, config), block_bounds(k, config.nsa.block_size)), axis=2)


def _best_blocks(importance: Array, config: ModelConfig, **where: Array | None) -> Int[Array, "B Hkv T n"]:
    n = config.nsa
    return best_blocks(
        importance, block_size=n.block_size, num_blocks=n.num_blocks, num_init=n.num_init,
        num_local=n.num_local, **where,
    )  # fmt: skip


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

"""What is wrong with the arguments of an operator, in one line that names the argument.

Shapes are checked at every call, values only where `debug_checks` asks for it.
"""

import contextlib
import contextvars
from collections.abc import Collection, Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Int

from kernels_pallas.nsa.base import num_compressed

_LAYOUT = "they look like [B, H, T, D]; these operators take [B, T, H, D]"
_checks_values: contextvars.ContextVar[bool] = contextvars.ContextVar("checks_values", default=False)


def check_sizes(**sizes: int | float) -> None:
    _check_whole(**sizes)
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be positive, not {size}")


def _check_whole(**sizes: int | float) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer):
            raise ValueError(f"{name} must be a whole number, not {size!r}")


def _check_integers(name: str, x: Array) -> None:
    if jnp.issubdtype(x.dtype, jnp.inexact):
        raise ValueError(f"{name} must be integers, not {x.dtype}")


def check_attention(
    q: Array, *branches: tuple[tuple[str, Array], tuple[str, Array]], **sizes: int | float
) -> None:
    """q and one or several pairs of keys and values, each with its name."""
    check_sizes(**sizes)
    arrays = [("q", q), *(named for branch in branches for named in branch)]
    for name, x in arrays:
        if x.ndim != 4:
            raise ValueError(f"{name} must have the 4 axes [B, T, H, D], not the shape {x.shape}")
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{name} must be floating point, not {x.dtype}")
        if x.dtype != q.dtype:
            raise ValueError(f"{name} has dtype {x.dtype}, q {q.dtype}; all must have one dtype")
        if x.shape[0] != q.shape[0]:
            raise ValueError(f"{name} has batch {x.shape[0]}, q {q.shape[0]}")
    if q.shape[1] == 0:
        raise ValueError(f"q has no tokens: its shape is {q.shape}")
    (first_name, first), (_, first_values) = branches[0]
    for (k_name, k), (v_name, v) in branches:
        if k.shape[3] != q.shape[3]:
            raise ValueError(f"{k_name} has head dim {k.shape[3]}, q {q.shape[3]}")
        if v.shape[1] != k.shape[1]:
            raise ValueError(f"{v_name} has {v.shape[1]} entries, {k_name} {k.shape[1]}")
        if v.shape[2] != k.shape[2]:
            raise ValueError(f"{v_name} has {v.shape[2]} heads, {k_name} {k.shape[2]}")
        if v.shape[3] != first_values.shape[3]:
            other = branches[0][1][0]
            raise ValueError(
                f"{v_name} has head dim {v.shape[3]}, {other} {first_values.shape[3]}: the branches are added"
            )
        if k.shape[2] != first.shape[2]:
            looks = k.shape[1] == first.shape[1]
            more = f": {_LAYOUT}" if looks else ""
            raise ValueError(f"{k_name} has {k.shape[2]} heads, {first_name} {first.shape[2]}{more}")
        if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
            more = f": {_LAYOUT}" if _heads_second(q, k) else ""
            raise ValueError(
                f"{q.shape[2]} query heads cannot share {k.shape[2]} key/value heads of {k_name}{more}"
            )


def _heads_second(q: Array, k: Array) -> bool:
    """Whether axis 1 looks more like heads than axis 2: fewer keys than queries, which they share equally,
    and as many or more rows of keys behind them."""
    return 0 < k.shape[1] < q.shape[1] and q.shape[1] % k.shape[1] == 0 and q.shape[2] <= k.shape[2]


def check_gates(gates: Array, q: Array) -> None:
    if gates.shape != (*q.shape[:3], 3):
        swapped = (q.shape[0], q.shape[2], q.shape[1], 3) == gates.shape
        more = f": {_LAYOUT}" if swapped else ""
        raise ValueError(
            f"gates have shape {gates.shape}; for q {q.shape} it must be {(*q.shape[:3], 3)}{more}"
        )


def check_queries(q: Array, q_positions: Array | None, segment_ids: Array | None, k: Array | None) -> None:
    """Shapes of what says where queries stand among the keys."""
    batch, length = q.shape[:2]
    keys = None if k is None else k.shape[1]
    if segment_ids is not None:
        _check_integers("segment_ids", segment_ids)
        if segment_ids.ndim != 2 or segment_ids.shape[0] != batch or keys not in (None, segment_ids.shape[1]):
            expected = f"[{batch}, {'S' if keys is None else keys}]"
            raise ValueError(f"segment_ids have shape {segment_ids.shape}, not {expected}")
        keys = segment_ids.shape[1]
    if q_positions is None:
        if keys is not None and keys != length:
            more = f"; or {_LAYOUT}" if k is not None and _heads_second(q, k) else ""
            raise ValueError(f"{length} queries against {keys} keys need q_positions{more}")
    else:
        _check_integers("q_positions", q_positions)
        if q_positions.shape != (batch, length):
            raise ValueError(f"q_positions have shape {q_positions.shape}, not {(batch, length)}")


def check_text(
    q: Array, tokens: Mapping[str, Array], gates: Array, positions: Array | None, segment_ids: Array | None
) -> None:
    """Shapes of whole texts: `tokens` are k_cmp, v_cmp, k_slc, ... of as many tokens as there are queries."""
    check_gates(gates, q)
    named = lambda name: (name, tokens[name])
    check_attention(
        q,
        (named("k_slc"), named("v_slc")),
        (named("k_win"), named("v_win")),
        (named("k_cmp"), named("v_cmp")),
    )
    for name, x in tokens.items():
        if x.shape[1] != q.shape[1]:
            more = f": {_LAYOUT}" if _heads_second(q, x) else ""
            raise ValueError(f"{name} has {x.shape[1]} tokens, q {q.shape[1]}{more}")
    check_queries(q, None, segment_ids, tokens["k_cmp"])
    if positions is not None and positions.shape[:2] != q.shape[:2]:
        raise ValueError(f"positions have shape {positions.shape}, not {q.shape[:2]}")


def check_branches(branches: Collection[str], known: tuple[str, ...]) -> None:
    if isinstance(branches, str) or not branches or not {*branches} <= {*known}:
        raise ValueError(f"branches must be some of {', '.join(known)}, not {branches!r}")


def check_selection(block_size: int, num_blocks: int, num_init: int, num_local: int) -> None:
    check_sizes(block_size=block_size, num_blocks=num_blocks)
    _check_whole(num_init=num_init, num_local=num_local)
    for name, size in (("num_init", num_init), ("num_local", num_local)):
        if size < 0:
            raise ValueError(f"{name} must not be negative, is {size}")
    if num_init + num_local > num_blocks:
        raise ValueError(
            f"{num_init} first and {num_local} local blocks do not fit into num_blocks={num_blocks}"
        )


def check_num_compressed(
    blocks: int, segment_ids: Array | None, length: int | None, block_len: int, stride: int
) -> None:
    """The number of compressed blocks, where the number of tokens is known: by segments or as `length`."""
    if segment_ids is not None:
        length = segment_ids.shape[1]
    if length is None:
        return
    packed = segment_ids is not None
    expected = num_compressed(length, block_len, stride, packed=packed)
    if blocks != expected:
        what = "slots for" if packed else "complete"
        raise ValueError(
            f"k_cmp: {length} tokens have {expected} {what} blocks of {block_len} every {stride}, "
            f"not {blocks}" + (" (num_compressed with packed=True)" if packed else "")
        )


def check_indices_shape(indices: Array, q: Array, k: Array) -> None:
    expected = (q.shape[0], k.shape[2], q.shape[1])
    if indices.ndim != 4 or indices.shape[:3] != expected or indices.shape[3] == 0:
        raise ValueError(f"indices have shape {indices.shape}, not {expected} and at least one slot")
    if not jnp.issubdtype(indices.dtype, jnp.integer):
        raise ValueError(f"indices must be integers, not {indices.dtype}")


@contextlib.contextmanager
def debug_checks() -> Iterator[None]:
    """Within it, calls that are traced or run also check values: `indices` of selected blocks must be in
    ascending order without doubles, missing slots (-1) last, and none may lie after the query's own block.

    Each block that is listed twice would be counted twice. Costs a copy of the indices to the host a call.
    What was compiled before stays as it was compiled.

    Raises:
        ValueError: at the call, where indices are known; jax's own error with the same line, from inside of
            a compiled function.
    """
    token = _checks_values.set(True)
    try:
        yield
    finally:
        _checks_values.reset(token)


def check_indices(indices: Int[Array, "B Hkv T n"], own: Int[Array, "B T"]) -> None:
    """Values of `indices`, within `debug_checks`; `own` is the block of each query's own position, -1 for
    padding."""
    if not _checks_values.get():
        return
    if isinstance(indices, jax.core.Tracer) or isinstance(own, jax.core.Tracer):
        jax.debug.callback(_check_indices, indices, own)
    else:
        _check_indices(indices, own)


def _check_indices(of_blocks: ArrayLike, of_queries: ArrayLike) -> None:
    indices, own = np.asarray(of_blocks), np.asarray(of_queries)
    there = indices >= 0
    later = there & (indices > own[:, None, :, None])
    number = np.where(there, indices.astype(np.int64), np.iinfo(np.int64).max)
    step = np.diff(number.astype(np.float64), axis=-1)
    doubled = np.pad((step == 0) & there[..., 1:], ((0, 0), (0, 0), (0, 0), (1, 0)))
    disordered = np.pad(step < 0, ((0, 0), (0, 0), (0, 0), (1, 0)))
    found = ((doubled, "twice"), (disordered, "out of order"), (later, "after the query's own block"))
    for wrong, what in found:
        if wrong.any():
            b, h, t, slot = np.argwhere(wrong)[0]
            listed = indices[b, h, t].tolist()
            raise ValueError(f"indices[{b}, {h}, {t}] = {listed}: slot {slot} is {what}")

"""Full and sliding attention by Hopper kernels, with a tap on its output whose cotangent is the flow.

Output, log-sum-exp and the gradients of q, k and v come from the kernels of NSA's window, of which full
attention is the case of a window over everything. The tap is a function of its own, the identity on the
output: its backward pass has the output's cotangent, which is all that class_sums.py lacks.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from kernels_pallas.flow.base import Marks, Spec
from kernels_pallas.flow.mosaic_gpu.class_sums import COLUMNS, Sizes, row_class_sums
from kernels_pallas.flow.probe import Probe
from kernels_pallas.hopper import FEATURES, LOG2_E, ROWS
from kernels_pallas.nsa import window_attention_with_lse
from kernels_pallas.target import OLDEST_JAX, current_target, is_hopper

MOST_FEATURES = 128
"""Of a head: compiled for Hopper without spilled registers, in the shared memory that there is."""


def reason_against(spec: Spec, q: Array, v: Array, marks: Marks, probe: Probe) -> str | None:
    """Why the Hopper kernels cannot take a call; None if they can."""
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"wgmma takes bfloat16 and float16 (float32 would be rounded to TF32), not {q.dtype}"
    if max(q.shape[3], v.shape[3]) > MOST_FEATURES:
        return f"head dims {q.shape[3]}/{v.shape[3]} are above {MOST_FEATURES}"
    has = {
        "softcaps": spec.softcap is not None,
        "tokens that see each other whatever their order": marks.together is not None,
        "maps": probe.map_tap is not None,
        "blocking": probe.blocked is not None,
        "factors": probe.factors is not None,
    }
    for what, there in has.items():
        if there:
            return f"they have no {what}"
    taps = [tap for tap in (probe.class_tap, probe.count_tap) if tap is not None]
    if any(tap.shape[-1] > COLUMNS for tap in taps):
        return f"they know at most {COLUMNS} token classes"
    if jax.__version_info__ < OLDEST_JAX:
        return f"they need jax {'.'.join(map(str, OLDEST_JAX))} or newer, not {jax.__version__}"
    if current_target() == "device" and not is_hopper():
        return "the default device is no Hopper GPU"
    return None


def kernel_attention(
    spec: Spec,
    q: Float[Array, "B T H Dk"],
    k: Float[Array, "B T Hkv Dk"],
    v: Float[Array, "B T Hkv Dv"],
    marks: Marks,
    probe: Probe,
    sinks: Float[Array, " H"] | None = None,
) -> Float[Array, "B T H Dv"]:
    """Attention in the dtype of q whose cotangents include those of the probe's taps over classes.

    Sinks take part afterwards: a logit more in the softmax makes the output smaller by one factor a row.
    """
    window = q.shape[1] if spec.window is None else spec.window
    out, lse = window_attention_with_lse(
        q,
        k,
        v,
        window=window,
        scale=spec.scale,
        segment_ids=marks.segment_ids,
        implementation="mosaic_gpu",
    )
    if sinks is not None:
        whole = jnp.logaddexp(lse, sinks.astype(jnp.float32)[None, None])
        out = (out.astype(jnp.float32) * jnp.exp(lse - whole)[..., None]).astype(out.dtype)
        lse = whole
    q, k, v, lse = map(lax.stop_gradient, (q, k, v, lse))
    return _tapped(spec, out, (q, k, v, lse), marks, probe)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(spec: Spec, out: Array, operands: tuple[Array, ...], marks: Marks, probe: Probe) -> Array:
    return out


def _forward(
    spec: Spec, out: Array, operands: tuple[Array, ...], marks: Marks, probe: Probe
) -> tuple[Array, tuple[Any, ...]]:
    return out, (operands, marks, probe)


def _backward(spec: Spec, saved: tuple[Any, ...], d_out: Array) -> tuple[Any, ...]:
    (q, k, v, lse), marks, probe = saved
    first, visible = _first_seen(spec, marks, q.shape[:2])
    flow = count = None
    if probe.class_tap is not None:
        flow = _class_sums(spec, q, k, v, lse, d_out, first, probe)
    if probe.count_tap is not None:
        hot = jax.nn.one_hot(probe.classes, probe.count_tap.shape[-1], dtype=jnp.float32)
        count = _edges(hot, first, visible)
    return d_out, None, None, probe.cotangent(class_tap=flow, count_tap=count)


_tapped.defvjp(_forward, _backward)


def _first_seen(spec: Spec, marks: Marks, shape: tuple[int, ...]) -> tuple[Int[Array, "B T"], Array]:
    """The first token that each token sees, and whether it sees any: segments are stretches."""
    index = jnp.broadcast_to(jnp.arange(shape[1], dtype=jnp.int32)[None], shape)
    first, visible = jnp.zeros_like(index), jnp.ones(shape, bool)
    if marks.segment_ids is not None:
        segments = marks.segment_ids
        changed = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
        first, visible = lax.cummax(jnp.where(changed, index, 0), axis=1), segments != 0
    if spec.window is not None:
        first = jnp.maximum(first, index - spec.window + 1)
    return jnp.where(visible, first, index), visible


def _edges(hot: Float[Array, "B T K"], first: Int[Array, "B T"], visible: Array) -> Float[Array, "B K K"]:
    """Visible edges j < i of each pair of classes, from running counts."""
    before = jnp.pad(jnp.cumsum(hot, axis=1), ((0, 0), (1, 0), (0, 0)))
    seen = before[:, :-1] - jnp.take_along_axis(before, first[:, :, None], axis=1)
    return jnp.einsum("btc,btk->bck", jnp.where(visible[:, :, None], hot, 0.0), seen)


def _class_sums(
    spec: Spec, q: Array, k: Array, v: Array, lse: Array, d_out: Array, first: Array, probe: Probe
) -> Array:
    tap = probe.class_tap
    heads, classes, length = q.shape[2], tap.shape[-1], q.shape[1]
    absolute = "none" if probe.signed else "heads" if probe.needs_absolute or probe.per_head else "sum"
    wide = max(q.shape[3], v.shape[3]) > FEATURES
    sizes = Sizes(spec.scale, probe.per_head, absolute, stages=2 if wide else 3)
    if current_target() == "interpreter":
        sizes = Sizes(spec.scale, probe.per_head, absolute, warpgroups=1, registers=False)
    extra = -length % sizes.rows

    def pack(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, -x.shape[3] % FEATURES)))
        return x.swapaxes(1, 2).astype(q.dtype)

    hot = jax.nn.one_hot(probe.classes, classes, dtype=jnp.float32)
    base2 = jnp.where(jnp.isfinite(lse), lse, 0.0) * LOG2_E
    base2 = jnp.pad(base2, ((0, 0), (0, extra), (0, 0))).swapaxes(1, 2)
    index = np.arange(length + extra, dtype=np.int32)
    first = jnp.where(index[None] < length, jnp.pad(first, ((0, 0), (0, extra))), index[None])
    ends = jnp.where(first < index[None], index[None], 0).reshape(first.shape[0], -1, sizes.rows)
    starts = jnp.where(first < index[None], first, index[-1]).reshape(ends.shape)
    stop = -(-jnp.max(ends, axis=2) // ROWS)
    bounds = jnp.stack([jnp.minimum(jnp.min(starts, axis=2) // ROWS, stop), stop], axis=2)
    padded_hot = jnp.pad(hot, ((0, 0), (0, extra), (0, COLUMNS - classes)))
    by_row = row_class_sums(pack(q), pack(d_out), pack(k), pack(v), base2, first, bounds, padded_hot, sizes)
    by_row = by_row[..., :length, :classes]
    if probe.per_head:
        return jnp.einsum("btc,bhtk->bhck", hot, by_row)
    sums = jnp.einsum("btc,btk->bck", hot, by_row)
    return sums / heads if probe.reduction == "mean_abs" else sums

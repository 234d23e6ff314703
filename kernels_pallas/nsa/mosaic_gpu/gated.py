"""The three branches with their gates as one differentiable function, which moves less than one by one.

The kernels of the backward pass read the gradient of the weighted sum where it is and multiply by the gates
themselves, so no gated copy of it is written; and each adds its gradient of the queries to that of the branch
before. The window's forward kernel adds the branches up. What XLA does between the kernels is then one pass
over the outputs, for the gates' gradients.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Array, Float, Int

from kernels_pallas.nsa.base import (
    NSA_RESIDUALS,
    GatedBranches,
    Positions,
    Residuals,
    SelectionGrid,
    dot_outputs,
    named,
    softmax_shift,
)
from kernels_pallas.nsa.mosaic_gpu.block_selection import select_blocks
from kernels_pallas.nsa.mosaic_gpu.common import Tuning
from kernels_pallas.nsa.mosaic_gpu.vjp import Kernels, forward, forward_and_sum, gradients

BRANCHES = ("compression", "selection", "window")


class Gated(NamedTuple):
    """Static facts."""

    grid: SelectionGrid
    compression: Kernels
    selection: Kernels
    window: Kernels
    scores: Tuning


class Operands(NamedTuple):
    """Grouped queries, keys and values of each branch."""

    q: Float[Array, "B T Hkv G Dk"]
    q_cmp: Float[Array, "B T Hkv G Dk"] | None
    """None: q."""
    k_cmp: Float[Array, "B M Hkv Dk"]
    v_cmp: Float[Array, "B M Hkv Dv"]
    k_slc: Float[Array, "B S Hkv Dk"]
    v_slc: Float[Array, "B S Hkv Dv"]
    k_win: Float[Array, "B S Hkv Dk"]
    v_win: Float[Array, "B S Hkv Dv"]

    def of(self, branch: str) -> tuple[Array, Array, Array]:
        """q, k, v."""
        if branch == "compression":
            return self.q if self.q_cmp is None else self.q_cmp, self.k_cmp, self.v_cmp
        return (self.q, self.k_slc, self.v_slc) if branch == "selection" else (self.q, self.k_win, self.v_win)


class _Saved(NamedTuple):
    operands: Operands
    gates: Array
    indices: Array
    positions: Positions
    outs: tuple[Array, Array, Array]
    lses: tuple[Array, Array, Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_gated(
    op: Gated,
    operands: Operands,
    gates: Float[Array, "B T Hkv G 3"],
    indices: Int[Array, "B T Hkv n"] | None,
    positions: Positions,
) -> GatedBranches:
    """For queries in the order of the rows (groups of more heads than `operators.MOST_HEADS_BY_BLOCK`) and
    at least one compressed key; `indices` None: they are selected."""
    return _forward(op, operands, gates, indices, positions)[0]


def _forward(
    op: Gated, operands: Operands, gates: Array, indices: Array | None, positions: Positions
) -> tuple[GatedBranches, _Saved]:
    q, k, v = operands.of("compression")
    compressed, lse = named(*forward(op.compression, q, k, v, None, positions))
    if indices is None:
        indices = jnp.moveaxis(select_blocks(op.grid, q, k, lse, positions, op.scores), 1, 2)
        indices = checkpoint_name(indices, NSA_RESIDUALS[2])
    selected, lse_slc = named(*forward(op.selection, *operands.of("selection"), indices, positions))
    window = operands.of("window")
    recent, lse_win, out = forward_and_sum(op.window, *window, positions, (compressed, selected), gates)
    recent, lse_win = named(recent, lse_win)
    out = checkpoint_name(out, NSA_RESIDUALS[0])  # or it would take the window's kernel once more
    outs = compressed, selected, recent
    saved = _Saved(operands, gates, indices, positions, outs, (lse, lse_slc, lse_win))
    return GatedBranches(out, *outs, lse, indices), saved


def _forward_saving(
    op: Gated, operands: Any, gates: Any, indices: Any, positions: Any
) -> tuple[GatedBranches, _Saved]:
    plain = jax.tree.map(lambda x: x.value, (operands, gates, indices, positions))
    return _forward(op, *plain)


def _backward(op: Gated, saved: _Saved, cotangents: Any) -> tuple[Any, ...]:
    operands, gates, indices, positions, outs, lses = saved
    d_out, *d_outs, d_lse, _ = cotangents
    filled = lambda x, like: jnp.zeros_like(like) if isinstance(x, SymbolicZero) else x
    together = all(isinstance(x, SymbolicZero) for x in (*d_outs, d_lse))
    d_out = filled(d_out, outs[0])
    wide = d_out.astype(jnp.float32)
    # One pass over the outputs: a gate's gradient, and what lessens the gradient of each weight.
    deltas = [dot_outputs(wide, out) for out in outs]
    d_gates = jnp.stack(deltas, axis=-1).astype(gates.dtype)
    found: dict[str, tuple[Array, Array, Array]] = {}
    dq = None
    for i, branch in enumerate(BRANCHES):
        q, k, v = operands.of(branch)
        chosen = indices if branch == "selection" else None
        if branch == "selection" and operands.q_cmp is not None:
            dq = None
        if together:
            gate, shift, d_branch = gates[..., i].astype(jnp.float32), deltas[i], d_out
        else:
            gate = None
            d_branch = gates[..., i, None].astype(jnp.float32) * wide
            d_branch = (d_branch + filled(d_outs[i], outs[i]).astype(jnp.float32)).astype(q.dtype)
            of_lse = filled(d_lse, lses[0]) if i == 0 else jnp.zeros_like(lses[i])
            residuals = Residuals(q, k, v, chosen, positions, outs[i], lses[i])
            shift = softmax_shift(residuals, d_branch, of_lse)
        kernels = getattr(op, branch)
        found[branch] = gradients(
            kernels, q, k, v, chosen, positions, lses[i], d_branch, shift, gate=gate, before=dq
        )
        dq = found[branch][0]
    of = lambda branch, j: found[branch][j]
    keys = [of(branch, j) for branch in BRANCHES for j in (1, 2)]
    d_q_cmp = None if operands.q_cmp is None else of("compression", 0)
    return Operands(of("window", 0), d_q_cmp, *keys), d_gates, None, None


attend_gated.defvjp(_forward_saving, _backward, symbolic_zeros=True)

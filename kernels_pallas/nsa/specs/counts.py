"""FLOPs and bytes of each Hopper kernel, counted from the plans that the kernels follow.

Rows, tiles and plans are those of mosaic_gpu/plan.py; all is static but the selected blocks, which are given.
"""

import dataclasses
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from kernels_pallas.hopper import FEATURES, ROWS
from kernels_pallas.nsa.base import Positions, ceil_div, intervals
from kernels_pallas.nsa.mosaic_gpu.choice import columns_of, rows_of
from kernels_pallas.nsa.mosaic_gpu.common import Tuning, Visible
from kernels_pallas.nsa.mosaic_gpu.plan import TilesOfBlocks, inverse, lists, plan_rows, ranges, readers
from kernels_pallas.nsa.specs.arg_specs import ArgSpec

Branch = Literal["compression", "selection", "window"]
DEFAULT_TUNING = Tuning()
ITEM, NUMBER = 2, 4
"""Bytes of an operand (bfloat16) and of float32 and int32."""


@dataclasses.dataclass(frozen=True)
class Device:
    """Rates that kernels can reach, not those of the data sheet."""

    name: str
    flops: float
    hbm_bytes: float
    l2_bytes: float


H100 = Device("NVIDIA H100 SXM", flops=800e12, hbm_bytes=3.0e12, l2_bytes=5.4e12)
"""Per second: large bf16 products, copies in device memory, loads from L2 into shared memory (what public
Triton kernels of selection reach). Measured by others, not by this project."""
H200 = Device("NVIDIA H200 SXM", flops=770e12, hbm_bytes=4.3e12, l2_bytes=5.4e12)
"""The same processor with faster memory; products and copies as they were seen on one, L2 as for the H100."""
DEVICES = {"h100": H100, "h200": H200}


class Count(NamedTuple):
    """Of one kernel, for the whole call."""

    flops: float
    """Of the products that run, masked parts of tiles included."""
    useful_flops: float
    """Of the pairs of a query and a key that it sees."""
    l2_bytes: float
    """That TMA brings from L2 (or beyond it) into shared memory."""
    hbm_bytes: float
    """Every operand read once and every result written once."""

    def floors_ms(self, device: Device = H100) -> dict[str, float]:
        """Milliseconds below which each rate does not let the kernel come."""
        return {
            "products": 1e3 * self.flops / device.flops,
            "l2": 1e3 * self.l2_bytes / device.l2_bytes,
            "hbm": 1e3 * self.hbm_bytes / device.hbm_bytes,
        }

    def floor_ms(self, device: Device = H100) -> float:
        return max(self.floors_ms(device).values())


def pairs(spec: ArgSpec) -> dict[str, int]:
    """Pairs of a query and a key that it sees, of one sequence and head: for each branch, and dense."""
    t = np.arange(spec.length, dtype=np.int64)
    selected = np.minimum(spec.num_blocks, t // spec.block_size + 1)
    return {
        "compression": int(np.clip((t - spec.block_len + 1) // spec.stride + 1, 0, spec.blocks).sum()),
        "selection": int(((selected - 1) * spec.block_size + t % spec.block_size + 1).sum()),
        "window": int(np.minimum(t + 1, spec.window).sum()),
        "dense": int((t + 1).sum()),
    }


def forward_flops(spec: ArgSpec, branch: str) -> float:
    """Useful ones of a branch, or of "dense" attention."""
    return 2.0 * pairs(spec)[branch] * spec.batch * spec.heads * (spec.key_dim + spec.value_dim)


class _Steps(NamedTuple):
    """What the plan of a branch comes to, over the batch and its key/value heads."""

    tiles: int
    """Tiles of keys that are loaded: once for all warpgroups of a program."""
    computed: int
    """The same for every warpgroup that does not pass over them."""
    reading: int
    """Tiles of 64 rows times tiles of 64 keys in the pass over keys."""
    rows: int
    keys: int
    """Rows and (padded) keys."""


def kernels(
    spec: ArgSpec,
    branch: Branch,
    indices: Int[np.ndarray, "B Hkv T n"] | None = None,
    tuning: Tuning = DEFAULT_TUNING,
) -> dict[str, Count]:
    """forward, query_gradient and key_gradients of a branch; of selection with these selected blocks.

    Raises:
        ValueError: selection without `indices`.
    """
    steps = _steps(spec, branch, indices, tuning)
    dk, dv = (ceil_div(dim, FEATURES) * FEATURES for dim in (spec.key_dim, spec.value_dim))
    useful = 2.0 * pairs(spec)[branch] * spec.batch * spec.heads
    product, tile = 2.0 * ROWS * tuning.keys * steps.computed, tuning.keys * (dk + dv) * ITEM
    numbers = 3 if branch == "selection" else 2  # first, end and the bit of a row
    row_in, row_out = dk * ITEM + numbers * NUMBER, dv * ITEM + NUMBER
    row_back = (dk + dv) * ITEM + (2 + numbers) * NUMBER
    keys = steps.keys * (dk + dv) * ITEM
    step_back = ROWS * ((dk + dv) * ITEM + 4 * NUMBER)
    return {
        "forward": Count(
            product * (dk + dv),
            useful * (spec.key_dim + spec.value_dim),
            steps.tiles * tile + steps.rows * row_in,
            steps.rows * (row_in + row_out) + keys,
        ),
        "query_gradient": Count(
            product * (2 * dk + dv),
            useful * (2 * spec.key_dim + spec.value_dim),
            steps.tiles * tile + steps.rows * row_back,
            steps.rows * (row_back + dk * ITEM) + keys,
        ),
        "key_gradients": Count(
            2.0 * ROWS * ROWS * steps.reading * 2 * (dk + dv),
            useful * 2 * (spec.key_dim + spec.value_dim),
            steps.reading * step_back + keys,
            steps.rows * row_back + 2 * keys,
        ),
    }


def scores(spec: ArgSpec, tuning: Tuning = DEFAULT_TUNING) -> Count:
    """The kernel that selects blocks: products of scores, of sums over heads and of Eq. 9."""
    groups = plan_rows(spec.length, spec.groups, ROWS).padded_groups
    own_rows, columns = rows_of(groups), columns_of(groups)
    rows_of_tile = tuning.warpgroups * own_rows
    layout = plan_rows(spec.length, spec.groups, rows_of_tile)
    bounds = np.asarray(
        _ranges(
            _visible(spec, "compression", layout.padded_groups, layout.padded_length), rows_of_tile, ROWS
        ).bounds,
        np.int64,
    )
    heads = spec.batch * spec.kv_heads
    steps = int((bounds[..., 3] - bounds[..., 0]).sum()) * heads
    dim = ceil_div(spec.key_dim, FEATURES) * FEATURES
    queries = layout.padded_length * heads
    rows, programs = queries * layout.padded_groups, queries * layout.padded_groups // rows_of_tile
    row, keys = dim * ITEM + NUMBER, spec.blocks * heads * dim * ITEM
    tables = programs * ITEM * (ROWS * ROWS + own_rows * columns)
    computed = steps * tuning.warpgroups
    return Count(
        computed * 2.0 * ROWS * (own_rows * (dim + 2 * columns) + 2 * ROWS * columns),
        2.0 * pairs(spec)["compression"] * spec.batch * spec.heads * spec.key_dim,
        steps * ROWS * dim * ITEM + rows * row + tables,
        rows * row + keys + queries * spec.num_blocks * NUMBER,
    )


def _visible(spec: ArgSpec, branch: Branch, padded_groups: int, padded_length: int) -> Visible:
    """Of one sequence; every row of a query sees the same."""
    positions = jnp.arange(spec.length, dtype=jnp.int32)[None]  # an operand, or XLA would fold all of it
    return _visible_at(positions, spec, branch, padded_groups, padded_length)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _visible_at(
    positions: Array, spec: ArgSpec, branch: Branch, padded_groups: int, padded_length: int
) -> Visible:
    stride, offset = (spec.stride, spec.block_len - 1) if branch == "compression" else (1, 0)
    window = spec.window if branch == "window" else None
    first, end = intervals(Positions(positions), stride, offset, window)
    end = jnp.minimum(end, spec.blocks if branch == "compression" else spec.length)
    missing = ((0, 0), (0, padded_length - spec.length))
    return Visible(*(jnp.repeat(jnp.pad(x, missing), padded_groups, axis=1) for x in (first, end)))


_ranges = jax.jit(ranges, static_argnums=(1, 2))
_lists = jax.jit(lists, static_argnums=(0, 2, 3, 4))
_inverse = jax.jit(inverse, static_argnums=1)


def _steps(spec: ArgSpec, branch: Branch, indices: np.ndarray | None, tuning: Tuning) -> _Steps:
    layout = plan_rows(spec.length, spec.groups, tuning.rows)
    heads = spec.batch * spec.kv_heads
    number = spec.blocks if branch == "compression" else spec.length
    padded_keys = ceil_div(number, max(tuning.keys, ROWS)) * max(tuning.keys, ROWS)
    rows = layout.padded_length * layout.padded_groups * heads
    if branch == "selection":
        if indices is None:
            raise ValueError("counts of selection depend on the selected blocks; give indices")
        selected = TilesOfBlocks(jnp.moveaxis(jnp.asarray(indices), 1, 2), None)
        blocks = padded_keys // tuning.keys
        plan = _lists(layout, selected, blocks, tuning.rows, tuning.warpgroups)
        used = np.arange(plan.blocks.shape[2]) < np.asarray(plan.steps)[..., None]
        computed = sum(
            int((((np.asarray(plan.members) & bits) != 0) & used).sum())
            for bits in np.asarray(plan.warpgroup_bits)
        )
        single = _lists(layout, selected, blocks, ROWS, 1)
        reading = int(np.asarray(_inverse(single, blocks).start)[:, -1].sum())
        return _Steps(int(np.asarray(plan.steps).sum()), computed, reading, rows, padded_keys * heads)
    visible = _visible(spec, branch, layout.padded_groups, layout.padded_length)
    bounds = np.asarray(_ranges(visible, tuning.rows, tuning.keys).bounds, np.int64)
    tiles = int((bounds[..., 3] - bounds[..., 0]).sum()) * heads
    turned = _readers(visible, padded_keys // ROWS)
    reading = int((turned[..., 1] - turned[..., 0]).sum()) * heads
    return _Steps(tiles, tiles * tuning.warpgroups, reading, rows, padded_keys * heads)


def _readers(visible: Visible, tiles: int, chunk: int = 256) -> np.ndarray:
    """`plan.readers` for a few tiles of keys at a time: it compares each with all tiles of rows."""
    plan = _ranges(visible, ROWS, ROWS)
    part = jax.jit(lambda plan, s: readers(plan._replace(bounds=jnp.maximum(plan.bounds - s, 0)), chunk))
    found = [np.asarray(part(plan, start), np.int64) for start in range(0, tiles, chunk)]
    return np.concatenate(found, axis=1)[:, :tiles]

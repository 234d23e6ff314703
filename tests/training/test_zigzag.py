"""Sequences over `context`: where their tokens lie, what neighbours give, and that all devices have the same
work."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlab.models.mesh import Part, in_parts, reorder, stretches_of
from jaxlab.models.sharding import MeshConfig, make_mesh, on_mesh
from kernels_pallas.nsa.base import Interval, Positions
from kernels_pallas.nsa.xla import interval_attention

PARTS = 4
LENGTH = 24
ZIGZAG = [0, 7, 1, 6, 2, 5, 3, 4]
"""Stretches by device, two of each."""


def on_four(function):
    mesh = make_mesh(MeshConfig(data=1, context=PARTS))
    run = jax.jit(on_mesh(function, mesh))
    return lambda x: run(jax.device_put(x, NamedSharding(mesh, PartitionSpec())))


def test_tokens_go_to_the_zigzag_and_back():
    x = jnp.arange(2.0 * LENGTH).reshape(2, LENGTH, 1)
    turned = on_four(reorder)(x)
    by_stretch = np.asarray(x).reshape(2, 8, 3, 1)[:, ZIGZAG]
    np.testing.assert_array_equal(turned.reshape(2, 8, 3, 1), by_stretch)
    np.testing.assert_array_equal(on_four(functools.partial(reorder, back=True))(turned), x)


@pytest.mark.parametrize("before", [2, 7])
def test_a_device_has_two_stretches_and_what_lies_before_and_after_them(before):
    """Neighbours may lie on another device, on the same one, or further than one stretch away."""
    x = 1 + jnp.arange(2.0 * LENGTH).reshape(2, LENGTH, 1)

    def core(tokens, rows, weights, blocks, part: Part):
        assert (part.parts, part.length, part.stretch) == (PARTS, 6, 3)
        around = part.joined(part.with_neighbours(tokens, before, 1))  # [B, 2 (before + 3 + 1), 1]
        wrong = jnp.sum(jnp.abs(part.whole(tokens) - rows)) + jnp.sum(jnp.abs(part.own(rows) - tokens))
        ids = part.joined(part.rows_with_neighbours(rows[:, :, 0].astype(jnp.int32), before))
        return jnp.concatenate([around[..., 0], ids.astype(jnp.float32)], axis=1)[
            ..., None
        ] + wrong, part.positions(2)[:, None]

    found, positions = on_four(lambda x: in_parts(core, reorder(x), x, None, stretches=stretches_of(LENGTH)))(
        x
    )
    np.testing.assert_array_equal(positions[0, 0].reshape(8, 3)[:, 0] // 3, ZIGZAG)
    around, ids = np.split(np.asarray(found)[..., 0].reshape(2, PARTS, -1), [2 * (before + 4)], axis=2)
    padded = np.pad(np.asarray(x)[..., 0], ((0, 0), (before, 1)))
    for place, stretch in enumerate(ZIGZAG):
        device, second = divmod(place, 2)
        width = before + 4
        expected = padded[:, 3 * stretch : 3 * stretch + width]
        np.testing.assert_array_equal(around[:, device, second * width :][:, :width], expected)
        np.testing.assert_array_equal(
            ids[:, device, second * (width - 1) :][:, : width - 1], expected[:, :-1]
        )


def test_gradients_of_what_neighbours_give_go_back_to_them():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, LENGTH, 1)), jnp.float32)
    weight = jnp.arange(1.0, 6.0)[None, :, None]

    def weighed(x):
        core = lambda y, _, __, ___, part: (
            part.joined(part.with_neighbours(y, 2, 0) * weight)[:, : part.length],
            None,
        )
        return jnp.sum(in_parts(core, reorder(x), None, None, stretches=2)[0] ** 2)

    def plainly(x):
        padded = jnp.pad(x, ((0, 0), (2, 0), (0, 0)))
        rows = jnp.stack([padded[:, 3 * i : 3 * i + 5] * weight for i in ZIGZAG], axis=1)
        return jnp.sum(rows.reshape(1, PARTS, 10, 1)[:, :, :6] ** 2)

    np.testing.assert_allclose(on_four(jax.grad(weighed))(x), jax.grad(plainly)(x), rtol=1e-6)


def test_where_stretches_are_no_whole_units_each_device_has_one():
    assert stretches_of(LENGTH) == 1
    with jax.sharding.use_abstract_mesh(make_mesh(MeshConfig(data=1, context=PARTS)).abstract_mesh):
        assert stretches_of(LENGTH) == 2
        assert stretches_of(20) == 1
        assert stretches_of(LENGTH, unit=2) == 1
        assert stretches_of(LENGTH, least=4) == 1


# Of 65,536 tokens on eight devices, the paper's sizes.
TOKENS, DEVICES = 65536, 8
BRANCHES = {
    "full": Interval(1, 0, TOKENS, 1.0),
    "compression": Interval(16, 31, None, 1.0),
    "window": Interval(1, 0, 512, 1.0),
}


def queries_of(device, stretches):
    size = TOKENS // DEVICES // stretches
    numbers = [device, 2 * DEVICES - 1 - device][:stretches]
    return np.concatenate([np.arange(n * size, (n + 1) * size) for n in numbers])


def pairs(branch, rows):
    """Query and key pairs that these queries see."""
    if branch == "selection":
        return np.minimum(rows + 1, 16 * 64).sum()
    interval = BRANCHES[branch]
    seen = np.maximum(0, (rows - interval.offset) // interval.stride + 1)
    return (seen if interval.window is None else np.minimum(seen, interval.window)).sum()


def tiles(branch, rows):
    """Tiles of keys that the loops of `interval_attention` run for these queries."""
    interval = BRANCHES[branch]
    keys = TOKENS // interval.stride
    sizes = interval_attention.Tiles(256, interval_attention.KEY_TILE, keys)
    positions = Positions(jnp.asarray(rows, jnp.int32)[None])
    seen = interval_attention._chunks(interval, sizes, positions)
    start, end = jax.vmap(functools.partial(interval_attention._tile_range, sizes))(seen)
    return int(jnp.sum(end - start))


def over_the_mean(work):
    return max(work) / np.mean(work)


@pytest.mark.parametrize("count", [pairs, tiles])
def test_no_device_has_more_attention_work_than_another(count):
    """By pairs of queries and keys, and by the tiles that are computed; in order the last device has up to
    twice the mean."""
    for branch in BRANCHES:
        in_order, zigzag = (
            [count(branch, queries_of(device, n)) for device in range(DEVICES)] for n in (1, 2)
        )
        assert over_the_mean(zigzag) < 1.005, branch
        assert sum(zigzag) == sum(in_order)
        if branch != "window":
            assert over_the_mean(in_order) > 1.8, branch
    if count is pairs:  # all of NSA, a compressed key being as much work as a token
        both = [
            [
                sum(pairs(b, queries_of(d, n)) for b in ("compression", "selection", "window"))
                for d in range(DEVICES)
            ]
            for n in (1, 2)
        ]
        assert over_the_mean(both[0]) > 1.45
        assert over_the_mean(both[1]) < 1.01

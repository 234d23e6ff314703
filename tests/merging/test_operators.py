"""Operators against values worked out by hand, identities, and what must not change their bits."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxlab.errors import UserError
from jaxlab.merging import OPERATORS, merge_tensors, task_vector, tensor_key

KEY = tensor_key(0, "model.norm.weight")
BASE = jnp.array([1.0, 1.0, 1.0, 1.0])
X = jnp.array([2.0, -1.0, 4.0, 1.0])  # task vector 1 -2 3 0
Y = jnp.array([3.0, 3.0, -2.0, 2.0])  # task vector 2 2 -3 1
TASK_METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")


def merged(method, tensors=(X, Y), base=BASE, **options):
    return np.asarray(merge_tensors(method, list(tensors), base=base, **options)).tolist()


def test_task_vector_of_arrays_and_trees():
    assert np.asarray(task_vector(X, BASE)).tolist() == [1, -2, 3, 0]
    tree = task_vector({"a": {"b": X.astype(jnp.bfloat16)}}, {"a": {"b": BASE.astype(jnp.bfloat16)}})
    assert tree["a"]["b"].dtype == jnp.float32


def test_linear_by_hand():
    assert merged("linear", weight=[3, 1]) == [2.25, 0.0, 2.5, 1.25]
    assert merged("linear", weight=[3, 1], normalize=False) == [9, 0, 10, 5]
    assert merged("linear", base=None) == [2.5, 1.0, 1.0, 1.5]


def test_task_arithmetic_by_hand():
    assert merged("task_arithmetic", weight=[1, 0.5], **{"lambda": 2.0}) == [5, -1, 4, 2]
    assert merged("task_arithmetic", weight=[1, 3], normalize=True) == [2.75, 2, -0.5, 1.75]


def test_ties_by_hand_paper():
    # Votes 3 0 0 1. Zero elects nobody; those who agree are averaged.
    assert merged("ties") == [2.5, 1.0, 1.0, 2.0]
    assert merged("ties", weight=[1, 3]) == [1 + 7 / 4, 1.0, 1.0, 2.0]
    assert merged("ties", normalize=False, **{"lambda": 0.5}) == [2.5, 1.0, 1.0, 1.5]
    # Trimmed to 0 -2 3 0 (of X) and 2 0 -3 0 (of Y: 2 and 2 tie, the first stays).
    assert merged("ties", density=0.5) == [3.0, -1.0, 1.0, 1.0]
    # The election does not know the weights: element 0 stays positive although Y's weighted -0.1 * 2 pulls.
    assert merged("ties", weight=[1, -0.1], normalize=False)[0] == pytest.approx(1 + 1 - 0.2)


def test_ties_by_hand_mergekit():
    # Votes of weighted deltas; zero elects plus.
    assert merged("ties", mode="mergekit", weight=1.0) == [2.5, 3.0, 4.0, 2.0]
    assert merged("ties", mode="mergekit", weight=[1, -1]) == [3.0, -3.0, 7.0, 2.0]


def test_dare_by_hand():
    mask = [np.array([1, 0, 1, 1], bool), np.array([0, 1, 1, 0], bool)]
    assert merged("dare_linear", density=0.5, mask=mask) == [1 + 2, 1 + 4, 1 + 6 - 6, 1 + 0]
    assert merged("dare_linear", density=0.5, mask=mask, rescale=False, weight=[1, 2]) == [2, 5, 1 + 3 - 6, 1]
    assert merged("dare_linear", density=[0.5, 0.25], mask=mask) == [3, 1 + 8, 1 + 6 - 12, 1]
    # Elected after dropping: votes 2 4 0 0; the mean of those who agree.
    assert merged("dare_ties", density=0.5, mask=mask) == [3, 5, 1, 1]
    # mergekit: to the L1 norm before, 6 / 4 and 8 / 5.
    want = [1 + 1.5, 1 + 2 * 1.6, 1 + 4.5 - 3 * 1.6, 1]
    assert merged("dare_linear", mode="mergekit", density=0.5, mask=mask) == pytest.approx(want)


def test_slerp_by_hand():
    a, b = jnp.array([2.0, 0.0]), jnp.array([0.0, 1.0])
    half = np.sqrt(0.5)
    assert merged("slerp", (a, b), None, t=0.5) == pytest.approx([2 * half, half])
    third = np.sin(np.pi / 3), np.sin(np.pi / 6)
    assert merged("slerp", (b,), a, t=1 / 3) == pytest.approx([2 * third[0], third[1]])
    # Nearly parallel: mergekit takes the line, the paper's formula goes on.
    near = jnp.array([2.0, 0.05])
    line = 0.75 * np.asarray(a) + 0.25 * np.asarray(near)
    assert merged("slerp", (a, near), None, t=0.25, mode="mergekit") == pytest.approx(line.tolist(), rel=1e-6)
    angle = np.arctan2(0.05, 2.0)
    arc = (np.sin(0.75 * angle) * np.asarray(a) + np.sin(0.25 * angle) * np.asarray(near)) / np.sin(angle)
    assert merged("slerp", (a, near), None, t=0.25) == pytest.approx(arc.tolist(), rel=1e-6)
    assert merged("slerp", (a, -a), None, t=0.5) == [0.0, 0.0]
    assert merged("slerp", (a, a * 0), None, t=0.25) == [1.5, 0.0]


@pytest.mark.parametrize("mode", ["paper", "mergekit"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_identities(mode, dtype):
    rng = np.random.default_rng(0)
    base, x, y = (jnp.asarray(rng.normal(size=(7, 5)), jnp.float32).astype(dtype) for _ in range(3))
    options = {"mode": mode, "base": base}
    for method in TASK_METHODS:
        random = {"key": KEY} if OPERATORS[method].random else {}
        thin = {} if method == "task_arithmetic" else {"density": 0.4}
        result = merge_tensors(
            method, [x, y], weight=[0.5, 0.7], **{"lambda": 0.0}, **options, **random, **thin
        )
        assert result.dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(result, base, err_msg=f"{method}: lambda 0 is the base")
    plain = merge_tensors("task_arithmetic", [x, y], weight=[0.5, 0.7], **options)
    np.testing.assert_array_equal(
        merge_tensors("dare_linear", [x, y], weight=[0.5, 0.7], key=KEY, **options), plain
    )
    ties = merge_tensors("ties", [x, y], weight=[0.5, 0.7], **options)
    full = merge_tensors("dare_ties", [x, y], weight=[0.5, 0.7], key=KEY, normalize=True, **options)
    np.testing.assert_array_equal(full, ties)
    for method in ("ties", "task_arithmetic"):
        one = merge_tensors(
            method, [x], weight=[0.7], **{"lambda": 1.0, "normalize": method == "ties"}, **options
        )
        exact = np.asarray(base, np.float64) + (np.asarray(x, np.float64) - np.asarray(base, np.float64)) * (
            1.0 if method == "ties" else 0.7
        )
        np.testing.assert_allclose(
            np.asarray(one, np.float64), exact, atol=0.05 if dtype == "bfloat16" else 5e-3
        )
    np.testing.assert_array_equal(merge_tensors("linear", [x, x], mode=mode, weight=[2, 2]), x)
    for t, end in ((0.0, x), (1.0, y)):
        np.testing.assert_array_equal(merge_tensors("slerp", [x, y], t=t, mode=mode), end)


def kept(x, density):
    """The trimmed tensor, by a stable sort."""
    order = np.argsort(-np.abs(x).reshape(-1), kind="stable")
    count = max(int(density * x.size), 1) if density > 0 and x.size else 0
    mask = np.zeros(x.size, bool)
    mask[order[:count]] = True
    return np.where(mask.reshape(x.shape), x, 0)


@settings(max_examples=30)
@given(
    shape=st.sampled_from([(), (3, 0), (1,), (7,), (2, 3, 5)]),
    density=st.floats(0, 1),
    seed=st.integers(0, 1000),
    coarse=st.booleans(),
)
def test_trimming_is_a_stable_sort(shape, density, seed, coarse):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    x = np.asarray(np.round(x) if coarse else x, np.float32)  # rounded: many ties
    base = np.zeros(shape, np.float32)
    got = np.asarray(merge_tensors("ties", [x], base=base, density=density))
    np.testing.assert_array_equal(got, kept(np.asarray(x), density))
    assert got.shape == shape


@pytest.mark.parametrize("method", OPERATORS)
@pytest.mark.parametrize("shape", [(), (0,), (4, 0), (1, 1), (3, 5, 2)])
def test_every_shape_and_bfloat16(method, shape):
    rng = np.random.default_rng(1)
    base, x, y = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(3))
    options = {"t": 0.3} if method == "slerp" else {"weight": [0.5, 0.5]}
    options |= {"density": 0.5} if "density" in OPERATORS[method].parameters else {}
    result = merge_tensors(method, [x, y], base=None if method == "slerp" else base, key=KEY, **options)
    assert result.shape == shape
    assert result.dtype == jnp.bfloat16
    assert np.all(np.isfinite(np.asarray(result, np.float32)))


@pytest.mark.parametrize("method", ["linear", *TASK_METHODS])
def test_nan_stays_visible_and_local(method):
    x = X.at[2].set(jnp.nan)
    options = {"key": KEY} if OPERATORS[method].random else {}
    result = merged(method, (x, Y), **options)
    assert np.isnan(result).tolist() == [False, False, True, False]
    if method == "ties":  # trimming keeps a NaN before anything else
        assert np.isnan(merged(method, (x, Y), density=0.25)).tolist() == [False, False, True, False]


def random_tensors(shape=(6, 33), dtype="float32"):
    rng = np.random.default_rng(2)
    return [jnp.asarray(rng.normal(size=shape), jnp.float32).astype(dtype) for _ in range(3)]


CASES = [
    ("linear", {}),
    ("task_arithmetic", {}),
    ("ties", {"density": 0.3}),
    ("dare_linear", {"density": 0.3}),
    ("dare_ties", {"density": 0.3}),
]


@pytest.mark.parametrize(("method", "options"), CASES)
@pytest.mark.parametrize(("mode", "dtype"), [("paper", "float32"), ("mergekit", "bfloat16")])
def test_bits_do_not_depend_on_the_program(method, options, mode, dtype):
    """Eager, jitted with constant or traced weights, mapped over a grid, stacked with other layers."""
    base, x, y = random_tensors(dtype=dtype)

    def merge(weights, tensors=(x, y, base), key=KEY, scale=0.7):
        extra = {} if method == "linear" else {"lambda": scale}
        return merge_tensors(
            method, list(tensors[:2]), base=tensors[2], mode=mode, key=key, weight=weights, **options, **extra
        )

    want = np.asarray(merge([0.9, 0.3]))
    weights = jnp.array([0.9, 0.3])
    grid = jnp.stack([jnp.array([0.1, 0.2]), weights])
    stacked = [jnp.stack([z + jnp.asarray(1, dtype), z]) for z in (x, y, base)]
    keys = jnp.asarray(np.stack([tensor_key(0, "other"), KEY]))

    @jax.jit
    def programs(weights, grid):
        return {
            "constant weights": merge([0.9, 0.3]),
            "traced weights": merge(weights),
            "followed by more": (merge(weights) * jnp.asarray(2, dtype)) / jnp.asarray(2, dtype),
            "mapped": jax.lax.map(merge, grid)[1],
            "stacked": jax.vmap(lambda a, b, c, k, w: merge(w, (a, b, c), k))(*stacked, keys, grid)[1],
        }

    for name, got in programs(weights, grid).items():
        np.testing.assert_array_equal(got, want, err_msg=name)


def test_float32_arithmetic_is_that_of_numpy():
    """One rounding an operation, nothing contracted: a merge can be checked outside of JAX, bit for bit."""
    base, x, y = random_tensors((100, 100))
    w, v = np.float32(0.9), np.float32(0.3)
    n = [np.asarray(z) for z in (base, x, y)]
    want = n[0] + ((n[1] - n[0]) * w + (n[2] - n[0]) * v)
    got = jax.jit(lambda w: merge_tensors("task_arithmetic", [x, y], base=base, weight=w))(jnp.array([w, v]))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("method", ["ties", "dare_linear"])
def test_density_may_be_traced(method):
    base, x, y = random_tensors()
    merge = lambda density: merge_tensors(method, [x, y], base=base, key=KEY, density=density)
    for density in (0.0, 0.25, 0.5, 1.0):
        np.testing.assert_array_equal(jax.jit(merge)(jnp.float32(density)), merge(density))


@pytest.mark.parametrize(("method", "options"), [*CASES, ("slerp", {"t": 0.4})])
def test_two_calls_give_the_same_bits(method, options):
    base, x, y = random_tensors(dtype="bfloat16")
    first, second = (
        merge_tensors(method, [x, y], base=None if method == "slerp" else base, key=KEY, **options)
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, second)


def test_sharding_does_not_change_elementwise_operators():
    base, x, y = random_tensors((8, 16))
    mesh = jax.make_mesh((4,), ("data",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    @jax.jit
    def merge(base, x, y):
        options = {"base": base, "key": KEY, "weight": 0.3}
        return {method: merge_tensors(method, [x, y], **options, **own) for method, own in CASES}

    sharded = merge(*(jax.device_put(z, sharding) for z in (base, x, y)))
    for method, want in merge(base, x, y).items():
        np.testing.assert_array_equal(sharded[method], want, err_msg=method)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: merge_tensors("tie", [X]), "no merge method 'tie'"),
        (lambda: merge_tensors("ties", [X]), "needs base"),
        (lambda: merge_tensors("ties", [], base=BASE), "at least one"),
        (lambda: merge_tensors("ties", [X[:2]], base=BASE), "differ in shape"),
        (lambda: merge_tensors("ties", [X], base=BASE, gamma=1), "no parameter 'gamma'"),
        (lambda: merge_tensors("task_arithmetic", [X], base=BASE, density=0.5), "no parameter 'density'"),
        (lambda: merge_tensors("slerp", [X, Y], weight=1.0, t=0.5), "no parameter 'weight'"),
        (lambda: merge_tensors("slerp", [X, Y]), "needs the parameter t"),
        (lambda: merge_tensors("slerp", [X, Y], base=BASE, t=0.5), "two tensors"),
        (lambda: merge_tensors("dare_linear", [X], base=BASE, density=0.5), "needs key="),
        (lambda: merge_tensors("dare_linear", [X], base=BASE, key=np.zeros(3)), "a key is"),
        (lambda: merge_tensors("dare_linear", [X], base=BASE, mask=[np.ones(3, bool)]), "mask needs one"),
        (lambda: merge_tensors("ties", [X], base=BASE, mask=[np.ones(4, bool)]), "takes no mask"),
        (lambda: merge_tensors("ties", [X], base=BASE, density=1.5), "between 0 and 1"),
        (lambda: merge_tensors("dare_linear", [X], base=BASE, density=-0.5, key=KEY), "between 0 and 1"),
        (lambda: merge_tensors("linear", [X, Y], weight=[1, -1]), "sum to zero"),
        (lambda: merge_tensors("linear", [X, Y], weight=[1, 2, 3]), "3 values for 2 models"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)

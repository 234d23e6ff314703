"""Operators against values worked out by hand, identities, and what must not change their bits."""

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from jaxlab.errors import UserError, UserNote
from jaxlab.merging import AFTERWARDS, OPERATORS, merge_tensors, operator_named, task_vector, tensor_key

KEY = tensor_key(0, "model.norm.weight")
BASE = jnp.array([1.0, 1.0, 1.0, 1.0])
X = jnp.array([2.0, -1.0, 4.0, 1.0])  # task vector 1 -2 3 0
Y = jnp.array([3.0, 3.0, -2.0, 2.0])  # task vector 2 2 -3 1
TASK_METHODS = ("task_arithmetic", "ties", "dare_linear", "dare_ties")
ONE_MODEL = ("nearswap", "arcee_fusion", "passthrough")


def asked_of(method, shape=(), models=2):
    """What an operator needs beside the tensors, for a tensor of this shape."""
    entry, rng = operator_named(method), np.random.default_rng(11)
    options = {"density": 0.5} if "density" in entry.parameters else {}
    options |= {"t": 0.3} if "t" in entry.parameters else {}
    options |= {"key": KEY} if entry.random else {}
    options |= {"bottom": 1, "layer": 1, "num_layers": 3} if method == "layer_swap" else {}
    options |= {"alpha": 0.5, "beta": 1.0, "layer": 1, "num_layers": 3} if method == "lines" else {}
    if method == "fisher":
        options["statistics"] = [np.float32(rng.uniform(0.1, 1, size=shape)) for _ in range(models)]
    if method == "adamerging":
        options["statistics"] = [np.float32(0.5)] * models
    if method.startswith("regmean"):
        options["statistics"] = [np.eye(shape[-1], dtype=np.float32) if len(shape) == 2 else None] * models
    return options


def call(method, tensors, base, **options):
    """The merge with what the operator needs, as a list of arrays: one, or one for each task."""
    entry = operator_named(method)
    tensors = list(tensors)[: 1 if method in ONE_MODEL else len(tensors)]
    own = asked_of(method, np.shape(tensors[0]), len(tensors))
    given = {} if entry.base == "unused" or (method == "slerp" and len(tensors) == 2) else {"base": base}
    found = merge_tensors(method, tensors, **given, **{**own, **options})
    return list(found.values()) if isinstance(found, dict) else [found]


EVERY = [*OPERATORS, *AFTERWARDS]
QUICK = [
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "slerp",
    "breadcrumbs",
    "della",
    "sce",
    "ram",
    "nearswap",
    "nuslerp",
    "emr",
    "tsv_m",
    "layer_swap",
    "trust_region",
    "widen",
]
SOME_QUICK = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EVERY]


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


@pytest.mark.parametrize("method", SOME_QUICK)
@pytest.mark.parametrize("mode", ["paper", pytest.param("mergekit", marks=pytest.mark.slow)])
def test_every_shape_and_bfloat16(method, mode):
    """Scalars, empty tensors, one element, three axes, in one program each: the shape, the dtype, numbers."""
    rng = np.random.default_rng(1)
    for shape in ((), (0,), (4, 0), (1, 1), (3, 5, 2), (5, 4)):
        base, x, y = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for _ in range(3))
        options = {"epsilon": 0.1} if method.startswith("della") else {}
        merge = jax.jit(
            lambda *models, options=options: call(method, models[1:], models[0], mode=mode, **options)
        )
        for result in merge(base, x, y):
            assert result.shape == shape
            assert result.dtype == jnp.bfloat16
            assert np.all(np.isfinite(np.asarray(result, np.float32))), shape


@pytest.mark.parametrize("method", SOME_QUICK)
def test_algebra(method):
    """lambda or weights of zero give the base; a factor comes out; the order of models does not matter."""
    entry = operator_named(method)
    rng = np.random.default_rng(4)
    base, x, y = (jnp.asarray(rng.normal(size=(6, 5)), jnp.float32) for _ in range(3))
    near = dict(rtol=2e-4, atol=2e-5)
    if "lambda" in entry.parameters:
        for result in call(method, (x, y), base, **{"lambda": 0.0}):
            np.testing.assert_array_equal(result, base)
    if entry.takes("weights") and not entry.of_models and method not in ("fisher", "expo", "pcb"):
        normal = {"normalize": False} if "normalize" in entry.parameters else {}
        if not method.startswith("regmean"):
            for result in call(method, (x, y), base, weight=0.0, **normal):
                np.testing.assert_array_equal(result, base)
    zero = jnp.zeros_like(base)
    if not entry.of_models and method not in ("wudi", "optmerge", "pcb", "ram", "ramplus_tl"):
        # Of a base of zeros all is exact: c d_i give c times what d_i give.
        for one, twice in zip(call(method, (x, y), zero), call(method, (4 * x, 4 * y), zero), strict=True):
            np.testing.assert_allclose(twice, 4 * np.asarray(one), **near)
    if entry.takes("weights") and method not in ("layer_swap", "fisher", "magmax") and not entry.random:
        ahead = call(method, (x, y), base, weight=[0.9, 0.4])
        back = call(method, (y, x), base, weight=[0.4, 0.9])
        for one, other in zip(ahead, back[::-1] if entry.per_task else back, strict=True):
            np.testing.assert_allclose(one, other, **near)
    alike = (
        "linear ties slerp nuslerp multislerp karcher model_stock sce ram magmax closed_form_lambda fisher "
    )
    if (
        method
        in (alike + "regmean breadcrumbs_ties della layer_swap ties_global arcee_fusion nearswap").split()
    ):
        whole = {"density": 1.0} if "density" in entry.parameters else {}
        whole |= {"normalize": True} if "normalize" in entry.parameters else {}
        whole |= {"gamma": 0.0} if "gamma" in entry.parameters else {}
        whole |= {"t": 1e9} if method == "nearswap" else {}
        (result,) = call(method, (x, x), x if method == "arcee_fusion" else base, **whole)
        bias = {"atol": 2e-4} if method == "closed_form_lambda" else {}  # its ridge
        np.testing.assert_allclose(result, x, **near | bias)


@pytest.mark.parametrize(
    ("thinned", "options", "plain"),
    [
        ("ties_global", {}, "ties"),
        ("breadcrumbs", {"gamma": 0.0}, "task_arithmetic"),
        ("breadcrumbs_ties", {"gamma": 0.0, "normalize": True}, "ties"),
        ("della_linear", {}, "task_arithmetic"),
        ("della", {}, "ties"),
        ("dare_linear", {"rescale": False}, "task_arithmetic"),
        ("consensus_ta", {"k": 0}, "task_arithmetic"),
    ],
)
@pytest.mark.parametrize("mode", ["paper", "mergekit"])
def test_all_kept_is_nothing_trimmed(thinned, options, plain, mode):
    rng = np.random.default_rng(0)
    base, x, y = (jnp.asarray(rng.normal(size=(7, 5)), jnp.bfloat16) for _ in range(3))
    whole = {"density": 1.0} if "density" in OPERATORS[thinned].parameters else {}
    for weight in ([0.5, 0.7], [1.0, -0.5]):
        (got,) = call(thinned, (x, y), base, weight=weight, mode=mode, **whole, **options)
        (want,) = call(
            plain, (x, y), base, weight=weight, mode=mode, **({"density": 1.0} if plain == "ties" else {})
        )
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    "method", ["breadcrumbs", "magmax", "ram", "nearswap", "tall", "consensus_ta", "della"]
)
def test_nan_stays_local_in_others(method):
    x = X.at[2].set(jnp.nan)
    for result in call(
        method, (x, Y), BASE, **({"density": 1.0, "gamma": 0.0} if method == "breadcrumbs" else {})
    ):
        assert np.isnan(np.asarray(result)).tolist() == [False, False, True, False]


def test_elements_may_be_merged_in_chunks():
    """What an operator of scope element gives for a part of a tensor is a part of what the whole gives."""
    rng = np.random.default_rng(3)
    base, x, y = (jnp.asarray(rng.normal(size=300), jnp.bfloat16) for _ in range(3))
    methods = [name for name, entry in OPERATORS.items() if entry.scope("paper") == "element"]
    assert {"linear", "task_arithmetic", "dare_linear", "dare_ties", "ram", "magmax", "tall"} <= set(methods)
    for method in methods:
        if method == "fisher":  # its statistics would be cut too
            continue
        wholes = call(method, (x, y), base)
        parts = [
            call(method, (x[a:b], y[a:b]), base[a:b], offset=a) for a, b in ((0, 1), (1, 130), (130, 300))
        ]
        for i, whole in enumerate(wholes):
            joined = jnp.concatenate([part[i] for part in parts])
            np.testing.assert_array_equal(joined, whole, err_msg=method)


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
SLOW_CASES = [
    pytest.param(method, options, marks=pytest.mark.slow)
    for method, options in (
        ("breadcrumbs", {"density": 0.3, "gamma": 0.1}),
        ("della", {"density": 0.3, "epsilon": 0.1}),
        ("nuslerp", {"nuslerp_flatten": False}),
        ("multislerp", {}),
        ("magmax", {}),
        ("consensus_ta", {}),
        ("closed_form_lambda", {}),
        ("pcb", {}),
        ("widen", {}),
    )
]


@pytest.mark.parametrize(("method", "options"), [*CASES, *SLOW_CASES])
@pytest.mark.parametrize(("mode", "dtype"), [("paper", "float32"), ("mergekit", "bfloat16")])
def test_bits_do_not_depend_on_the_program(method, options, mode, dtype):
    """Eager, jitted with constant or traced weights, mapped over a grid, stacked with other layers."""
    base, x, y = random_tensors(dtype=dtype)

    def merge(weights, tensors=(x, y, base), key=KEY, scale=0.7):
        extra = {"lambda": scale} if "lambda" in OPERATORS[method].parameters else {}
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


def test_donated_inputs_give_the_same_bits():
    base, x, y = random_tensors((64, 33))
    merge = lambda base, x, y: merge_tensors("ties", [x, y], base=base, density=0.3, weight=[0.9, 0.3])
    want = np.asarray(merge(base, x, y))
    np.testing.assert_array_equal(jax.jit(merge, donate_argnums=0)(base, x, y), want)


def test_mergekits_files_carry_what_a_method_does_not_use():
    options = {"base": BASE, "density": 0.5, "int8_mask": True}
    with pytest.warns(UserNote, match="task_arithmetic does not use density") as notes:
        got = merge_tensors("task_arithmetic", [X, Y], mode="mergekit", **options)
    assert len(notes) == 1  # none of int8_mask
    np.testing.assert_array_equal(got, merge_tensors("task_arithmetic", [X, Y], base=BASE))
    with pytest.raises(UserError, match="no parameter 'int8_mask'"):
        merge_tensors("ties", [X, Y], base=BASE, int8_mask=True)


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
        (lambda: merge_tensors("nuslerp", [X], weight=1), "two models, not 1"),
        (lambda: merge_tensors("nearswap", [X, Y], base=BASE, t=0.1), "a base and one model, not 2"),
        (lambda: merge_tensors("arcee_fusion", [X]), "arcee_fusion needs base="),
        (lambda: merge_tensors("model_stock", [X], base=BASE), "at least two models"),
        (lambda: merge_tensors("passthrough", [X, Y]), "one model, not 2"),
        (lambda: merge_tensors("karcher", [X, Y], max_iter=2.5), "max_iter is a whole number, not 2.5"),
        (lambda: merge_tensors("fisher", [X, Y], base=BASE), "fisher needs statistics=, the Fisher diagonal"),
        (
            lambda: merge_tensors("regmean", [X, Y], base=BASE, statistics=[1]),
            "for each of 2 models; found 1",
        ),
        (lambda: merge_tensors("ties+svd", [X], base=BASE), "'svd' cannot follow a merge method"),
        (lambda: merge_tensors("linear+svc", [X]), "linear merges models, not task vectors"),
        (lambda: merge_tensors("emr+svc", [X], base=BASE), "emr makes a model for each task"),
        (lambda: merge_tensors("emr", [X, Y], base=BASE, tasks=["a"]), "tasks has 1 names for 2 models"),
        (lambda: merge_tensors("lines", [X], base=BASE, alpha=1, beta=1), "lines depends on depth"),
        (
            lambda: merge_tensors("lines", [X], base=BASE, layer=0, num_layers=2, alpha=1),
            "needs the parameter beta",
        ),
        (lambda: merge_tensors("della", [X], base=BASE, density=0.5), "needs key="),
        (
            lambda: merge_tensors("della", [X], base=BASE, density=0.1, key=KEY, mode="mergekit"),
            "must lie between 0 and 1; they are 0.1 and 0.15",
        ),
        (lambda: merge_tensors("arcee_fusion", [X], base=BASE, weight=1.0), "it has none"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)

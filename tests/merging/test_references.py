"""Operators of papers against FusionBench where its functions run, else against NumPy in float64, written
from the paper.
"""

import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import UserError
from jaxlab.merging import entropy, learn_coefficients, merge_tensors
from jaxlab.merging.numerics import order_statistic

GOLDEN = Path(__file__).parents[1] / "golden" / "merging" / "fusionbench.safetensors"


def read():
    raw = GOLDEN.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    kinds = {"F32": np.float32, "BOOL": np.bool_}
    return {
        name: np.frombuffer(raw[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
                            kinds[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in json.loads(raw[8:start]).items() if name != "__metadata__"
    }  # fmt: skip


GIVEN = read()
TASKS = range(3)


def merged(method, part="matrix", weight=1.0, **options):
    """The merged task vector of FusionBench's inputs, in float64."""
    base = np.zeros_like(GIVEN[f"base.{part}"])
    vectors = [GIVEN[f"d{i}.{part}"] for i in TASKS]
    found = merge_tensors(method, vectors, base=base, weight=weight, **options)
    as_array = lambda x: np.asarray(x, np.float64)
    return {k: as_array(x) for k, x in found.items()} if isinstance(found, dict) else as_array(found)


def close(got, want, **options):
    np.testing.assert_allclose(got, want, **{"rtol": 2e-4, "atol": 2e-6} | options)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("iso_c", {}),
        ("iso_cts", {"common_space_fraction": 0.5}),
        ("tsv_m", {}),
        ("wudi", {"steps": 100}),
        ("magmax", {}),
    ],
)
def test_fusionbench_by_matrices(method, options):
    close(merged(method, **options), GIVEN[f"{method}.matrix"])
    part = merged(method, "vector", **options)
    close(part, GIVEN[f"{method}.vector"])


def test_fusionbench_masks():
    vectors = np.stack([GIVEN[f"d{i}.matrix"] for i in TASKS]).astype(np.float64)
    models = merged("tall", mask_lambda=0.4)
    for i in TASKS:
        close(models[str(i)], np.where(GIVEN["tall.masks"][i], vectors.sum(0), 0.0))
    wanted = GIVEN["tall.masks"].sum(0) >= 2
    assert 0.1 < wanted.mean() < 0.9
    close(
        merged("consensus_ta", mask_lambda=0.4, **{"lambda": 0.5}),
        np.where(wanted, 0.5 * vectors.sum(0), 0.0),
    )
    models = merged("emr", tasks=["a", "b", "c"])
    for i, name in enumerate("abc"):
        close(models[name], GIVEN[f"emr{i}.matrix"])


def test_fusionbench_trimmed_globally():
    # 24 of 80 asked for; of k asked for it keeps k + 1, what reaches the (n - k)th smallest.
    close(merged("ties_global", density=25 / 80), GIVEN["ties.matrix"])


def test_fusionbench_calibration():
    close(merged("svc"), GIVEN["svc.matrix"])
    close(merged("task_arithmetic+svc"), GIVEN["svc.matrix"])
    assert np.abs(merged("svc") - merged("task_arithmetic")).max() > 1e-3
    close(merged("svc", "vector"), merged("task_arithmetic", "vector"))


def test_fusionbench_with_data():
    base, models = GIVEN["base.matrix"], [GIVEN["base.matrix"] + GIVEN[f"d{i}.matrix"] for i in TASKS]
    grams, fishers = ([GIVEN[f"{kind}{i}"] for i in TASKS] for kind in ("gram", "fisher"))
    for method in ("regmean", "regmean_plusplus"):
        got = merge_tensors(method, models, base=base, statistics=grams, reduction=0.9)
        close(np.asarray(got), GIVEN["regmean.matrix"], atol=1e-5)
    got = merge_tensors("fisher", models, base=base, statistics=fishers, weight=[0.5, 0.3, 0.2])
    close(np.asarray(got), GIVEN["fisher.matrix"], atol=1e-5)
    close(np.asarray(entropy(jnp.asarray(GIVEN["logits"]))), GIVEN["entropy"][0])


def test_fusionbench_dropped_at_random():
    """With its masks; ours keep a share `density`, its `sparsity_level` is what is dropped."""
    masks = [GIVEN[f"dare.mask{i}"] for i in TASKS]
    assert 0.2 < np.mean(masks) < 0.6
    for rescale, name in ((True, "rescaled"), (False, "plain")):
        close(
            merged("dare_linear", weight=0.7, density=0.4, mask=masks, rescale=rescale), GIVEN[f"dare.{name}"]
        )


def test_fusionbench_pairs():
    base, one = GIVEN["base.matrix"], GIVEN["base.matrix"] + GIVEN["d0.matrix"]
    other = GIVEN["base.matrix"] + GIVEN["d1.matrix"]
    pair = [GIVEN["stock0"], GIVEN["stock1"]]
    close(np.asarray(merge_tensors("model_stock", pair, base=base)), GIVEN["model_stock.matrix"], atol=1e-5)
    close(np.asarray(merge_tensors("slerp", [one, other], t=0.35)), GIVEN["slerp.matrix"], atol=1e-5)
    apart = [GIVEN["d0.matrix"], GIVEN["d1.matrix"]]
    close(np.asarray(merge_tensors("slerp", apart, t=0.35)), GIVEN["slerp.apart"])
    close(np.asarray(merge_tensors("expo", [one], base=base, alpha=0.3)), GIVEN["expo.matrix"], atol=1e-5)


def test_fusionbench_elects_signs_as_we_do_and_sums():
    """Its `sum` is TIES whose normalize is off; one more element is kept, as above."""
    close(merged("ties_global", density=25 / 80, normalize=False), GIVEN["ties.sum"])
    assert np.abs(merged("ties_global", density=25 / 80) - GIVEN["ties.sum"]).max() > 1e-3


# NumPy in float64.

RNG = np.random.default_rng(7)
BASE = RNG.normal(size=(9, 6)).astype(np.float32)
VECTORS = [(0.1 * RNG.normal(size=(9, 6))).astype(np.float32) for _ in range(3)]
D = np.stack(VECTORS).astype(np.float64)
WEIGHTS = np.array([0.9, 0.3, 0.55])


def ours(method, vectors=VECTORS, **options):
    """The merged task vector, of a base of zeros."""
    return np.asarray(merge_tensors(method, vectors, base=np.zeros_like(vectors[0]), **options), np.float64)


def test_breadcrumbs():
    n = D[0].size
    for density, gamma in ((0.5, 0.1), (0.9, 0.3), (0.25, 0.0), (0.01, 0.0)):
        want = np.zeros_like(D[0])
        for w, d in zip(WEIGHTS, D, strict=True):
            order = np.argsort(-np.abs(d).reshape(-1))
            kept, top = int(density * n), min(int(gamma * n), n - int(density * n))
            mask = np.zeros(n, bool)
            mask[order[top : top + kept]] = True
            want += w * np.where(mask.reshape(d.shape), d, 0)
        close(ours("breadcrumbs", weight=WEIGHTS.tolist(), density=density, gamma=gamma), want)


def test_della():
    masks = [np.random.default_rng(i).uniform(size=D[0].shape) < 0.6 for i in range(3)]
    density, epsilon, n = 0.6, 0.2, D.shape[2]
    kept = []
    for d, m in zip(D, masks, strict=True):
        rank = np.argsort(np.argsort(-np.abs(d), axis=1), axis=1)
        kept.append(np.where(m, d / (density + epsilon / 2 - epsilon * rank / n), 0))
    options = {"density": density, "epsilon": epsilon, "mask": masks, "weight": WEIGHTS.tolist()}
    close(ours("della_linear", **options), sum(w * k for w, k in zip(WEIGHTS, kept, strict=True)))
    sign = np.sign(sum(kept))
    agree = [np.sign(k) == sign for k in kept]
    top = sum(w * k * a for w, k, a in zip(WEIGHTS, kept, agree, strict=True))
    bottom = sum(w * a for w, a in zip(WEIGHTS, agree, strict=True))
    close(ours("della", **options), np.where(bottom > 0, top / np.where(bottom > 0, bottom, 1), 0))


def test_della_draws_by_rank():
    """Of many rows that are equal in magnitude order, the share kept of each rank is its probability."""
    from jaxlab.merging import tensor_key

    x = np.tile(np.arange(1.0, 9.0, dtype=np.float32), (20000, 1))
    got = ours("della_linear", [x], density=0.5, epsilon=0.4, rescale=False, key=tensor_key(0, "a"))
    share = (got != 0).mean(0)
    want = 0.5 + 0.2 - 0.4 * np.arange(7, -1, -1) / 8
    assert np.abs(share - want).max() < 5 * 0.5 / np.sqrt(20000)


def test_sce():
    share = 0.4
    variance = D.var(0)
    mask = variance >= np.sort(variance.reshape(-1))[::-1][int(share * variance.size) - 1]
    kept = D * mask
    weights = (kept**2).mean((1, 2))
    weights /= weights.sum()
    agree = np.sign(kept) == np.where(kept.sum(0) >= 0, 1, -1)
    w = weights[:, None, None]
    bottom = (w * agree).sum(0)
    close(ours("sce", select_topk=share), (w * kept * agree).sum(0) / np.where(bottom == 0, 1, bottom))


def test_ram():
    sparse = [
        np.where(np.random.default_rng(i).uniform(size=d.shape) < 0.5, d, 0) for i, d in enumerate(VECTORS)
    ]
    changed = np.stack([np.abs(d) > 1e-5 for d in sparse])
    together = changed.sum(0)
    mean = sum(sparse) / np.maximum(together, 1)
    close(ours("ram", sparse), np.where(together == 1, sum(sparse), mean))
    rho = [(m & (together > 1)).sum() / (m & (together == 1)).sum() for m in changed]
    scale = [1 + 0.5 * min(r, 0.8) for r in rho]
    alone = sum(s * d for s, d in zip(scale, sparse, strict=True))
    close(ours("ramplus_tl", sparse, r=0.5, alpha=0.8), np.where(together == 1, alone, mean))


def test_model_stock_and_nearswap():
    models = [BASE + d for d in VECTORS]
    d = [m.astype(np.float64) - BASE for m in models]
    cosines = [(a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b) for a, b in itertools.combinations(d, 2)]
    c = np.mean(cosines)
    t = 3 * c / (1 + 2 * c)
    want = t * np.mean(models, axis=0) + (1 - t) * BASE
    close(np.asarray(merge_tensors("model_stock", models, base=BASE)), want, atol=1e-5)
    share = np.clip(0.05 / np.abs(d[0]), 0, 1)
    want = share * models[0] + (1 - share) * BASE
    close(np.asarray(merge_tensors("nearswap", models[:1], base=BASE, t=0.05)), want, atol=1e-5)


def unit(x):
    return x / np.linalg.norm(x)


def test_spheres():
    models = [RNG.normal(size=(9, 6)).astype(np.float32) for _ in range(3)]
    units = [unit(m.astype(np.float64)) for m in models]
    mean = unit(sum(units))
    for _ in range(10):
        step = np.zeros_like(mean)
        for u in units:
            angle = np.arccos((u * mean).sum())
            step += angle / np.sin(angle) * (u - np.cos(angle) * mean) / 3
        size = np.linalg.norm(step)
        if size < 1e-5:
            break
        mean = np.cos(size) * mean + np.sin(size) * step / size
    close(
        np.asarray(merge_tensors("karcher", models)),
        mean * np.mean([np.linalg.norm(m) for m in models]),
        atol=1e-5,
    )
    shares = WEIGHTS / WEIGHTS.sum()
    middle = unit(sum(w * u for w, u in zip(shares, units, strict=True)))
    tangent = sum(w * (u - (u * middle).sum() * middle) for w, u in zip(shares, units, strict=True))
    size = np.linalg.norm(tangent)
    point = np.cos(size) * middle + np.sin(size) * tangent / size
    want = point * sum(w * np.linalg.norm(m) for w, m in zip(shares, models, strict=True))
    close(np.asarray(merge_tensors("multislerp", models, weight=WEIGHTS.tolist())), want, atol=1e-5)
    a, b = (m.astype(np.float64) for m in models[:2])
    angle = np.arccos((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))[:, None]
    t = 0.3 / 1.2
    want = (np.sin((1 - t) * angle) * a + np.sin(t * angle) * b) / np.sin(angle)
    got = merge_tensors("nuslerp", models[:2], weight=[0.9, 0.3], nuslerp_flatten=False)
    close(np.asarray(got), want, atol=1e-5)
    # With a base: of the task vectors.
    shifted = merge_tensors(
        "nuslerp", [m + BASE for m in models[:2]], base=BASE, weight=[0.9, 0.3], nuslerp_flatten=False
    )
    close(np.asarray(shifted), want + BASE, atol=1e-4)


def test_arcee_fusion():
    model = BASE + VECTORS[0]
    x, b = model.astype(np.float64), BASE.astype(np.float64)
    softmax = lambda z: np.exp(z) / np.exp(z).sum(1, keepdims=True)
    p, q = softmax(x) + 1e-8, softmax(b) + 1e-8
    importance = np.abs(x - b) * (p * np.log(p / q)).sum(1, keepdims=True)
    low, middle, high = (np.quantile(importance, f, method="lower") for f in (0.25, 0.5, 0.75))
    mask = importance >= middle + 1.5 * (high - low)
    assert 0 < mask.sum() < mask.size / 2
    close(np.asarray(merge_tensors("arcee_fusion", [model], base=BASE)), np.where(mask, model, BASE))


def test_subspace_boosting():
    u, s, vh = np.linalg.svd(D.sum(0), full_matrices=False)
    for beta in (0.01, 0.6, 1.0):
        floor = s[np.argmax(np.cumsum(s) / s.sum() >= beta - 1e-12)]
        got = ours("subspace_boosting", beta=beta if beta < 1 else 0.999999)
        close(got, (u * np.maximum(s, floor)) @ vh, atol=1e-5)


def test_optmerge():
    """Gradient descent on the loss itself, the gradient by hand."""
    rank, x, velocity = 6 // 3, D.mean(0), np.zeros_like(D[0])
    parts = []
    for d in D:
        u, s, vh = np.linalg.svd(d, full_matrices=False)
        rows = s[:rank, None] * vh[:rank]
        parts.append((u[:, :rank] @ rows, rows, (d**2).sum()))
    for _ in range(40):
        gradient = sum(2 * ((x - p) @ rows.T) @ rows / power for p, rows, power in parts)
        velocity = 0.9 * velocity + gradient
        x = x - 0.01 * velocity
    got = ours("optmerge", steps=40, learning_rate=0.01)
    close(got, x)
    assert np.abs(got - D.mean(0)).max() > 1e-3


def test_closed_form_lambda():
    gram = np.einsum("iab,jab->ij", D, D)
    c = gram / np.diag(gram)[:, None]
    solved = np.linalg.solve(c.T @ c + 1e-4 * np.eye(3), c.T @ WEIGHTS)
    want = np.einsum("i,iab->ab", solved, D)
    got = ours("closed_form_lambda", weight=WEIGHTS.tolist())
    close(got, want)
    # What it is for: every task's own share of the merged vector is its weight.
    close([(got * d).sum() / (d**2).sum() for d in D], WEIGHTS, atol=1e-3)
    eye = [np.float32(np.diag(row)) for row in np.eye(3)]  # orthogonal: plain task arithmetic
    close(ours("closed_form_lambda", eye, weight=[1, 2, 3]), np.diag([1.0, 2, 3]), atol=1e-3)
    close(ours("closed_form_lambda", [eye[0]] * 3), eye[0], atol=1e-3)  # shared: not counted three times
    close(ours("closed_form_lambda", [eye[0], eye[1] * 0]), eye[0], atol=1e-3)


def test_pcb():
    n, size = 3, D[0].size
    clipped, scores = [], []
    to_unit = lambda x: (x - x.min()) / (x.max() - x.min())
    for d in D:
        ordered = np.sort(np.abs(d).reshape(-1))
        magnitude = np.clip(np.abs(d), ordered[0], ordered[int(size * (1 - 1e-4) - 1)])
        clipped.append(np.sign(d) * magnitude)
        score = np.exp(n * to_unit(magnitude) ** 2) * np.tanh(d * D.sum(0))
        least = np.sort(score.reshape(-1))[size - int(0.2 * size)]
        scores.append(to_unit(np.maximum(score, least)))
    top = sum(w * s * d for w, s, d in zip(WEIGHTS, scores, clipped, strict=True))
    close(ours("pcb", ratio=0.2, weight=WEIGHTS.tolist()), top / np.maximum(sum(scores), 1e-12))


@pytest.mark.parametrize("gradients", [None, "given"])
def test_trust_region(gradients):
    given = (
        None if gradients is None else [np.abs(RNG.normal(size=d.shape)).astype(np.float32) for d in VECTORS]
    )
    steep = np.abs(D) if given is None else np.stack(given).astype(np.float64)
    omega = sum(steep[i] * np.abs(D[j]) for i in range(3) for j in range(3) if i != j)
    threshold = np.sort(omega.reshape(-1))[int(0.8 * omega.size)]
    want = np.where(omega < threshold, np.einsum("i,iab->ab", WEIGHTS, D), 0)
    close(ours("trust_region", quantile=0.8, weight=WEIGHTS.tolist(), statistics=given), want)


@pytest.mark.parametrize("by_row", [False, True])
def test_widen(by_row):
    models = [BASE + d for d in VECTORS]
    turn = (lambda x: x.T) if by_row else (lambda x: x)
    b, x = turn(BASE.astype(np.float64)), [turn(m.astype(np.float64)) for m in models]

    def scores(values):
        ranks = np.stack([np.argsort(np.argsort(v)) / len(v) for v in values])
        soft = np.exp(ranks) / np.exp(ranks).sum(0)
        return np.where(ranks > 1.1 * ranks.mean(1, keepdims=True), 0.8, soft)

    norm = lambda z: np.linalg.norm(z, axis=0)
    magnitude = scores([np.abs(norm(m) - norm(b)) for m in x])
    direction = scores([1 - (m * b).sum(0) / norm(m) / norm(b) for m in x])
    s = 0.5 * (magnitude + direction)
    want = b + sum(w * score * (m - b) for w, score, m in zip(WEIGHTS, s, x, strict=True))
    options = {"above_average": 1.1, "calibration": 0.8, "by_row": by_row, "weight": WEIGHTS.tolist()}
    close(turn(np.asarray(merge_tensors("widen", models, base=BASE, **options))), want, atol=1e-5)
    vector = merge_tensors("widen", [m[0] for m in models], base=BASE[0], weight=WEIGHTS.tolist())
    change = np.abs(np.stack([m[0].astype(np.float64) - BASE[0] for m in models]))
    s = np.where(change > change.mean(1, keepdims=True), 1.0, np.exp(change) / np.exp(change).sum(0))
    want = BASE[0] + (
        WEIGHTS[:, None] * s * np.stack([m[0].astype(np.float64) - BASE[0] for m in models])
    ).sum(0)
    close(np.asarray(vector), want, atol=1e-5)


def test_by_depth():
    first, second = VECTORS[:2]
    shares = {}
    for layer in (None, *range(6)):
        options = {"layer": layer, "num_layers": 6, "weight": [0.5, 2.0]}
        got = ours("layer_swap", [first, second], bottom=1, top=1, transition=1, **options)
        mixed = {"first": 0.5 * first, "second": 2 * second, "mean": 0.25 * first + second}
        shares[layer] = [name for name, want in mixed.items() if np.allclose(got, want, atol=1e-6)]
    assert shares == {
        None: ["first"],
        0: ["first"],
        1: ["mean"],
        2: ["second"],
        3: ["second"],
        4: ["mean"],
        5: ["first"],
    }
    for layer, scale in ((None, 0.2), (0, 0.2), (2, 0.2 + 0.8 * 2 / 5), (5, 1.0)):
        options = {"layer": layer, "num_layers": 6, "alpha": 0.2, "beta": 0.8}
        close(ours("lines", weight=[1, 1, 1], **options), scale * D.sum(0))
        close(ours("ties+lines", **options), scale * ours("ties"))
    close(ours("lines", layer=0, num_layers=1, alpha=0.2, beta=0.8), 0.2 * D.sum(0))
    want = 1.5 * np.einsum("i,iab->ab", WEIGHTS, D) / WEIGHTS.sum()
    close(ours("expo", alpha=0.5, weight=WEIGHTS.tolist()), want)
    with pytest.raises(UserError, match="layer_swap depends on depth"):
        ours("layer_swap", [first, second], bottom=1)
    for bottom, top in ((5, 0), (1, 1), (0, 2)):
        with pytest.raises(UserError, match=f"bottom {bottom} and top {top} leave none of 2 layers"):
            ours("layer_swap", [first, second], bottom=bottom, top=top, layer=0, num_layers=2)


def test_adamerging_learns_what_makes_predictions_sure():
    """Two tasks, one layer, no labels: from 0.3 on coefficients move as Adam in NumPy moves them."""
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(40, 9)).astype(np.float32)

    def loss(coefficients):
        w = BASE + sum(c * d for c, d in zip(coefficients, VECTORS[:2], strict=True))
        return entropy(jnp.asarray(inputs) @ w)

    learned = learn_coefficients(loss, [0.3, 0.3], steps=3, learning_rate=0.01)

    def numpy_loss(c):
        logits = inputs.astype(np.float64) @ (BASE + c[0] * D[0] + c[1] * D[1])
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -(np.exp(log_p) * log_p).sum(1).mean()

    c, m, v = np.array([0.3, 0.3]), np.zeros(2), np.zeros(2)
    for step in range(1, 4):
        gradient = np.array([(numpy_loss(c + h) - numpy_loss(c - h)) / 2e-6 for h in 1e-6 * np.eye(2)])
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        c = c - 0.01 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
    close([float(x) for x in learned], c, atol=1e-4)
    want = sum(float(x) * d for x, d in zip(learned, D[:2], strict=True))
    close(ours("adamerging", VECTORS[:2], statistics=learned), want)


def test_regmean_keeps_the_mean_where_no_input_is():
    models = [BASE + d for d in VECTORS]
    inputs = [RNG.normal(size=(40, 6)) for _ in models]
    for x in inputs:
        x[:, 4] = 0  # no input has the fifth feature
    grams = [np.float32(x.T @ x) for x in inputs]
    got = np.asarray(merge_tensors("regmean", models, base=BASE, statistics=grams, reduction=1.0))
    np.testing.assert_allclose(got[:, 4], np.mean(models, axis=0)[:, 4], rtol=1e-4, atol=1e-5)
    kept = [0, 1, 2, 3, 5]
    stacked = np.concatenate(inputs)[:, kept]
    targets = np.concatenate([x @ m.T.astype(np.float64) for x, m in zip(inputs, models, strict=True)])
    best, *_ = np.linalg.lstsq(stacked, targets, rcond=None)  # what it claims to be: the least squares map
    close(got[:, kept], best.T, atol=1e-4)
    vector = merge_tensors("regmean", [m[0] for m in models], base=BASE[0], statistics=[None] * 3)
    close(np.asarray(vector), np.mean([m[0] for m in models], axis=0), atol=1e-5)


def test_order_statistics_are_those_of_a_sort():
    for size, coarse in ((1, False), (2, True), (97, True), (20_000, False), (20_000, True)):
        x = np.random.default_rng(size).normal(size=size).astype(np.float32)
        x = np.float32(np.round(x)) if coarse else x
        find = jax.jit(order_statistic)
        for rank in {0, size // 4, size // 2, size - 1}:
            assert float(find(x, np.uint32(rank))) == np.sort(x)[rank]
    spoiled = jnp.array([1.0, np.nan, -np.inf, -0.0, 2.0])
    assert [float(order_statistic(spoiled, i)) for i in range(4)] == [-np.inf, 0.0, 1.0, 2.0]
    assert np.isnan(float(order_statistic(spoiled, 4)))
    assert np.isnan(float(order_statistic(jnp.zeros(0), 0)))

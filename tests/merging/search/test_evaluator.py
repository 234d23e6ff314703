"""Points of a search measured on the device: the bits of the injection, and one program for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.merging import Evaluator, Method, Point, Space, inject, plan_injection
from jaxlab.merging.search.measures import stack_batches
from tests.merging.search.trio import few, hand_trio


def digest(params, data):
    """Measures in which every bit of the language model counts."""
    layers = params["layers"]
    bits = {name: jax.lax.bitcast_convert_type(layers["mlp"][name], jnp.uint32) for name in ("up", "down")}
    return {name: jnp.sum(value * data, dtype=jnp.uint32).astype(jnp.float32) for name, value in bits.items()}


METHODS = [
    Method.of("task_arithmetic"),
    Method.of("ties", density=0.5),
    Method.of("dare_ties", density=0.5, mode="mergekit"),
    Method.of("slerp"),
    Method.of("nuslerp"),  # sums over the tensor after the lambdas are known
    *(
        pytest.param(method, marks=pytest.mark.slow)
        for method in (
            Method.of("sce"),
            Method.of("karcher"),
            Method.of("model_stock"),
            Method.of("iso_c"),  # singular values after the lambdas are known
            Method.of("task_arithmetic+svc"),
            Method.of("ties_global", density=0.5),
            Method.of("closed_form_lambda"),
        )
    ),
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.operator)
def test_a_point_has_the_bits_of_the_injection(method):
    trio = hand_trio(few)
    plan = plan_injection(trio.vlm, trio.expert, trio.base)
    thin = [(("density", d),) for d in (0.3, 0.5)] if "density" in dict(method.parameters) else [()]
    points = [Point(v, e, own) for own in thin for v, e in ((0.9, 0.4), (0.123, 0.77), (0.0, 0.0))]
    points.append(Point(0.9, 0.5, thin[0], None, (0.1, 0.9)))
    evaluator = Evaluator(plan, trio, mode=method.mode, seed=5, chunk=2)
    data = jnp.uint32(2654435761)
    measured = evaluator(method.operator, points, digest, data)
    for point, got in zip(points, measured, strict=True):
        lambda_v, lambda_e = point.over_layers
        params, _ = inject(
            trio.vlm,
            trio.expert,
            trio.base,
            operator=method.operator,
            lambda_v=lambda_v,
            lambda_e=list(lambda_e) if isinstance(lambda_e, tuple) else lambda_e,
            seed=5,
            mode=method.mode,
            **dict(point.parameters),
        )
        want = {name: float(value) for name, value in digest(params, data).items()}
        assert got == want, point
        saved = {name: float(v) for name, v in digest(evaluator.merged(method.operator, point), data).items()}
        assert saved == want, point


def test_progress_counts_every_point_and_one_program_serves_them_all():
    trio = hand_trio(few)
    plan = plan_injection(trio.vlm, trio.expert, trio.base)
    traced, done = [], []

    def measure(params, data):
        traced.append(1)
        return {"norm": jnp.sum(params["final_norm"]["scale"])}

    evaluator = Evaluator(plan, trio, chunk=2)
    search = lambda points: evaluator("ties", points, measure, (), progress=done.append)
    search([Point(1.0, 1.0, (("density", 0.25),))])
    traced.clear()
    points = [Point(1.0, e / 4, (("density", d),)) for d in (0.25, 0.5) for e in range(5)]
    points.append(Point(0.5, 1.0, (("density", 0.75),), (0.25, 0.75), (1.5, 0.5)))
    measured = search(points)
    assert sum(done) == 1 + len(measured) == 12
    assert traced == []


def test_task_vectors_are_prepared_once_for_a_density(monkeypatch):
    from jaxlab.merging.search import evaluator as module

    trio = hand_trio(few)
    plan = plan_injection(trio.vlm, trio.expert, trio.base)
    calls, prepare = [], module.prepare_task_vectors
    monkeypatch.setattr(module, "prepare_task_vectors", lambda *a, **k: calls.append(1) or prepare(*a, **k))
    space = Space(operator="ties", lambda_v=(0.5, 1.0), lambda_e=(0.1, 0.2, 0.3), density=(0.2, 0.4))
    evaluator = Evaluator(plan, trio, chunk=2)
    evaluator("ties", space.points(), lambda params, data: {"x": jnp.float32(1.0)}, ())
    assert len(calls) == 2


def test_batches_of_equal_shapes_are_stacked():
    batches = [{"tokens": np.full((2, n), n, np.int32)} for n in (4, 5, 4)]
    assert [stack["tokens"].shape for stack in stack_batches(batches)] == [(2, 2, 4), (1, 2, 5)]

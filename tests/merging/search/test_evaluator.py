"""Points of a search measured on the device: the bits of the injection, and one program for all of them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.merging import OPERATORS, Evaluator, Method, Point, Space, inject, operator_named, plan_injection
from jaxlab.merging.in_forward import tensor_weights
from jaxlab.merging.injection import given_to_leaves, merged_tensors
from jaxlab.merging.operators.declarations import NotInjected
from jaxlab.merging.programs import ZERO, Program, merge_whole
from jaxlab.merging.search.measures import stack_batches
from tests.merging.search.trio import LM, few, hand_trio


def digest(params, data):
    """Measures in which every bit of the language model counts."""
    layers = params["layers"]
    bits = {name: jax.lax.bitcast_convert_type(layers["mlp"][name], jnp.uint32) for name in ("up", "down")}
    return {name: jnp.sum(value * data, dtype=jnp.uint32).astype(jnp.float32) for name, value in bits.items()}


METHODS = [
    Method.of("task_arithmetic"),
    Method.of("ties", density=0.5),
    Method.of("dare_ties", density=0.5, mode="mergekit"),  # sums over the tensor
    Method.of("slerp"),
    Method.of("nuslerp"),  # sums over the tensor after the lambdas are known
]
GIVEN = {"density": 0.5, "gamma": 0.1, "t": 0.1, "k": 1}
"""What operators must be told."""


def every_method():
    """All operators that an injection can have without data, in both modes."""
    for name in [*OPERATORS, "ties+svc", "task_arithmetic+subspace_boosting"]:
        declared = OPERATORS.get(name)
        if declared and (isinstance(declared.injection, NotInjected) or declared.per_task):
            continue
        operator = operator_named(name).for_injection
        if operator.needs_statistics:
            continue
        asked = {n: GIVEN[n] for n, p in operator.parameters.items() if n in GIVEN and (p.asked or n == "t")}
        if name == "layer_swap":
            asked = {"bottom": 1}
        for mode in ("paper", "mergekit"):
            yield Method.of(name, mode, **asked)
            if "rescale" in operator.parameters:
                yield Method.of(name, mode, rescale=True, **asked)


SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in every_method() if method not in METHODS]


@pytest.mark.parametrize("method", [*METHODS, *SLOW], ids=lambda m: f"{m.operator}-{m.mode}-{m.parameters}")
def test_a_point_has_the_bits_of_its_merge(method):
    """Measured, saved, injected in memory, and each tensor by itself as run.py merge makes it."""
    trio = hand_trio(few, dataclasses.replace(LM, width=20, mlp_width=36, num_layers=3))
    plan = plan_injection(trio.vlm, trio.expert, trio.base)
    own = tuple((name, value) for name, value in method.parameters if name != "density")
    thin = [(("density", d), *own) for d in (0.3, 0.5)] if "density" in dict(method.parameters) else [own]
    points = [Point(v, e, more) for more in thin for v, e in ((0.9, 0.4), (0.123, 0.77), (0.0, 0.0))]
    points.append(Point(0.9, 0.5, thin[0], None, (0.1, 0.4, 0.9)))
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
        merged = evaluator.merged(method.operator, point)
        saved = {name: float(v) for name, v in digest(merged, data).items()}
        assert saved == want, point
        for name, tensor in alone(evaluator, method.operator, point).items():
            assert tensor.tobytes() == tensors_of(merged, plan)[name].tobytes(), (name, point)


def tensors_of(params, plan):
    """What is merged, by name."""
    return {
        name: np.asarray(tensor)
        for leaf in plan.leaves
        if leaf.action == "merged"
        for name, tensor in zip(leaf.entry.names, merged_tensors(params, leaf, 0), strict=True)
    }


def alone(evaluator, operator, point):
    """Each tensor of a point by the program of run.py merge."""
    plan, trio, method = evaluator.plan, evaluator.trio, evaluator.method(operator, point)
    models = [tensors_of(params, plan) for params in (trio.vlm, trio.expert, trio.base)]
    given, numbers = given_to_leaves(plan, method, trio.vlm, trio.expert, trio.base, seed=evaluator.seed)
    lambdas = [tensor_weights(plan, jnp.asarray(x)) for x in evaluator.lambdas(point)]
    found = {}
    for entry in plan.merged:
        fixed = method.switches.parameters
        program = Program(operator, method.mode, fixed, True, "float32", plan.num_layers, 2)
        known = given[entry.pattern]
        for i, name in enumerate(entry.names):
            weights = [np.float32(own[entry.pattern][i]) for own in lambdas]
            *pair, base = (model[name] for model in models)
            own = known._replace(key=known.key[i], layer=known.layer[i])
            arguments = tuple(pair), base, (numbers[entry.pattern], weights), own, ZERO
            found[name] = np.asarray(merge_whole(program, *arguments))
    return found


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

"""Points from a grid, chance, CMA-ES and TPE: within their space, the same again, better for being told."""

import sys

import pytest

from jaxlab.errors import ConfigError, UserError
from jaxlab.merging import Interval, Space
from jaxlab.merging.search.gradient import Schedule, point_at, start
from jaxlab.merging.search.samplers import make_sampler

LAYERS = 4
SPACES = {
    "grid": Space(
        operator="ties", method="grid", lambda_v=(0.5, 1.0), lambda_e=(0.2, 0.4), density=(0.3, 0.6)
    ),
    "random": Space(
        operator="ties",
        method="random",
        lambda_e=Interval(low=0.0, high=2.0),
        density=Interval(low=0.1, high=0.9),
    ),
    "cma_es": Space(
        operator="dare_linear",
        method="cma_es",
        lambda_v=Interval(low=0.0, high=1.0),
        lambda_e=Interval(low=0.0, high=2.0),
        density=(0.5,),
        parameters={"rescale": (False,)},
    ),
    "bayesian": Space(
        operator="ties",
        method="bayesian",
        layers="each",
        lambda_e=Interval(low=0.0, high=2.0),
        density=(0.3, 0.6),
    ),
}


def asked(space, budget=8, seed=0, told=lambda point: point.lambda_e, **options):
    """The points that a sampler asks for, one after the other."""
    sampler, points = make_sampler(space, budget, LAYERS, seed, **options), []
    for _ in range(budget):
        points += sampler.ask(1)
        sampler.tell([told(points[-1])])
    return points


@pytest.mark.parametrize("method", SPACES)
def test_points_are_in_their_space_and_the_same_again(method):
    space = SPACES[method]
    space.check("paper")
    points = asked(space)
    assert points == asked(space)
    for point in points:
        row = point.as_row()
        assert space.point_of_row(row) == point
        for name, values in space.dimensions.items():
            if isinstance(values, Interval):
                own = row.get(f"layers_{name[-1]}") or [row[name]]
                assert all(values.low <= x <= values.high for x in own)
            else:
                assert row[name] in values
    if method == "grid":
        assert sorted(points) == sorted(space.points())
    else:
        assert points != asked(space, seed=1)
    if method == "bayesian":
        assert {len(point.layers_e) for point in points} == {LAYERS}
        assert point.lambda_v == 1.0
        assert point.layers_v is None


@pytest.mark.parametrize("method", ["cma_es", "bayesian"])
def test_what_is_told_counts(method):
    space = Space(
        operator="task_arithmetic",
        method=method,
        lambda_v=Interval(low=0.0, high=1.0),
        lambda_e=Interval(low=0.0, high=1.0),
    )
    near = lambda p: -((p.lambda_v - 0.9) ** 2) - (p.lambda_e - 0.1) ** 2
    points = asked(space, budget=40, told=near)
    mean = lambda part: sum(map(near, part)) / len(part)
    assert mean(points[-10:]) > mean(points[:10])
    assert points != asked(space, budget=40, told=lambda p: -near(p))


def test_a_profile_shapes_the_expert_s_weight():
    space = SPACES["grid"]
    shaped = Space(**{**vars(space), "layers": "flows"})
    profile = (0.5, 1.0, 1.5, 1.0)
    for plain, point in zip(asked(space), asked(shaped, profile=profile), strict=True):
        assert point.lambda_e == plain.lambda_e
        assert point.layers_e == pytest.approx([plain.lambda_e * share for share in profile])
    half = Space(**{**vars(shaped), "strength": 0.5})
    assert asked(half, profile=profile)[0].layers_e == pytest.approx(
        [0.2 * share for share in (0.75, 1, 1.25, 1)]
    )
    assert asked(space, profile=profile) == asked(space)  # of entries of one lambda it is no matter


def test_without_optuna_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match="install the extra `search`"):
        make_sampler(SPACES["cma_es"], 4, LAYERS, 0)


@pytest.mark.parametrize(("budget", "passes", "batches"), [(12, 3, 4), (24, 4, 1), (1, 3, 2), (7, 3, 100)])
def test_a_gradient_costs_no_more_than_its_evaluations(budget, passes, batches):
    schedule = Schedule.of(budget, passes, batches)
    spent = schedule.measured + schedule.steps * passes / batches
    assert budget - passes / batches < spent <= budget or schedule.steps == 0
    assert schedule.until(schedule.measured - 1) == schedule.steps


def test_a_gradient_starts_in_the_middle():
    space = Space(
        operator="ties",
        method="gradient",
        layers="each",
        lambda_v=(0.75,),
        lambda_e=Interval(low=0.0, high=2.0),
        density=(0.5,),
    )
    point = point_at(space, start(space, LAYERS))
    assert point.over_layers == (0.75, (1.0,) * LAYERS)
    assert point.parameters == (("density", 0.5),)


def test_parameters_are_those_of_the_operator():
    with pytest.raises(ConfigError, match="has none; did you mean density"):
        Space(operator="ties", method="grid", parameters={"densty": (0.5,)}).check("paper")
    wrong = {"rescale": Interval(low=0.0, high=1.0)}
    with pytest.raises(ConfigError, match="takes a list of values"):
        Space(operator="dare_linear", method="random", density=(0.5,), parameters=wrong).check("paper")

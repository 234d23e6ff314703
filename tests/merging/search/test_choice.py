"""Choosing among points: by labels, without any, and the front of gained and kept skill."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.errors import UserError
from jaxlab.merging import Space, own_answers, token_measure
from jaxlab.merging.search.choice import choose, choose_keeping, differences, pareto
from jaxlab.merging.search.measures import answer_greedily
from jaxlab.models import generate
from tests.models.tiny import draw_params, draw_tokens, make_config

SPACE = Space(operator="ties", method="grid", lambda_v=(0.5, 1.0), lambda_e=(0.1, 0.2, 0.3), density=(0.4,))


def rows_of(answers, scores=None, entropies=None):
    points = SPACE.points()
    scores, entropies = scores or [0.0] * len(points), entropies or [0.0] * len(points)
    return [
        {**p.as_row(), "answers": {"x": a}, "score": s, "entropy": {"x": e}}
        for p, a, s, e in zip(points, answers, scores, entropies, strict=True)
    ]


def test_the_first_of_the_best_is_taken():
    rows = rows_of([[0]] * 6, scores=[0.1, 0.7, 0.2, 0.7, float("nan"), 0.0], entropies=[3, 2, 1, 1, 2, 3])
    assert choose(rows, "labels", ("x",), SPACE) == 1
    assert choose(rows, "entropy", ("x",), SPACE) == 2


def test_answers_that_stay_the_same_to_the_neighbours():
    # By lambda_v, then lambda_e: neighbours are beside, above and below, never across a corner.
    answers = [[1, 1], [1, 2], [3, 3], [1, 1], [1, 1], [4, 4]]
    assert differences(rows_of(answers), ("x",), SPACE) == pytest.approx(
        [(0.5 + 0) / 2, (0.5 + 1 + 0.5) / 3, 1.0, 0.0, (0 + 1 + 0.5) / 3, 1.0]
    )
    assert choose(rows_of(answers), "neighbours", ("x",), SPACE) == 3


def test_choosing_among_those_that_keep_enough():
    rows = [{"score": s, "kept": k} for s, k in ((0.9, 0.1), (0.5, 0.8), (0.6, 0.7), (0.1, 0.9))]
    assert [choose_keeping(rows, least) for least in (None, 0.65, 0.75, 0.85, 0.95)] == [0, 2, 1, 3, 3]


def test_the_front():
    pairs = [(0.9, 0.1), (0.5, 0.8), (0.6, 0.7), (0.1, 0.9), (0.5, 0.7), (0.0, 0.0), (0.5, 0.8)]
    assert pareto([{"score": s, "kept": k} for s, k in pairs]) == [3, 1, 6, 2, 0]


@pytest.mark.slow
def test_a_model_s_own_answers_are_those_of_generation():
    config = make_config(vocab_size=16)
    params, stop = draw_params(config), 3
    tokens = np.asarray(draw_tokens(config, 4, 12)).copy()
    starts, lengths = np.array([3, 5, 4, 6]), np.array([4, 3, 4, 2])
    place = np.arange(12)[None]
    mask = (place >= starts[:, None]) & (place < (starts + lengths)[:, None])
    tokens[np.arange(4), starts + lengths - 1] = stop
    batch = {"tokens": jnp.asarray(tokens), "loss_mask": jnp.asarray(mask)}
    stacked = [jax.tree.map(lambda x: x[None], batch)]
    assert own_answers("x", stacked) == ("x", 4, stop)
    made, entropies = jax.jit(lambda b: answer_greedily(params, b, config, 4, stop))(batch)
    for row in range(4):
        prompt = {"tokens": tokens[row : row + 1, : starts[row]]}
        want = generate(params, prompt, config, max_new_tokens=4)[0].tolist()
        end = want.index(stop) + 1 if stop in want else 4
        assert made[row].tolist() == want[:end] + [-1] * (4 - end)
        assert (np.asarray(entropies[row]) >= 0).tolist() == [True] * end + [False] * (4 - end)
    # What is right is not looked at.
    other = {**batch, "tokens": jnp.where(batch["loss_mask"], 7, batch["tokens"])}
    measured = jax.jit(token_measure(config, (("x", 4, stop),)))
    first, second = (measured(params, {"x": [jax.tree.map(lambda x: x[None], b)]}) for b in (batch, other))
    for name in ("answers/x", "entropy/x"):
        np.testing.assert_array_equal(first[name], second[name])


def test_rows_without_one_answer_each_are_refused():
    mask = np.array([[False, True, False, True]])
    with pytest.raises(UserError, match="rows of one answer each"):
        own_answers("x", [{"tokens": np.zeros((1, 4), np.int32), "loss_mask": mask}])

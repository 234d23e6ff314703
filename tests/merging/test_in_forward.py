"""Merging inside the scanned forward: the logits and gradients of merging first, without the merged copy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlab.losses import target_losses
from jaxlab.merging import MergedInForward, Method, forward_merged, plan_injection, tensor_weights
from jaxlab.merging.injection import prepare_task_vectors, weight_task_vectors
from jaxlab.models import MoEConfig, forward
from tests.models.tiny import draw_params, draw_tokens, make_config

LAYERS = 3
LAMBDAS = np.array([[0.9, 0.7, 1.1], [0.2, 0.5, 0.4]], np.float32)


def case(method, variant="rotary", embeddings="merge", **changes):
    """The loss of merging first and of merging in the forward, as functions of every layer's lambdas."""
    language = "rotary" if variant == "vision" else variant
    config = make_config(variant, num_layers=LAYERS, **changes)
    of_text = make_config(language, num_layers=LAYERS, **changes)
    vlm, expert, base = draw_params(config, 0), draw_params(of_text, 1), draw_params(of_text, 2)
    tokens = draw_tokens(of_text, 2, 9)
    batch = {"tokens": jnp.where(tokens == 3, 4, tokens)}
    plan = plan_injection(vlm, expert, base, embeddings=embeddings)
    prepared = prepare_task_vectors(plan, method, vlm, expert, base)

    def loss_of(logits):
        losses, mask = target_losses(logits, batch)
        return jnp.sum(losses, where=mask) / jnp.sum(mask, dtype=jnp.float32)

    def first(lambdas):
        weights = [tensor_weights(plan, lambdas[i]) for i in range(2)]
        merged = weight_task_vectors(plan, method, vlm, prepared, *weights)
        return loss_of(forward(merged, batch, config).logits)

    def inside(lambdas, remat="layer"):
        model = MergedInForward(plan, method, vlm, prepared, lambdas)
        return loss_of(forward_merged(model, batch, dataclasses.replace(config, remat=remat)).logits)

    return first, inside


OPERATORS = [
    Method.of("task_arithmetic"),
    *(
        pytest.param(method, marks=pytest.mark.slow)
        for method in (
            Method.of("dare_linear", density=0.5),
            Method.of("ties", density=0.6),
            Method.of("dare_ties", density=0.5, mode="mergekit"),
            Method.of("breadcrumbs", density=0.6),
            Method.of("ties_global", density=0.6),
            Method.of("slerp"),
            Method.of("iso_c"),
        )
    ),
]


@pytest.mark.parametrize("method", OPERATORS, ids=lambda method: method.operator)
def test_loss_and_gradient_are_those_of_merging_first(method):
    first, inside = case(method)
    want, wanted = jax.jit(jax.value_and_grad(first))(jnp.asarray(LAMBDAS))
    got, gradient = jax.jit(jax.value_and_grad(inside))(jnp.asarray(LAMBDAS))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert float(jnp.abs(wanted).min()) > 1e-4  # every layer's lambdas count
    np.testing.assert_allclose(gradient, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_the_gradient_is_the_limit_of_differences():
    _, inside = case(Method.of("task_arithmetic"))
    inside, gradient = jax.jit(inside), jax.jit(jax.grad(inside))(jnp.asarray(LAMBDAS))
    for at in np.ndindex(LAMBDAS.shape):
        step = np.zeros_like(LAMBDAS)
        step[at] = 1e-3
        slope = (inside(LAMBDAS + step) - inside(LAMBDAS - step)) / 2e-3
        np.testing.assert_allclose(gradient[at], slope, rtol=2e-2, atol=1e-2)


EXPERTS = MoEConfig(num_experts=2, experts_per_token=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ("vision", {}),
        ("other", {}),
        ("parallel", {}),
        ("nope", {}),
        ("nsa", {}),
        ("rotary", {"moe": EXPERTS}),
        ("rotary", {"moe": MoEConfig(num_experts=2, experts_per_token=1, first_dense=1)}),
    ],
)
def test_models_of_other_kinds(variant, changes):
    first, inside = case(Method.of("task_arithmetic"), variant, **changes)
    got, want = jax.jit(inside)(LAMBDAS), jax.jit(first)(LAMBDAS)
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("gradient", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_no_merged_copy_of_the_layers_exists(gradient):
    """By what the compiler allocates: the weights of twelve layers when merged first, of two inside."""
    layers, method = 12, Method.of("task_arithmetic")
    config = make_config(num_layers=layers, width=64, mlp_width=256, num_heads=4, head_dim=16)
    models = [draw_params(config, seed) for seed in range(3)]
    plan = plan_injection(*models)
    prepared = prepare_task_vectors(plan, method, *models)
    batch = {"tokens": draw_tokens(config, 1, 4)}

    def first(vlm, prepared, lambdas):
        weights = [tensor_weights(plan, lambdas[i]) for i in range(2)]
        return forward(weight_task_vectors(plan, method, vlm, prepared, *weights), batch, config).logits.sum()

    def inside(vlm, prepared, lambdas, remat="layer"):
        model = MergedInForward(plan, method, vlm, prepared, lambdas)
        return forward_merged(model, batch, dataclasses.replace(config, remat=remat)).logits.sum()

    def temporaries(function):
        compiled = jax.jit(function).lower(models[0], prepared, np.ones((2, layers), np.float32)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    weights = sum(x.nbytes for x in jax.tree.leaves(models[0]["layers"]))
    if gradient:
        assert temporaries(jax.grad(inside, argnums=2)) < 0.6 * weights
    else:
        assert temporaries(first) > 0.9 * weights
        assert temporaries(inside) < 0.3 * weights

"""What is measured when a dense model has been retrofitted, before the first step."""

from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from jaxlab.distributed import compile_together
from jaxlab.losses import evaluate_step
from jaxlab.models import Batch, ModelConfig, Params, forward
from jaxlab.retrofit.coverage import attention_coverage


def measure_retrofit(
    dense_params: Params, dense: ModelConfig, params: Params, model: ModelConfig, batch: Batch
) -> dict[str, Any]:
    """Losses of a dense model and of the NSA model made of it, on one batch, and how much of the dense
    attention the blocks hold that it chooses: a number for each layer, the mean over its groups.
    """
    # Only mean keys are known without the model that was made.
    by_means = model.nsa.selector == "compressed" or "selection" not in model.nsa.branches
    chosen = None if by_means else _chosen_blocks(params, batch, config=model)
    coverage = attention_coverage(dense_params, batch, dense, model.nsa, chosen=chosen)
    of_layers = lambda shares: np.mean(shares, axis=1).tolist()
    return {
        "sequences": batch["tokens"].shape[0],
        "length": batch["tokens"].shape[1],
        "loss": {
            "dense": mean_loss(evaluate_step(dense_params, batch, config=dense)),
            "retrofitted": mean_loss(evaluate_step(params, batch, config=model)),
        },
        "choice": float(coverage.choice[0]),
        "coverage": {
            "chosen": of_layers(coverage.chosen),
            "with_window": of_layers(coverage.with_window),
            "random": of_layers(coverage.random),
            "best": of_layers(coverage.best),
        },
    }


@compile_together
@partial(jax.jit, static_argnames="config")
def _chosen_blocks(params: Params, batch: Batch, config: ModelConfig) -> Array:
    chosen = forward(params, batch, config).chosen_blocks
    assert chosen is not None
    return chosen


def mean_loss(sums: dict[str, Any]) -> float:
    """Of a batch, from what `evaluate_step` sums."""
    return float(sums["loss"]) / max(float(sums["targets"]), 1.0)


def describe_retrofit(found: dict[str, Any]) -> str:
    """What `measure_retrofit` found, in half a line."""
    loss, chosen = found["loss"], found["coverage"]["chosen"]
    return (
        f"its loss {loss['dense']:.3f} becomes {loss['retrofitted']:.3f}, the chosen blocks hold "
        f"{100 * min(chosen):.0f} to {100 * max(chosen):.0f} % of a layer's attention"
    )

"""Twenty steps of training on meshes of eight devices and on one device, compared: prints as JSON, for each
mesh, the largest difference of a loss and of a parameter.

Run by itself with XLA_FLAGS=--xla_force_host_platform_device_count=8 and the name of a model in `MODELS`.
"""

import dataclasses
import functools
import itertools
import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlab.models import ModelConfig, MoEConfig
from jaxlab.models.sharding import MeshConfig, make_mesh, on_mesh, place_batch
from jaxlab.training.optimizer import OptimizerConfig, make_optimizer
from jaxlab.training.state import state_shardings
from jaxlab.training.step import State, train_step
from tests.models.tiny import draw_params, make_config
from tests.training.on_meshes import LENGTH, draw_batch

STEPS, ROWS = 20, 8
EXPERTS = MoEConfig(
    num_experts=8,
    width=8,
    experts_per_token=2,
    shared_width=4,
    scoring="sigmoid",
    choice_bias=True,
    bias_rate=0.01,
    balance_loss=0.01,
)
CAPACITY = dataclasses.replace(EXPERTS, capacity_factor=1.0, capacity_group=4, bias=True)
SIZES: dict[str, Any] = {"max_length": LENGTH, "vocab_size": 16, "width": 16, "num_layers": 1}
MODELS: dict[str, ModelConfig] = {
    "full": make_config(num_kv_heads=4, **SIZES),
    "nsa": make_config("nsa", tie_embeddings=False, **SIZES),
    "experts": make_config(moe=EXPERTS, num_kv_heads=4, **SIZES),
    "nsa_experts": make_config("nsa", moe=CAPACITY, **SIZES),
}


def meshes(model: ModelConfig) -> list[MeshConfig]:
    """Each axis alone over four devices (two, where heads allow no more), in pairs, and in threes."""
    axes = ["data", "fsdp", "model", "context", *(["expert"] if model.moe is not None else [])]
    found = []
    for count in (1, 2, 3):
        for names in itertools.combinations(axes, count):
            sizes = dict.fromkeys(names, 4 if count == 1 else 2)
            if count == 2:  # one of them is larger
                larger = next(name for name in reversed(names) if name != "model" or model.kv_heads > 2)
                sizes[larger] = 4
            sizes["model"] = min(sizes.get("model", 1), model.kv_heads)
            found.append(MeshConfig(**{"data": 1, **sizes}))
    return found


def trained(model: ModelConfig, mesh_config: MeshConfig) -> tuple[list[float], Any]:
    """The losses of the steps, and the parameters after them."""
    mesh = make_mesh(mesh_config)
    # A tiny eps would blow rounding errors of parameters without a gradient up to full steps.
    settings = OptimizerConfig(warmup_steps=1, learning_rate=0.003, eps=1e-4)
    optimizer = make_optimizer(settings, model, STEPS)
    shardings = state_shardings(model, optimizer, mesh)
    params = draw_params(model)
    state = jax.tree.map(jax.device_put, State(np.int32(0), params, optimizer.init(params)), shardings)
    step = functools.partial(train_step, config=model, optimizer=optimizer)
    update = jax.jit(on_mesh(step, mesh), out_shardings=(shardings, None))
    batch = draw_batch(ROWS, packed=True)
    losses = []
    for number in range(STEPS):
        seen = {**batch, "tokens": np.roll(batch["tokens"], number, axis=1)}
        state, metrics = update(state, place_batch(seen, mesh))
        losses.append(metrics["loss"])
    return [float(loss) for loss in losses], jax.tree.map(np.asarray, state.params)


def main(name: str) -> None:
    model, found = MODELS[name], {}
    losses, params = trained(model, MeshConfig(data=1))
    for mesh in meshes(model):
        others, theirs = trained(model, mesh)
        apart = jax.tree.map(lambda a, b: float(np.max(np.abs(a - b), initial=0)), theirs, params)
        axes = {axis: size for axis, size in dataclasses.asdict(mesh).items() if size > 1}
        found["+".join(f"{axis} {size}" for axis, size in axes.items())] = {
            "loss": float(jnp.max(jnp.abs(jnp.asarray(others) - jnp.asarray(losses)))),
            "parameters": max(jax.tree.leaves(apart)),
        }
        print(mesh, found, file=sys.stderr, flush=True)
    print(json.dumps({"losses": losses, "meshes": found}))


if __name__ == "__main__":
    main(sys.argv[1])

"""Loss and gradients of a model on a mesh, and on one device."""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from jaxlab.losses import loss_sum
from jaxlab.models import LatentConfig, ModelConfig, MoEConfig, RopeConfig, SlidingAttentionConfig
from jaxlab.models.sharding import MeshConfig, make_mesh, on_mesh, param_shardings, place_batch
from tests.models.tiny import NSA, draw_params, make_config

LENGTH = 32
MODELS: dict[str, ModelConfig] = {
    "nsa": make_config("nsa", max_length=LENGTH),
    # Blocks of 10 tokens every 2: a stretch of 8 takes all of the next one.
    "nsa_wide": make_config("nsa", attention=dataclasses.replace(NSA, block_len=10), max_length=LENGTH),
    "nsa_min_max": make_config("nsa_min_max", max_length=LENGTH),
    "nsa_auxiliary": make_config("nsa_auxiliary", max_length=LENGTH),
    "nsa_indexer": make_config("nsa_indexer", max_length=LENGTH),
    "nsa_shared": make_config("nsa_shared", max_length=LENGTH, remat="layer"),
    "full": make_config(max_length=LENGTH, remat="layer", vocab_size=16),
    "sinks": make_config(
        attention=SlidingAttentionConfig(window=11, pattern=("full", "sliding")),
        attention_sinks=True,
        moe=MoEConfig(num_experts=4, width=6, router_bias=True, bias=True, swiglu_limit=1.0),
        max_length=LENGTH,
    ),
    "experts": make_config(
        moe=MoEConfig(
            num_experts=8,
            width=6,
            experts_per_token=3,
            shared_width=4,
            balance_loss=0.1,
            choice_bias=True,
            scoring="sigmoid",
            first_dense=1,
            scale=1.5,
            num_groups=2,
            groups_per_token=2,
        ),
        max_length=LENGTH,
        vocab_size=16,
        tie_embeddings=False,
        head_bias=True,
    ),
    "capacity": make_config(
        moe=MoEConfig(
            num_experts=4, width=6, bias=True, router_bias=True, capacity_factor=0.8, capacity_group=4
        ),
        max_length=LENGTH,
        remat="layer",
    ),
    "nsa_experts": make_config(
        "nsa",
        moe=MoEConfig(num_experts=4, width=6, capacity_factor=1.0, capacity_group=4, choice_bias=True),
        max_length=LENGTH,
    ),
    "latent": make_config(
        latent=LatentConfig(kv_rank=6, query_rank=10),
        position=RopeConfig(dim=2),
        num_kv_heads=None,
        max_length=LENGTH,
    ),
    "sliding": make_config(attention=SlidingAttentionConfig(window=11), mlp_bias=True, max_length=LENGTH),
    "chunked": make_config(
        attention=SlidingAttentionConfig(window=11, pattern=("full", "sliding"), implementation="chunked"),
        max_length=LENGTH,
    ),
}


def draw_batch(rows: int, length: int = LENGTH, *, packed: bool = False) -> dict[str, np.ndarray]:
    """Tokens, some of them targets; packed sequences end within stretches, one lies across several, and one
    begins where a stretch does."""
    rng = np.random.default_rng(3)
    batch = {"tokens": rng.integers(0, 13, (rows, length)).astype(np.int32)}
    batch["loss_mask"] = rng.random((rows, length)) < 0.8
    if packed:
        ends = np.array([[3, 16, length], [5, 27, 30], [length, length, length], [1, 8, 24]])[
            np.arange(rows) % 4
        ]
        index = np.arange(length)[None]
        segments = 1 + sum((index >= ends[:, i, None]).astype(np.int32) for i in range(3))
        batch["segment_ids"] = np.where(segments == 4, 0, segments).astype(np.int32)  # the rest is padding
    return batch


def loss_and_gradients(config: ModelConfig, mesh_config: MeshConfig, batch: Any) -> Any:
    """Mean loss, and the gradient of its sum for every parameter."""
    mesh = make_mesh(mesh_config)
    params = jax.tree.map(jax.device_put, draw_params(config), param_shardings(config, mesh))
    step = jax.value_and_grad(functools.partial(loss_sum, config=config), has_aux=True)
    (total, count), gradients = jax.jit(on_mesh(step, mesh))(params, place_batch(batch, mesh))
    scale = 1 / float(count)
    return float(total) * scale, jax.tree.map(lambda g: np.asarray(g) * scale, gradients)


@functools.cache
def on_one_device(name: str, rows: int, packed: bool) -> Any:
    return loss_and_gradients(MODELS[name], MeshConfig(data=1), draw_batch(rows, packed=packed))


def compare(name: str, mesh_config: MeshConfig, *, rows: int = 4, packed: bool = False) -> None:
    """Asserts that the mesh gives what one device gives."""
    loss, gradients = loss_and_gradients(MODELS[name], mesh_config, draw_batch(rows, packed=packed))
    expected, alone = on_one_device(name, rows, packed)
    np.testing.assert_allclose(loss, expected, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, alone)

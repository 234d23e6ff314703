"""Mixture of experts: each token passes through its best k routed experts, and through the shared ones.

Without a capacity no token is dropped: tokens are sorted by expert and multiplied by groups of rows
(`jax.lax.ragged_dot`), so that the work is that of k experts a token, whatever the load. With one, experts
have as many places each, and their products are one batched product. Sums are gathers, never scatters: the
same bits each time.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxlab.errors import ConfigError
from jaxlab.models.config import ModelConfig, MoEConfig
from jaxlab.models.expert_parallel import Devices, on_devices, through_experts
from jaxlab.models.initializer import Initializer
from jaxlab.models.layers import ACTIVATIONS, MLP
from jaxlab.models.mesh import CONTEXT, check_length, current_mesh


class ExpertStats(NamedTuple):
    """How the tokens of a batch spread over the routed experts of a layer."""

    balance_loss: Float[Array, ""]
    """The load-balancing loss: 1 where the load is even."""
    expert_load: Float[Array, " E"]
    """The share of all choices that each expert got, dropped ones among them."""
    dropped_choices: Float[Array, ""]
    """The share of all choices that no expert took. Padding counts in none of the three."""


class MixtureOfExperts(nnx.Module):
    """Routed experts, gated MLPs D -> F -> D, and the shared ones as one MLP."""

    def __init__(self, config: ModelConfig, residual_scale: float, init: Initializer):
        c, m, std = config, config.moe, config.initializer_range
        if m is None:
            raise ValueError("a model without experts")
        self.moe, self.activation = m, c.activation
        inward, outward = ("experts", "embed", "mlp"), ("experts", "mlp", "embed")
        self.router = init.normal((c.width, m.num_experts), ("embed", "experts"), std)
        self.gate = init.normal((m.num_experts, c.width, m.width), inward, std)
        self.up = init.normal((m.num_experts, c.width, m.width), inward, std)
        self.down = init.normal((m.num_experts, m.width, c.width), outward, std * residual_scale)
        bias = lambda there, *shape: init.zeros(shape, ("experts", "mlp")[: len(shape)]) if there else None
        self.router_bias = bias(m.router_bias, m.num_experts)
        self.choice_bias = bias(m.choice_bias, m.num_experts)
        self.gate_bias = bias(m.bias, m.num_experts, m.width)
        self.up_bias = bias(m.bias, m.num_experts, m.width)
        self.down_bias = init.zeros((m.num_experts, c.width), ("experts", "embed")) if m.bias else None
        self.shared = MLP(c, m.shared_width, residual_scale, init) if m.shared_width else None
        self.shared_gate = init.normal((c.width,), ("embed",), std) if m.shared_gate else None

    def __call__(
        self, x: Float[Array, "B T D"], real: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], ExpertStats]:
        """The experts' output, and how the tokens spread over them.

        Args:
          real: tokens that are no padding, which does not count; None: all.
        """
        m = self.moe
        check_groups(m, x.shape[1])
        router = {"router": self.router, "bias": self.router_bias, "choice_bias": self.choice_bias}
        kernels = {"gate": self.gate, "up": self.up, "down": self.down}
        biases = {"gate_bias": self.gate_bias, "up_bias": self.up_bias, "down_bias": self.down_bias}
        # In the compute dtype before devices exchange them.
        experts = {name: p.astype(x.dtype) for name, p in (kernels | biases).items() if p is not None}
        of_router = {name: _value(p) for name, p in router.items()}
        y, stats = on_devices(self._routed, x, real, of_router, experts)
        if m.scale != 1.0:
            y = y * jnp.asarray(m.scale, y.dtype)
        if self.shared is not None:
            shared = self.shared(x)
            if self.shared_gate is not None:
                gate = jnp.einsum("btd,d->bt", x, self.shared_gate.astype(x.dtype))
                shared = shared * jax.nn.sigmoid(gate)[:, :, None]
            y = y + shared
        return y, stats

    def _routed(
        self,
        x: Float[Array, "B T D"],
        real: Bool[Array, "B T"] | None,
        router: Any,
        experts: dict[str, Array],
        devices: Devices,
    ) -> tuple[Float[Array, "B T D"], ExpertStats]:
        """What the routed experts add to the tokens of one device."""
        m, (batch, length, width) = self.moe, x.shape
        flat = x.reshape(-1, width)
        weights, chosen, scores = route(router["router"], flat, m, router["bias"], router["choice_bias"])
        of_group, capacity = m.capacity_group or length, None
        groups, num_groups = jnp.zeros((batch * length,), jnp.int32), 1
        if m.capacity_factor is not None:
            per_row = -(-length // of_group)
            groups = jnp.arange(batch)[:, None] * per_row + jnp.arange(length)[None] // of_group
            groups, num_groups, capacity = groups.reshape(-1), batch * per_row, m.capacity(of_group)

        def products(rows: Array, sizes: Array | None) -> Array:
            """Of all experts here for the tokens that they got."""
            if sizes is None:
                times = lambda y, kernel: jnp.einsum("esd,edf->esf", y, kernel)
                each = lambda bias: bias[:, None]
            else:
                times = lambda y, kernel: jax.lax.ragged_dot(y, kernel, sizes)
                expert = jnp.repeat(jnp.arange(sizes.size), sizes, total_repeat_length=rows.shape[0])
                each = lambda bias: bias[expert]

            def by_expert(y: Array, name: str) -> Array:
                bias = experts.get(f"{name}_bias")
                z = times(y, experts[name])
                if bias is None:
                    return z
                return z + (devices.once(each(bias)) if name == "down" else each(bias))

            return by_expert(self._gated(by_expert(rows, "gate"), by_expert(rows, "up")), "down")

        out, kept = through_experts(flat, chosen, groups, num_groups, products, m, devices, capacity)
        y = devices.sum_over_hidden(jnp.einsum("nkd,nk->nd", out, weights.astype(out.dtype)))
        real = None if real is None else real.reshape(-1)
        stats = expert_stats(chosen, scores, kept, m, devices, real)
        return y.reshape(x.shape), stats

    def _gated(self, gate: Float[Array, "*rows F"], up: Float[Array, "*rows F"]) -> Float[Array, "*rows F"]:
        """Neurons of the routed experts."""
        limit = self.moe.swiglu_limit
        if limit is None:
            return ACTIVATIONS[self.activation](gate) * up
        gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
        return gate * jax.nn.sigmoid(self.moe.swiglu_alpha * gate) * (up + 1)


def _value(param: nnx.Param | None) -> Array | None:
    return None if param is None else param[...]


def check_groups(moe: MoEConfig, length: int, devices: int | None = None) -> None:
    """Whether the tokens that share a capacity lie on one device each.

    Args:
      devices: that split sequences of so many tokens; None: as the mesh that is set has it.

    Raises:
      ConfigError: they do not.
    """
    if devices is None:
        mesh = current_mesh()
        devices = 1 if mesh is None else mesh.shape.get(CONTEXT, 1)
    if moe.capacity_factor is None or devices == 1:
        return
    if moe.capacity_group is None:
        raise ConfigError(
            "must be given where sequences are split over devices", key="model.moe.capacity_group"
        )
    check_length(length, devices, unit=moe.capacity_group)


def expert_stats(
    chosen: Int[Array, "N k"],
    scores: Float[Array, "N E"],
    kept: Bool[Array, "N k"],
    moe: MoEConfig,
    devices: Devices,
    real: Bool[Array, " N"] | None = None,
) -> ExpertStats:
    """Over the tokens of all devices, of those that are `real`.

    The balance loss is E times the sum over experts of (share of choices) * (mean probability): Switch
    Transformer, arXiv 2101.03961, eq. 4, with the k choices of a token counted alike.
    """
    k, probabilities = chosen.shape[1], scores / jnp.sum(scores, axis=-1, keepdims=True)
    if real is None:
        counts, tokens = jnp.bincount(chosen.reshape(-1), length=moe.num_experts), jnp.asarray(len(chosen))
        total = jnp.sum(probabilities, axis=0)
    else:
        counted = jnp.where(real[:, None], chosen, moe.num_experts)  # beyond the last one: dropped
        counts, tokens = jnp.bincount(counted.reshape(-1), length=moe.num_experts), jnp.sum(real)
        kept, total = kept & real[:, None], jnp.sum(probabilities, axis=0, where=real[:, None])
    counts = devices.sum_over_tokens(counts)
    tokens = jnp.maximum(devices.sum_over_tokens(tokens.astype(jnp.int32)), 1)
    choices = (tokens * k).astype(jnp.float32)
    share = counts.astype(jnp.float32) / choices
    mean = devices.sum_over_tokens(total) / tokens.astype(jnp.float32)
    balance = moe.num_experts * jnp.sum(jax.lax.stop_gradient(share) * mean)
    taken = devices.sum_over_tokens(jnp.sum(kept, dtype=jnp.int32))
    return ExpertStats(balance, share, 1 - taken.astype(jnp.float32) / choices)


def route(
    router: Float[Array, "D E"],
    x: Float[Array, "N D"],
    moe: MoEConfig,
    bias: Float[Array, " E"] | None = None,
    choice_bias: Float[Array, " E"] | None = None,
) -> tuple[Float[Array, "N k"], Int[Array, "N k"], Float[Array, "N E"]]:
    """Weights and numbers of the chosen experts (on ties the lower ones), and the scores of all.

    `bias` is on the logits, `choice_bias` on the weights by which experts are chosen, not on those that they
    get.
    """
    if moe.router_dtype == "float32":
        x = x.astype(jnp.float32)
    logits = x @ router.astype(x.dtype)
    if bias is not None:
        logits = logits + bias.astype(x.dtype)[None]
    logits = logits.astype(jnp.float32)
    scores = jax.nn.softmax(logits, axis=-1) if moe.scoring == "softmax" else jax.nn.sigmoid(logits)
    if choice_bias is None and moe.num_groups == 1:
        weights, chosen = jax.lax.top_k(scores, moe.experts_per_token)
    else:
        rated = scores if choice_bias is None else scores + choice_bias.astype(jnp.float32)[None]
        _, chosen = jax.lax.top_k(_within_groups(rated, moe), moe.experts_per_token)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if moe.normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen, scores


def _within_groups(rated: Float[Array, "N E"], moe: MoEConfig) -> Float[Array, "N E"]:
    """Ratings of the experts in each token's best groups; -inf for the others."""
    if moe.num_groups == 1:
        return rated
    groups = rated.reshape(rated.shape[0], moe.num_groups, -1)
    best = jnp.sum(jax.lax.top_k(groups, 1 if moe.group_score == "max" else 2)[0], axis=-1)
    _, chosen = jax.lax.top_k(best, moe.groups_per_token)
    open_groups = jnp.any(chosen[:, :, None] == jnp.arange(moe.num_groups)[None, None], axis=1)
    return jnp.where(open_groups[:, :, None], groups, -jnp.inf).reshape(rated.shape)

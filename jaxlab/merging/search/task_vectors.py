"""How large two task vectors are, and how far they point the same way, by layer and module."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxlab.merging.injection import merged_tensors
from jaxlab.merging.injection_plan import InjectionPlan
from jaxlab.merging.recipe import Trio
from jaxlab.models import Params


def compare_task_vectors(plan: InjectionPlan, trio: Trio) -> list[dict[str, Any]]:
    """A row for every layer and module: "layer" (None outside of layers), "module", "norm_v", "norm_e", both
    over the base's norm "norm_base", and "cosine" of the two task vectors, None where one of them is zero.
    """
    sums = _sums(plan, trio.vlm, trio.expert, trio.base)
    groups: dict[tuple[int, str], np.ndarray] = {}
    for entry in plan.merged:
        found = np.asarray(sums[entry.pattern], np.float64)
        inside = entry.path[0] in ("layers", "dense_layers")
        module = entry.path[1] if inside else entry.path[0]
        for layer, own in zip(entry.layers, found, strict=True):
            key = (-1 if layer is None else layer, module)
            groups[key] = groups.get(key, 0.0) + own
    rows = []
    for (layer, module), (vv, ee, ve, bb) in sorted(groups.items()):
        cosine = float(ve / np.sqrt(vv * ee)) if vv > 0 and ee > 0 else None
        rows.append(
            {
                "layer": None if layer < 0 else layer,
                "module": module,
                "norm_v": float(np.sqrt(vv)),
                "norm_e": float(np.sqrt(ee)),
                "norm_base": float(np.sqrt(bb)),
                "cosine": cosine,
            }
        )
    return rows


@functools.partial(jax.jit, static_argnames="plan")
def _sums(
    plan: InjectionPlan, vlm: Params, expert: Params, base: Params
) -> dict[str, Float[Array, "tensors 4"]]:
    """Of each tensor the squared norms of both task vectors, their product, and the base's squared norm."""

    def one(x: Array, y: Array, origin: Array) -> Array:
        origin = origin.astype(jnp.float32)
        v, e = x.astype(jnp.float32) - origin, y.astype(jnp.float32) - origin
        return jnp.stack([jnp.sum(v * v), jnp.sum(e * e), jnp.sum(v * e), jnp.sum(origin * origin)])

    return {
        leaf.entry.pattern: jax.vmap(one)(
            *(merged_tensors(p, leaf, i) for i, p in enumerate((vlm, expert, base)))
        )
        for leaf in plan.leaves
        if leaf.action == "merged"
    }

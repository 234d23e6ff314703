"""The layers of a decoder or of a vision transformer, scanned."""

from typing import Any

import jax
from jaxtyping import Array, Float, Int

from jaxlab.models.attention import Cache, Where, attention
from jaxlab.models.config import ModelConfig
from jaxlab.models.layers import mlp, norm
from jaxlab.models.modules import Params
from jaxlab.models.probe import Probe


def stack(
    params: Params,
    x: Float[Array, "B T D"],
    where: Where,
    config: ModelConfig,
    *,
    causal: bool = True,
    probe: Probe | None = None,
    cache: Cache | None = None,
) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None, Int[Array, "L B Hkv T n"] | None]:
    """All layers, scanned: hidden states, and where they apply the layers' caches and NSA's chosen blocks."""
    layer_probes, shared_probe = (None, None) if probe is None else probe.split()

    def layer(x: Array, per_layer: tuple[Any, ...]) -> tuple[Array, tuple[Any, ...]]:
        p, layer_probe, layer_cache = per_layer
        if layer_probe is not None:
            layer_probe = layer_probe.join(shared_probe)
        y, layer_cache, chosen = attention(
            p["attention"], norm(p["attention_norm"], x, config), where, config,
            causal=causal, probe=layer_probe, cache=layer_cache,
        )  # fmt: skip
        x = x + y
        return x + mlp(p["mlp"], norm(p["mlp_norm"], x, config), config), (layer_cache, chosen)

    if config.remat == "layer":
        layer = jax.checkpoint(layer, prevent_cse=False)  # the scan already keeps the two passes apart
    caches = None if cache is None else (cache.key, cache.value)
    x, (caches, chosen) = jax.lax.scan(layer, x, (params, layer_probes, caches))
    return x, caches, chosen

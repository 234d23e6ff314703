"""The layers of a decoder or of a vision transformer, scanned."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.models.attention import Cache, LayerCache, attention, join_cache, part_cache
from jaxlab.models.config import ModelConfig
from jaxlab.models.layers import mlp, norm
from jaxlab.models.mesh import split_tokens
from jaxlab.models.modules import Params
from jaxlab.models.moe import experts
from jaxlab.models.native_sparse import Choice
from jaxlab.models.probe import Probe
from jaxlab.models.where import Where


class Stacked(NamedTuple):
    """What the layers return; None where it does not apply."""

    x: Float[Array, "B T D"]
    caches: LayerCache | None
    choice: Choice
    """Of each layer, stacked."""
    balance: Float[Array, " L_moe"] | None
    """The load-balancing loss of each layer with experts."""
    outputs: Float[Array, "L B T D"] | None
    """Of each layer, if they were asked for."""


class Run(NamedTuple):
    """Consecutive layers done by one scan: `repeats` times the kinds, from layer `start` on."""

    start: int
    kinds: tuple[str, ...]
    repeats: int

    @property
    def stop(self) -> int:
        return self.start + len(self.kinds) * self.repeats


def stack(
    params: Params,
    x: Float[Array, "B T D"],
    where: Where,
    config: ModelConfig,
    *,
    dense_params: Params | None = None,
    causal: bool = True,
    probe: Probe | None = None,
    cache: Cache | None = None,
    additions: Float[Array, "n B T D"] | None = None,
    keep_outputs: bool = False,
) -> Stacked:
    """All layers whose parameters are given: those with an MLP, if experts follow, then `params`.

    `additions` are added to the outputs of the first n layers (DeepStack, arXiv 2406.04334).
    """
    per_layer, shared = (None, None) if probe is None else probe.split()
    pool, caches = part_cache(None if cache is None else cache.layers)
    results: list[tuple[Any, ...]] = []
    start = 0
    for part in (dense_params, params):
        if part is None:
            continue
        count = jax.tree.leaves(part)[0].shape[0]
        alone = 0 if additions is None else max(0, additions.shape[0] - start)
        for run in _runs(config.kinds[start : start + count], min(alone, count)):
            rows = slice(start + run.start, start + run.stop)
            of_run = (
                _cut(part, slice(run.start, run.stop)),
                _cut(per_layer, rows),
                _cut(caches, rows),
            )
            (x, pool), ys = _scan((x, pool), of_run, run, where, config, shared, causal, keep_outputs)
            if start + run.start < (0 if additions is None else additions.shape[0]):
                assert additions is not None
                x = x + additions[start + run.start].astype(x.dtype)
            results.append(ys)
        start += count
    caches, choice, balance, outputs = (_joined([ys[i] for ys in results]) for i in range(4))
    return Stacked(x, join_cache(pool, caches), choice, balance, outputs)


Carry = tuple[Array, dict[str, Array] | None]
"""What passes from layer to layer: x, and what their caches share."""


def _scan(
    carry: Carry,
    of_run: tuple[Any, ...],
    run: Run,
    where: Where,
    config: ModelConfig,
    shared: Probe | None,
    causal: bool,
    keep_outputs: bool,
) -> tuple[Carry, tuple[Any, ...]]:
    """One scan: the carry after it, and what each of its layers returned, stacked over them."""

    def layer(carry: Carry, of_layer: tuple[Any, ...], kind: str) -> tuple[Carry, tuple[Any, ...]]:
        (x, pool), (p, layer_probe, own) = carry, of_layer
        if layer_probe is not None:
            layer_probe = layer_probe.join(shared)
        if causal:
            x = split_tokens(x)
        normed = norm(p["attention_norm"], x, config)
        y, layer_cache, choice = attention(
            p["attention"],
            normed,
            where,
            config,
            kind=kind,
            causal=causal,
            probe=layer_probe,
            cache=join_cache(pool, own),
        )
        pool, own = part_cache(layer_cache)
        if config.post_norms:
            y = norm(p["attention_post_norm"], y, config)
        y = _gained(y, p, "attention_gain")
        if not config.parallel:
            x = x + y
            normed = norm(p["mlp_norm"], x, config)
        balance = None
        if "moe" in p:
            z, balance = experts(p["moe"], normed, config)
        else:
            z = mlp(p["mlp"], normed, config)
        if config.post_norms:
            z = norm(p["mlp_post_norm"], z, config)
        z = _gained(z, p, "mlp_gain")
        x = x + (y + z if config.parallel else z)
        return (x, pool), (own, choice, balance, x if keep_outputs else None)

    def period(carry: Carry, of_period: tuple[Any, ...]) -> tuple[Carry, tuple[Any, ...]]:
        results = []
        for i, kind in enumerate(run.kinds):
            step = lambda carry, of_layer, kind=kind: layer(carry, of_layer, kind)
            if config.remat == "layer":
                step = jax.checkpoint(step, prevent_cse=False)  # the scan already keeps the two passes apart
            carry, result = step(carry, jax.tree.map(lambda leaf, i=i: leaf[i], of_period))
            results.append(result)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    if len(run.kinds) == 1:  # no axis for the period: what most models are
        single = lambda carry, of_layer: layer(carry, of_layer, run.kinds[0])
        if config.remat == "layer":
            single = jax.checkpoint(single, prevent_cse=False)
        return jax.lax.scan(single, carry, of_run)
    fold = lambda leaf: leaf.reshape(run.repeats, len(run.kinds), *leaf.shape[1:])
    carry, ys = jax.lax.scan(period, carry, jax.tree.map(fold, of_run))
    return carry, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), ys)


def _gained(y: Array, params: Params, name: str) -> Array:
    """LayerScale (arXiv 2103.17239), in layers that have it."""
    return y * params[name].astype(y.dtype)[None, None] if name in params else y


def _runs(kinds: tuple[str, ...], alone: int) -> list[Run]:
    """The fewest scans: kinds that repeat are one, with a shorter one for what is left; else a scan for each
    stretch of one kind. The first `alone` layers are scans of their own.
    """
    runs = [Run(i, (kinds[i],), 1) for i in range(alone)]
    rest = kinds[alone:]
    if not rest:
        return runs
    period = next(p for p in range(1, len(rest) + 1) if all(k == rest[i % p] for i, k in enumerate(rest)))
    if period <= len(rest) // 2 or period == 1:
        runs.append(Run(alone, rest[:period], len(rest) // period))
        left = len(rest) % period
        return runs + ([Run(len(kinds) - left, rest[-left:], 1)] if left else [])
    start = alone
    for i in range(alone + 1, len(kinds) + 1):
        if i == len(kinds) or kinds[i] != kinds[start]:
            runs.append(Run(start, (kinds[start],), i - start))
            start = i
    return runs


def _cut(tree: Any, rows: slice) -> Any:
    return jax.tree.map(lambda leaf: leaf if rows == slice(0, leaf.shape[0]) else leaf[rows], tree)


def _joined(parts: list[Any]) -> Any:
    """What the scans returned, one after the other; scans without the thing have None."""
    parts = [part for part in parts if part is not None]
    if len(parts) < 2:
        return parts[0] if parts else None
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

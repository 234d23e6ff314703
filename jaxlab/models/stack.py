"""Layers one after the other: stacked blocks, applied by scans."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.models.batch import Params
from jaxlab.models.block import Block
from jaxlab.models.config import ModelConfig
from jaxlab.models.context import AttentionContext
from jaxlab.models.kv_cache import Cache, LayerCache, join_cache, split_cache
from jaxlab.models.moe import ExpertStats
from jaxlab.models.taps import NO_TAPS, Taps
from kernels_pallas.flow import FLOW_RESIDUALS
from kernels_pallas.nsa import NSA_RESIDUALS


class Stacked(NamedTuple):
    """What the layers return; None where it does not apply."""

    x: Float[Array, "B T D"]
    caches: LayerCache | None
    chosen_blocks: Int[Array, "L B Hkv T n"] | None
    weights_read: Float[Array, "L B H P"] | None
    selector_loss: Float[Array, " L"] | None
    experts: ExpertStats | None
    """Of each layer with experts, stacked."""
    activations: dict[str, Array]
    """Those that the taps read."""


class Kind(NamedTuple):
    """What is static in a layer and may differ from that of the next."""

    attention: str
    """One of `ModelConfig.kinds`."""
    rotary: bool
    """Whether it has rotary positions, where the model has any."""


class Run(NamedTuple):
    """Consecutive layers done by one scan: `repeats` times the kinds, from layer `start` on."""

    start: int
    kinds: tuple[Kind, ...]
    repeats: int

    @property
    def stop(self) -> int:
        return self.start + len(self.kinds) * self.repeats


class Between(NamedTuple):
    """Layers that stand between those of the stacks and read something else (images of Mllama)."""

    before: tuple[int, ...]
    """Of each, in rising order, the number of the layer that follows it; the last one may follow all."""
    apply: Callable[[int, Float[Array, "B T D"]], Float[Array, "B T D"]]
    """The residual stream after one of them, by its own number."""

    def done(self, layer: int, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The stream after those that stand before `layer`."""
        for index, before in enumerate(self.before):
            x = self.apply(index, x) if before == layer else x
        return x


NO_BETWEEN = Between((), lambda index, x: x)


class MadeLayers(NamedTuple):
    """The layers' parameters, made one layer after the other as they run: all of them never exist at once."""

    make: Callable[[str, Params, Any], Params]
    """(the stack's name in the tree, a layer's parameters, its slice of the inputs) -> parameters of the same
    shapes."""
    inputs: dict[str, Any]
    """By the name of a stack: arrays with a leading axis of its layers."""


def apply_blocks(
    stacks: Sequence[Block],
    x: Float[Array, "B T D"],
    context: AttentionContext,
    config: ModelConfig,
    *,
    taps: Taps = NO_TAPS,
    cache: Cache | None = None,
    additions: Float[Array, "n B T D"] | None = None,
    between: Between = NO_BETWEEN,
    made: MadeLayers | None = None,
) -> Stacked:
    """The layers of all stacks, one stack after the other.

    Args:
      stacks: blocks whose parameters are stacked on a leading axis (`Initializer.stack`).
      additions: added to the outputs of the first n layers (DeepStack, arXiv 2406.04334).
      between: further layers.
      made: makes the layers' parameters of what the blocks hold and of its inputs.
    """
    # A tower's config must say that its layers turn, or its tables would be passed over.
    assert context.rotary is None or any(config.rotary_layers)
    pool, caches = split_cache(None if cache is None else cache.layers)
    num_additions = 0 if additions is None else additions.shape[0]
    results: list[tuple[Any, ...]] = []
    kinds = tuple(map(Kind, config.kinds, config.rotary_layers))
    found, start = taps.buffers, 0
    names = ("layers",) if len(stacks) == 1 else ("dense_layers", "layers")
    for name, blocks in zip(names, stacks, strict=True):
        graphdef, params = nnx.split(blocks)
        make, inputs = None, None
        if made is not None:
            make, inputs = functools.partial(made.make, name), made.inputs[name]
        count = jax.tree.leaves(params)[0].shape[0]
        alone = min(max(0, num_additions - start), count)
        cuts = [layer - start for layer in between.before]
        for run in _runs(kinds[start : start + count], alone, cuts):
            x = between.done(start + run.start, x)
            layers = slice(start + run.start, start + run.stop)
            of_run = (
                _cut(params, slice(run.start, run.stop)),
                _cut(taps.per_layer, layers),
                _cut(caches, layers),
                _cut(inputs, slice(run.start, run.stop)),
            )
            scan = _Scan(graphdef, run, context, config.remat, taps, make)
            (x, pool, found), ys = scan((x, pool, found), of_run)
            if start + run.start < num_additions:
                assert additions is not None
                x = x + additions[start + run.start].astype(x.dtype)
            results.append(ys)
        start += count
    x = between.done(start, x)
    caches, chosen, read, selector_loss, experts = (_joined([ys[i] for ys in results]) for i in range(5))
    return Stacked(x, join_cache(pool, caches), chosen, read, selector_loss, experts, found)


def take_blocks(blocks: Block, layers: slice) -> Block:
    """Some of stacked blocks."""
    graphdef, params = nnx.split(blocks)
    return nnx.merge(graphdef, _cut(params, layers))


Carry = tuple[Array, dict[str, Array] | None, dict[str, Array]]
"""What passes from layer to layer: x, what their caches share, and the activations that the taps read."""


class _Scan(NamedTuple):
    """One scan over layers: of their parameters, their taps, and their caches."""

    graphdef: nnx.GraphDef[Block]
    run: Run
    context: AttentionContext
    remat: str
    """`ModelConfig.remat`."""
    taps: Taps
    make: Callable[[Params, Any], Params] | None = None
    """See `MadeLayers`."""

    def __call__(self, carry: Carry, of_run: tuple[Any, ...]) -> tuple[Carry, tuple[Any, ...]]:
        """The carry after it, and what each of its layers returned, stacked over them."""
        kinds, repeats = self.run.kinds, self.run.repeats
        if len(kinds) == 1:  # no axis for the period: what most models are
            return jax.lax.scan(self._step(kinds[0]), carry, of_run)
        fold = lambda leaf: leaf.reshape(repeats, len(kinds), *leaf.shape[1:])
        carry, ys = jax.lax.scan(self._period, carry, jax.tree.map(fold, of_run))
        return carry, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), ys)

    def _period(self, carry: Carry, of_period: tuple[Any, ...]) -> tuple[Carry, tuple[Any, ...]]:
        results = []
        for i, kind in enumerate(self.run.kinds):
            carry, result = self._step(kind)(carry, jax.tree.map(lambda leaf, i=i: leaf[i], of_period))
            results.append(result)
        return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *results)

    def _step(self, kind: Kind) -> Any:
        step = lambda carry, of_layer: self._layer(carry, of_layer, kind)
        if self.remat == "none":
            return step
        # The scan already keeps the two passes apart.
        policy = _POLICIES[self.remat]
        return jax.checkpoint(step, prevent_cse=False, policy=policy)

    def _layer(self, carry: Carry, of_layer: tuple[Any, ...], kind: Kind) -> tuple[Carry, tuple[Any, ...]]:
        (x, pool, found), (params, per_layer, cache, inputs) = carry, of_layer
        tap = self.taps.layer(per_layer)
        if self.make is not None:
            params = self.make(nnx.to_pure_dict(params), inputs)
        block = nnx.merge(self.graphdef, params)
        context = self.context.for_layer(kind.rotary)
        done = block(x, context, kind=kind.attention, tap=tap, cache=join_cache(pool, cache))
        pool, cache = split_cache(done.attended.cache)
        attended = done.attended
        of_attention = (attended.chosen_blocks, attended.weights_read, attended.selector_loss)
        results = (cache, *of_attention, done.experts)
        return (done.x, pool, self.taps.store(found, per_layer, tap)), results


_KEEP_PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(*FLOW_RESIDUALS, *NSA_RESIDUALS),
)
_POLICIES: dict[str, Callable[..., Any] | None] = {
    "layer": None,
    "elementwise": _KEEP_PRODUCTS,
    "all_but_attention": jax.checkpoint_policies.save_only_these_names(*FLOW_RESIDUALS, *NSA_RESIDUALS),
}
"""What `jax.checkpoint` keeps, by `ModelConfig.remat`."""


def _runs(kinds: tuple[Kind, ...], alone: int, cuts: Sequence[int] = ()) -> list[Run]:
    """The fewest scans: kinds that repeat are one, with a shorter one for what is left; else a scan for each
    stretch of one kind. The first `alone` layers are scans of their own; none goes on over a layer of `cuts`.
    """
    for cut in cuts:
        if 0 < cut < len(kinds):
            after = _runs(kinds[cut:], max(0, alone - cut), [other - cut for other in cuts])
            before = _runs(kinds[:cut], min(alone, cut))
            return before + [run._replace(start=run.start + cut) for run in after]
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


def _cut(tree: Any, layers: slice) -> Any:
    whole = lambda leaf: layers == slice(0, leaf.shape[0])
    return jax.tree.map(lambda leaf: leaf if whole(leaf) else leaf[layers], tree)


def _joined(parts: list[Any]) -> Any:
    """What the scans returned, one after the other; scans without the thing have None."""
    parts = [part for part in parts if part is not None]
    if len(parts) < 2:
        return parts[0] if parts else None
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

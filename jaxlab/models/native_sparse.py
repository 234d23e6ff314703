"""Native Sparse Attention (arXiv 2502.11089, sec. 3) of one layer: compression, choice of blocks, gates.

The operators themselves, Eq. 9 among them (`select_blocks`), are in kernels_pallas/nsa.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxlab.errors import ConfigError
from jaxlab.models.attention import Attended, Attention
from jaxlab.models.compressor import Compressor
from jaxlab.models.config import BRANCHES, ModelConfig
from jaxlab.models.context import AttentionContext
from jaxlab.models.indexer import Indexer, block_scores, indexer_loss
from jaxlab.models.initializer import Initializer
from jaxlab.models.kv_cache import LayerCache
from jaxlab.models.mesh import AXES, check_parts, on_several_devices
from jaxlab.models.rotary import rotary_table
from jaxlab.models.selectors import (
    AuxiliarySelector,
    auxiliary_loss,
    block_bounds,
    bound_scores,
    packed_bound_scores,
)
from jaxlab.models.taps import BRANCH_OUTPUTS, BRANCH_PATTERNS, Tap
from kernels_pallas import nsa
from kernels_pallas.flow import Probe, nsa_flow_attention
from kernels_pallas.nsa import (
    PagedCache,
    nsa_attention,
    select_blocks_by_importance,
)


class Gate(nnx.Module):
    """The gates: an MLP of the layer input, a sigmoid per query head and branch (Eq. 5)."""

    def __init__(self, config: ModelConfig, init: Initializer):
        c, width, std = config, config.nsa.gate_width or config.width, config.initializer_range
        hidden_axes = ("embed", "gate")
        self.hidden = init.normal((c.width, width), hidden_axes, std) if c.nsa.gate_width else None
        self.output = init.normal((width, c.num_heads, len(BRANCHES)), ("gate", "heads", "branch"), std)
        self.bias = init.zeros((c.num_heads, len(BRANCHES)), ("heads", "branch"))
        self.branches = tuple(branch in c.nsa.branches for branch in BRANCHES)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H 3"]:
        """In [0, 1]; exactly 0 for the branches that the model goes without."""
        if self.hidden is not None:
            x = jax.nn.silu(x @ self.hidden.astype(x.dtype))
        logits = jnp.einsum("btd,dhc->bthc", x, self.output.astype(x.dtype))
        gates = jax.nn.sigmoid(logits + self.bias.astype(x.dtype)[None, None])
        return jnp.where(jnp.asarray(self.branches)[None, None, None], gates, 0)


def _tap_branches(tap: Tap, name: str, x: Float[Array, "B 3 T Hkv K"]) -> Float[Array, "B 3 T Hkv K"]:
    """Keys or values, seen with their tokens first."""
    return tap(name, x.swapaxes(1, 2)).swapaxes(1, 2) if tap.wants(name) else x


class NativeSparseAttention(Attention):
    """Three branches with their own keys and values, added up by gates: compressed blocks, chosen blocks, the
    sliding window."""

    def __init__(self, config: ModelConfig, residual_scale: float, init: Initializer, **more: Any):
        c = config
        branches = None if c.nsa.shared_kv else len(BRANCHES)
        super().__init__(c, residual_scale, init, branches=branches, **more)
        self.compress_key = Compressor(c, c.key_dim, init)
        self.compress_value = Compressor(c, c.value_dim, init)
        if c.nsa.gated:
            self.gate = Gate(c, init)
        if c.nsa.selector == "auxiliary":
            self.selector = AuxiliarySelector(c, init)
        if c.nsa.selector == "indexer":
            self.indexer = Indexer(c, init)

    def attend(
        self,
        x: Float[Array, "B T D"],
        context: AttentionContext,
        *,
        kind: str,
        tap: Tap,
        cache: LayerCache | None,
    ) -> Attended:
        q, k, v = self.project(x)
        q = tap("queries", self.with_rope(q, context.rotary))
        k, v = _tap_branches(tap, "keys", k), _tap_branches(tap, "values", v)
        # Compressed keys are built from keys without rotary positions.
        k_slc, k_win = self.with_rope(k[:, 1], context.rotary), self.with_rope(k[:, 2], context.rotary)
        new = nsa.NewTokens(k[:, 0], v[:, 0], k_slc, v[:, 1], k_win, v[:, 2])
        gates = tap("gates", self.gate(x) if self.config.nsa.gated else self._open_gates(x))
        if isinstance(cache, PagedCache):
            return self._attend_with_cache(x, q, new, gates, context, cache)
        if tap.probe is not None and tap.probe.streams:
            return Attended(self._probed(q, new, gates, context, tap.probe))
        return self._attend_to_all(x, q, new, gates, context, tap)

    def project(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """Queries, and keys and values of the three branches [B, 3, T, Hkv, D]."""
        q, k, v = super().project(x)
        if self.config.nsa.shared_kv:
            k, v = (jnp.broadcast_to(y[:, None], (y.shape[0], len(BRANCHES), *y.shape[1:])) for y in (k, v))
        return q, k, v

    def _open_gates(self, x: Float[Array, "B T D"]) -> Float[Array, "B T H 3"]:
        """1 for the branches that are there."""
        there = jnp.asarray([branch in self.config.nsa.branches for branch in BRANCHES], x.dtype)
        return jnp.broadcast_to(there[None, None, None], (*x.shape[:2], self.config.num_heads, len(BRANCHES)))

    def _attend_to_all(
        self, x: Array, q: Array, new: nsa.NewTokens, gates: Array, context: AttentionContext, tap: Tap
    ) -> Attended:
        """Of whole texts."""
        n = self.config.nsa
        indices, loss = self._selected(x, q, new.k_slc, context)
        if tap.wants(*BRANCH_PATTERNS, *BRANCH_OUTPUTS) or tap.patches("chosen_blocks"):
            if n.selector_stage == "warm_up":
                raise ValueError("what branches compute is not read in a warm-up; set selector_stage: sparse")
            out, chosen = self._tapped(q, new, gates, context, indices, tap)
            return Attended(out, None, chosen, selector_loss=loss)
        check_parts((q, *new, gates), unit=n.stride, least=max(n.block_len - n.stride, 1))
        with _named_implementation():
            out, chosen = nsa.attend_to_text(
                q,
                new,
                gates,
                self.compress_key.cast(q.dtype),
                self.compress_value.cast(q.dtype),
                rotate=None if context.rotary is None else self._turn_blocks,
                positions=context.positions,
                segment_ids=context.segment_ids,
                indices=indices,
                branches=n.branches,
                read_all=n.selector_stage == "warm_up",
                axes=AXES,
                stretches=context.stretches,
                implementation=self._implementation,
                **self._sizes,
            )
        chosen = chosen if chosen is None else tap("chosen_blocks", chosen)
        return Attended(out, None, chosen, selector_loss=loss)

    def _tapped(
        self,
        q: Array,
        new: nsa.NewTokens,
        gates: Array,
        context: AttentionContext,
        indices: Array | None,
        tap: Tap,
    ) -> tuple[Array, Array | None]:
        """Output and choice of whole texts, where what each branch computes is read or changed."""
        if on_several_devices():
            raise ValueError("what NSA's branches compute is read and patched on one device; set no mesh")
        n = self.config.nsa
        k_cmp, v_cmp = self._compress(
            new.k_cmp, new.v_cmp, self._block_positions(context), context.segment_ids
        )
        attend = functools.partial(
            nsa_attention,
            *(q, k_cmp, v_cmp, new.k_slc, new.v_slc, new.k_win, new.v_win, gates),
            segment_ids=context.segment_ids,
            implementation=self._implementation,
            **self._sizes,
        )
        with _named_implementation():
            chosen = attend(indices=indices)[1].indices
            if "selection" in n.branches:
                chosen = tap("chosen_blocks", chosen)
            out = attend(indices=chosen)[1]
        outputs = {"compression": out.compressed, "selection": out.selected, "window": out.window}
        attended = {
            "compression": (k_cmp, v_cmp),
            "selection": (new.k_slc, new.v_slc),
            "window": (new.k_win, new.v_win),
        }
        for branch in n.branches:
            if tap.wants(f"{branch}_pattern"):
                k, v = attended[branch]
                mask = self._visible(branch, chosen, q.shape[1], k.shape[1])
                outputs[branch] = self._with_pattern(q, k, v, mask, f"{branch}_pattern", tap)
            outputs[branch] = tap(f"{branch}_output", outputs[branch])
        return self._weighted(gates, outputs), chosen if "selection" in n.branches else None

    def _visible(
        self, branch: str, chosen: Int[Array, "B Hkv T n"], length: int, keys: int
    ) -> Bool[Array, "B_ Hkv_ T S"]:
        """The keys of a branch that each query sees."""
        n = self.config.nsa
        query, key = jnp.arange(length)[:, None], jnp.arange(keys)[None]
        if branch == "compression":
            return (key * n.stride + n.block_len - 1 <= query)[None, None]
        if branch == "window":
            return ((key <= query) & (query - key < n.window))[None, None]
        blocks = jnp.arange(-(-keys // n.block_size))[None, None, None, None]
        listed = jnp.any(chosen[..., None] == blocks, axis=-2)
        return listed[..., jnp.arange(keys) // n.block_size] & (key <= query)[None, None]

    def _with_pattern(
        self, q: Array, k: Array, v: Array, mask: Bool[Array, "B_ Hkv_ T S"], name: str, tap: Tap
    ) -> Float[Array, "B T H Dv"]:
        """Attention of one branch that builds its weights; 0 for a query that sees nothing."""
        (batch, length, heads, _), of_groups = q.shape, mask[:, :, None]
        q = self._grouped(q)
        weights = jnp.zeros((batch, *q.shape[2:4], length, k.shape[1]), v.dtype)
        if k.shape[1]:
            scores = jnp.einsum("bthgd,bshd->bhgts", q, k, preferred_element_type=jnp.float32)
            scores = jnp.where(of_groups, scores * self.config.score_scale, jnp.finfo(jnp.float32).min)
            weights = jnp.where(of_groups, jax.nn.softmax(scores, axis=-1), 0).astype(v.dtype)
        tapped = tap(name, weights.reshape(batch, heads, length, -1)).reshape(weights.shape)
        return jnp.einsum("bhgts,bshd->bthgd", tapped, v).reshape(batch, length, heads, -1)

    def _weighted(
        self, gates: Float[Array, "B T H 3"], outputs: Mapping[str, Float[Array, "B T H Dv"]]
    ) -> Float[Array, "B T H Dv"]:
        """The branches that are there times their gates, summed in float32 as the operators do."""
        dtype = gates.dtype
        parts = [
            gates[..., i, None].astype(jnp.float32) * outputs[branch].astype(jnp.float32)
            for i, branch in enumerate(BRANCHES)
            if branch in self.config.nsa.branches
        ]
        return jax.tree.reduce(jnp.add, parts).astype(dtype)

    def _attend_with_cache(
        self,
        x: Array,
        q: Array,
        new: nsa.NewTokens,
        gates: Array,
        context: AttentionContext,
        cache: PagedCache,
    ) -> Attended:
        """Of tokens that continue what the cache holds; segment_ids mark padding at their right end."""
        n, num_new, rotary = self.config.nsa, None, context.rotary is not None
        if n.selector == "auxiliary" and "selection" in n.branches:
            raise ValueError("the auxiliary selector reads one whole text a row: no cache")
        if n.selector_stage == "warm_up":
            raise ValueError("a warm-up reads whole texts: no cache; set selector_stage: sparse")
        if context.segment_ids is not None:
            num_new = jnp.sum(context.segment_ids != 0, axis=1, dtype=jnp.int32)
        cache, recent = nsa.append_tokens(
            cache,
            new,
            lambda k, v, starts: self._compress(k, v, starts if rotary else None),
            block_len=n.block_len,
            stride=n.stride,
            num_new=num_new,
            k_index=self.indexer.keys(x, context.rotary) if n.selector == "indexer" else None,
        )
        indices = None
        if n.selector != "compressed" and "selection" in n.branches:
            assert context.cache_slots is not None
            last = nsa.capacity(cache) - 1  # padding may stand past the cache's end
            rows = jnp.minimum(context.cache_slots, last)
            if n.selector == "min_max":
                importance = self._bounds(q, nsa.whole(cache, cache.k_slc))
            else:
                assert cache.k_index is not None
                keys = nsa.whole(cache, cache.k_index)
                importance = block_scores(self.indexer.queries(x, context.rotary), keys, rows, n.block_size)
            indices = self._select_by_importance(importance, q_positions=rows)
        with _named_implementation():
            out, branches = nsa.cached_attention(
                cache,
                recent,
                q,
                gates,
                indices=indices,
                **self._sizes,
                implementation=self._implementation,
            )
        return Attended(out, cache, branches.indices if "selection" in n.branches else None)

    def _probed(
        self, q: Array, new: nsa.NewTokens, gates: Array, context: AttentionContext, probe: Probe
    ) -> Array:
        if self.config.nsa.selector != "compressed":
            raise ValueError("flows and blocking know no selector of NSA but compressed")
        compressed = self._compress(new.k_cmp, new.v_cmp, self._block_positions(context), context.segment_ids)
        operands = (q, *compressed, new.k_slc, new.v_slc, new.k_win, new.v_win, gates)
        return nsa_flow_attention(*operands, probe, segment_ids=context.segment_ids, **self._sizes)

    def _selected(
        self, x: Array, q: Array, k_slc: Array, context: AttentionContext
    ) -> tuple[Int[Array, "B Hkv T n"] | None, Float[Array, ""] | None]:
        """The choice of a selector that does not go by compressed keys, and its loss; None: the operators
        choose by Eq. 9."""
        n, segments, scale = self.config.nsa, context.segment_ids, self.config.score_scale
        if n.selector == "compressed" or "selection" not in n.branches:
            return None, None
        choose = functools.partial(self._select_by_importance, segment_ids=segments)
        if n.selector == "min_max":
            return choose(self._bounds(q, k_slc, segments)), None
        if n.selector == "auxiliary":
            importance = self.selector(x, segments)
            loss = auxiliary_loss(importance, self._grouped(q), k_slc, n, scale=scale, segment_ids=segments)
            return choose(importance), loss
        queries, keys = self.indexer.queries(x, context.rotary), self.indexer.keys(x, context.rotary)
        rows = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32)[None], x.shape[:2])
        chosen = choose(block_scores(queries, keys, rows, n.block_size, segments))
        loss = indexer_loss(
            queries,
            keys,
            self._grouped(q),
            k_slc,
            None if n.selector_stage == "warm_up" else chosen,
            size=n.block_size,
            scale=scale,
            segment_ids=segments,
        )
        return chosen, loss

    def _compress(
        self,
        k: Float[Array, "B T Hkv Dk"],
        v: Float[Array, "B T Hkv Dv"],
        positions: Int[Array, "B M *axes"] | None,
        segment_ids: Int[Array, "B S"] | None = None,
    ) -> tuple[Array, Array]:
        """Compressed keys are built from keys without rotary positions and take those of their block's first
        token, `positions`, in layers with rotary positions."""
        n = self.config.nsa
        k_cmp, v_cmp = nsa.compress_part(
            lambda k, v, starts: (self.compress_key(k, starts), self.compress_value(v, starts)),
            k,
            v,
            block_len=n.block_len,
            stride=n.stride,
            segment_ids=segment_ids,
        )
        return k_cmp if positions is None else self._turn_blocks(k_cmp, positions), v_cmp

    def _turn_blocks(
        self, k_cmp: Float[Array, "B M Hkv Dk"], positions: Int[Array, "B M *axes"]
    ) -> Float[Array, "B M Hkv Dk"]:
        return self.with_rope(k_cmp, rotary_table(positions, self.config.rope, self.config.rotary_dim))

    def _block_positions(self, context: AttentionContext) -> Int[Array, "B M *axes"] | None:
        """The position of each compressed block: that of its first token; None: no rotary positions."""
        if context.rotary is None:
            return None
        sizes = nsa.NsaSizes(**self._sizes)
        positions = context.positions
        return nsa.block_positions(positions, context.segment_ids, positions.shape[:2], sizes)

    def _grouped(self, q: Float[Array, "B T H Dk"]) -> Float[Array, "B T Hkv G Dk"]:
        return q.reshape(*q.shape[:2], self.config.kv_heads, -1, self.config.key_dim)

    def _bounds(
        self, q: Array, k: Array, segment_ids: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B Hkv T N"]:
        """Quest's bound of the scores in each block of a query's text, summed over the heads of a group."""
        if segment_ids is not None:
            return packed_bound_scores(self._grouped(q), k, segment_ids, self.config.nsa.block_size)
        bounds = block_bounds(k, self.config.nsa.block_size)
        return jnp.sum(bound_scores(self._grouped(q), bounds), axis=2)

    def _select_by_importance(self, importance: Array, **more: Array | None) -> Int[Array, "B Hkv T n"]:
        n = self.config.nsa
        return select_blocks_by_importance(
            importance,
            block_size=n.block_size,
            num_blocks=n.num_blocks,
            num_init=n.num_init,
            num_local=n.num_local,
            **more,
        )

    @property
    def _implementation(self) -> Literal["xla", "mosaic_gpu"] | None:
        chosen = self.config.nsa.implementation
        return None if chosen == "auto" else chosen

    @property
    def _sizes(self) -> dict[str, Any]:
        n = self.config.nsa
        return {
            "block_len": n.block_len,
            "stride": n.stride,
            "block_size": n.block_size,
            "num_blocks": n.num_blocks,
            "num_init": n.num_init,
            "num_local": n.num_local,
            "window": n.window,
            "scale": self.config.score_scale,
        }


@contextlib.contextmanager
def _named_implementation() -> Iterator[None]:
    """The kernel that was named may not take the case, or not here: the key is at fault."""
    try:
        yield
    except NotImplementedError as error:
        raise ConfigError(str(error), key="model.attention.implementation") from error

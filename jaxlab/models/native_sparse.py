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
from jaxlab.models.initializer import Initializer
from jaxlab.models.kv_cache import LayerCache
from jaxlab.models.mesh import Part, in_parts, on_several_devices
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
    block_starts,
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


Compressors = tuple[Compressor, Compressor]
"""Of keys and of values."""


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
        self.gate = Gate(c, init)
        if c.nsa.selector == "auxiliary":
            self.selector = AuxiliarySelector(c, init)

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
        gates = tap("gates", self.gate(x))
        if isinstance(cache, PagedCache):
            return self._attend_with_cache(q, new, gates, context, cache)
        if tap.probe is not None and tap.probe.streams:
            return Attended(self._probed(q, new, gates, context, tap.probe))
        return self._attend_to_all(x, q, new, gates, context, tap)

    def project(self, x: Float[Array, "B T D"]) -> tuple[Array, Array, Array]:
        """Queries, and keys and values of the three branches [B, 3, T, Hkv, D]."""
        q, k, v = super().project(x)
        if self.config.nsa.shared_kv:
            k, v = (jnp.broadcast_to(y[:, None], (y.shape[0], len(BRANCHES), *y.shape[1:])) for y in (k, v))
        return q, k, v

    def _attend_to_all(
        self, x: Array, q: Array, new: nsa.NewTokens, gates: Array, context: AttentionContext, tap: Tap
    ) -> Attended:
        """Of whole texts."""
        n, starts = self.config.nsa, self._block_positions(context)
        indices, loss = self._selected(x, q, new.k_slc, context)
        if tap.wants(*BRANCH_PATTERNS, *BRANCH_OUTPUTS) or tap.patches("chosen_blocks"):
            out, chosen = self._tapped(q, new, gates, context, indices, tap)
            return Attended(out, None, chosen, selector_loss=loss)
        graphdef, weights = nnx.split((self.compress_key, self.compress_value))

        def core(
            tokens: tuple[Array, ...],
            rows: tuple[Array, Array | None],
            weights: Any,
            indices: Array | None,
            part: Part | None,
        ) -> tuple[Array, Array | None]:
            return self._part_output(
                tokens, rows, nnx.merge(graphdef, weights), indices, part, rotary=context.rotary is not None
            )

        out, chosen = in_parts(
            core,
            (q, *new, gates),
            (starts, context.segment_ids),
            weights,
            indices,
            unit=n.stride,
            least=n.block_len - n.stride,
            stretches=context.stretches,
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
        compressors = self.compress_key, self.compress_value
        k_cmp, v_cmp = self._compress(
            compressors,
            new.k_cmp,
            new.v_cmp,
            self._block_positions(context),
            context.segment_ids,
            rotary=context.rotary is not None,
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

    def _part_output(
        self,
        tokens: tuple[Array, ...],
        rows: tuple[Array, Array | None],
        compressors: Compressors,
        indices: Array | None,
        part: Part | None,
        *,
        rotary: bool,
    ) -> tuple[Array, Array | None]:
        """Output and choice of all queries, or of those of one stretch of the sequence.

        A stretch compresses its own blocks (`nsa.compress_part`), and only the compressed keys and values of
        all stretches are gathered.
        """
        (q, k, v, k_slc, v_slc, k_win, v_win, gates), (starts, segment_ids) = tokens, rows
        n = self.config.nsa
        k_cmp, v_cmp = self._compress(compressors, k, v, starts, segment_ids, part, rotary=rotary)
        with _named_implementation():
            out, branches = nsa.attend_part(
                q,
                k_cmp,
                v_cmp,
                k_slc,
                v_slc,
                k_win,
                v_win,
                gates,
                part=part,
                segment_ids=segment_ids,
                indices=indices,
                implementation=self._implementation,
                **self._sizes,
            )
        there = [branch in n.branches for branch in BRANCHES]
        if all(there):
            return out, branches.indices
        # What the other branches would give is not used, so it is not computed.
        outputs = zip(there, (branches.compressed, branches.selected, branches.window), strict=True)
        parts = [gates[..., i, None].astype(q.dtype) * y for i, (used, y) in enumerate(outputs) if used]
        return jax.tree.reduce(jnp.add, parts), branches.indices if "selection" in n.branches else None

    def _attend_with_cache(
        self, q: Array, new: nsa.NewTokens, gates: Array, context: AttentionContext, cache: PagedCache
    ) -> Attended:
        """Of tokens that continue what the cache holds; segment_ids mark padding at their right end."""
        n, num_new, rotary = self.config.nsa, None, context.rotary is not None
        if n.selector == "auxiliary" and "selection" in n.branches:
            raise ValueError("the auxiliary selector reads one whole text a row: no cache")
        if context.segment_ids is not None:
            num_new = jnp.sum(context.segment_ids != 0, axis=1, dtype=jnp.int32)
        compressors = self.compress_key, self.compress_value
        cache, recent = nsa.append_tokens(
            cache,
            new,
            lambda k, v, starts: self._compress(compressors, k, v, starts, rotary=rotary),
            block_len=n.block_len,
            stride=n.stride,
            num_new=num_new,
        )
        indices = None
        if n.selector == "min_max" and "selection" in n.branches:
            assert context.cache_slots is not None
            importance = self._bounds(q, nsa.whole(cache, cache.k_slc))
            last = importance.shape[-1] * n.block_size - 1  # padding may stand past the cache's end
            indices = self._select_by_importance(
                importance, q_positions=jnp.minimum(context.cache_slots, last)
            )
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
        compressors = self.compress_key, self.compress_value
        compressed = self._compress(
            compressors,
            new.k_cmp,
            new.v_cmp,
            self._block_positions(context),
            context.segment_ids,
            rotary=context.rotary is not None,
        )
        operands = (q, *compressed, new.k_slc, new.v_slc, new.k_win, new.v_win, gates)
        return nsa_flow_attention(*operands, probe, segment_ids=context.segment_ids, **self._sizes)

    def _selected(
        self, x: Array, q: Array, k_slc: Array, context: AttentionContext
    ) -> tuple[Int[Array, "B Hkv T n"] | None, Float[Array, ""] | None]:
        """The choice of a selector that does not go by compressed keys, and its loss; None: the operators
        choose by Eq. 9."""
        n, loss = self.config.nsa, None
        if n.selector == "compressed" or "selection" not in n.branches:
            return None, None
        if n.selector == "min_max":
            importance = self._bounds(q, k_slc, context.segment_ids)
        else:
            if context.segment_ids is not None:
                raise ValueError("the auxiliary selector reads one whole text a row: no segments")
            importance = self.selector(x)
            loss = auxiliary_loss(importance, self._grouped(q), k_slc, n, scale=self.config.score_scale)
        return self._select_by_importance(importance, segment_ids=context.segment_ids), loss

    def _compress(
        self,
        compressors: Compressors,
        k: Array,
        v: Array,
        positions: Int[Array, "B M *axes"],
        segment_ids: Int[Array, "B S"] | None = None,
        part: Part | None = None,
        *,
        rotary: bool,
    ) -> tuple[Array, Array]:
        """Compressed keys are built from keys without rotary positions and take that of their block's first
        token, in layers with rotary positions; all of them, where k and v are one stretch of the tokens."""
        c, (of_keys, of_values) = self.config, compressors
        k_cmp, v_cmp = nsa.compress_part(
            lambda k, v, starts: (of_keys(k, starts), of_values(v, starts)),
            k,
            v,
            block_len=c.nsa.block_len,
            stride=c.nsa.stride,
            segment_ids=segment_ids,
            part=part,
        )
        if rotary:
            k_cmp = self.with_rope(k_cmp, rotary_table(positions, c.rope, c.rotary_dim))
        return k_cmp, v_cmp

    def _block_positions(self, context: AttentionContext) -> Int[Array, "B M *axes"]:
        """The position of each compression block: that of its first token."""
        n, positions = self.config.nsa, context.positions
        if context.segment_ids is None:
            return positions[:, : max(0, positions.shape[1] - n.block_len + 1) : n.stride]
        rows = block_starts(context.segment_ids, block_len=n.block_len, stride=n.stride)
        return jax.vmap(lambda x, at: x[jnp.maximum(at, 0)])(positions, rows)

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

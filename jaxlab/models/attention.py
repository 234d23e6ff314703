"""What all kinds of attention share: the projections of a layer. How queries meet keys is each kind's own.

Kinds: full and sliding (full_attention.py), native sparse (native_sparse.py).
"""

from typing import Literal, NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxlab.models.config import ModelConfig, RopeConfig
from jaxlab.models.context import AttentionContext
from jaxlab.models.initializer import Initializer
from jaxlab.models.kv_cache import LayerCache
from jaxlab.models.layers import Norm, project
from jaxlab.models.low_rank import base_of, plus_update
from jaxlab.models.rotary import Rotary, rotate
from jaxlab.models.taps import NO_TAP, Tap


class Attended(NamedTuple):
    """What a layer's attention gives; None where it does not apply."""

    out: Float[Array, "B T ..."]
    """Of each head [B, T, H, Dv]; after the output projection [B, T, D]."""
    cache: LayerCache | None = None
    """The layer's cache with these tokens in it."""
    chosen_blocks: Int[Array, "B Hkv T n"] | None = None
    """What NSA chose to read."""
    weights_read: Float[Array, "B H P"] | None = None
    """Attention weights from one token at others, where a probe reads them."""
    selector_loss: Float[Array, ""] | None = None
    """How far the choice of NSA's selector is from where attention lies, where it is trained for that."""


class Attention(nnx.Module):
    """Queries, keys, values and output of a layer; a kind adds `attend`."""

    def __init__(
        self,
        config: ModelConfig,
        residual_scale: float,
        init: Initializer,
        *,
        branches: int | None = None,
        qk_norm_kind: Literal["rms", "layer"] | None = None,
    ):
        """
        Args:
          residual_scale: factor on the initial output projection.
          branches: so many key and value projections of their own; None: one, without the axis.
          qk_norm_kind: of the norms on queries and keys; None: as the other norms.
        """
        c = config
        self.config = config
        self._init_projections(init, branches)
        self.output = init.normal(
            (c.num_heads, c.value_dim, c.width),
            ("heads", "head_dim", "embed"),
            c.initializer_range * residual_scale,
        )
        self.output_bias = init.zeros((c.width,), ("embed",)) if c.has_output_bias else None
        self.sinks = init.zeros((c.num_heads,), ("heads",)) if c.attention_sinks else None
        if c.qk_norm != "none":
            kind = qk_norm_kind or c.norm
            norm = lambda heads, axis: _head_norm(c, kind, heads, axis, init)
            self.query_norm, self.key_norm = norm(c.num_heads, "heads"), norm(c.kv_heads, "kv_heads")

    def _init_projections(self, init: Initializer, branches: int | None) -> None:
        """Those of queries, keys and values."""
        c, std = self.config, self.config.initializer_range
        lead: tuple[int, ...] = () if branches is None else (branches,)
        lead_axes: tuple[str, ...] = () if branches is None else ("branch",)
        kv_axes, bias_axes = ("embed", "kv_heads", "head_dim"), ("kv_heads", "head_dim")
        self.query = init.normal((c.width, c.num_heads, c.key_dim), ("embed", "heads", "head_dim"), std)
        self.key = init.normal((*lead, c.width, c.kv_heads, c.key_dim), (*lead_axes, *kv_axes), std)
        self.value = init.normal((*lead, c.width, c.kv_heads, c.value_dim), (*lead_axes, *kv_axes), std)
        bias = lambda shape, axes: init.zeros(shape, axes) if c.attention_bias else None
        self.query_bias = bias((c.num_heads, c.key_dim), ("heads", "head_dim"))
        self.key_bias = bias((*lead, c.kv_heads, c.key_dim), (*lead_axes, *bias_axes))
        self.value_bias = bias((*lead, c.kv_heads, c.value_dim), (*lead_axes, *bias_axes))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: AttentionContext,
        *,
        kind: str = "full",
        tap: Tap = NO_TAP,
        cache: LayerCache | None = None,
    ) -> Attended:
        """Attention of one layer on its normed input.

        Args:
          kind: one of `config.kinds`; this layer's, where layers of several kinds share a scan.
          tap: reads and changes what is computed (taps.py), or streams it (kernels_pallas/flow).
          cache: what the layer keeps of earlier tokens.
        """
        attended = self.attend(x, context, kind=kind, tap=tap, cache=cache)
        return attended._replace(out=self.project_output(tap("head_output", attended.out)))

    def attend(
        self,
        x: Float[Array, "B T D"],
        context: AttentionContext,
        *,
        kind: str,
        tap: Tap,
        cache: LayerCache | None,
    ) -> Attended:
        """The output of each head: how queries meet keys."""
        raise NotImplementedError

    def project(
        self, x: Float[Array, "B T D"]
    ) -> tuple[
        Float[Array, "B T H Dk"], Float[Array, "B *branches T Hkv Dk"], Float[Array, "B *branches T Hkv Dv"]
    ]:
        """Queries, keys and values, normed where the model has it, before their rotary positions."""
        q = _heads(x, self.query, self.query_bias)
        k, v = _heads(x, self.key, self.key_bias), _heads(x, self.value, self.value_bias)
        if self.config.qk_norm != "none":
            q, k = self._norm_heads(self.query_norm, q), self._norm_heads(self.key_norm, k)
        return q, k, v

    def project_output(self, heads: Float[Array, "B T H Dv"]) -> Float[Array, "B T D"]:
        """The heads' outputs added up in the model's width."""
        y = project(heads, base_of(self.output, heads.dtype), inputs=2)
        y = plus_update(y, heads, self.output)
        return y if self.output_bias is None else y + self.output_bias.astype(y.dtype)[None, None]

    def with_rope(self, x: Float[Array, "B T H Dk"], rotary: Rotary | None) -> Float[Array, "B T H Dk"]:
        """Queries or keys with their rotary positions; as they are where the model has none."""
        position = self.config.position  # a vision tower has a table and no such positions
        interleaved = isinstance(position, RopeConfig) and position.interleaved
        return x if rotary is None else rotate(x, rotary, interleaved)

    def _norm_heads(self, norm: Norm, x: Float[Array, "*rows H K"]) -> Float[Array, "*rows H K"]:
        """Over each head, or over all heads together."""
        if self.config.qk_norm == "width":
            return norm(x.reshape(*x.shape[:-2], -1)).reshape(x.shape)
        return norm(x)


def _head_norm(
    c: ModelConfig, kind: Literal["rms", "layer"], heads: int, axis: str, init: Initializer
) -> Norm:
    """The norm on queries or keys of `heads` heads."""
    shape: tuple[int, ...] = (c.key_dim,)
    axes: tuple[str, ...] = ("head_dim",)
    if c.qk_norm == "width":
        shape = (heads * c.key_dim,)
    elif c.qk_norm == "each_head":
        shape, axes = (heads, c.key_dim), (axis, "head_dim")
    biased = c.norm_bias and c.qk_norm != "each_head"
    return Norm(shape, kind, c.norm_eps, init, offset=c.norm_offset, axes=axes, biased=biased)


def _heads(
    x: Float[Array, "B T D"], kernel: nnx.Param, bias: nnx.Param | None
) -> Float[Array, "B *branches T H K"]:
    """Heads of `x`; kernel [D, H, K] or, with an axis for branches, [c, D, H, K]."""
    base = base_of(kernel, x.dtype)
    y = project(x, base) if kernel.ndim == 3 else jnp.einsum("btd,cdhk->bcthk", x, base)
    y = plus_update(y, x, kernel)
    if bias is None:
        return y
    b = bias.astype(x.dtype)
    return y + (b[None, None] if b.ndim == 2 else b[None, :, None])

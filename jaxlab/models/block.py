"""One layer of a decoder or of a vision transformer: norms, attention, MLP or experts, residual sums."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxlab.models.attention import Attended, Attention
from jaxlab.models.config import ModelConfig
from jaxlab.models.context import AttentionContext
from jaxlab.models.full_attention import FullAttention
from jaxlab.models.initializer import Initializer
from jaxlab.models.kv_cache import LayerCache
from jaxlab.models.latent_attention import LatentAttention
from jaxlab.models.layers import MLP, Norm, layer_norm
from jaxlab.models.mesh import on_several_devices, split_tokens
from jaxlab.models.moe import ExpertStats, MixtureOfExperts
from jaxlab.models.native_sparse import NativeSparseAttention
from jaxlab.models.taps import NO_TAP, Tap

ATTENTION: dict[str, type[Attention]] = {
    "full": FullAttention,
    "sliding": FullAttention,
    "nsa": NativeSparseAttention,
}
"""The class of each kind of attention."""
MLP_BYTES = 1 << 28
"""Of the MLP's hidden numbers at once, where flows are streamed."""


class BlockOutput(NamedTuple):
    """What a layer returns; None where it does not apply."""

    x: Float[Array, "B T D"]
    attended: Attended
    """Of its attention: the cache, NSA's choice."""
    experts: ExpertStats | None
    """How tokens spread over its experts."""


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); or both at once (`parallel`)."""

    def __init__(
        self,
        config: ModelConfig,
        init: Initializer,
        *,
        experts: bool = True,
        qk_norm_kind: Literal["rms", "layer"] | None = None,
        layer_scale: float | None = None,
    ):
        """
        Args:
          experts: a mixture of experts in place of the MLP, if the model has any.
          qk_norm_kind: of the norms on queries and keys; None: as the other norms.
          layer_scale: initial factors on what attention and the MLP add (arXiv 2103.17239); None: there are
            none.
        """
        c, residual_scale = config, (2 * config.num_layers) ** -0.5
        self.parallel, self.residual_scale = c.parallel, c.residual_scale
        self.attention_norm = layer_norm(c, init) if c.pre_norms else None
        kind = LatentAttention if c.latent is not None else ATTENTION[c.attention.kind]
        self.attention = kind(c, residual_scale, init, qk_norm_kind=qk_norm_kind)
        self.mlp_norm = layer_norm(c, init) if c.has_mlp_norm else None
        self.attention_post_norm = layer_norm(c, init) if c.post_norms else None
        self.mlp_post_norm = layer_norm(c, init) if c.post_norms else None
        has_experts = c.moe is not None and experts
        self.moe = MixtureOfExperts(c, residual_scale, init) if has_experts else None
        self.mlp = None if has_experts else MLP(c, c.mlp_width, residual_scale, init)
        gain = lambda: None if layer_scale is None else init.full((c.width,), ("embed",), layer_scale)
        self.attention_gain, self.mlp_gain = gain(), gain()

    def __call__(
        self,
        x: Float[Array, "B T D"],
        context: AttentionContext,
        *,
        kind: str = "full",
        tap: Tap = NO_TAP,
        cache: LayerCache | None = None,
    ) -> BlockOutput:
        """The residual stream after this layer; arguments as those of `Attention`."""
        if context.causal:
            x = split_tokens(x)
        x = tap("residual_pre", x)
        normed = self.attention_input(x)
        attended = self.attention(tap("attention_input", normed), context, kind=kind, tap=tap, cache=cache)
        attention_out = self._added(attended.out, self.attention_post_norm, self.attention_gain)
        attention_out = tap("attention_output", attention_out)
        if not self.parallel:
            x = normed = tap("residual_mid", x + attention_out)
        if self.mlp_norm is not None:
            normed = self.mlp_norm(x)
        normed = tap("mlp_input", normed)
        experts = None
        if self.moe is not None:
            mlp_out, experts = self.moe(normed, context.real)
        else:
            mlp_out = self._mlp_output(normed, tap)
        mlp_out = tap("mlp_output", self._added(mlp_out, self.mlp_post_norm, self.mlp_gain))
        x = tap("residual_post", x + (attention_out + mlp_out if self.parallel else mlp_out))
        return BlockOutput(x, attended, experts)

    def _mlp_output(self, x: Float[Array, "B T D"], tap: Tap) -> Float[Array, "B T D"]:
        """The MLP of all tokens; where flows are streamed, of a long text stretch by stretch: what it holds
        of the whole would be most of the memory."""
        assert self.mlp is not None
        batch, tokens, width = x.shape
        parts = 1
        flows = tap.probe is not None and tap.probe.streams
        if flows and not tap.wants("mlp_hidden") and not on_several_devices():
            hidden = batch * tokens * self.mlp.up.shape[-1] * x.dtype.itemsize
            least = -(-hidden // MLP_BYTES)
            parts = next((n for n in range(least, 4 * least + 1) if tokens % n == 0), 1)
        if parts == 1:
            return self.mlp(x, tap)
        stretches = x.reshape(batch, parts, -1, width).swapaxes(0, 1)
        done = jax.lax.map(jax.checkpoint(self.mlp, prevent_cse=False), stretches)
        return done.swapaxes(0, 1).reshape(x.shape)

    def attention_input(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What attention reads of the residual stream."""
        return x if self.attention_norm is None else self.attention_norm(x)

    def _added(self, out: Array, norm: Norm | None, gain: nnx.Param | None) -> Float[Array, "B T D"]:
        """What the stream gets of an output of attention or the MLP: normed, and times LayerScale's factors
        or the model's one, where there are any."""
        y = out if norm is None else norm(out)
        if gain is not None:
            y = y * gain.astype(y.dtype)[None, None]
        return y if self.residual_scale == 1.0 else y * jnp.asarray(self.residual_scale, y.dtype)

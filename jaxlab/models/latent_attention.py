"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, sec. 2.1): full attention of what it projects.

What decoding keeps is the projected keys and values of every head, not their latent: the same numbers, in
more memory than DeepSeek's own cache takes.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.models.full_attention import FullAttention
from jaxlab.models.initializer import Initializer
from jaxlab.models.layers import Norm
from jaxlab.models.rotary import Rotary

EPSILON = 1e-6
"""Of the norms of latents, whatever the model's other norms have."""


class LatentAttention(FullAttention):
    """Keys and values of all heads come from one narrow latent, queries from the stream or their own latent.

    A head's dimensions are those without positions and then those that turn; in keys the latter are one
    projection that all heads share.
    """

    def _init_projections(self, init: Initializer, branches: int | None) -> None:
        c, std = self.config, self.config.initializer_range
        assert c.latent is not None
        rank, turning = c.latent.kv_rank, c.rotary_dim
        norm = lambda size: Norm((size,), "rms", EPSILON, init, axes=("latent",))
        of_heads = ("latent", "heads", "head_dim")
        if c.latent.query_rank is None:
            self.query = init.normal((c.width, c.num_heads, c.key_dim), ("embed", "heads", "head_dim"), std)
        else:
            self.query_down = init.normal((c.width, c.latent.query_rank), ("embed", "latent"), std)
            self.query_latent_norm = norm(c.latent.query_rank)
            self.query_up = init.normal((c.latent.query_rank, c.num_heads, c.key_dim), of_heads, std)
        self.kv_down = init.normal((c.width, rank), ("embed", "latent"), std)
        self.shared_key = init.normal((c.width, turning), ("embed", "head_dim"), std)
        self.kv_latent_norm = norm(rank)
        self.key_up = init.normal((rank, c.num_heads, c.key_dim - turning), of_heads, std)
        self.value_up = init.normal((rank, c.num_heads, c.value_dim), of_heads, std)

    def project(
        self, x: Float[Array, "B T D"]
    ) -> tuple[Float[Array, "B T H Dk"], Float[Array, "B T H Dk"], Float[Array, "B T H Dv"]]:
        """Queries, keys and values of every head, before their rotary positions."""
        c = self.config
        assert c.latent is not None
        up = lambda latent, kernel: jnp.einsum("btr,rhk->bthk", latent, kernel.astype(latent.dtype))
        if c.latent.query_rank is None:
            q = up(x, self.query)
        else:
            q = up(self.query_latent_norm(x @ self.query_down.astype(x.dtype)), self.query_up)
        latent = self.kv_latent_norm(x @ self.kv_down.astype(x.dtype))
        k, v = up(latent, self.key_up), up(latent, self.value_up)
        shared = (x @ self.shared_key.astype(x.dtype))[:, :, None]
        shared = jnp.broadcast_to(shared, (*k.shape[:3], shared.shape[-1]))
        return q, jnp.concatenate([k, shared], axis=-1), v

    def with_rope(self, x: Float[Array, "B T H Dk"], rotary: Rotary | None) -> Float[Array, "B T H Dk"]:
        """Queries or keys with rotary positions in their last dimensions."""
        split = x.shape[-1] - self.config.rotary_dim
        return jnp.concatenate([x[..., :split], super().with_rope(x[..., split:], rotary)], axis=-1)

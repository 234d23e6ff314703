"""A matrix with a low-rank update beside it: what LoRA trains (Hu et al., arXiv 2106.09685)."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxlab.models.batch import Params


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["base", "a", "b", "key"],
    meta_fields=["scale", "dropout"],
)
@dataclasses.dataclass(frozen=True)
class LowRank:
    """base + scale * a b, in the place of a leaf of the parameters.

    The axes of a leaf are those that count matrices (layers, branches), then those of the matrix's input,
    then those of its output. Where a module multiplies by it (`plus_update`), the product of the base and
    that of the two narrow matrices are added, and the whole matrix is never made; everywhere else it stands
    for the sum.
    """

    base: Any
    """[lead..., ins..., outs...]"""
    a: Any
    """[lead..., ins..., r]"""
    b: Any
    """[lead..., r, outs...]"""
    key: Any = None
    """Keys of dropout, one for each layer; None: nothing is dropped."""
    scale: float = 1.0
    dropout: float = 0.0
    """Part of the numbers that enter `a` which is dropped while training; the base sees them all."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return self.base.ndim

    @property
    def size(self) -> int:
        return self.base.size

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    def merged(self) -> Float[Array, "*leaf"]:
        """The sum, float32 where one of its parts is.

        Raises:
          ValueError: it has dropout, which is of what enters `a`.
        """
        if self.key is not None:
            raise ValueError("dropout of a low-rank update is known to the projections of attention and MLPs")
        lead = self._lead
        sizes = self.base.shape[:lead]
        a = self.a.reshape(*sizes, -1, self.a.shape[-1])
        update = self.scale * (a @ self.b.reshape(*sizes, self.b.shape[lead], -1))
        return self.base.astype(update.dtype) + update.reshape(self.base.shape)

    @property
    def _lead(self) -> int:
        """Axes that count matrices, which both a and b have."""
        return self.a.ndim + self.b.ndim - 2 - self.base.ndim

    def astype(self, dtype: jax.typing.DTypeLike) -> Array:
        return self.merged().astype(dtype)

    def __getitem__(self, index: Any) -> Array:
        return self.merged()[index]

    def product(self, x: Float[Array, "*rows_ins"]) -> Float[Array, "*rows_outs"]:
        """scale * (dropout(x) a) b of one matrix, in the dtype of `x`.

        With one axis that counts matrices, as NSA's branches are counted, that axis comes after the first of
        `x`.
        """
        if self.key is not None and self.dropout:
            kept = jax.random.bernoulli(self.key, 1 - self.dropout, x.shape)
            x = jnp.where(kept, x / (1 - self.dropout), jnp.zeros((), x.dtype))
        ins = self.a.ndim - self._lead - 1
        flat = x.reshape(*x.shape[: x.ndim - ins], math.prod(x.shape[x.ndim - ins :]))

        def of_one(a: Array, b: Array) -> Array:
            y = (flat @ a.reshape(-1, a.shape[-1])) @ b.reshape(b.shape[0], -1)
            return self.scale * y.reshape(*y.shape[:-1], *b.shape[1:])

        a, b = self.a.astype(x.dtype), self.b.astype(x.dtype)
        return jax.vmap(of_one, out_axes=1)(a, b) if self._lead else of_one(a, b)


def base_of(kernel: Any, dtype: jax.typing.DTypeLike) -> Array:
    """The matrix of a parameter in `dtype`, without a low-rank update that stands beside it."""
    value = kernel.get_value()
    return value.base.astype(dtype) if isinstance(value, LowRank) else kernel.astype(dtype)


def plus_update(y: Float[Array, "*out"], x: Float[Array, "*rows"], kernel: Any) -> Float[Array, "*out"]:
    """`y`, the product of `x` and the matrix of a parameter, with what a low-rank update adds to it."""
    value = kernel.get_value()
    return y + value.product(x) if isinstance(value, LowRank) else y


def is_low_rank(leaf: Any) -> bool:
    return isinstance(leaf, LowRank)


def merge_updates(params: Params) -> Params:
    """`params` with the sum, in the dtype of the base, in place of each matrix with an update beside it."""
    merge = lambda leaf: leaf.merged().astype(leaf.dtype) if is_low_rank(leaf) else leaf
    return jax.tree.map(merge, params, is_leaf=is_low_rank)

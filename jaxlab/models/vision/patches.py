"""Images to patches, and patches to the width of a vision transformer."""

import math
from typing import Literal

from flax import nnx
from jaxtyping import Array, Float

from jaxlab.models.initializer import Initializer


def cut_patches(
    images: Float[Array, "N a b c"], size: int, channels: Literal["first", "last"]
) -> Float[Array, "N P pixels"]:
    """Squares of size x size pixels, row by row; what does not fill a square at the end is cut off.

    Args:
      images: [N, channels, height, width] or [N, height, width, channels]; the numbers of a patch have the
        same order.
    """
    if channels == "first":
        count, depth, height, width = images.shape
        down, across = height // size, width // size
        x = images[:, :, : down * size, : across * size]
        x = x.reshape(count, depth, down, size, across, size).transpose(0, 2, 4, 1, 3, 5)
    else:
        count, height, width, depth = images.shape
        down, across = height // size, width // size
        x = images[:, : down * size, : across * size]
        x = x.reshape(count, down, size, across, size, depth).swapaxes(2, 3)
    return x.reshape(count, down * across, size * size * depth)


class PatchEmbedding(nnx.Module):
    """The patch projection: all numbers of a patch to the tower's width."""

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str, ...],
        width: int,
        init: Initializer,
        *,
        bias: bool = True,
    ):
        """
        Args:
          shape: of a patch, with its logical axes.
        """
        self.table = init.normal((*shape, width), (*axes, "embed"), math.prod(shape) ** -0.5)
        self.bias = init.zeros((width,), ("embed",)) if bias else None

    def __call__(self, patches: Float[Array, "*rows pixels"]) -> Float[Array, "*rows V"]:
        table = self.table.astype(patches.dtype)
        x = patches @ table.reshape(-1, table.shape[-1])
        if self.bias is None:
            return x
        return x + self.bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + x.shape[-1:])

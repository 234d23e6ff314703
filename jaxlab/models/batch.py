"""What a model reads, and what it computes with."""

from typing import Any, Required, TypedDict

import jax
import numpy as np

from jaxlab.models.config import ModelConfig

Params = dict[str, Any]
"""The parameters of a model: `init_params`, `abstract_params` and `logical_axes`, all from its modules."""


class Batch(TypedDict, total=False):
    """Rows of tokens with what goes with them; arrays of numpy or JAX.

    Whatever else a family's processor gives beside its images is passed on to the vision tower.
    """

    tokens: Required[Any]
    """int32[B, T]"""
    segment_ids: Any
    """int32[B, T]: packed texts; 0 is padding. Without it, one text a row."""
    attention_mask: Any
    """int[B, T], as tokenizers give it: 0 is padding. It stands for segment_ids."""
    positions: Any
    """int32[B, T], or int32[B, T, 3] with M-RoPE; with a cache they count on from what it holds. Without it
    they follow from the segments."""
    together: Any
    """int32[B, T]: tokens of one number above 0 see each other whatever their order."""
    loss_mask: Any
    """bool[B, T]: True on the targets of the loss."""
    images: Any
    """float32[B, n, height, width, channels], or what the family's processor calls pixel_values."""
    image_grid_thw: Any
    """int[images, 3]: frames, rows and columns of patches of each image (Qwen2-VL and after)."""
    image_sizes: Any
    """int[images, 2]: heights and widths of images, as they were before they were cut to tiles (LLaVA-NeXT
    and after), or as they lie in `images` (Mistral 3)."""
    batch_num_images: Any
    """int[B]: images of each row (LLaVA-OneVision)."""
    pixel_attention_mask: Any
    """int[B, n, height, width]: 1 on pixels of the image (Idefics 2 and 3)."""
    aspect_ratio_ids: Any
    """int[B, n]: which of the model's aspect ratios an image has, from 1; 0: none (Mllama)."""
    aspect_ratio_mask: Any
    """int[B, n, tiles]: 1 on tiles of the image (Mllama)."""
    cross_attention_mask: Any
    """int[B, T, n, tiles]: 1 on tiles that a token sees (Mllama)."""
    token_type_ids: Any
    """int[B, T]: 0 on the prompt (PaliGemma)."""


def check_tokens(tokens: Any, config: ModelConfig) -> None:
    """Checks that the embedding has a row for every token: a gather beyond it would say nothing.

    Tokens that are traced or shapes alone, or not all on this host, are believed.

    Args:
      tokens: int[...].

    Raises:
      ValueError: a token is beyond it.
    """
    if isinstance(tokens, jax.core.Tracer | jax.ShapeDtypeStruct):
        return
    if isinstance(tokens, jax.Array) and not tokens.is_fully_addressable:
        return
    ids = np.asarray(tokens)
    beyond = ids[(ids < 0) | (ids >= config.embedding_rows)]
    if beyond.size:
        token, rows = int(beyond.reshape(-1)[0]), config.embedding_rows
        raise ValueError(f"the batch holds token {token}, the embedding has {rows} rows")

"""What a model reads, and what it computes with."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Required, TypedDict, cast

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
    source_ids: Any
    """int32[B]: which source of a mixture each row is from; models do not read it."""
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


OF_TOKENS = (
    *("tokens", "segment_ids", "attention_mask", "positions", "together", "loss_mask"),
    *("token_type_ids", "cross_attention_mask"),
)
"""What has an entry for each token of a row."""


def shapes_of(row: Batch) -> Hashable:
    """What two batches of one row share where `stack_rows` takes both: their images have the same shapes,
    grids and masks. Texts without images all share it.

    Args:
      row: a batch of one row, before `prepare_batch`.
    """
    found = []
    for name, value in sorted(row.items()):
        array = np.asarray(value)
        if name not in OF_TOKENS:
            numbers = array.tobytes() if array.dtype.kind in "biu" else b""
            found.append((name, array.shape, array.dtype.str, numbers))
        elif name != "tokens":
            found.append((name, array.shape[2:], "", b""))
    return tuple(found)


def stack_rows(rows: Sequence[Batch], length: int, config: ModelConfig) -> Batch:
    """One batch of several, each of one row; its tokens are padded at the right.

    Args:
      rows: batches that share `shapes_of`, without segments.
      length: T of the batch, at least that of each row.

    Returns:
      The batch, with segment_ids that are 0 on padding where there is any.
    """
    # A placeholder in padding would stand for an image.
    filler = 1 if config.has_vision and config.image_token == 0 else 0
    lengths = np.asarray([np.shape(row["tokens"])[1] for row in rows])
    batch: dict[str, Any] = {}
    for name in rows[0]:
        values = [np.asarray(cast(Mapping[str, Any], row)[name]) for row in rows]
        if name in OF_TOKENS:
            fill = filler if name == "tokens" else 0
            values = [
                np.pad(x, ((0, 0), (0, length - x.shape[1]), *[(0, 0)] * (x.ndim - 2)), constant_values=fill)
                for x in values
            ]
        batch[name] = np.concatenate(values)
    if (lengths < length).any():
        batch["segment_ids"] = (np.arange(length)[None] < lengths[:, None]).astype(np.int32)
    return cast(Batch, batch)


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


def check_positions(batch: Mapping[str, Any], config: ModelConfig) -> None:
    """Checks that a table of learned positions has a row for every token: a gather beyond it would repeat the
    last one.

    Where segments or positions that are given are traced, they are believed.

    Raises:
      ValueError: a text is longer than the table.
    """
    shape = np.shape(batch["tokens"])
    if config.position.kind != "learned" or len(shape) != 2:
        return
    given = batch.get("positions")
    if given is None and shape[1] <= config.max_length:
        return
    read = batch.get("segment_ids") if given is None else given
    if isinstance(read, jax.core.Tracer | jax.ShapeDtypeStruct):
        return
    if isinstance(read, jax.Array) and not read.is_fully_addressable:
        return
    if given is not None:
        longest = int(np.max(np.asarray(given), initial=-1)) + 1
    elif read is None:
        longest = shape[1]
    else:  # positions start again with each segment
        segments, at = np.asarray(read), np.arange(shape[1])
        starts = np.diff(segments, axis=1, prepend=segments[:, :1]) != 0
        first = np.maximum.accumulate(np.where(starts, at, 0), axis=1)
        longest = int(np.max(np.where(segments != 0, at - first + 1, 0)))
    if longest > config.max_length:
        raise ValueError(
            f"a text of {longest} tokens, and the model has positions for {config.max_length} (max_length)"
        )

"""Questions of a data set with the answers of models to them, for people to read."""

from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from jaxlab.models import Batch, ModelConfig, Params, generate


def answered(
    models: Mapping[str, Params],
    batch: Mapping[str, Any],
    config: ModelConfig,
    tokenizer: Tokenizer,
    count: int,
) -> list[dict[str, Any]]:
    """The first `count` rows of a batch, answered greedily by every model.

    Args:
      models: parameters by name, all of one config.
      batch: rows with one answer each, which loss_mask marks; it ends the row.

    Returns:
      For each row the question, the expected answer, answers by model, and its image, float [height, width]
      in [0, 1], where it has one of a single channel.
    """
    rows = {name: np.asarray(value)[:count] for name, value in batch.items()}
    starts = rows["loss_mask"].argmax(1)
    ends = rows["loss_mask"].shape[1] - rows["loss_mask"][:, ::-1].argmax(1)
    expected = [row[start:end] for row, start, end in zip(rows["tokens"], starts, ends, strict=True)]
    before = np.arange(rows["tokens"].shape[1])[None] < starts[:, None]
    prompts = cast(
        Batch,
        {  # padded with the first token: the answer must not even stand where it is not read
            "tokens": jnp.asarray(np.where(before, rows["tokens"], rows["tokens"][:, :1])[:, : starts.max()]),
            "segment_ids": jnp.asarray(before.astype(np.int32)[:, : starts.max()]),
        }
        | ({"images": jnp.asarray(rows["images"])} if "images" in rows else {}),
    )
    last = {int(answer[-1]) for answer in expected}
    stop = last.pop() if len(last) == 1 else None  # the mark of an end, if answers have one
    longest = max(len(answer) for answer in expected)
    said = {
        name: generate(params, prompts, config, max_new_tokens=longest, stop_token=stop)
        for name, params in models.items()
    }
    examples = []
    for i, answer in enumerate(expected):
        example: dict[str, Any] = {
            "question": tokenizer.decode(rows["tokens"][i, : starts[i]].tolist()),
            "expected": tokenizer.decode(answer.tolist()),
            "answers": {name: tokenizer.decode(_until(tokens[i], stop)) for name, tokens in said.items()},
        }
        if "images" in rows and rows["images"].shape[1] == rows["images"].shape[-1] == 1:
            example["image"] = rows["images"][i, 0, :, :, 0].round(3)
        examples.append(example)
    return examples


def _until(tokens: np.ndarray, stop: int | None) -> list[int]:
    """Tokens before the first `stop`."""
    ids = tokens.tolist()
    return ids[: ids.index(stop)] if stop in ids else ids

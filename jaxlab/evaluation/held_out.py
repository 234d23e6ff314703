"""Loss by position, exact match and needles by depth, of parameters on held-out data."""

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from jaxlab.costs import attended_tokens
from jaxlab.data import Source
from jaxlab.distributed import compile_together
from jaxlab.evaluation.chosen_blocks import decoding_reads, describe_chosen_blocks
from jaxlab.evaluation.needle import ByDepth
from jaxlab.losses import exact_match, target_losses
from jaxlab.models import Batch, ModelConfig, Params, forward, place_batch, positions_of, to_host, using


def measure_held_out(
    params: Params,
    model: ModelConfig,
    source: Source,
    *,
    mesh: Mesh | None = None,
    split: Literal["validation", "test"] = "test",
    batch_size: int = 32,
    batches: int = 16,
    position_buckets: int = 16,
    title: str | None = None,
) -> dict[str, Any]:
    """What the task `evaluate` says of parameters on a split of a source.

    Args:
      mesh: the devices that they live on; None: the default one.
      batches: at most so many.
      position_buckets: into how many equal ranges of positions the loss is split.
      title: of a progress bar; None: there is none.
    """
    losses, counts, matches, blocks = [], [], [], []
    needles = ByDepth()
    for batch in tqdm(
        source.held_out_batches(batch_size, batches, split), desc=title, unit="batch", disable=title is None
    ):
        with using(mesh):
            placed = batch if mesh is None else place_batch(batch, mesh)
            loss, count, match, chosen = measure_batch(params, placed, model)
        loss, count, match = to_host((loss, count, match))
        losses.append(np.asarray(loss, np.float64))
        counts.append(count)
        matches.append(match)
        needles.add(batch, matches[-1])
        blocks.append(chosen)
    loss, count = np.sum(losses, axis=0), np.sum(counts, axis=0)
    mean = loss.sum() / max(count.sum(), 1)
    results = {
        "loss": float(mean),
        "perplexity": float(np.exp(mean)),
        "bits_per_token": float(mean / np.log(2)),
        "exact_match": float(np.mean(np.concatenate(matches))),
        "sequences": int(sum(len(m) for m in matches)),
        "targets": int(count.sum()),
        "attended_tokens": attended_tokens(model, len(loss) + 1),
        "by_position": by_position(loss, count, position_buckets),
    }
    if (found := needles.results()) is not None:
        results["needle"] = found
    if blocks[0] is not None:
        described = describe_chosen_blocks(to_host(blocks[0]), model.nsa)
        results["nsa"] = described | {"decoding": decoding_reads(model, len(loss) + 1)}
    return results


def by_position(
    loss: Float[np.ndarray, " places"], count: Int[np.ndarray, " places"], buckets: int
) -> list[dict[str, Any]]:
    """Mean loss in ranges of positions from summed losses of the tokens at positions 1 ... T-1."""
    ranges = []
    for part in np.array_split(np.arange(len(loss)), min(buckets, len(loss))):
        targets = int(count[part].sum())
        mean = float(loss[part].sum() / targets) if targets else None
        ranges.append(
            {"first": int(part[0]) + 1, "last": int(part[-1]) + 1, "targets": targets, "loss": mean}
        )
    return ranges


@compile_together
@partial(jax.jit, static_argnames="model")
def measure_batch(
    params: Params, batch: Batch, model: ModelConfig
) -> tuple[Array, Array, Array, Int[Array, "L Hkv T n"] | None]:
    """Summed losses and numbers of targets at positions 1 ... T-1 of their own texts, right rows, and NSA's
    choice in row 0."""
    logits, intermediates = forward(params, batch, model)
    losses, mask = target_losses(logits, batch)
    chosen = intermediates["chosen_blocks"][:, 0] if "chosen_blocks" in intermediates else None
    loss, count = jnp.sum(losses, axis=0, where=mask), jnp.sum(mask, axis=0)
    if "segment_ids" in batch:  # a row holds several texts, each of which begins at 0
        at = jnp.where(mask, positions_of(batch["tokens"], batch["segment_ids"])[:, 1:] - 1, 0)
        loss = jnp.zeros_like(loss).at[at].add(jnp.where(mask, losses, 0))
        count = jnp.zeros_like(count).at[at].add(mask.astype(count.dtype))
    return loss, count, exact_match(logits, batch), chosen

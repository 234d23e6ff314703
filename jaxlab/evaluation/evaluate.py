"""Task `evaluate`: loss by position and exact match of a model on held-out data."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from tqdm import tqdm

from jaxlab.checkpoints.native import load_model, model_identity
from jaxlab.checkpoints.reference import model_folder
from jaxlab.data.source import DataConfig, make_source
from jaxlab.errors import ConfigError, UserError
from jaxlab.evaluation.measures import exact_match, target_losses
from jaxlab.models import Batch, Params, forward
from jaxlab.runs import Run


@dataclass(frozen=True)
class Config:
    """Measure a model on held-out data."""

    model: str = ""
    """A model folder, a run folder, or the config of a finished train run."""
    data: DataConfig = DataConfig()
    """What it is measured on."""
    split: str = "test"
    """validation or test."""
    batch_size: int = 32
    """Sequences in a batch."""
    batches: int = 16
    """At most so many batches."""
    position_buckets: int = 16
    """Into how many equal ranges of positions the loss is split."""

    def __post_init__(self):
        if not self.model:
            raise ConfigError("which model? give a folder or the config of a train run", key="model")
        if self.split not in ("validation", "test"):
            raise ConfigError(f"must be validation or test, is {self.split}", key="split")
        for name in ("batch_size", "batches", "position_buckets"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)


def inputs(config: Config) -> dict[str, str]:
    """What the run depends on besides its config."""
    return {"model": model_identity(model_folder(config.model)), "data": make_source(config.data).identity}


def run(config: Config, run: Run) -> dict[str, Any]:
    model, params, _ = load_model(model_folder(config.model))
    source = make_source(config.data)

    @jax.jit
    def measure(params: Params, batch: Batch) -> tuple[Array, Array, Array]:
        logits, _ = forward(params, batch, model)
        losses, mask = target_losses(logits, batch)
        return jnp.sum(losses * mask, axis=0), jnp.sum(mask, axis=0), exact_match(logits, batch)

    losses, counts, matches = [], [], []
    batches = list(source.held_out_batches(config.batch_size, config.batches, config.split))
    if not batches:
        raise UserError(
            f"the {config.split} split holds no full batch of {config.batch_size}; lower batch_size"
        )
    for batch in tqdm(batches, desc=f"evaluate {run.name}", unit="batch"):
        loss, count, match = measure(params, batch)
        losses.append(np.asarray(loss, np.float64))
        counts.append(np.asarray(count))
        matches.append(np.asarray(match))
    loss, count = np.sum(losses, axis=0), np.sum(counts, axis=0)
    mean = loss.sum() / max(count.sum(), 1)
    by_position = []
    for part in np.array_split(np.arange(len(loss)), min(config.position_buckets, len(loss))):
        targets = int(count[part].sum())
        by_position.append({
            "first": int(part[0]) + 1, "last": int(part[-1]) + 1, "targets": targets,
            "loss": float(loss[part].sum() / targets) if targets else None,
        })  # fmt: skip
    return {
        "loss": float(mean),
        "perplexity": float(np.exp(mean)),
        "bits_per_token": float(mean / np.log(2)),
        "exact_match": float(np.mean(np.concatenate(matches))),
        "sequences": int(sum(len(m) for m in matches)),
        "targets": int(count.sum()),
        "by_position": by_position,
    }

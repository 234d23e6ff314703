"""What people and files are told of each step: the progress bar, lines of metrics, speeds."""

import resource
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxlab.costs import attended_tokens, peak_flops, train_flops_per_token
from jaxlab.distributed import is_main
from jaxlab.training.loop import Callback, Loop
from jaxlab.training.schedule import make_schedule
from jaxlab.training.spikes import skipped


class ShowProgress(Callback):
    """The progress bar, with the loss that was logged last."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._bar: Any = None

    def on_train_begin(self, loop: Loop) -> None:
        self._bar = tqdm(
            total=loop.config.steps,
            initial=loop.done,
            desc=f"train {loop.run.name}",
            unit="step",
            disable=not is_main(),
        )

    def on_step_end(self, loop: Loop) -> None:
        self._bar.update(loop.done - self._bar.n)

    def due(self, loop: Loop) -> bool:
        return loop.last or loop.done % self.every == 0

    def on_due(self, loop: Loop) -> None:
        self._bar.set_postfix(loss=f"{loop.values['loss']:.3f}")

    def on_train_end(self, loop: Loop) -> dict[str, Any]:
        self.close()
        return {}

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


class LogMetrics(Callback):
    """A line of metrics every `every` steps; speeds of the whole run among its results."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_train_begin(self, loop: Loop) -> None:
        rows, length = loop.setup.batch["tokens"].shape
        self.tokens = rows * length
        self.flops = train_flops_per_token(loop.config.model, length) * self.tokens
        self.peak, self.peak_source = peak_flops(list(loop.setup.mesh.devices.flat))
        self.schedule = make_schedule(loop.config.optimizer, loop.config.steps)
        self._sources = loop.setup.source.source_names
        self._of_sources: jax.Array | None = None

    def on_step_end(self, loop: Loop) -> None:
        if "source_losses" in loop.measured:
            now = jnp.stack([loop.measured["source_losses"], loop.measured["source_targets"]])
            self._of_sources = now if self._of_sources is None else self._of_sources + now

    def due(self, loop: Loop) -> bool:
        return loop.last or loop.done % self.every == 0

    def on_due(self, loop: Loop) -> None:
        values: dict[str, Any] = {**loop.values, "learning_rate": float(self.schedule(loop.done - 1))}
        if loop.config.spikes.action == "skip":
            values["skipped_updates"] = skipped(loop.state.optimizer)[0]
        seconds = loop.watch.read()
        if seconds is not None:
            values |= {
                "tokens_per_second": self.tokens / seconds,
                "mfu": self.flops / seconds / self.peak,
            }
        if (by_source := self._by_source()) is not None:
            values["loss_by_source"] = by_source
        loop.log(**values, **memory_in_use())

    def _by_source(self) -> dict[str, float] | None:
        """The loss of each source over the steps since the last line; of those that had targets."""
        if self._of_sources is None:
            return None
        losses, targets = np.asarray(jax.device_get(self._of_sources), np.float64)
        self._of_sources = None
        found = zip(self._sources, losses, targets, strict=True)
        return {name: float(loss / count) for name, loss, count in found if count}

    def on_train_end(self, loop: Loop) -> dict[str, Any]:
        records = loop.run.records()
        rates = [r["tokens_per_second"] for r in records if r.get("tokens_per_second")]
        rate = float(np.median(rates)) if rates else None
        return {
            "tokens_per_step": self.tokens,
            "loss": next((r["loss"] for r in reversed(records) if "loss" in r), None),
            "seconds_per_step": None if rate is None else self.tokens / rate,
            "tokens_per_second": rate,
            "mfu": None if rate is None else self.flops * rate / self.tokens / self.peak,
            "mfu_of": self.peak_source,
            **peak_memory(records),
            "attended_tokens": attended_tokens(loop.config.model, loop.setup.batch["tokens"].shape[1]),
        }


_STATM = Path("/proc/self/statm")
_MEMORY = ("device_peak_bytes", "host_peak_bytes")


def memory_in_use() -> dict[str, int]:
    """Bytes of this process: at most so far, of the fullest device, where its backend tells, and of the host;
    and of the host now, where the system tells."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [int(told["peak_bytes_in_use"]) for told in stats if "peak_bytes_in_use" in told]
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"host_peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if _STATM.exists():
        found["host_bytes"] = int(_STATM.read_text().split()[1]) * resource.getpagesize()
        found["host_peak_bytes"] = max(found.values())  # which some systems count later
    return found | ({"device_peak_bytes": max(peaks)} if peaks else {})


def peak_memory(records: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The largest peaks of all processes that a run went through."""
    seen = {name: [r[name] for r in records if name in r] for name in _MEMORY}
    return {name: max(found) for name, found in seen.items() if found}

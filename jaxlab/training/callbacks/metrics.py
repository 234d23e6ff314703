"""What people and files are told of each step: the progress bar, lines of metrics, speeds."""

from typing import Any

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

    def due(self, loop: Loop) -> bool:
        return loop.last or loop.done % self.every == 0

    def on_due(self, loop: Loop) -> None:
        values = {**loop.values, "learning_rate": float(self.schedule(loop.done - 1))}
        if loop.config.spikes.action == "skip":
            values["skipped_updates"] = skipped(loop.state.optimizer)[0]
        seconds = loop.watch.read()
        if seconds is not None:
            values |= {
                "tokens_per_second": self.tokens / seconds,
                "mfu": self.flops / seconds / self.peak,
            }
        loop.run.log(step=loop.done, **values)

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
            "attended_tokens": attended_tokens(loop.config.model, loop.setup.batch["tokens"].shape[1]),
        }

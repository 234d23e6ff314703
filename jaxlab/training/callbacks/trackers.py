"""Metrics for programs that show them: TensorBoard and Weights & Biases, both optional."""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from jaxlab.errors import UserError
from jaxlab.training.loop import Callback, Loop
from jaxlab.training.monitoring import WandbConfig


def check_trackers(*, tensorboard: bool, wandb: WandbConfig | None) -> None:
    """Whether what is asked for is installed.

    Raises:
      UserError: it is not.
    """
    for wanted, key, module in ((tensorboard, "tensorboard", "tensorboardX"), (wandb, "wandb", "wandb")):
        if wanted and importlib.util.find_spec(module) is None:
            raise UserError(f"{key}: the package {module} is not there; pip install 'jaxlab[{key}]'")


class WriteTensorBoard(Callback):
    """Event files in the run's folder `tensorboard`."""

    def __init__(self) -> None:
        self._writer: Any = None

    def on_train_begin(self, loop: Loop) -> None:
        made = importlib.import_module("tensorboardX").SummaryWriter
        # What a killed process wrote of later steps is not shown.
        purge = loop.done + 1 if loop.done else None
        self._writer = made(str(loop.run.path / "tensorboard"), purge_step=purge)

    def on_log(self, loop: Loop, metrics: dict[str, Any]) -> None:
        for name, value in numbers(metrics):
            self._writer.add_scalar(name, value, loop.done)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WriteWandb(Callback):
    """A run of Weights & Biases, taken up again where this one is."""

    def __init__(self, config: WandbConfig, described: dict[str, Any]) -> None:
        """
        Args:
          described: the config of the run, as plain values.
        """
        self.config, self.described = config, described
        self._run: Any = None

    def on_train_begin(self, loop: Loop) -> None:
        with _quiet():
            self._run = importlib.import_module("wandb").init(
                project=self.config.project,
                entity=self.config.entity,
                group=self.config.group,
                tags=list(self.config.tags),
                mode=self.config.mode,
                name=loop.run.name,
                id=loop.run.name[-128:],
                resume="allow",
                dir=str(loop.run.path),
                config=self.described,
            )

        # Against a metric of ours: of W&B's own steps it drops those that a rolled-back run does again.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def on_log(self, loop: Loop, metrics: dict[str, Any]) -> None:
        self._run.log({**dict(numbers(metrics)), "step": loop.done})

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()


def numbers(metrics: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a line of metrics; those of groups by name/name."""
    for name, value in metrics.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what it says of itself, unless that is asked for."""
    before = os.environ.get("WANDB_SILENT")
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("WANDB_SILENT", None)

"""The loop of training, and what may happen around its steps: callbacks."""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from jaxlab.data import BatchReader, Source
from jaxlab.distributed import Agreement, leave
from jaxlab.models import Batch, Params, place_batch, rows_here
from jaxlab.training.averages import averaged
from jaxlab.training.checkpoints import Checkpoints
from jaxlab.training.config import TrainConfig
from jaxlab.training.speed import Stopwatch
from jaxlab.training.spikes import Rollbacks
from jaxlab.training.state import Initial
from jaxlab.training.step import State
from jaxlab.training.trainable import Trainable


@runtime_checkable
class RunFolder(Protocol):
    """What the loop needs of a run: `jaxlab.app.Run` is one."""

    path: Path
    name: str

    def log(self, *, step: int | None = None, **metrics: Any) -> None:
        """Appends a line to the metrics."""
        ...

    def rewind(self, step: int) -> None:
        """Drops the metrics of that step and later ones."""
        ...

    def records(self) -> list[dict[str, Any]]:
        """The lines of the metrics."""
        ...


@runtime_checkable
class Stop(Protocol):
    """What was asked of the run from outside, by a signal: `jaxlab.app.Stop` is one."""

    armed: bool
    """Whether there is something to save."""
    asked: int | None

    def end(self, said: str) -> None:
        """Ends the run with a word on what is saved.

        Raises:
          KeyboardInterrupt: in any case.
        """
        ...


class Setup(NamedTuple):
    """What is known before there are parameters."""

    mesh: Mesh
    source: Source
    batch: dict[str, jax.ShapeDtypeStruct]
    """Its shapes."""
    initial: Initial
    trainable: Trainable
    """What of the model is trained: the state's parameters are of that alone."""
    optimizer: optax.GradientTransformation
    shardings: State
    update: Callable[[State, Params, Batch], tuple[State, dict[str, Any]]]
    """One training step of a state, what is frozen, and a batch, jitted; it takes over its state's memory."""
    evaluate: Callable[[Params, Batch], dict[str, Any]]
    """Sums over a held-out batch, jitted."""


class Loop:
    """A training run under way, as callbacks see it."""

    def __init__(
        self,
        config: TrainConfig,
        setup: Setup,
        run: RunFolder,
        checkpoints: Checkpoints,
        restore: Callable[[], tuple[int, State]],
        stop: Stop,
        frozen: Params | None = None,
    ) -> None:
        """Restores the newest state.

        Args:
          restore: gives (steps done, state) of the newest whole checkpoint, or of the beginning.
          frozen: the parameters that are not trained.
        """
        self.frozen: Params = frozen or {}
        self.config, self.setup, self.run, self.checkpoints, self.stop = config, setup, run, checkpoints, stop
        self.rollbacks = Rollbacks(run.path / "rollbacks.json")
        self.watch = Stopwatch()
        self.held_out: dict[str, dict[str, float]] = {}
        """The newest results on held-out data, by split or by name of an evaluation."""
        self.stopping = False
        """Whether the run ends after this step, because it was asked to from outside."""
        self.callbacks: Sequence[Callback] = ()
        self._restore = restore
        self._compiled = False
        self._agreement = Agreement()
        # What images have besides is numbered over all rows, so each process reads these.
        rows = None if config.data.kind == "image_chats" else rows_here(config.batch_size, setup.mesh)
        self._batches = BatchReader(setup.source, config.seed, config.batch_size, rows=rows)
        self.done: int
        """Steps done."""
        self.state: State
        """The state after them. The next step takes over its memory: copy what you keep."""
        self.done, self.state = restore()
        self.began_at = self.done
        self.measured: dict[str, Any] = {}
        """What the last step measured, on the devices: numbers, and vectors over sources."""
        self._values: dict[str, float] | None = None

    @property
    def last(self) -> bool:
        """Whether the last step is done."""
        return self.done >= self.config.steps

    @property
    def values(self) -> dict[str, float]:
        """The numbers that the last step measured; to read them waits for that step."""
        if self._values is None:
            self._values = {n: float(value) for n, value in self.measured.items() if value.ndim == 0}
        return self._values

    @property
    def trained(self) -> Params:
        """The parameters that the run is for: those of the state, or their average by
        `optimizer.ema.export`; of what is trained alone."""
        ema, average = self.config.optimizer.ema, averaged(self.state.optimizer)
        return average if ema is not None and ema.export and average is not None else self.state.params

    def whole(self, params: Params) -> Params:
        """All parameters of the model, as `forward` takes them, of those that are trained."""
        return self.setup.trainable.join(params, self.frozen)

    def step(self) -> None:
        """One update."""
        config, number, mesh = self.config, self.rollbacks.batch_of(self.done), self.setup.mesh
        batch = place_batch(self._batches.read(number), mesh, config.batch_size)
        self.state, self.measured = self.setup.update(self.state, self.frozen, batch)
        self._values = None
        self.done += 1
        self.watch.step()
        if not self._compiled:  # the first step compiles: no signal waits for it, no speed has it in
            jax.block_until_ready(self.state)
            self.watch.restart()
            self._compiled = self.stop.armed = True

    def close(self) -> None:
        """Ends what reads ahead."""
        self._batches.close()

    def ask_to_stop(self) -> None:
        """Whether the run ends after this step: all processes do if one was asked to."""
        asked = self._agreement.largest(self.stop.asked or 0)
        self.stopping = asked > 0
        if self.stopping:
            self.stop.asked = asked

    def go_back(self) -> None:
        """Returns to the newest checkpoint; the batches from there to here are passed by."""
        seen_at = self.done
        self.done, self.state = self._restore()
        self._values, self.measured = None, {}
        self.rollbacks.add(self.done, seen_at)
        self.log(rollback_from=seen_at)
        self.say(f"a spike before step {seen_at}: back to step {self.done}, on with other batches")
        self.watch.restart()

    def log(self, **metrics: Any) -> None:
        """Appends a line of metrics of this step, and tells the callbacks."""
        self.run.log(step=self.done, **metrics)
        for callback in self.callbacks:
            callback.on_log(self, metrics)

    def say(self, text: str) -> None:
        """Prints a line beside the progress bar."""
        tqdm.write(text)


class Callback:
    """What happens around the steps of training. Every method does nothing; a callback overrides some.

    To be due costs that the step is waited for and its state is checked first (`GuardSpikes`), so a
    callback is due as seldom as it can be. What it does before the step's checkpoint, to `loop.state` too,
    is in the checkpoint.
    """

    @property
    def identity(self) -> str:
        """What tells apart the runs that it changes; override it where it has settings."""
        return f"{type(self).__module__}.{type(self).__qualname__}"

    def on_train_begin(self, loop: Loop) -> None:
        """Before the first step of this process; `loop.done` says how many were done before."""

    def on_step_end(self, loop: Loop) -> None:
        """After every step, which may still be under way on the devices: reading its values waits for it."""

    def due(self, loop: Loop) -> bool:
        """Whether `on_due` is to be called after this step."""
        return False

    def on_due(self, loop: Loop) -> None:
        """After a step, and after the callbacks before this one in the list."""

    def on_log(self, loop: Loop, metrics: dict[str, Any]) -> None:
        """With every line of metrics, by name; lines of one step come in several parts."""

    def on_train_end(self, loop: Loop) -> dict[str, Any]:
        """After the last step: what it adds to the results; mappings of one name are joined."""
        return {}

    def close(self) -> None:
        """At the end of training, whatever ends it; what begin has opened is closed here."""


def fit(loop: Loop, callbacks: Sequence[Callback]) -> dict[str, Any]:
    """Trains to the last step and returns what the callbacks add to the results.

    Raises:
      UserError: a callback's, one line.
      KeyboardInterrupt: the run was asked to stop from outside.
    """
    loop.callbacks = callbacks
    with contextlib.ExitStack() as stack:
        stack.callback(loop.close)
        for callback in callbacks:
            stack.callback(callback.close)
            callback.on_train_begin(loop)
        while not loop.last:
            loop.step()
            loop.ask_to_stop()  # once: a signal that comes later finds the next step
            for callback in callbacks:
                callback.on_step_end(loop)
            due = [callback for callback in callbacks if callback.due(loop)]
            went_back = bool(due) and _call(loop, due)
            if loop.stopping and not went_back:
                leave()
                loop.stop.end(f"step {loop.done} of {loop.config.steps} is saved")
        loop.stop.armed = False  # no step is left that could be saved first
        results: dict[str, Any] = {}
        for callback in callbacks:
            for name, value in callback.on_train_end(loop).items():
                joined = isinstance(value, dict) and isinstance(results.get(name), dict)
                results[name] = {**results[name], **value} if joined else value
    return results


def _call(loop: Loop, due: Sequence[Callback]) -> bool:
    """Calls those that are due, outside of the measured time. Where one goes back, which it returns, the
    others are due no more."""
    step = loop.done
    jax.block_until_ready(loop.state)
    with loop.watch.paused():
        for callback in due:
            callback.on_due(loop)
            if loop.done != step:
                return True
    return False

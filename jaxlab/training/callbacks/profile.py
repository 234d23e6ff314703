"""A trace of chosen steps, by jax's profiler."""

import jax

from jaxlab.training.loop import Callback, Loop


class TraceSteps(Callback):
    """Traces steps `first` to `last` into the run's folder `profile` (TensorBoard, XProf, Perfetto)."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self._tracing = False

    def on_train_begin(self, loop: Loop) -> None:
        self._begin(loop)

    def on_step_end(self, loop: Loop) -> None:
        if self._tracing and loop.done >= self.last:
            jax.block_until_ready(loop.state)
            self.close()
            loop.say(f"steps {self.first} to {self.last} are traced in {loop.run.path / 'profile'}")
        self._begin(loop)

    def _begin(self, loop: Loop) -> None:
        if not self._tracing and self.first - 1 <= loop.done < self.last:
            jax.block_until_ready(loop.state)
            jax.profiler.start_trace(loop.run.path / "profile")
            self._tracing = True

    def close(self) -> None:
        if self._tracing:
            jax.profiler.stop_trace()
            self._tracing = False

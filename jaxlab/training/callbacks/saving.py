"""What a run keeps: checkpoints on its way, and the model at its end."""

import sys
import warnings
from typing import Any

from jaxlab.checkpoints import save_model
from jaxlab.errors import UserError, UserNote
from jaxlab.models import count_params
from jaxlab.training.checkpoints import Checkpoints
from jaxlab.training.loop import Callback, Loop


class SaveCheckpoints(Callback):
    """A checkpoint every `every` steps, after the last one, and where the run is asked to end."""

    def __init__(self, every: int, *, in_background: bool = True) -> None:
        self.every, self.in_background = every, in_background
        self._checkpoints: Checkpoints | None = None

    def on_train_begin(self, loop: Loop) -> None:
        self._checkpoints = loop.checkpoints

    def on_step_end(self, loop: Loop) -> None:
        loop.checkpoints.check()

    def due(self, loop: Loop) -> bool:
        return loop.last or loop.done % self.every == 0 or loop.stopping

    def on_due(self, loop: Loop) -> None:
        ends = loop.last or loop.stopping
        losses = {}
        if loop.checkpoints.keep.best:
            losses = {r["step"]: r["eval_loss"] for r in loop.run.records() if "eval_loss" in r}
        loop.checkpoints.save(
            loop.done, loop.state, losses=losses, background=self.in_background and not ends
        )

    def close(self) -> None:
        """Waits for what is being written; what ended the run is said first if both failed."""
        if self._checkpoints is None:
            return
        try:
            self._checkpoints.wait()
        except UserError as error:
            if sys.exc_info()[1] is None:
                raise
            warnings.warn(str(error), UserNote, stacklevel=1)


class SaveModel(Callback):
    """The trained model, in the run's folder `model`."""

    def on_train_end(self, loop: Loop) -> dict[str, Any]:
        setup, params = loop.setup, loop.trained
        save_model(
            loop.run.path / "model", loop.config.model, params, setup.source.tokenizer(), overwrite=True
        )
        return {"model": "model", "parameters": count_params(params), "steps": loop.config.steps}

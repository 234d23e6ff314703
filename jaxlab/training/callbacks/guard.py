"""Spikes: the run ends, goes on or goes back, before anything of it is logged or kept."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxlab.errors import UserError
from jaxlab.training.loop import Callback, Loop
from jaxlab.training.spikes import SpikesConfig, skipped


class GuardSpikes(Callback):
    """Looks at the loss whenever one of the callbacks that follow is due."""

    def __init__(self, config: SpikesConfig, guarded: Sequence[Callback]) -> None:
        self.config, self.guarded = config, guarded

    def due(self, loop: Loop) -> bool:
        return any(callback.due(loop) for callback in self.guarded)

    def on_due(self, loop: Loop) -> None:
        """Ends the run, or makes it go back.

        Raises:
          UserError: the loss is not finite and nothing was asked to be done then, or it does not help.
        """
        most, done = self.config.most, loop.done
        remedy = f"lower optimizer.learning_rate; {loop.checkpoints.describe_newest()}"
        if self.config.action == "stop":
            loss = loop.values["loss"]
            if not np.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} at step {done}; set spikes.action to skip or rollback, or {remedy}"
                )
            return
        total, in_a_row = skipped(loop.state.optimizer)
        if in_a_row >= most:
            raise UserError(
                f"the last {in_a_row} updates up to step {done} were spikes and left out; {remedy}"
            )
        if self.config.action == "skip" or not total:
            return
        if len(loop.rollbacks.made) >= most:
            raise UserError(f"a spike before step {done}, after {most} rollbacks; {remedy}")
        loop.go_back()

    def on_train_end(self, loop: Loop) -> dict[str, Any]:
        results = {}
        if self.config.action != "stop":
            results["skipped_updates"] = skipped(loop.state.optimizer)[0]
        if self.config.action == "rollback":
            results["rollbacks"] = len(loop.rollbacks.made)
        return results

"""Loss and exact match on held-out data, while training and at its end."""

from typing import Any

from jaxlab.models import Params, place_batch
from jaxlab.training.averages import averaged
from jaxlab.training.loop import Callback, Loop


class EvaluateHeldOut(Callback):
    """Validation every `every` steps, both splits at the end, over at most `batches` batches.

    Where `optimizer.ema.evaluate` asks for it the average of the parameters is measured besides, as
    `ema_eval_loss` and so on.
    """

    def __init__(self, every: int, batches: int) -> None:
        self.every, self.batches = every, batches

    def due(self, loop: Loop) -> bool:
        return loop.last or loop.done % self.every == 0

    def on_due(self, loop: Loop) -> None:
        loop.held_out["validation"] = self._measure(loop, "validation")
        loop.log(**loop.held_out["validation"])

    def on_train_end(self, loop: Loop) -> dict[str, Any]:
        splits = ("validation", "test")
        for split in splits:  # a run that was killed after its last step has not seen the first one
            if split not in loop.held_out:
                loop.held_out[split] = self._measure(loop, split)
        return {split: loop.held_out[split] for split in splits}

    def _measure(self, loop: Loop, split: str) -> dict[str, float]:
        found = self._measure_one(loop, loop.state.params, split)
        ema, average = loop.config.optimizer.ema, averaged(loop.state.optimizer)
        if average is not None and ema is not None and ema.evaluate:
            of_average = self._measure_one(loop, average, split)
            found |= {f"ema_{name}": value for name, value in of_average.items()}
        return found

    def _measure_one(self, loop: Loop, trained: Params, split: str) -> dict[str, float]:
        setup, sums, params = loop.setup, dict[str, float](), loop.whole(trained)
        for rows in setup.source.held_out_batches(loop.config.batch_size, self.batches, split):
            batch = place_batch(rows, setup.mesh)
            for name, value in setup.evaluate(params, batch).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        return {
            "eval_loss": sums["loss"] / max(sums["targets"], 1.0),
            "eval_exact_match": sums["matches"] / sums["rows"],
        }

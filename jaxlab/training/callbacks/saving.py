"""What a run keeps: checkpoints on its way, and the model at its end."""

from typing import Any

from jaxlab.checkpoints import save_model
from jaxlab.models import count_params
from jaxlab.training.loop import Callback, Loop


class SaveCheckpoints(Callback):
    """A checkpoint every `every` steps, after the last one, and where the run is asked to end."""

    def __init__(self, every: int) -> None:
        self.every = every

    def due(self, loop: Loop) -> bool:
        return loop.last or loop.done % self.every == 0 or loop.stopping

    def on_due(self, loop: Loop) -> None:
        loop.checkpoints.save(loop.done, loop.state)


class SaveModel(Callback):
    """The trained model, in the run's folder `model`."""

    def on_train_end(self, loop: Loop) -> dict[str, Any]:
        setup, params = loop.setup, loop.trained
        save_model(
            loop.run.path / "model", loop.config.model, params, setup.source.tokenizer(), overwrite=True
        )
        return {"model": "model", "parameters": count_params(params), "steps": loop.config.steps}

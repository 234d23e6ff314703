"""What a run keeps: checkpoints on its way, and the model at its end."""

import sys
import warnings
from typing import Any

from jaxlab.checkpoints import huggingface_config, save_model
from jaxlab.errors import UserError, UserNote
from jaxlab.models import count_params
from jaxlab.training.checkpoints import Checkpoints
from jaxlab.training.config import TrainConfig
from jaxlab.training.loop import Callback, Loop, Setup


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
    """The trained model, in the run's folder `model`; with `export: hf` in Hugging Face's form too, `hf`."""

    def __init__(self, config: TrainConfig, setup: Setup) -> None:
        """
        Raises:
          UserError: no family of Hugging Face can describe a model that is to be exported.
        """
        opened = setup.initial.opened
        self.source_files = None if opened is None else opened.source_files
        if config.export == "hf":
            huggingface_config(config.model, self.source_files)

    def on_train_end(self, loop: Loop) -> dict[str, Any]:
        config, params, tokenizer = loop.config, loop.trained, loop.setup.source.tokenizer()
        results: dict[str, Any] = {"model": "model"}
        save_model(loop.run.path / "model", config.model, params, tokenizer, overwrite=True)
        if config.export == "hf":
            results["hf"] = "hf"
            save_model(
                loop.run.path / "hf",
                config.model,
                params,
                tokenizer,
                form="huggingface",
                source_files=self.source_files,
                overwrite=True,
            )
        return {**results, "parameters": count_params(params), "steps": config.steps}

"""What a run keeps: checkpoints on its way, and the model at its end."""

import sys
import warnings
from typing import Any

from jaxlab.checkpoints import huggingface_config, kept_files, save_adapter, save_model, whole_tensors
from jaxlab.errors import UserError, UserNote
from jaxlab.models import count_params, merge_updates, to_host
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
    """What was trained, in the run's folder: `model`, the whole model, with `export: hf` in Hugging Face's
    form too, `hf`; with LoRA `adapter`, as PEFT has it, and the whole model if `lora.merge` asks for it."""

    def __init__(self, config: TrainConfig, setup: Setup) -> None:
        """
        Raises:
          UserError: no family of Hugging Face can describe a model that is to be exported.
        """
        opened = setup.initial.opened
        self.source_files = None if opened is None else kept_files(opened, config.model)
        if config.export == "hf":
            huggingface_config(config.model, self.source_files)

    def on_train_end(self, loop: Loop) -> dict[str, Any]:
        setup, lora = loop.setup, loop.config.lora
        results: dict[str, Any] = {}
        if lora is not None:
            results["adapter"] = "adapter"
            self._save_adapter(loop)
        if lora is None or lora.merge:
            results |= self._save_whole(loop)
        trained = count_params(loop.trained)
        return {
            **results,
            "parameters": count_params(setup.trainable.shapes),
            **({} if setup.trainable.everything else {"trained_parameters": trained}),
            "steps": loop.config.steps,
        }

    def _save_whole(self, loop: Loop) -> dict[str, Any]:
        config, tokenizer = loop.config, loop.setup.source.tokenizer()
        params = merge_updates(loop.whole(loop.trained))
        forms: dict[str, Any] = {"model": {}}
        if config.export == "hf":
            forms["hf"] = {"form": "huggingface"}
        for folder, form in forms.items():
            save_model(
                loop.run.path / folder,
                config.model,
                params,
                tokenizer,
                source_files=self.source_files,
                overwrite=True,
                **form,
            )
        return {folder: folder for folder in forms}

    def _save_adapter(self, loop: Loop) -> None:
        config, trainable, opened = loop.config, loop.setup.trainable, loop.setup.initial.opened
        assert trainable.adapters is not None
        assert opened is not None
        trained = to_host(loop.trained)
        save_adapter(
            loop.run.path / "adapter",
            {path: trainable.pair(trained, path) for path, _ in trainable.adapted},
            trainable.targets,
            trainable.adapters,
            trainable.shapes,
            base=config.init_from or "",
            base_identity=opened.identity,
            causal_lm=not config.model.has_vision,
            replaced=whole_tensors(trained, trainable.whole, config.model),
            overwrite=True,
        )

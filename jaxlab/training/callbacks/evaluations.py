"""Evaluations of one's own while training: what the task `evaluate` measures, of the model as it is now."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer

from jaxlab.checkpoints import NotFinite, OpenModel, SourceFiles
from jaxlab.data import DataConfig, Source, batch_shapes, check_all_tokens, check_fits, check_same_words
from jaxlab.evaluation import Questions, QuestionsConfig, measure_held_out, prepare_questions
from jaxlab.models import ModelConfig, Params, abstract_params, using
from jaxlab.training.config import TrainConfig
from jaxlab.training.loop import Callback, Loop, Setup
from jaxlab.training.monitoring import EvaluationConfig


class ModelInTraining(OpenModel):
    """The model that is trained, where something asks for an opened one: its parameters are elsewhere."""

    form = "orbax"

    def __init__(
        self, path: Path, config: ModelConfig, tokenizer: Tokenizer | None, like: OpenModel | None
    ) -> None:
        """
        Args:
          path: what stands for it in messages.
          like: the model that it began as, whose chat template and processor are its own.
        """
        super().__init__(path)
        self._config, self._tokenizer, self._like = config, tokenizer, like

    @property
    def config(self) -> ModelConfig:
        return self._config

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    @property
    def source_files(self) -> SourceFiles | None:
        return None if self._like is None else self._like.source_files

    @property
    def companion_folder(self) -> Path:
        return self.path if self._like is None else self._like.companion_folder

    def shapes_in(self, dtype: jax.typing.DTypeLike | None) -> Params:
        return abstract_params(self._config)

    def _read(self, shardings: Params | None, dtype: np.dtype | None, not_finite: NotFinite) -> Params:
        raise TypeError(f"{self.path}: its parameters are not on a disk")


class Evaluate(Callback):
    """Measures every so many steps and at the end; what it finds stands in metrics and results under
    `evaluations`, by its name."""

    def __init__(
        self,
        evaluation: EvaluationConfig,
        config: TrainConfig,
        setup: Setup,
        make_source: Callable[[DataConfig], Source],
    ) -> None:
        """
        Raises:
          UserError: it does not fit the model.
        """
        self.config = evaluation
        self.every = evaluation.every or config.eval_every
        self.batch_size = evaluation.batch_size or config.batch_size
        self._at: int | None = None
        self._found: dict[str, Any] = {}
        tokenizer, like = setup.source.tokenizer(), setup.initial.opened
        opened = ModelInTraining(Path(f"evaluations: {evaluation.name}"), config.model, tokenizer, like)
        self._data: Source | Questions
        if isinstance(evaluation.data, QuestionsConfig):
            self._data = prepare_questions(evaluation.data, opened, evaluation.split)
            return
        self._data = source = make_source(evaluation.data)
        check_fits(batch_shapes(source, self.batch_size, evaluation.split), config.model)
        check_same_words(tokenizer, source.tokenizer(), opened.path)
        check_all_tokens(source, config.model)

    def due(self, loop: Loop) -> bool:
        return loop.last or loop.done % self.every == 0

    def on_due(self, loop: Loop) -> None:
        config, data = self.config, self._data
        params, model, mesh = loop.whole(loop.trained), loop.config.model, loop.setup.mesh
        if isinstance(data, Questions):
            with using(mesh):
                measured = data.measure(params, batch_size=self.batch_size, model=model)
            self._found = {**measured.measures, "questions": len(data.asked)}
        else:
            self._found = measure_held_out(
                params,
                model,
                data,
                mesh=mesh,
                split=config.split,
                batch_size=self.batch_size,
                batches=config.batches,
                position_buckets=config.position_buckets,
            )
        self._at = loop.done
        loop.held_out[self.config.name] = {n: v for n, v in self._found.items() if isinstance(v, float)}
        loop.log(evaluations={self.config.name: self._found})

    def on_train_end(self, loop: Loop) -> dict[str, Any]:
        if self._at != loop.done:  # a run that was killed after its last step
            self.on_due(loop)
        return {"evaluations": {self.config.name: self._found}}

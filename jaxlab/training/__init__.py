"""The trainer: language models, vision-language models and experts are configs of it."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.training.checkpoints import Checkpoints
    from jaxlab.training.config import MOST, TrainConfig
    from jaxlab.training.lora import LoraConfig
    from jaxlab.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
    from jaxlab.training.speed import Stopwatch
    from jaxlab.training.spikes import Rollbacks, skip_spikes, skipped
    from jaxlab.training.state import (
        Initial,
        abstract_state,
        find_initial,
        init_state,
        read_initial,
        state_shardings,
    )
    from jaxlab.training.step import State, train_step
    from jaxlab.training.trainable import Trainable, find_trainable

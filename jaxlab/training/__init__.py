"""The trainer: language models, vision-language models and experts are configs of it."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.training.averages import EmaConfig, averaged
    from jaxlab.training.callbacks import (
        Evaluate,
        EvaluateHeldOut,
        GuardSpikes,
        LogMetrics,
        SaveCheckpoints,
        SaveModel,
        ShowProgress,
        TraceSteps,
        WriteSamples,
        WriteTensorBoard,
        WriteWandb,
        check_trackers,
    )
    from jaxlab.training.checkpoints import Checkpoints, KeepConfig, newest_digests, restore_newest
    from jaxlab.training.config import MOST, TrainConfig, with_initial_model
    from jaxlab.training.estimate import EstimateConfig, estimate_run, estimate_table, make_host_devices
    from jaxlab.training.loop import Callback, Loop, Setup, fit
    from jaxlab.training.lora import LoraConfig
    from jaxlab.training.monitoring import EvaluationConfig, SamplesConfig, WandbConfig
    from jaxlab.training.muon import MuonConfig
    from jaxlab.training.optimizer import GroupConfig, OptimizerConfig, groups_of, is_frozen, make_optimizer
    from jaxlab.training.schedule import make_schedule
    from jaxlab.training.speed import Stopwatch
    from jaxlab.training.spikes import Rollbacks, skip_spikes, skipped
    from jaxlab.training.state import (
        Initial,
        abstract_state,
        find_initial,
        init_frozen,
        init_state,
        read_initial,
        state_shardings,
    )
    from jaxlab.training.step import State, train_step
    from jaxlab.training.trainable import Trainable, find_trainable

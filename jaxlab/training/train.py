"""Task `train`: language models, vision-language models and fine-tuned experts. Reads top to bottom."""

import functools
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from tqdm import tqdm

from jaxlab.checkpoints.native import load_model, model_identity, save_model
from jaxlab.checkpoints.reference import model_folder
from jaxlab.data.source import DataConfig, Source, make_source
from jaxlab.errors import ConfigError, UserError
from jaxlab.models import ModelConfig, Params, abstract_params, count_params, init_params
from jaxlab.runs import Run
from jaxlab.training.metrics import attended_tokens, peak_flops, train_flops_per_token
from jaxlab.training.optimizer import OptimizerConfig, make_optimizer, make_schedule
from jaxlab.training.sharding import MeshConfig, batch_sharding, make_mesh, param_shardings
from jaxlab.training.step import State, evaluate_step, train_step


@dataclass(frozen=True)
class Config:
    """Train a model, from random parameters or from another model's."""

    model: ModelConfig = ModelConfig()
    """The model."""
    data: DataConfig = DataConfig()
    """What it reads."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How it learns."""
    mesh: MeshConfig = MeshConfig()
    """How devices are arranged."""
    init_from: str | None = None
    """Start from this model: a model folder, a run folder, or the config of a finished train run. Parts that it lacks
    (a vision tower, a projector) start from random parameters."""
    steps: int = 1000
    """Updates."""
    batch_size: int = 32
    """Sequences in an update, over all devices."""
    accumulation: int = 1
    """Parts in which the batch is read, one after the other, to save memory."""
    seed: int = 0
    """Of initial parameters and of the order of the data."""
    log_every: int = 10
    """Steps between lines of metrics."""
    eval_every: int = 200
    """Steps between evaluations on the validation split; one more comes at the end."""
    eval_batches: int = 8
    """Batches in an evaluation."""
    checkpoint_every: int = 500
    """Steps between checkpoints, from which a killed run goes on."""

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "accumulation",
            "log_every",
            "eval_every",
            "eval_batches",
            "checkpoint_every",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, is {getattr(self, name)}", key=name)
        if self.batch_size % self.accumulation:
            raise ConfigError(
                f"batch_size {self.batch_size} is not divisible by accumulation {self.accumulation}",
                key="accumulation",
            )
        if self.data.kind == "digits" and self.data.digits.has_images and not self.model.has_vision:
            raise ConfigError(
                "digits with images need a model with vision; set model.vision.num_layers", key="model"
            )
        if self.data.kind == "text" and self.data.text.sequence_length > self.model.max_length:
            raise ConfigError(
                f"sequences of {self.data.text.sequence_length} exceed model.max_length {self.model.max_length}",
                key="model.max_length",
            )


def inputs(config: Config) -> dict[str, str]:
    """What the run depends on besides its config."""
    identities = {"data": make_source(config.data).identity}
    if config.init_from is not None:
        identities["init_from"] = model_identity(model_folder(config.init_from))
    return identities


def run(config: Config, run: Run) -> dict[str, Any]:
    mesh = make_mesh(config.mesh)
    if config.batch_size // config.accumulation % mesh.size:
        raise UserError(
            f"a part of {config.batch_size // config.accumulation} sequences cannot be split over {mesh.size} devices; "
            "change batch_size, accumulation or mesh"
        )
    source = make_source(config.data)
    optimizer = make_optimizer(config.optimizer, config.model, config.steps)
    schedule = make_schedule(config.optimizer, config.steps)

    # State: made or read where it will live, then replaced by the newest checkpoint if there is one.
    shardings = state_shardings(config, optimizer, mesh)
    state = init_state(config, optimizer, shardings)
    checkpoints = ocp.CheckpointManager(
        (run.path / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    start = checkpoints.latest_step() or 0
    if start:
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
        )
        state = checkpoints.restore(start, args=ocp.args.StandardRestore(target))
        print(f"resuming at step {start} of {config.steps}")
    run.rewind(start)

    # Two compiled functions.
    place = functools.partial(jax.device_put, device=batch_sharding(mesh))
    update = jax.jit(
        functools.partial(
            train_step, config=config.model, optimizer=optimizer, accumulation=config.accumulation
        ),
        donate_argnums=0,
        out_shardings=(shardings, None),
    )
    evaluate = jax.jit(functools.partial(evaluate_step, config=config.model))

    tokens = place(source.batch(config.seed, start, config.batch_size))
    length = tokens["tokens"].shape[1]
    flops = train_flops_per_token(config.model, length) * config.batch_size * length
    peak, peak_source = peak_flops()
    seconds: list[float] = []
    evaluations: list[dict[str, float]] = []
    with tqdm(total=config.steps, initial=start, desc=f"train {run.name}", unit="step") as bar:
        compiled = False
        window_start, window_steps = time.perf_counter(), 0
        for step in range(start, config.steps):
            batch = place(source.batch(config.seed, step, config.batch_size))
            state, metrics = update(state, batch)
            bar.update()
            window_steps += 1
            done = step + 1
            if not compiled:  # the first step compiles: it is not part of any speed
                jax.block_until_ready(state)
                compiled, window_start, window_steps = True, time.perf_counter(), 0
            if done % config.log_every == 0 or done == config.steps:
                values = {name: float(value) for name, value in metrics.items()}
                if not np.isfinite(values["loss"]):
                    raise UserError(
                        f"the loss is {values['loss']} at step {done}; lower optimizer.learning_rate"
                    )
                speed: dict[str, float] = {}
                if window_steps:
                    seconds.append((time.perf_counter() - window_start) / window_steps)
                    speed = {"tokens_per_second": config.batch_size * length / seconds[-1],
                             "mfu": flops / seconds[-1] / peak}  # fmt: skip
                run.log(step=done, learning_rate=float(schedule(step)), **values, **speed)
                bar.set_postfix(loss=f"{values['loss']:.3f}")
                window_start, window_steps = time.perf_counter(), 0
            if done % config.eval_every == 0 and done < config.steps:
                evaluations.append(_evaluate(evaluate, state.params, source, config, place, "validation"))
                run.log(step=done, **evaluations[-1])
                window_start, window_steps = time.perf_counter(), 0
            if done % config.checkpoint_every == 0 and done < config.steps:
                checkpoints.save(done, args=ocp.args.StandardSave(state))
                window_start, window_steps = time.perf_counter(), 0
    checkpoints.wait_until_finished()
    checkpoints.close()

    final = {
        split: _evaluate(evaluate, state.params, source, config, place, split)
        for split in ("validation", "test")
    }
    run.log(step=config.steps, **final["validation"])
    save_model(run.path / "model", config.model, state.params, source.tokenizer(), overwrite=True)
    median = float(np.median(seconds)) if seconds else None
    return {
        "model": "model",
        "parameters": count_params(state.params),
        "steps": config.steps,
        "tokens_per_step": config.batch_size * length,
        **final,
        "seconds_per_step": median,
        "tokens_per_second": None if median is None else config.batch_size * length / median,
        "mfu": None if median is None else flops / median / peak,
        "mfu_of": peak_source,
        "attended_tokens": attended_tokens(config.model, length),
    }


def state_shardings(config: Config, optimizer, mesh) -> State:
    """Where each part of the state lives: the optimizer's moments like their parameters, scalars everywhere."""
    params = param_shardings(config.model, mesh)
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    moments = jax.eval_shape(optimizer.init, abstract_params(config.model))
    like_params = jax.tree.structure(params)
    is_params = lambda node: jax.tree.structure(node) == like_params  # noqa: E731
    optimizer_shardings = jax.tree.map(
        lambda node: params if is_params(node) else everywhere, moments, is_leaf=is_params
    )
    return State(everywhere, params, optimizer_shardings)  # type: ignore[arg-type]


def init_state(config: Config, optimizer, shardings: State) -> State:
    """The state at step 0: random parameters, under those of `init_from` where it has them."""

    def make(key, loaded: Params) -> State:
        params = init_params(config.model, key)
        params = {**params, **loaded}
        return State(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    loaded: Params = {}
    if config.init_from is not None:
        loaded = _load_initial(config, shardings.params)
    return jax.jit(make, out_shardings=shardings)(jax.random.key(config.seed), loaded)


def _load_initial(config: Config, shardings: Params) -> Params:
    assert config.init_from is not None
    folder = model_folder(config.init_from)
    from jaxlab.checkpoints.native import load_model_config

    theirs = load_model_config(folder)
    has = abstract_params(theirs)
    _, params, _ = load_model(folder, shardings={name: shardings[name] for name in has}, dtype=jnp.float32)
    return params


def _evaluate(
    evaluate, params: Params, source: Source, config: Config, place, split: str
) -> dict[str, float]:
    """Loss, perplexity and exact match over at most `eval_batches` batches of a held-out split."""
    sums: dict[str, float] = {}
    for batch in source.held_out_batches(config.batch_size, config.eval_batches, split):
        for name, value in evaluate(params, place(batch)).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    if not sums:
        raise UserError(
            f"the {split} split holds no full batch of {config.batch_size}; lower batch_size or give more data"
        )
    loss = sums["loss"] / max(sums["targets"], 1.0)
    return {"eval_loss": loss, "eval_exact_match": sums["matches"] / sums["rows"]}

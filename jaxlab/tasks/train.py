"""Task `train`: language models, vision-language models, fine-tuned experts and retrofits. Reads top to
bottom."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax.sharding import Mesh
from tqdm import tqdm

from jaxlab.app import Run, model_folder, read_metrics, train_inputs
from jaxlab.checkpoints import open_model, save_model
from jaxlab.costs import attended_tokens, bytes_per_device, compiled_memory, peak_flops, train_flops_per_token
from jaxlab.data import Source, check_all_tokens, check_fits, first_held_out, make_source
from jaxlab.errors import UserError
from jaxlab.losses import evaluate_step
from jaxlab.models import (
    Batch,
    Params,
    batch_shardings,
    check_batch,
    count_params,
    make_mesh,
    on_mesh,
    place_batch,
)
from jaxlab.retrofit import describe_retrofit, mean_loss, measure_retrofit
from jaxlab.training import (
    Initial,
    State,
    Stopwatch,
    TrainConfig,
    abstract_state,
    find_initial,
    init_state,
    make_optimizer,
    make_schedule,
    read_initial,
    state_shardings,
    train_step,
)

Config = TrainConfig


def inputs(config: Config) -> dict[str, str]:
    """What the run depends on besides its config."""
    return train_inputs(config)


def check(config: Config) -> dict[str, Any]:
    """What `--check` reports: every check that a run makes first, and the memory of a step on each device.

    The step is compiled for shapes alone: no parameter is read or made.
    """
    setup = prepare(config)
    state = jax.tree.map(_place, abstract_state(config.model, setup.optimizer), setup.shardings)
    batch = jax.tree.map(_place, setup.batch, batch_shardings(setup.batch, setup.mesh))
    return {
        **({"retrofit_of": str(setup.initial.folder)} if setup.initial.dense else {}),
        "parameters": count_params(state.params),
        "tokens_per_step": int(setup.batch["tokens"].size),
        "devices": dict(setup.mesh.shape),
        "bytes_per_device": {
            "parameters": bytes_per_device(state.params),
            "optimizer": bytes_per_device(state.optimizer),
            **compiled_memory(setup.update, state, batch),
        },
    }


def run(config: Config, run: Run) -> dict[str, Any]:
    setup = prepare(config)
    source, model = setup.source, config.model
    schedule = make_schedule(config.optimizer, config.steps)

    # State: made or read where it will live, or the newest checkpoint of this run.
    checkpoints = ocp.CheckpointManager(
        (run.path / "checkpoints").absolute(), options=ocp.CheckpointManagerOptions(max_to_keep=2)
    )
    start = checkpoints.latest_step() or 0
    # Metrics are numbered by the steps done: those of step `start` stay.
    run.rewind(start + 1 if start else 0)
    dense = setup.initial.dense
    if start:
        target = jax.tree.map(_place, abstract_state(model, setup.optimizer), setup.shardings)
        state = checkpoints.restore(start, args=ocp.args.StandardRestore(target))
        print(f"resuming at step {start} of {config.steps}")
    else:
        loaded = read_initial(setup.initial, model, setup.mesh)
        state = init_state(
            model,
            setup.optimizer,
            config.seed,
            setup.shardings,
            loaded,
            dense=dense,
            gate=config.retrofit_gate,
        )
        if dense is not None:
            dense_params = {**state.params, **loaded}
            measure = on_mesh(measure_retrofit, setup.mesh)
            found = measure(dense_params, dense, state.params, model, _held_out(setup))
            run.log(step=0, retrofit=found)
            print(f"retrofit of the dense model {setup.initial.folder}: {describe_retrofit(found)}")
            del dense_params
        del loaded

    batch_size, length = setup.batch["tokens"].shape
    tokens = batch_size * length
    flops = train_flops_per_token(model, length) * tokens
    peak, peak_source = peak_flops(list(setup.mesh.devices.flat))
    watch = Stopwatch()
    with tqdm(total=config.steps, initial=start, desc=f"train {run.name}", unit="step") as bar:
        for done in range(start + 1, config.steps + 1):
            batch = place_batch(source.batch(config.seed, done - 1, config.batch_size), setup.mesh)
            state, metrics = setup.update(state, batch)
            bar.update()
            watch.step()
            if done == start + 1:  # the first step compiles: it is not part of any speed
                jax.block_until_ready(state)
                watch.restart()
            if done % config.log_every == 0 or done == config.steps:
                values = {name: float(value) for name, value in metrics.items()}
                if not np.isfinite(values["loss"]):
                    raise UserError(
                        f"the loss is {values['loss']} at step {done}; lower optimizer.learning_rate"
                    )
                values["learning_rate"] = float(schedule(done - 1))
                seconds = watch.read()
                if seconds is not None:
                    values |= {"tokens_per_second": tokens / seconds, "mfu": flops / seconds / peak}
                run.log(step=done, **values)
                bar.set_postfix(loss=f"{values['loss']:.3f}")
            if done < config.steps and done % config.eval_every == 0:
                run.log(step=done, **_evaluate(setup, state.params, config, "validation"))
                watch.restart()
            if done < config.steps and done % config.checkpoint_every == 0:
                checkpoints.save(done, args=ocp.args.StandardSave(state))
                watch.restart()
    checkpoints.close()

    held_out = {split: _evaluate(setup, state.params, config, split) for split in ("validation", "test")}
    run.log(step=config.steps, **held_out["validation"])
    save_model(run.path / "model", model, state.params, source.tokenizer(), overwrite=True)
    median = float(np.median(watch.stretches)) if watch.stretches else None
    return {
        "model": "model",
        "parameters": count_params(state.params),
        "steps": config.steps,
        "tokens_per_step": tokens,
        **held_out,
        **({} if dense is None else {"retrofit": _retrofit(setup, state.params, run)}),
        "seconds_per_step": median,
        "tokens_per_second": None if median is None else tokens / median,
        "mfu": None if median is None else flops / median / peak,
        "mfu_of": peak_source,
        "attended_tokens": attended_tokens(model, length),
    }


class Setup(NamedTuple):
    """What is known before there are parameters."""

    mesh: Mesh
    source: Source
    batch: dict[str, np.ndarray]
    """The first one, for its shapes."""
    initial: Initial
    optimizer: optax.GradientTransformation
    shardings: State
    update: Callable[[State, Batch], tuple[State, dict[str, Any]]]
    """One training step, jitted; it takes over its state's memory."""
    evaluate: Callable[[Params, Batch], dict[str, Any]]
    """Sums over a held-out batch, jitted."""


def prepare(config: Config) -> Setup:
    """Every check that needs no parameters, and the two jitted functions.

    Raises:
      UserError: mesh, data, model and initial model do not fit together.
    """
    mesh = make_mesh(config.mesh)
    source = make_source(config.data, model_folder)
    check_all_tokens(source, config.model)
    batch = source.batch(config.seed, 0, config.batch_size)
    for seen in (
        batch,
        *(first_held_out(source, config.batch_size, split) for split in ("validation", "test")),
    ):
        check_fits(seen, config.model)
        check_batch(len(seen["tokens"]) // config.accumulation, seen["tokens"].shape[1], config.model, mesh)
    initial = (
        Initial()
        if config.init_from is None
        else find_initial(open_model(model_folder(config.init_from)), config.model, source)
    )
    optimizer = make_optimizer(config.optimizer, config.model, config.steps)
    shardings = state_shardings(config.model, optimizer, mesh)
    step = functools.partial(
        train_step, config=config.model, optimizer=optimizer, accumulation=config.accumulation
    )
    update = jax.jit(on_mesh(step, mesh), donate_argnums=0, out_shardings=(shardings, None))
    evaluate = jax.jit(on_mesh(functools.partial(evaluate_step, config=config.model), mesh))
    return Setup(mesh, source, batch, initial, optimizer, shardings, update, evaluate)


def _place(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _held_out(setup: Setup) -> Batch:
    """The first validation batch, on the devices."""
    batch = first_held_out(setup.source, len(setup.batch["tokens"]), "validation")
    return place_batch(batch, setup.mesh)


def _retrofit(setup: Setup, params: Params, run: Run) -> dict[str, Any]:
    """What was measured before the first step, and the loss of the trained model on the same batch."""
    before = read_metrics(run.path)[0]["retrofit"]
    trained = mean_loss(setup.evaluate(params, _held_out(setup)))
    return {**before, "loss": {**before["loss"], "trained": trained}}


def _evaluate(setup: Setup, params: Params, config: Config, split: str) -> dict[str, float]:
    """Loss and exact match over at most `eval_batches` batches of a held-out split."""
    sums: dict[str, float] = {}
    for batch in setup.source.held_out_batches(config.batch_size, config.eval_batches, split):
        for name, value in setup.evaluate(params, place_batch(batch, setup.mesh)).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    return {
        "eval_loss": sums["loss"] / max(sums["targets"], 1.0),
        "eval_exact_match": sums["matches"] / sums["rows"],
    }

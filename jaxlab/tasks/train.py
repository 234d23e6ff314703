"""Task `train`: language models, vision-language models, fine-tuned experts and retrofits. Reads top to
bottom."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from tqdm import tqdm

from jaxlab.app import Run, model_folder, read_metrics, save_first, train_inputs
from jaxlab.checkpoints import open_model, save_model
from jaxlab.costs import attended_tokens, bytes_per_device, compiled_memory, peak_flops, train_flops_per_token
from jaxlab.data import (
    Source,
    batch_shapes,
    check_all_tokens,
    check_fits,
    first_held_out,
    make_source,
)
from jaxlab.errors import UserError
from jaxlab.losses import evaluate_step
from jaxlab.models import (
    Batch,
    ModelConfig,
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
    MOST,
    Checkpoints,
    Initial,
    Rollbacks,
    State,
    Stopwatch,
    TrainConfig,
    abstract_state,
    find_initial,
    init_state,
    make_optimizer,
    make_schedule,
    read_initial,
    skip_spikes,
    skipped,
    state_shardings,
    train_step,
)

Config = TrainConfig

MOST_BYTES = 1 << 50
"""Of what is refused at once as a mistake: a pebibyte."""
SHOWN = (
    "loss",
    "validation.eval_loss",
    "test.eval_loss",
    "test.eval_exact_match",
    "steps",
    "parameters",
    "tokens_per_second",
    "mfu",
)
"""What the last line of a run shows."""


def inputs(config: Config) -> dict[str, str]:
    """What the run depends on besides its config."""
    return train_inputs(config)


def check(config: Config) -> dict[str, Any]:
    """What `--check` reports: every check that a run makes first, and the memory of a step on each device.

    The step is compiled for shapes alone: no parameter is read or made.
    """
    setup = prepare(config, for_shapes=True)
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
    model = config.model
    schedule = make_schedule(config.optimizer, config.steps)
    rollbacks = Rollbacks(run.path / "rollbacks.json")
    checkpoints = Checkpoints(run.path / "checkpoints")
    start, state = _newest_state(setup, config, checkpoints, run)
    if start:
        print(f"resuming at step {start} of {config.steps}")

    batch_size, length = setup.batch["tokens"].shape
    tokens = batch_size * length
    flops = train_flops_per_token(model, length) * tokens
    peak, peak_source = peak_flops(list(setup.mesh.devices.flat))
    watch = Stopwatch()
    held_out: dict[str, dict[str, float]] = {}
    done = start
    with (
        tqdm(total=config.steps, initial=start, desc=f"train {run.name}", unit="step") as bar,
        save_first() as stop,
    ):
        while done < config.steps:
            number = rollbacks.batch_of(done)
            batch = place_batch(setup.source.batch(config.seed, number, config.batch_size), setup.mesh)
            state, metrics = setup.update(state, batch)
            done += 1
            bar.update(done - bar.n)
            watch.step()
            if not stop.armed:  # the first step compiles: no signal waits for it, no speed has it in
                jax.block_until_ready(state)
                watch.restart()
                stop.armed = True
            last = done == config.steps
            logs = last or done % config.log_every == 0
            stops = stop.asked is not None  # once: a signal that comes later finds the next step
            saves = last or done % config.checkpoint_every == 0 or stops
            if logs or saves:
                values = {name: float(value) for name, value in metrics.items()}
                if _must_go_back(config, state, values["loss"], done, rollbacks, checkpoints):
                    seen_at = done
                    done, state = _newest_state(setup, config, checkpoints, run)
                    rollbacks.add(done, seen_at)
                    run.log(step=done, rollback_from=seen_at)
                    bar.write(f"a spike before step {seen_at}: back to step {done}, on with other batches")
                    watch.restart()
                    continue
            if logs:
                values["learning_rate"] = float(schedule(done - 1))
                if config.spikes.action == "skip":
                    values["skipped_updates"] = skipped(state.optimizer)[0]
                seconds = watch.read()
                if seconds is not None:
                    values |= {"tokens_per_second": tokens / seconds, "mfu": flops / seconds / peak}
                run.log(step=done, **values)
                bar.set_postfix(loss=f"{values['loss']:.3f}")
            if last or done % config.eval_every == 0:
                held_out["validation"] = _evaluate(setup, state.params, config, "validation")
                run.log(step=done, **held_out["validation"])
                watch.restart()
            if saves:
                checkpoints.save(done, state)
                watch.restart()
            if stops:
                stop.end(f"step {done} of {config.steps} is saved")

    for split in ("validation", "test"):
        if split not in held_out:
            held_out[split] = _evaluate(setup, state.params, config, split)
    save_model(run.path / "model", model, state.params, setup.source.tokenizer(), overwrite=True)
    rates = [r["tokens_per_second"] for r in read_metrics(run.path) if r.get("tokens_per_second")]
    rate = float(np.median(rates)) if rates else None
    return {
        "model": "model",
        "parameters": count_params(state.params),
        "steps": config.steps,
        "tokens_per_step": tokens,
        "loss": _last_loss(run),
        **held_out,
        **({} if setup.initial.dense is None else {"retrofit": _retrofit(setup, state.params, run)}),
        **({} if config.spikes.action == "stop" else {"skipped_updates": skipped(state.optimizer)[0]}),
        **({"rollbacks": len(rollbacks.made)} if config.spikes.action == "rollback" else {}),
        "seconds_per_step": None if rate is None else tokens / rate,
        "tokens_per_second": rate,
        "mfu": None if rate is None else flops * rate / tokens / peak,
        "mfu_of": peak_source,
        "attended_tokens": attended_tokens(model, length),
    }


class Setup(NamedTuple):
    """What is known before there are parameters."""

    mesh: Mesh
    source: Source
    batch: dict[str, jax.ShapeDtypeStruct]
    """Its shapes."""
    initial: Initial
    optimizer: optax.GradientTransformation
    shardings: State
    update: Callable[[State, Batch], tuple[State, dict[str, Any]]]
    """One training step, jitted; it takes over its state's memory."""
    evaluate: Callable[[Params, Batch], dict[str, Any]]
    """Sums over a held-out batch, jitted."""


def prepare(config: Config, *, for_shapes: bool = False) -> Setup:
    """Every check that needs no parameters, and the two jitted functions.

    Args:
      for_shapes: make none of the data, if it is not there yet.

    Raises:
      UserError: mesh, data, model and initial model do not fit together.
    """
    mesh = make_mesh(config.mesh)
    source = make_source(config.data, model_folder, for_shapes=for_shapes)
    check_all_tokens(source, config.model)
    batch = batch_shapes(source, config.batch_size)
    for seen in (
        batch,
        *(batch_shapes(source, config.batch_size, split) for split in ("validation", "test")),
    ):
        rows, length = seen["tokens"].shape
        if rows * length > MOST:
            raise UserError(
                f"{rows} sequences of {length} tokens are more than an int32 counts; lower batch_size"
            )
        check_fits(seen, config.model)
        check_batch(rows // config.accumulation, length, config.model, mesh)
    initial = (
        Initial()
        if config.init_from is None
        else find_initial(open_model(model_folder(config.init_from)), config.model, source)
    )
    optimizer = make_optimizer(config.optimizer, config.model, config.steps)
    if config.spikes.action != "stop":
        optimizer = skip_spikes(optimizer, config.spikes)
    _check_size(abstract_state(config.model, optimizer), batch, config.model)
    shardings = state_shardings(config.model, optimizer, mesh)
    step = functools.partial(
        train_step, config=config.model, optimizer=optimizer, accumulation=config.accumulation
    )
    update = jax.jit(on_mesh(step, mesh), donate_argnums=0, out_shardings=(shardings, None))
    evaluate = jax.jit(on_mesh(functools.partial(evaluate_step, config=config.model), mesh))
    return Setup(mesh, source, batch, initial, optimizer, shardings, update, evaluate)


def _check_size(state: State, batch: Mapping[str, jax.ShapeDtypeStruct], model: ModelConfig) -> None:
    """Refuses what no machine holds, before a compiler's own sizes overflow.

    Raises:
      UserError: the state or the activations of one layer, or the logits, are larger than that.
    """
    state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    rows, length = batch["tokens"].shape
    widest = 4 * rows * length * max(model.width, model.mlp_width, model.vocab_size)
    for what, size, keys in (
        ("parameters and optimizer", state_bytes, "the model's sizes"),
        ("the widest activation of a batch", widest, "batch_size or the model's sizes"),
    ):
        if size > MOST_BYTES:
            raise UserError(f"{what} would take {size:.3g} bytes, more than any machine has; lower {keys}")


def _place(x: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _newest_state(setup: Setup, config: Config, checkpoints: Checkpoints, run: Run) -> tuple[int, State]:
    """(steps done, state) of the newest whole checkpoint, or of the beginning, made or read where it will
    live. Metrics of later steps are dropped."""
    target = jax.tree.map(_place, abstract_state(config.model, setup.optimizer), setup.shardings)
    found = checkpoints.restore(target)
    # Metrics are numbered by the steps done: those of that step stay.
    run.rewind(found[0] + 1 if found else 0)
    return found or (0, _first_state(setup, config, run))


def _first_state(setup: Setup, config: Config, run: Run) -> State:
    """The state before the first step; what a retrofit does to the model is measured."""
    loaded = read_initial(setup.initial, config.model, setup.mesh)
    dense = setup.initial.dense
    state = init_state(
        config.model,
        setup.optimizer,
        config.seed,
        setup.shardings,
        loaded,
        dense=dense,
        gate=config.retrofit_gate,
    )
    if dense is not None:
        measure = on_mesh(measure_retrofit, setup.mesh)
        found = measure({**state.params, **loaded}, dense, state.params, config.model, _held_out(setup))
        run.log(step=0, retrofit=found)
        print(f"retrofit of the dense model {setup.initial.folder}: {describe_retrofit(found)}")
    return state


def _must_go_back(
    config: Config, state: State, loss: float, done: int, rollbacks: Rollbacks, checkpoints: Checkpoints
) -> bool:
    """Whether the run goes back to a checkpoint because of a spike.

    Raises:
      UserError: the loss is not finite and nothing was asked to be done then, or it does not help.
    """
    spikes = config.spikes
    remedy = f"lower optimizer.learning_rate; {checkpoints.describe_newest()}"
    if spikes.action == "stop":
        if not np.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {done}; set spikes.action to skip or rollback, or {remedy}"
            )
        return False
    total, in_a_row = skipped(state.optimizer)
    if in_a_row >= spikes.most:
        raise UserError(f"the last {in_a_row} updates up to step {done} were spikes and left out; {remedy}")
    if spikes.action == "skip" or not total:
        return False
    if len(rollbacks.made) >= spikes.most:
        raise UserError(f"a spike before step {done}, after {spikes.most} rollbacks; {remedy}")
    return True


def _last_loss(run: Run) -> float | None:
    """The training loss that was logged last."""
    return next((r["loss"] for r in reversed(read_metrics(run.path)) if "loss" in r), None)


def _held_out(setup: Setup) -> Batch:
    """The first validation batch, on the devices."""
    batch = first_held_out(setup.source, setup.batch["tokens"].shape[0], "validation")
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

"""Task `train`: language models, vision-language models, fine-tuned experts and retrofits. Reads top to
bottom."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlab.app import Run, checkpoints_of, model_folder, save_first, train_inputs
from jaxlab.checkpoints import open_model
from jaxlab.config import to_dict
from jaxlab.data import (
    batch_shapes,
    check_all_tokens,
    check_fits,
    first_held_out,
    make_source,
)
from jaxlab.distributed import compile_together, is_main
from jaxlab.errors import UserError
from jaxlab.losses import evaluate_step
from jaxlab.models import (
    Batch,
    ModelConfig,
    Params,
    check_batch,
    make_mesh,
    on_mesh,
    param_shardings,
    place_batch,
)
from jaxlab.retrofit import describe_retrofit, mean_loss, measure_retrofit
from jaxlab.training import (
    MOST,
    Callback,
    Checkpoints,
    Evaluate,
    EvaluateHeldOut,
    GuardSpikes,
    Initial,
    LogMetrics,
    Loop,
    SaveCheckpoints,
    SaveModel,
    Setup,
    ShowProgress,
    State,
    TraceSteps,
    TrainConfig,
    WriteSamples,
    WriteTensorBoard,
    WriteWandb,
    abstract_state,
    check_trackers,
    estimate_run,
    estimate_table,
    find_initial,
    find_trainable,
    fit,
    groups_of,
    init_frozen,
    init_state,
    is_frozen,
    make_host_devices,
    make_optimizer,
    read_initial,
    restore_newest,
    skip_spikes,
    state_shardings,
    train_step,
    with_initial_model,
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
    """What `--check` reports: every check that a run makes first, and what a step takes and exchanges on each
    device of the mesh, which need not be here.

    The step is compiled for shapes alone: no parameter is read or made.
    """
    make_host_devices(config.mesh)
    config, setup = prepare(config, for_shapes=True)
    make_callbacks(config, setup, for_shapes=True)  # which fit, or say so
    state = jax.tree.map(_place, abstract_state(setup.trainable, setup.optimizer), setup.shardings)
    found = estimate_run(
        config.estimate,
        setup.update,
        state,
        setup.batch,
        setup.mesh,
        config.model,
        config.steps,
        frozen=_abstract_frozen(setup, config),
    )
    return {**({"retrofit_of": str(setup.initial.folder)} if setup.initial.dense else {}), **found}


check_table = estimate_table
"""What `--check` shows to people."""


def run(config: Config, run: Run, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    config, setup = prepare(config)
    around = make_callbacks(config, setup, callbacks)
    checkpoints = Checkpoints(run.path / "checkpoints", config.keep)
    restore = lambda: _newest_state(setup, config, checkpoints, run)
    with save_first() as stop:
        loop = Loop(config, setup, run, checkpoints, restore, stop, _frozen(setup, config))
        if loop.done:
            print(f"resuming at step {loop.done} of {config.steps}")
        results = fit(loop, around)
    if setup.initial.dense is not None:
        results |= _retrofit(setup, loop.whole(loop.state.params), run)
    return results


def make_callbacks(
    config: Config, setup: Setup, more: Sequence[Callback] = (), *, for_shapes: bool = False
) -> list[Callback]:
    """What happens around the steps of a run, in this order; `more` sees what was measured, and what it does
    to the state is saved.

    Args:
      for_shapes: make none of the data, if it is not there yet.

    Raises:
      UserError: a package is missing, or an evaluation, a prompt or an export does not fit the model.
    """
    check_trackers(tensorboard=config.tensorboard, wandb=config.wandb)
    trackers: list[Callback] = []
    if config.tensorboard and is_main():
        trackers.append(WriteTensorBoard())
    if config.wandb is not None and is_main():
        trackers.append(WriteWandb(config.wandb, to_dict(config)))
    find = functools.partial(make_source, find_model=model_folder, for_shapes=for_shapes)
    following = [
        LogMetrics(config.log_every),
        ShowProgress(config.log_every),
        EvaluateHeldOut(config.eval_every, config.eval_batches),
        *(Evaluate(one, config, setup, find) for one in config.evaluations),
        *([WriteSamples(config.samples, config, setup)] if config.samples else []),
        *more,
        SaveCheckpoints(config.checkpoint_every, in_background=config.checkpoint_in_background),
        SaveModel(config, setup),
        *([TraceSteps(*config.profile)] if config.profile else []),
    ]
    return [*trackers, GuardSpikes(config.spikes, following), *following]


def prepare(config: Config, *, for_shapes: bool = False) -> tuple[Config, Setup]:
    """Every check that needs no parameters, and the two jitted functions; the config with the model that it
    is for.

    Args:
      for_shapes: make none of the data, if it is not there yet.

    Raises:
      UserError: mesh, data, model and initial model do not fit together.
    """
    opened = None if config.init_from is None else open_model(model_folder(config.init_from))
    if opened is not None and config.model_is_initial:
        config = with_initial_model(config, opened.config)
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
        check_fits(seen, config.model, source)
        check_batch(rows // config.accumulation, length, config.model, mesh)
    initial = Initial() if opened is None else find_initial(opened, config.model, source)
    frozen = functools.partial(is_frozen, config.optimizer)
    trainable = find_trainable(config.model, config.lora, frozen)
    optimizer = make_optimizer(
        groups_of(config.optimizer, trainable.names, trainable.frozen_names),
        config.model,
        config.steps,
        shapes=trainable.abstract(),
        axes=trainable.axes(),
    )
    if config.spikes.action != "stop":
        optimizer = skip_spikes(optimizer, config.spikes)
    _check_size(abstract_state(trainable, optimizer), batch, config.model)
    shardings = state_shardings(trainable, optimizer, mesh)
    one_step = functools.partial(
        train_step,
        config=config.model,
        optimizer=optimizer,
        accumulation=config.accumulation,
        loss=config.loss,
        sources=len(source.source_names) if "source_ids" in batch else 0,
        seed=config.seed,
    )

    def step(state: State, frozen: Params, batch: Batch) -> tuple[State, dict[str, Any]]:
        join = None if trainable.everything else lambda trained, key: trainable.join(trained, frozen, key)
        return one_step(state, batch, join=join)

    update = compile_together(jax.jit(on_mesh(step, mesh), donate_argnums=0, out_shardings=(shardings, None)))
    evaluate = compile_together(jax.jit(on_mesh(functools.partial(evaluate_step, config=config.model), mesh)))
    return config, Setup(mesh, source, batch, initial, trainable, optimizer, shardings, update, evaluate)


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
    """(steps done, state) of the newest whole checkpoint, of the run's own or of the one that it goes on
    from, or of the beginning, made or read where it will live. Metrics of later steps are dropped."""
    target = jax.tree.map(_place, abstract_state(setup.trainable, setup.optimizer), setup.shardings)
    found = checkpoints.restore(target)
    # Metrics are numbered by the steps done: those of that step stay.
    run.rewind(found[0] + 1 if found else 0)
    if found is not None:
        return found
    if config.continue_from is None:
        return 0, _first_state(setup, config, run)
    before = checkpoints_of(config.continue_from)
    found = restore_newest(before, target)
    if found is None:
        raise UserError(f"{before}: no checkpoint is whole; see the notes above")
    if found[0] >= config.steps:
        raise UserError(f"{before}: it is at step {found[0]} already; raise steps, which are {config.steps}")
    return found


def _first_state(setup: Setup, config: Config, run: Run) -> State:
    """The state before the first step; what a retrofit does to the model is measured."""
    dense = setup.initial.dense
    adapters_alone = not setup.trainable.whole and dense is None  # these follow from no tensor
    loaded = {} if adapters_alone else read_initial(setup.initial, config.model, setup.mesh)
    state = init_state(
        setup.trainable,
        setup.optimizer,
        config.seed,
        setup.shardings,
        loaded,
        dense=dense,
        gate=config.retrofit_gate,
    )
    if dense is not None:
        measure = on_mesh(measure_retrofit, setup.mesh)
        params = setup.trainable.join(state.params, _frozen(setup, config))
        found = measure({**params, **loaded}, dense, params, config.model, _held_out(setup))
        run.log(step=0, retrofit=found)
        print(f"retrofit of the dense model {setup.initial.folder}: {describe_retrofit(found)}")
    return state


def _frozen(setup: Setup, config: Config) -> Params:
    """The parameters that are not trained, read or made where they live."""
    if setup.trainable.everything:
        return {}
    dtype = jnp.dtype(config.frozen_dtype)
    loaded = read_initial(setup.initial, config.model, setup.mesh, dtype)
    return init_frozen(
        setup.trainable,
        config.seed,
        setup.mesh,
        loaded,
        dtype=dtype,
        dense=setup.initial.dense,
        gate=config.retrofit_gate,
    )


def _abstract_frozen(setup: Setup, config: Config) -> Params:
    """Shapes, dtypes and places of these."""
    trainable = setup.trainable
    if trainable.everything:
        return {}
    shapes, dtype = trainable.frozen(trainable.shapes), jnp.dtype(config.frozen_dtype)
    place = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding)
    return jax.tree.map(place, shapes, trainable.frozen(param_shardings(config.model, setup.mesh)))


def _held_out(setup: Setup) -> Batch:
    """The first validation batch, on the devices."""
    batch = first_held_out(setup.source, setup.batch["tokens"].shape[0], "validation")
    return place_batch(batch, setup.mesh)


def _retrofit(setup: Setup, params: Params, run: Run) -> dict[str, Any]:
    """What was measured before the first step, and the loss of the trained model on the same batch; nothing
    where the line of metrics that told it is damaged."""
    before = next((r["retrofit"] for r in run.records() if "retrofit" in r), None)
    trained = mean_loss(setup.evaluate(params, _held_out(setup)))
    if before is None:
        return {}
    return {"retrofit": {**before, "loss": {**before["loss"], "trained": trained}}}

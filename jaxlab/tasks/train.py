"""Task `train`: language models, vision-language models, fine-tuned experts and retrofits. Reads top to
bottom."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxlab.app import Run, model_folder, save_first, train_inputs
from jaxlab.checkpoints import open_model
from jaxlab.data import (
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
    check_batch,
    make_mesh,
    on_mesh,
    place_batch,
)
from jaxlab.retrofit import describe_retrofit, mean_loss, measure_retrofit
from jaxlab.training import (
    MOST,
    Callback,
    Checkpoints,
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
    TrainConfig,
    abstract_state,
    estimate_run,
    estimate_table,
    find_initial,
    fit,
    init_state,
    make_host_devices,
    make_optimizer,
    read_initial,
    skip_spikes,
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
    """What `--check` reports: every check that a run makes first, and what a step takes and exchanges on each
    device of the mesh, which need not be here.

    The step is compiled for shapes alone: no parameter is read or made.
    """
    make_host_devices(config.mesh)
    setup, model = prepare(config, for_shapes=True), config.model
    state = jax.tree.map(_place, abstract_state(model, setup.optimizer), setup.shardings)
    found = estimate_run(config.estimate, setup.update, state, setup.batch, setup.mesh, model, config.steps)
    return {**({"retrofit_of": str(setup.initial.folder)} if setup.initial.dense else {}), **found}


check_table = estimate_table
"""What `--check` shows to people."""


def run(config: Config, run: Run, callbacks: Sequence[Callback] = ()) -> dict[str, Any]:
    setup = prepare(config)
    checkpoints = Checkpoints(run.path / "checkpoints", config.keep)
    restore = lambda: _newest_state(setup, config, checkpoints, run)
    with save_first() as stop:
        loop = Loop(config, setup, run, checkpoints, restore, stop)
        if loop.done:
            print(f"resuming at step {loop.done} of {config.steps}")
        results = fit(loop, make_callbacks(config, callbacks))
    if setup.initial.dense is not None:
        results["retrofit"] = _retrofit(setup, loop.state.params, run)
    return results


def make_callbacks(config: Config, more: Sequence[Callback] = ()) -> list[Callback]:
    """What happens around the steps of a run, in this order; `more` sees what was measured, and what it does
    to the state is saved."""
    following = [
        LogMetrics(config.log_every),
        ShowProgress(config.log_every),
        EvaluateHeldOut(config.eval_every, config.eval_batches),
        *more,
        SaveCheckpoints(config.checkpoint_every, in_background=config.checkpoint_in_background),
        SaveModel(),
    ]
    return [GuardSpikes(config.spikes, following), *following]


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
        train_step,
        config=config.model,
        optimizer=optimizer,
        accumulation=config.accumulation,
        loss=config.loss,
        sources=len(source.source_names) if "source_ids" in batch else 0,
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


def _held_out(setup: Setup) -> Batch:
    """The first validation batch, on the devices."""
    batch = first_held_out(setup.source, setup.batch["tokens"].shape[0], "validation")
    return place_batch(batch, setup.mesh)


def _retrofit(setup: Setup, params: Params, run: Run) -> dict[str, Any]:
    """What was measured before the first step, and the loss of the trained model on the same batch."""
    before = run.records()[0]["retrofit"]
    trained = mean_loss(setup.evaluate(params, _held_out(setup)))
    return {**before, "loss": {**before["loss"], "trained": trained}}

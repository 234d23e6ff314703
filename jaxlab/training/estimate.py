"""What a training run will cost, from its step compiled for shapes alone: nothing is allocated or run."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from jaxlab.costs import (
    PEAK_FLOPS,
    by_kind,
    bytes_per_device,
    peak_flops,
    planned_memory,
    read_collectives,
    train_flops_per_token,
)
from jaxlab.errors import ConfigError, UserError
from jaxlab.models import MeshConfig, ModelConfig, Params, abstract_params, batch_shardings, count_params
from jaxlab.training.step import State

MOST_DEVICES = 1 << 12
"""Host devices that are made to compile for."""


@dataclass(frozen=True)
class EstimateConfig:
    """What `--check` takes for the speed of the devices."""

    mfu: float = 0.4
    """Model FLOPs utilisation that the expected times are stated at: 0.4 is what well-tuned dense models
    reach on clusters; nothing here measures it."""
    device: Literal["auto", "A100", "H100", "H200"] = "auto"
    """Whose peak it is a part of; auto: the devices at hand, a CPU's by a product that is timed."""

    def __post_init__(self) -> None:
        if not 0 < self.mfu <= 1:
            raise ConfigError(f"must be above 0 and at most 1, is {self.mfu}", key="mfu")


def make_host_devices(mesh: MeshConfig) -> None:
    """Makes as many devices of the host as a mesh names, where jax computes on the CPU and has not started
    yet: what is only compiled needs no others. A mesh that takes the rest (-1) is one of those at hand.

    Raises:
      UserError: it names more than can be had.
    """
    number = math.prod(dataclasses.asdict(mesh).values())
    if number < 2:
        return
    if number <= MOST_DEVICES:
        with contextlib.suppress(RuntimeError):  # it has started
            jax.config.update("jax_num_cpu_devices", number)
    here = jax.devices()
    if number > len(here):
        raise UserError(
            f"mesh needs {number} devices, {len(here)} of {here[0].platform} are here; --check compiles for "
            f"up to {MOST_DEVICES} devices with JAX_PLATFORMS=cpu in the environment"
        )


def estimate_run(
    config: EstimateConfig,
    update: Callable[..., Any],
    state: State,
    batch: Mapping[str, Any],
    mesh: Mesh,
    model: ModelConfig,
    steps: int,
    frozen: Params | None = None,
) -> dict[str, Any]:
    """Parameters, bytes of each device, what a step exchanges, its FLOPs, and how long a run takes at a
    stated utilisation. The step is compiled, and nothing else is done.

    Args:
      update: one jitted step, of state, what is frozen, and batch.
      state: shapes, dtypes and shardings.
      batch: shapes.
      frozen: shapes, dtypes and shardings of the parameters that are not trained.
    """
    place = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
    placed = jax.tree.map(place, dict(batch), batch_shardings(batch, mesh))
    frozen = frozen or {}
    compiled = update.lower(state, frozen, placed).compile()  # type: ignore[attr-defined]
    rows, length = batch["tokens"].shape
    tokens, devices = rows * length, mesh.size
    flops = train_flops_per_token(model, length) * tokens
    if config.device == "auto":
        peak, source = peak_flops(list(mesh.devices.flat))
    else:
        peak, source = PEAK_FLOPS[config.device] * devices, f"data sheet of {config.device}, bf16"
    seconds = flops / (peak * config.mfu)
    exchanged = by_kind(read_collectives(compiled.as_text(), mesh))
    return {
        "parameters": count_params(abstract_params(model)),
        **({"trained_parameters": count_params(state.params)} if frozen else {}),
        "tokens_per_step": tokens,
        "devices": dict(mesh.shape),
        "bytes_per_device": {
            "parameters": bytes_per_device(state.params) + bytes_per_device(frozen),
            "optimizer": bytes_per_device(state.optimizer),
            **planned_memory(compiled),
        },
        "compiled_for": f"{devices} of {mesh.devices.flat[0].device_kind}",
        "collectives_per_step": exchanged,
        "collective_bytes_per_step": sum(row["bytes"] for row in exchanged),
        "flops_per_step": flops,
        "expected": {
            "mfu": config.mfu,
            "peak_flops": peak,
            "peak_of": source,
            "seconds_per_step": seconds,
            "tokens_per_second": tokens / seconds,
            "seconds": seconds * steps,
        },
    }


def estimate_table(report: Mapping[str, Any]) -> str:
    """What `estimate_run` found, for people."""
    sizes, expected = report["bytes_per_device"], report["expected"]
    axes = {name: size for name, size in report["devices"].items() if size > 1}
    mesh = " x ".join(f"{name} {size}" for name, size in axes.items()) or "one device"
    trained = report.get("trained_parameters")
    of_these = "" if trained is None else f", {_short(trained)}of them trained"
    lines = [
        f"parameters        {_short(report['parameters']).rstrip()}{of_these}",
        f"tokens a step     {report['tokens_per_step']:,}",
        f"mesh              {mesh}, compiled for {report['compiled_for']}",
        "on each device",
        f"  parameters      {_short(sizes['parameters'])}B",
        f"  optimizer       {_short(sizes['optimizer'])}B",
        f"  temporary       {_short(sizes['temporary'])}B (activations, gradients, work)",
        f"  in all          {_short(sizes['total'])}B",
        "exchanged by each device in a step",
    ]
    for row in report["collectives_per_step"]:
        times = f"{'at least ' if row.get('at_least') else ''}{row['times']:,} times"
        lines.append(
            f"  {row['kind']:<20}over {row['axes']:<14}{times:>12}  {_short(row['bytes'])}B, the largest "
            f"{_short(row['largest'])}B"
        )
    if not report["collectives_per_step"]:
        lines.append("  nothing")
    lines += [
        f"FLOPs a step      {_short(report['flops_per_step'])}",
        f"expected          {expected['seconds_per_step']:.3g} s a step, {_duration(expected['seconds'])} "
        f"in all, {expected['tokens_per_second']:,.0f} tokens/s",
        f"  at              {expected['mfu']:.0%} of {_short(expected['peak_flops'])}FLOP/s "
        f"({expected['peak_of']}); without evaluations, checkpoints and waits for data",
    ]
    return "\n".join(lines)


def _short(number: int | float) -> str:
    for unit in ("", "k", "M", "G", "T", "P"):
        if number < 1000:
            return f"{number:.3g} {unit}" if unit else f"{number:.3g} "
        number /= 1000
    return f"{number:.3g} E"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"

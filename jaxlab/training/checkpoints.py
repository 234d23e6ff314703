"""Checkpoints of a run under way, in folders named by the steps done: whole or not there, with digests of all
their files, and never of a state that is not finite.

Only the process that holds the run's lock may write here. Of several processes each writes its parts of the
arrays into the folder that process 0 makes, and all read what it finds whole.
"""

import os
import shutil
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlab import distributed
from jaxlab.checkpoints import DIGESTS, find_damage, restore_tree, save_tree
from jaxlab.distributed import compile_together
from jaxlab.errors import ConfigError, UserError, UserNote
from jaxlab.files import writing
from jaxlab.training.step import State

_STATE = "state"


@dataclass(frozen=True)
class KeepConfig:
    """Which checkpoints stay."""

    last: int = 2
    """The newest ones, so many."""
    every: int | None = None
    """Those after every so many steps besides, for good."""
    best: int = 0
    """So many of the lowest validation loss besides, among those at whose step it was measured."""

    def __post_init__(self) -> None:
        for name, least in (("last", 1), ("every", 1), ("best", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"must be at least {least}, is {value}", key=name)


class Checkpoints:
    """The checkpoints in a folder; those of the `keep` policy stay."""

    def __init__(self, folder: Path, keep: KeepConfig = KeepConfig()) -> None:
        """Makes the folder, and removes from it what a writer that was killed has left.

        Raises:
          UserError: it cannot be made or cleared.
        """
        self.folder, self.keep = folder.absolute(), keep
        self._pending: _Writer | None = None
        if distributed.is_main():
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                for path in folder.iterdir():
                    if path.name.startswith(".") and path.name.endswith(".partial"):
                        shutil.rmtree(path)
        distributed.wait_for_all("checkpoints")

    def steps(self) -> list[int]:
        """The steps that have a folder, whole or not, the newest first."""
        return _steps_in(self.folder)

    def save(
        self,
        step: int,
        state: State,
        *,
        losses: Mapping[int, float] | None = None,
        background: bool = False,
    ) -> None:
        """Writes the state after `step` steps, and removes the checkpoints that are not to stay.

        Args:
          losses: validation losses by step, for `keep.best`.
          background: write a copy of the state while training goes on, but of several processes; `wait`,
            `check` or the next call of anything here says what went wrong.

        Raises:
          UserError: the state is not finite, or there is no room for it; or for the one before.
        """
        self.wait()
        if wrong := not_finite(state):
            raise UserError(
                f"{wrong[0]} is not finite after step {step}, which is not saved; lower "
                f"optimizer.learning_rate, or set spikes.action; {self.describe_newest()}"
            )
        if background and jax.process_count() == 1:  # several would meet in the midst of a step
            copy = _detached(state)
            self._pending = _Writer(lambda: self._write(step, copy, losses or {}))
        else:
            self._write(step, state, losses or {})

    def wait(self) -> None:
        """Waits for what is written in the background.

        Raises:
          UserError: it failed.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Says what went wrong in the background, if it has ended; does not wait.

        Raises:
          UserError: it failed.
        """
        if self._pending is not None and not self._pending.is_alive():
            self.wait()

    def _write(self, step: int, state: State, losses: Mapping[int, float]) -> None:
        place, aside = self.folder / str(step), self.folder / f".{step}.partial"
        if not distributed.is_main():
            distributed.wait_for_all("begin")
            save_tree(aside / _STATE, state)
            distributed.wait_for_all("saved")
            return
        shutil.rmtree(aside, ignore_errors=True)
        try:
            with writing(place):
                aside.mkdir()
                distributed.wait_for_all("begin")
                save_tree(aside / _STATE, state)
                _flush(aside)
                self._remove(step)  # a damaged one that was passed by
                aside.rename(place)
                _flush(self.folder)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        distributed.wait_for_all("saved")
        for old in self._superfluous(step, losses):
            self._remove(old)

    def _superfluous(self, step: int, losses: Mapping[int, float]) -> list[int]:
        """Those that the policy does not keep; newer ones, which are damaged, are nobody's business."""
        steps, keep = [old for old in self.steps() if old <= step], self.keep
        stay = set(steps[: keep.last])
        stay |= {old for old in steps if keep.every is not None and old % keep.every == 0}
        measured = sorted((old for old in steps if old in losses), key=lambda old: losses[old])
        return [old for old in steps if old not in stay | set(measured[: keep.best])]

    def restore(self, target: State) -> tuple[int, State] | None:
        """The newest whole checkpoint; see `restore_newest`."""
        self.wait()
        return restore_newest(self.folder, target)

    def _remove(self, step: int) -> None:
        """Removes a checkpoint; a kill on the way leaves nothing that looks like one."""
        place, aside = self.folder / str(step), self.folder / f".{step}.old.partial"
        if place.exists():
            place.rename(aside)
            shutil.rmtree(aside)

    def describe_newest(self) -> str:
        """What there is to go back to, for messages."""
        self.wait()
        steps = self.steps()
        return f"the newest checkpoint is of step {steps[0]}" if steps else "there is no checkpoint"


def restore_newest(folder: Path, target: State) -> tuple[int, State] | None:
    """The newest whole checkpoint in a folder, (steps done, state), or None if there is none; a note says
    which ones are damaged. Nothing is written.

    Args:
      target: shapes, dtypes and shardings of the state.

    Raises:
      UserError: it is whole, and holds another state.
    """
    for step in distributed.share("steps", _steps_in(folder) if distributed.is_main() else None):
        place = folder.absolute() / str(step)
        if damage := find_damage(place / _STATE):
            warnings.warn(f"{place}: damaged, and passed by: {damage}", UserNote, stacklevel=3)
            continue
        return step, restore_tree(place / _STATE, target)
    return None


def newest_digests(folder: Path) -> str:
    """What the newest checkpoint says of its files, which tells it apart from any other; "" without one."""
    for step in _steps_in(folder) if folder.is_dir() else []:
        digests = folder / str(step) / _STATE / DIGESTS
        if digests.is_file():
            return digests.read_text(encoding="utf-8", errors="replace")
    return ""


def _steps_in(folder: Path) -> list[int]:
    names = [path.name for path in folder.iterdir() if path.is_dir()]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


class _Writer(threading.Thread):
    """Work in the background, whose error is raised where its result is asked for."""

    def __init__(self, work: Callable[[], None]) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._work = work
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._error = error

    def result(self) -> None:
        self.join()
        if self._error is not None:
            raise self._error


def _detached(state: State) -> State:
    """A copy that the next step, which takes over the state's memory, leaves alone: in the host's memory
    where the device has another one."""
    on_host = "pinned_host"

    def elsewhere(x: jax.Array) -> jax.sharding.Sharding | None:
        device: Any = next(iter(x.sharding.device_set))
        kinds = {memory.kind for memory in device.addressable_memories()}
        return x.sharding.with_memory_kind(on_host) if device.platform != "cpu" and on_host in kinds else None

    places = [elsewhere(x) for x in jax.tree.leaves(state)]
    if all(place is not None for place in places):
        return jax.device_put(state, jax.tree.unflatten(jax.tree.structure(state), places))
    return _copy(state)


@compile_together
@jax.jit
def _copy(state: State) -> State:
    return jax.tree.map(jnp.copy, state)


def not_finite(tree: Any) -> list[str]:
    """The names of the floating leaves that hold a NaN or an infinity."""
    leaves = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    good = jax.device_get(_are_finite([leaf for _, leaf in leaves]))
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for (path, _), fine in zip(leaves, good, strict=True)
        if not fine
    ]


@compile_together
@jax.jit
def _are_finite(leaves: list[Any]) -> list[Any]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


def _flush(folder: Path) -> None:
    """Waits until the files of a folder, and what it lists, are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Checkpoints of a run under way, in folders named by the steps done: whole or not there, with digests of all
their files, and never of a state that is not finite.

Only the process that holds the run's lock may write here. Of several processes each writes its parts of the
arrays into the folder that process 0 makes, and all read what it finds whole.
"""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlab import distributed
from jaxlab.checkpoints import find_damage, restore_tree, save_tree
from jaxlab.errors import UserError, UserNote
from jaxlab.files import writing
from jaxlab.training.step import State

_STATE = "state"


class Checkpoints:
    """The checkpoints in a folder; the newest `keep` stay."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        """Makes the folder, and removes from it what a writer that was killed has left.

        Raises:
          UserError: it cannot be made or cleared.
        """
        self.folder, self.keep = folder.absolute(), keep
        if distributed.is_main():
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                for path in folder.iterdir():
                    if path.name.startswith(".") and path.name.endswith(".partial"):
                        shutil.rmtree(path)
        distributed.wait_for_all("checkpoints")

    def steps(self) -> list[int]:
        """The steps that have a folder, whole or not, the newest first."""
        names = [path.name for path in self.folder.iterdir() if path.is_dir()]
        return sorted((int(name) for name in names if name.isdecimal()), reverse=True)

    def save(self, step: int, state: State) -> None:
        """Writes the state after `step` steps, and removes the checkpoint that is one too many.

        Raises:
          UserError: the state is not finite, or there is no room for it.
        """
        if wrong := not_finite(state):
            raise UserError(
                f"{wrong[0]} is not finite after step {step}, which is not saved; lower "
                f"optimizer.learning_rate, or set spikes.action; {self.describe_newest()}"
            )
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
        for old in [old for old in self.steps() if old <= step][self.keep :]:
            self._remove(old)

    def restore(self, target: State) -> tuple[int, State] | None:
        """The newest whole checkpoint, (steps done, state), or None if there is none; a note says which ones
        are damaged.

        Args:
          target: shapes, dtypes and shardings of the state.

        Raises:
          UserError: it is whole, and holds another state.
        """
        for step in distributed.share("steps", self.steps() if distributed.is_main() else None):
            place = self.folder / str(step)
            if damage := find_damage(place / _STATE):
                warnings.warn(f"{place}: damaged, and passed by: {damage}", UserNote, stacklevel=2)
                continue
            return step, restore_tree(place / _STATE, target)
        return None

    def _remove(self, step: int) -> None:
        """Removes a checkpoint; a kill on the way leaves nothing that looks like one."""
        place, aside = self.folder / str(step), self.folder / f".{step}.old.partial"
        if place.exists():
            place.rename(aside)
            shutil.rmtree(aside)

    def describe_newest(self) -> str:
        """What there is to go back to, for messages."""
        steps = self.steps()
        return f"the newest checkpoint is of step {steps[0]}" if steps else "there is no checkpoint"


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

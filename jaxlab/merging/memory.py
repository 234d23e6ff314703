"""A plan carried out in memory: tensors by name on the host."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxlab.checkpoints import Tensor
from jaxlab.merging.engine import execute
from jaxlab.merging.plan import Input, MergePlan, dtype_of


class Memory:
    """In place of a folder that is written and taken up again."""

    def __init__(self, plan: MergePlan) -> None:
        self.finished: dict[str, dict[str, Any]] = {}
        self._planned = {tensor.name: tensor for tensor in plan.tensors}
        self._bytes = {t.name: np.empty(t.nbytes, np.uint8) for t in plan.tensors}

    def write(self, name: str, values: np.ndarray, start: int) -> None:
        self._bytes[name][start : start + values.nbytes] = values

    def finish(self, name: str, **record: Any) -> None:
        self.finished[name] = record

    def array(self, name: str) -> np.ndarray:
        planned = self._planned[name]
        count = math.prod(planned.shape)
        return self._bytes[name].view(dtype_of(planned.dtype))[:count].reshape(planned.shape)


def run_in_memory(
    plan: MergePlan, inputs: Sequence[Mapping[str, Tensor] | Input], **options: Any
) -> dict[str, np.ndarray]:
    """The tensors of a plan by name; see `execute` for the options.

    Raises:
      UserError: an input is damaged, or the result is not finite though that is not allowed.
    """
    memory = Memory(plan)
    execute(plan, inputs, memory, hash_inputs="none", **options)
    return {tensor.name: memory.array(tensor.name) for tensor in plan.tensors}

"""Merging of models: task vectors, operators, injection of a language model's skills into a vision-language
model.
"""

from jaxlab.merging.inject import inject
from jaxlab.merging.operators import OPERATORS, Operator, merge_tensors, task_vector
from jaxlab.merging.randomness import tensor_key

__all__ = ["OPERATORS", "Operator", "inject", "merge_tensors", "task_vector", "tensor_key"]

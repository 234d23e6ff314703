"""Merging of models: task vectors, operators, injection of a language model's skills into a vision-language
model, and the search for the weights that show them.
"""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.merging.account import MergeAccount
    from jaxlab.merging.injection import inject
    from jaxlab.merging.merge import merge_models, merge_tensors, task_vector
    from jaxlab.merging.numerics import tensor_key
    from jaxlab.merging.operators import OPERATORS, Operator

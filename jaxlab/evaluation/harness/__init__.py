"""The models that the project reads, for EleutherAI's lm-evaluation-harness (docs/evaluation.md)."""

from etils import epy

with epy.lazy_api_imports(globals()):
    from jaxlab.evaluation.harness.model import HarnessModel

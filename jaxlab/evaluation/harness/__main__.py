"""The harness' own command line, in which `jaxlab` is a model.

python -m jaxlab.evaluation.harness run --model_args pretrained=MODEL --tasks mmlu --num_fewshot 5
"""

import importlib
import sys
from collections.abc import Sequence

from jaxlab.errors import UserError


def main(words: Sequence[str]) -> int:
    """Hands all words to the harness, with `--model jaxlab` where they name no model; exit status."""
    try:
        from lm_eval.__main__ import cli_evaluate

        importlib.import_module("jaxlab.evaluation.harness.model")  # which registers it
    except ImportError as error:
        print(f"error: lm-evaluation-harness: {error}; pip install 'jaxlab[lm-eval]'", file=sys.stderr)
        return 2
    named = any(word.partition("=")[0] in ("--model", "-M") for word in words)
    is_run = bool(words) and words[0] not in ("ls", "validate", "-h", "--help")
    sys.argv = ["lm_eval", *words, *([] if named or not is_run else ["--model", "jaxlab"])]
    try:
        cli_evaluate()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
